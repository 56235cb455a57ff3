// Launches: which CTAs live together, whose turn it is, and what is told when nobody can go on.
#include <algorithm>
#include <atomic>
#include <mutex>
#include <sstream>
#include <thread>

#include "emulator/internal.h"

namespace emu {
namespace {

constexpr size_t kMaxResidentSmem = 8 << 20;
constexpr uint64_t kMaxIdleSpins = 20'000'000;
constexpr int kMaxLines = 40;  // of a report about waiting threads

thread_local Group* t_group = nullptr;
thread_local const std::function<void()>* t_kernel = nullptr;

Thread* pick() {
  Group& g = *t_group;
  while (!g.bulk.empty() && options().async == Async::Random && g.rng() % 8 == 0) land_bulk(g.rng() % g.bulk.size());
  for (;;) {
    const size_t num_ready = g.ready.size() - g.ready_head;
    if (num_ready && options().order == Order::Random) {
      std::swap(g.ready[g.ready_head + g.rng() % num_ready], g.ready.back());
      Thread* t = g.ready.back();
      g.ready.pop_back();
      return t;
    }
    if (num_ready) {
      Thread* t = g.ready[g.ready_head++];
      if (g.ready_head == g.ready.size()) {
        g.ready.clear();
        g.ready_head = 0;
      }
      return t;
    }
    if (g.bulk.empty()) return nullptr;
    land_bulk(0);  // nothing else can move: data lands now
  }
}

void suspend() {  // the caller has set status and queues
  Thread* me = self();
  Thread* next = pick();
  if (next != me) fiber::switch_to(me, next);
}

std::string state(const Thread* t) {
  if (t->status == Thread::Status::Exited) return "exited";
  if (t->status == Thread::Status::Ready) return "runnable";
  std::ostringstream s;
  s << "waiting in " << t->waiting_for << " at " << place(t->where);
  if (t->wait_mask) s << " mask 0x" << std::hex << t->wait_mask;
  return s.str();
}

std::string name(const Block& b) {
  std::ostringstream o;
  o << "block (" << b.idx.x << "," << b.idx.y << "," << b.idx.z << ")";
  return o.str();
}

std::string describe(const Group& g) {  // who waits where, neighbours in the same state together
  std::string text;
  int lines = 0;
  for (size_t i = 0; i < g.threads.size();) {
    const Thread& first = g.threads[i];
    const std::string what = state(&first);
    size_t end = i + 1;
    while (end < g.threads.size() && g.threads[end].block == first.block && state(&g.threads[end]) == what) ++end;
    if (++lines > kMaxLines) return text + "\n  ...";
    text += "\n  " + name(*first.block) + " threads " + std::to_string(first.linear) + "-" +
            std::to_string(g.threads[end - 1].linear) + ": " + what;
    i = end;
  }
  return text;
}

void thread_main() {
  fiber::entered();
  Group& g = *t_group;
  try {
    (*t_kernel)();
  } catch (const std::exception& e) {
    g.error = std::string("exception in ") + g.kernel + ": " + e.what();
    fiber::switch_to(self(), nullptr);
  }
  Thread* me = self();
  finish_copies(me);
  me->status = Thread::Status::Exited;
  g.idle_spins = 0;
  --g.live;
  if (!options().strict_exit) leave_barrier(me);
  fiber::switch_to(me, pick());
  std::abort();
}

void build_cta(Cta& c, const Config& cfg, size_t linear) {
  const unsigned nt = cfg.block.x * cfg.block.y * cfg.block.z, num_warps = (nt + 31) / 32;
  c.idx = {unsigned(linear % cfg.grid.x), unsigned(linear / cfg.grid.x % cfg.grid.y),
           unsigned(linear / cfg.grid.x / cfg.grid.y)};
  c.dim = cfg.block;
  c.grid = cfg.grid;
  c.nthreads = nt;
  c.smem_bytes = cfg.smem;
  c.warps.resize(num_warps);
  c.warpgroups.resize((num_warps + 3) / 4);
  c.wgmma.resize(c.warpgroups.size());
}

// Zones between and around the CTAs' shared memory belong to nobody: the race checker reports accesses to them.
void place_smem(Group& g, const Config& cfg) {
  constexpr size_t kAlign = 1024, kZone = 4096;
  const size_t span = (cfg.smem + kAlign - 1) / kAlign * kAlign;
  const size_t total = kZone + g.ctas.size() * (span + kZone) + kAlign;
  thread_local std::vector<unsigned char> storage;
  if (storage.size() < total) storage.resize(total);
  g.arena = reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(storage.data()) + kAlign - 1) &
                                             ~uintptr_t(kAlign - 1));
  g.arena_end = storage.data() + total;
  std::memset(g.arena, 0xff, size_t(g.arena_end - g.arena));  // NaN in every float format
  for (size_t i = 0; i < g.ctas.size(); ++i) g.ctas[i].smem = g.arena + kZone + i * (span + kZone);
}

void run_group(const Config& cfg, const char* kernel_name, const std::function<void()>& kernel,
               const unsigned* cluster_idx, size_t num_clusters, uint64_t seed) {
  Group g;
  g.kernel = kernel_name;
  g.rng.seed(seed);
  t_group = &g;
  t_kernel = &kernel;
  const unsigned nt = cfg.block.x * cfg.block.y * cfg.block.z;
  g.clusters.resize(num_clusters);
  g.ctas.resize(num_clusters * cfg.cluster);
  g.threads.resize(g.ctas.size() * nt);
  fiber::reserve(g.threads.size(), options().stack_bytes);
  place_smem(g, cfg);
  for (size_t b = 0; b < g.ctas.size(); ++b) {
    Cta& c = g.ctas[b];
    Cluster& cluster = g.clusters[b / cfg.cluster];
    cluster.index = cluster_idx[b / cfg.cluster];
    cluster.ctas.push_back(&c);
    c.cluster = &cluster;
    c.rank = unsigned(b % cfg.cluster);
    build_cta(c, cfg, size_t(cluster.index) * cfg.cluster + c.rank);
    for (unsigned i = 0; i < nt; ++i) {
      Thread& t = g.threads[b * nt + i];
      t.tid = {i % cfg.block.x, i / cfg.block.x % cfg.block.y, i / cfg.block.x / cfg.block.y};
      t.linear = i;
      t.gid = c.rank * nt + i;
      t.lane = i % 32;
      t.warp = i / 32;
      t.block = &c;
      t.may_run_ahead = cfg.overlaps_previous;
      fiber::prepare(&t, b * nt + i, &thread_main);
      cluster.threads.push_back(&t);
      g.ready.push_back(&t);
    }
  }
  g.live = g.threads.size();
  if (options().order == Order::Reverse) std::reverse(g.ready.begin(), g.ready.end());
  race::begin_group(g);
  if (Thread* first = pick()) fiber::switch_to(nullptr, first);
  if (g.error.empty() && g.live) g.error = std::string("deadlock in ") + kernel_name + describe(g);
  t_cur = nullptr;
  t_group = nullptr;
  if (!g.error.empty()) throw Error(g.error);
}

// The clusters in the order in which they start. Forward and Reverse begin at the seed-th: each can be the last one.
std::vector<unsigned> cluster_order(unsigned count) {
  std::vector<unsigned> order(count);
  const Options& o = options();
  for (unsigned i = 0; i < count; ++i) order[i] = unsigned((i + o.seed) % count);
  if (o.order == Order::Reverse) std::reverse(order.begin(), order.end());
  if (o.order == Order::Random) std::shuffle(order.begin(), order.end(), std::mt19937_64(o.seed));
  return order;
}

}  // namespace

Group& group() { return *t_group; }

Options& options() {
  static Options o;
  return o;
}

uint3 thread_index() { return t_cur->tid; }
uint3 block_index() { return t_cur->block->idx; }
dim3 block_size() { return t_cur->block->dim; }
dim3 grid_size() { return t_cur->block->grid; }
unsigned char* dynamic_smem() { return t_cur->block->smem; }
int lane() { return static_cast<int>(t_cur->lane); }

std::string place(Loc l) {
  const std::string file = l.file_name();
  return file.substr(file.find_last_of('/') + 1) + ":" + std::to_string(l.line());
}

void make_ready(Thread* t) {
  t->status = Thread::Status::Ready;
  t_group->ready.push_back(t);
  t_group->idle_spins = 0;
}

void block_on(const char* what, Loc loc, unsigned mask) {
  Thread* me = self();
  me->status = Thread::Status::Blocked;
  me->waiting_for = what;
  me->where = loc;
  me->wait_mask = mask;
  suspend();
}

void yield() {
  t_group->ready.push_back(self());
  suspend();
}

void spin_hint(Loc loc) {
  if (++t_group->idle_spins > kMaxIdleSpins) {
    fail("a polling loop makes no progress (does the awaited CTA run at the same time?)", loc);
  }
  yield();
}

void fail(const std::string& what, Loc loc) {
  Thread* me = self();
  Group& g = *t_group;
  std::ostringstream o;
  o << what << "\n  in " << g.kernel << " at " << place(loc) << ", " << name(*me->block) << " thread " << me->linear
    << " (warp " << me->warp << " lane " << me->lane << ")" << describe(g);
  g.error = o.str();
  fiber::switch_to(me, nullptr);  // every fiber of the group is abandoned
  std::abort();
}

void launch(const Config& cfg, const char* kernel_name, const std::function<void()>& kernel) {
  const size_t blocks = size_t(cfg.grid.x) * cfg.grid.y * cfg.grid.z;
  const unsigned nt = cfg.block.x * cfg.block.y * cfg.block.z;
  const auto refuse = [&](const char* why) { throw Error(std::string(kernel_name) + ": " + why); };
  if (!blocks || !nt || nt > 1024) refuse("bad grid or block size");
  if (cfg.grid.y > 65535 || cfg.grid.z > 65535) refuse("grid.y and grid.z must be at most 65535");
  if (cfg.smem > 227 * 1024) refuse("more than 227 KiB of shared memory");
  if (!cfg.cluster || cfg.grid.x % cfg.cluster) refuse("grid.x is not a multiple of the cluster");
  if ((cfg.cluster > 1 || cfg.overlaps_previous) && options().capability < 90) {
    refuse("clusters and dependent launches need a GPU of compute capability 9.0");
  }
  const Options& o = options();
  const auto num_clusters = unsigned(blocks / cfg.cluster);
  const std::vector<unsigned> order = cluster_order(num_clusters);

  unsigned workers = o.workers ? o.workers : std::max(1u, std::thread::hardware_concurrency());
  if (race::enabled) workers = 1;
  size_t resident = std::max<size_t>(1, o.max_resident / (nt * cfg.cluster));
  if (cfg.smem) resident = std::min(resident, std::max<size_t>(1, kMaxResidentSmem / (cfg.smem * cfg.cluster)));
  resident = std::min(resident, (num_clusters + size_t(workers) - 1) / workers);

  std::atomic<size_t> next{0};
  std::mutex mutex;
  std::string error;
  const auto work = [&] {
    for (size_t begin; (begin = next.fetch_add(resident)) < num_clusters;) {
      try {
        const size_t count = std::min(resident, num_clusters - begin);
        run_group(cfg, kernel_name, kernel, &order[begin], count, o.seed * 0x9e3779b97f4a7c15ull + begin);
      } catch (const std::exception& e) {
        std::lock_guard lock(mutex);
        if (error.empty()) error = e.what();
        next = num_clusters;
      }
    }
  };
  race::begin_launch(cfg, kernel_name);
  if (workers == 1) {
    work();
  } else {
    std::vector<std::thread> pool;
    for (unsigned i = 0; i < workers; ++i) pool.emplace_back(work);
    for (auto& t : pool) t.join();
  }
  for (auto& report : race::end_launch()) error += (error.empty() ? "" : "\n") + report;
  if (!error.empty()) throw Error(error);
}

}  // namespace emu
