// Clusters: a barrier with separate arrive and wait, and the shared memory of other CTAs.
#include "emulator/internal.h"

namespace emu {

unsigned cluster_size() { return static_cast<unsigned>(cta().cluster->ctas.size()); }

void cluster_arrive(Loc loc, bool releases) {
  Thread* me = self();
  Cluster& cluster = *cta().cluster;
  auto& b = cluster.barrier;
  if (me->cluster_arrived) fail("barrier.cluster: arrived twice without waiting", loc);
  me->cluster_arrived = true;
  if (releases) race::release(me, b.next);
  if (++b.arrived < cluster.threads.size()) return;
  b.arrived = 0;
  b.phase ^= 1;
  b.done = std::exchange(b.next, {});
  for (Thread* t : std::exchange(b.waiting, {})) make_ready(t);
}

void cluster_wait(Loc loc) {
  Thread* me = self();
  auto& b = cta().cluster->barrier;
  if (!me->cluster_arrived) fail("barrier.cluster: wait without arrive", loc);
  if (me->cluster_phase == b.phase) {
    b.waiting.push_back(me);
    block_on("barrier.cluster.wait", loc);
  }
  me->cluster_arrived = false;
  me->knows_cluster_runs = true;
  me->cluster_phase = b.phase;
  race::acquire(me, b.done);
}

void* map_rank(void* p, unsigned rank) {
  auto& ctas = cta().cluster->ctas;
  const Loc loc = Loc::current();
  if (rank >= ctas.size()) fail("mapa: the cluster has no CTA of that rank", loc);
  const auto* byte = static_cast<const unsigned char*>(p);
  const Block* own = self()->block;
  if (byte < own->smem || byte >= own->smem + own->smem_bytes)
    fail("mapa: not an address of the CTA's own shared memory", loc);
  if (ctas[rank] != cta().cluster->ctas[own->rank] && !self()->knows_cluster_runs)
    fail("mapa: that CTA may not have started: every thread waits for a barrier of the cluster first", loc);
  bool is_running = false;
  for (const Thread* t : cta().cluster->threads)
    is_running |= t->block == ctas[rank] && t->status != Thread::Status::Exited;
  if (!is_running) fail("mapa: the CTA whose shared memory is wanted has exited", loc);
  return ctas[rank]->smem + smem_addr(p);
}

}  // namespace emu
