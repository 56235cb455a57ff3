// What the tests of the PTX wrappers share. The same files build with nvcc (a plain program for a GPU) and with g++
// against the emulator; no torch.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/prelude.cuh"

namespace nld::ptx_test {

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class... Args>
void expect(bool holds, const char* format, Args... args) {
  if (holds) return;
  char text[400];
  std::snprintf(text, sizeof text, format, args...);
  throw Failure(text);
}
inline void expect(bool holds, const char* text) {
  if (!holds) throw Failure(text);
}

// Waits for the kernels launched so far; what went wrong in them becomes a Failure.
inline void finish() {
  if (LaunchError error = launch_result()) throw Failure(error);
#if NLD_ON_DEVICE
  if (const cudaError_t error = cudaDeviceSynchronize()) throw Failure(cudaGetErrorString(error));
#endif
}

#if !NLD_ON_DEVICE
// Does the race checker look on?
constexpr bool kIsChecked =
#if defined(__SANITIZE_THREAD__)
    true;
#else
    false;
#endif

// The report of a launch, "" if it had nothing to say.
template <class Kernel>
std::string report_of(const ::emu::Config& config, Kernel kernel) {
  try {
    ::emu::launch(config, "kernel", kernel);
  } catch (const ::emu::Error& e) {
    return e.what();
  }
  return "";
}
#endif

// An array of which the test sees one copy and kernels another; the emulator has one for both. Copies are made when the
// other side asks for it, so a test must not hold on to references across launches.
template <class T>
class Array {
 public:
  explicit Array(size_t size, T fill = T{})
      : size_(size), host_(static_cast<T*>(std::aligned_alloc(256, (size * sizeof(T) + 255) / 256 * 256))) {
    for (size_t i = 0; i < size; ++i) host_[i] = fill;
#if NLD_ON_DEVICE
    if (cudaMalloc(&device_, size * sizeof(T)) != cudaSuccess) throw Failure("no memory");
#endif
  }
  Array(const Array&) = delete;
  ~Array() {
    std::free(host_);
#if NLD_ON_DEVICE
    cudaFree(device_);
#endif
  }
  size_t size() const { return size_; }
  T& operator[](size_t i) { return host()[i]; }
  // For the test.
  T* host() {
#if NLD_ON_DEVICE
    if (device_is_newer_) cudaMemcpy(host_, device_, size_ * sizeof(T), cudaMemcpyDeviceToHost);
    device_is_newer_ = false;
#endif
    return host_;
  }
  // For kernels.
  T* data() {
#if NLD_ON_DEVICE
    if (!device_is_newer_) cudaMemcpy(device_, host_, size_ * sizeof(T), cudaMemcpyHostToDevice);
    device_is_newer_ = true;
    return device_;
#else
    return host_;
#endif
  }

 private:
  size_t size_;
  T* host_;
#if NLD_ON_DEVICE
  T* device_ = nullptr;
  bool device_is_newer_ = false;
#endif
};

static std::mt19937 rng(20261121);  // not in a function: its guard would need more of libtsan than the emulator has
inline int random_int(int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng); }

struct Case {
  const char* name;
  void (*run)();
};
using Cases = std::vector<Case>;

}  // namespace nld::ptx_test
