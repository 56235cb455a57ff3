// Runs every wrapper of common/ptx*.cuh and compares it with layouts.h and values worked out by hand: on a GPU when
// nvcc builds it, and under the emulator when g++ does. Arguments of the emulated one: order, landing, seed.
//   nvcc -std=c++20 -arch=sm_90a -Icsrc csrc/emulator/tests/ptx_device.cu -o ptx_device && ./ptx_device
#include "emulator/tests/ptx_portable.cuh"
#include "emulator/tests/ptx_sm90.cuh"
#include "emulator/tests/ptx_wgmma.cuh"
#if !NLD_ON_DEVICE
#include "emulator/tests/ptx_misuse.cuh"
#endif

namespace nld::ptx_test {

const Cases kPortable = {
    {"pack and unpack bf16", test_pack<bf16>},
    {"pack and unpack f16", test_pack<f16>},
    {"mul_bf16x2", test_mul_bf16x2},
    {"exp2, log2 and tanh", test_approx},
    {"cp.async: sizes, zero fill, groups", test_cp_async_all},
    {"ldmatrix: x1, x2, x4, plain and transposed", test_ldmatrix_all},
    {"mma.m16n8k16 bf16", test_mma<bf16>},
    {"mma.m16n8k16 f16", test_mma<f16>},
    {"named barriers", test_barriers},
    {"16-byte loads and stores", test_streaming},
    {"ticket with atom.acq_rel", test_ticket<Ordering::kAcqRel>},
    {"ticket with fence.acq_rel", test_ticket<Ordering::kFence>},
    {"messages with st.release, ld.acquire, red.release", test_messages},
    {"programmatic dependent launch", test_dependent_launch},
};

const Cases kSm90 = {
    {"mbarrier phases", test_mbar<false>},
    {"mbarrier phases, polled", test_mbar<true>},
    {"bulk copies and transaction counts", test_bulk},
    {"tensor copies: ranks, edges, swizzles", test_tma},
    {"clusters: barrier, shared memory of others, messages", test_cluster},
    {"elect.sync", test_elect},
};

const Cases kSm90a = {
    {"wgmma bf16: all n", test_wgmma_all_n<bf16>},
    {"wgmma f16: all n", test_wgmma_all_n<f16>},
    {"wgmma bf16: operand layouts", test_wgmma_swizzles<bf16>},
    {"wgmma f16: operand layouts", test_wgmma_swizzles<f16>},
    {"setmaxnreg", test_registers},
};

#if !NLD_ON_DEVICE
const Cases kMisuse = {
    {"misuse of cp.async", misuse_cp_async},
    {"misuse of mbarriers", misuse_mbar},
    {"misuse of bulk and tensor copies", misuse_bulk},
    {"misuse of clusters, elect.sync and setmaxnreg", misuse_cluster},
    {"misuse of wgmma", misuse_wgmma},
};
#endif

int run(const Cases& cases) {
  int num_failed = 0;
  for (const Case& c : cases) {
    try {
      c.run();
      std::printf("ok %s\n", c.name);
    } catch (const std::exception& e) {
      std::printf("FAIL %s: %s\n", c.name, e.what());
      ++num_failed;
    }
    std::fflush(stdout);
  }
  return num_failed;
}

}  // namespace nld::ptx_test

int main(int argc, char** argv) {
  using namespace nld::ptx_test;
#if NLD_ON_DEVICE
  static_cast<void>(argc);
  static_cast<void>(argv);
  std::printf("compute capability %d\n", nld::compute_capability());
#else
  ::emu::Options& options = ::emu::options();
  if (argc > 1) options.order = static_cast< ::emu::Order>(std::atoi(argv[1]));
  if (argc > 2) options.async = static_cast< ::emu::Async>(std::atoi(argv[2]));
  if (argc > 3) options.seed = static_cast<uint64_t>(std::atoll(argv[3]));
  options.workers = 1;
#endif
  int num_failed = run(kPortable);
  if (nld::compute_capability() >= 90) num_failed += run(kSm90);
  if (nld::compute_capability() == 90) num_failed += run(kSm90a);
#if !NLD_ON_DEVICE
  num_failed += run(kMisuse);
#endif
  std::printf("%d failed\n", num_failed);
  return num_failed != 0;
}
