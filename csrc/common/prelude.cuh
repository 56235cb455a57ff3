// The only place that knows whether nvcc or the CPU emulator compiles a kernel. Every .cuh and launch*.cu starts here.
#pragma once

#include <atomic>
#include <bit>
#include <cstdint>

#include "common/capability.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define NLD_ON_DEVICE 1
// Parentheses around the kernel let template arguments contain commas. `stream` is a void*: headers that torch code
// includes know no CUDA types.
#define NLD_LAUNCH(kernel, grid, block, smem_bytes, stream, ...) \
  (kernel)<<<(grid), (block), (smem_bytes), static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define NLD_LAUNCH_SHAPED(kernel, shape, stream, ...) ::nld::launch_shaped(kernel, shape, stream, __VA_ARGS__)
#define NLD_DYNAMIC_SMEM(Type, name)                          \
  extern __shared__ __align__(1024) unsigned char nld_smem[]; \
  Type* const name = reinterpret_cast<Type*>(nld_smem)
#else
#include "emulator/emulator.h"

#define NLD_ON_DEVICE 0
#define NLD_LAUNCH(kernel, grid_, block_, smem_bytes, stream, ...)                                                 \
  (static_cast<void>(stream), ::emu::launch({dim3(grid_), dim3(block_), static_cast<size_t>(smem_bytes)}, #kernel, \
                                            [&] { (kernel)(__VA_ARGS__); }))
#define NLD_LAUNCH_SHAPED(kernel, shape_, stream, ...)                                                            \
  [&, nld_shape = ::nld::LaunchShape(shape_)] {                                                                   \
    static_cast<void>(stream);                                                                                    \
    ::emu::launch({nld_shape.grid, nld_shape.block, static_cast<size_t>(nld_shape.smem_bytes), nld_shape.cluster, \
                   nld_shape.overlaps_previous},                                                                  \
                  #kernel, [&] { (kernel)(__VA_ARGS__); });                                                       \
  }()
#define NLD_DYNAMIC_SMEM(Type, name) Type* const name = reinterpret_cast<Type*>(::emu::dynamic_smem())
#endif

// NLD_BUG(name): an injected bug, off on a GPU; tests switch it on under the emulator and must see it caught.
// NLD_DEVICE_CHECK(condition, text): rules about device data, in debug builds and under the emulator.
#if NLD_ON_DEVICE
#define NLD_BUG(name) false
#if NLD_DEBUG
#include <cstdio>
#define NLD_DEVICE_CHECK(condition, text)                                        \
  do {                                                                           \
    if (!(condition)) {                                                          \
      printf("%s:%d: %s must hold: %s\n", __FILE__, __LINE__, #condition, text); \
      __trap();                                                                  \
    }                                                                            \
  } while (false)
#else
#define NLD_DEVICE_CHECK(condition, text) static_cast<void>(0)
#endif
#else
#define NLD_BUG(name)                             \
  ([]() -> bool {                                 \
    static constinit ::emu::BugSwitch bug{#name}; \
    return ::emu::bug_is_on(bug);                 \
  }())
#define NLD_DEVICE_CHECK(condition, text)                                                           \
  do {                                                                                              \
    if (!(condition)) ::emu::fail(#condition " must hold: " text, std::source_location::current()); \
  } while (false)
#endif

namespace nld {

constexpr unsigned kFullMask = 0xffffffffu;
constexpr int kWarpSize = 32;

// What a launcher returns: null, or why the launch failed. op.cpp turns it into an exception that names the op.
using LaunchError = const char*;

// The result of the launches since the last call. Launches are asynchronous: a fault inside a kernel shows up later.
inline LaunchError launch_result() {
#if NLD_ON_DEVICE
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
#else
  return nullptr;  // the emulator runs a kernel to its end and throws
#endif
}

// A launch with more to say than NLD_LAUNCH can; both extras need sm_90.
struct LaunchShape {
  dim3 grid, block;
  int smem_bytes = 0;
  unsigned cluster = 1;            // CTAs of a cluster, along x
  bool overlaps_previous = false;  // programmatic dependent launch: the kernel calls ptx::wait_for_previous_kernel()
};
#if NLD_ON_DEVICE
template <class... Params, class... Args>
void launch_shaped(void (*kernel)(Params...), const LaunchShape& shape, void* stream, Args&&... args) {
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = static_cast<size_t>(shape.smem_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  if (shape.cluster > 1) {
    cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {shape.cluster, 1, 1};
  }
  if (shape.overlaps_previous) {
    cudaLaunchAttribute& overlap = attributes[config.numAttrs++];
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
  }
  static_cast<void>(cudaLaunchKernelEx(&config, kernel, static_cast<Args&&>(args)...));  // launch_result() tells
}
#endif

// More than 48 KiB of dynamic shared memory must be asked for, once per kernel and device.
template <class Kernel>
LaunchError allow_smem(Kernel kernel, int smem_bytes) {
#if NLD_ON_DEVICE
  const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                 cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
#else
  static_cast<void>(kernel);
  static_cast<void>(smem_bytes);
  return nullptr;
#endif
}

// Clusters of more than 8 CTAs must be asked for, too.
template <class Kernel>
LaunchError allow_wide_cluster(Kernel kernel) {
#if NLD_ON_DEVICE
  const cudaError_t error =
      cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
#else
  static_cast<void>(kernel);
  return nullptr;
#endif
}

// CTAs of a kernel that one SM of the current device holds at once.
template <class Kernel>
int resident_ctas(Kernel kernel, int num_threads, int smem_bytes) {
#if NLD_ON_DEVICE
  int ctas = 0;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&ctas, reinterpret_cast<const void*>(kernel), num_threads,
                                                static_cast<size_t>(smem_bytes));
  return ctas > 0 ? ctas : 1;
#else
  static_cast<void>(kernel);
  static_cast<void>(num_threads);
  static_cast<void>(smem_bytes);
  return 1;
#endif
}

// 10 * major + minor of the current device, or less (capability.h); what the tests say under the emulator.
inline int compute_capability() {
#if NLD_ON_DEVICE
  int device = 0, major = 0, minor = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  const int most = max_capability, found = 10 * major + minor;
  return most > 0 && most < found ? most : found;
#else
  return ::emu::options().capability;
#endif
}

// Multiprocessors of the current device.
inline int num_sms() {
#if NLD_ON_DEVICE
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
#else
  return ::emu::options().num_sms;
#endif
}

// Whether the current device runs a kernel's code for sm_90 or later, the only code that knows clusters and dependent
// launches: a library built for older GPUs alone runs on newer ones without.
template <class Kernel>
bool has_sm90_code(Kernel kernel) {
#if NLD_ON_DEVICE
  cudaFuncAttributes attributes{};
  const bool known = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)) == cudaSuccess;
  return known && attributes.ptxVersion >= 90;
#else
  static_cast<void>(kernel);
  return ::emu::options().capability >= 90;
#endif
}

// May the kernel be launched with overlaps_previous?
template <class Kernel>
bool can_overlap(Kernel kernel) {
#if NLD_ON_DEVICE
  static const bool knows_how = has_sm90_code(kernel);  // the same for all kernels, as they are built for the same GPUs
  return knows_how && compute_capability() >= 90;
#else
  return has_sm90_code(kernel);
#endif
}

// Clusters of more than 8 CTAs must be asked for, once per kernel and device.
template <class Kernel>
LaunchError allow_cluster(Kernel kernel, int size) {
#if NLD_ON_DEVICE
  if (size <= 8) return nullptr;
  const cudaError_t error =
      cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
#else
  static_cast<void>(kernel);
  static_cast<void>(size);
  return nullptr;
#endif
}

// Clusters of `size` CTAs of a kernel that the current device holds at once; 0: it has none of that size.
template <class Kernel>
int resident_clusters(Kernel kernel, int num_threads, int smem_bytes, int size) {
#if NLD_ON_DEVICE
  if (!has_sm90_code(kernel) || allow_smem(kernel, smem_bytes) != nullptr || allow_cluster(kernel, size) != nullptr) {
    cudaGetLastError();  // an error that was answered
    return 0;
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(size), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(size));
  config.blockDim = dim3(static_cast<unsigned>(num_threads));
  config.dynamicSmemBytes = static_cast<size_t>(smem_bytes);
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters = 0;
  if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return clusters;
#else
  return has_sm90_code(kernel) ? num_sms() * resident_ctas(kernel, num_threads, smem_bytes) / size : 0;
#endif
}

// The same, asked once for each size: GPUs of one machine are alike, or nearly. One static object per kernel.
class ResidentClusters {
 public:
  template <class Kernel>
  int operator()(Kernel kernel, int num_threads, int smem_bytes, int size) {
#if NLD_ON_DEVICE
    std::atomic<int>& known = known_[31 - std::countl_zero(static_cast<unsigned>(size))];
    int clusters = known;
    if (clusters < 0) known = clusters = resident_clusters(kernel, num_threads, smem_bytes, size);
    return compute_capability() >= 90 ? clusters : 0;
#else
    return resident_clusters(kernel, num_threads, smem_bytes, size);  // tests change the GPU
#endif
  }

 private:
  std::atomic<int> known_[5] = {-1, -1, -1, -1, -1};  // of 1, 2, 4, 8, 16 CTAs
};

}  // namespace nld
