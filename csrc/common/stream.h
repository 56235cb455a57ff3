// The torch side of a CUDA launch: the tensors' device made current, and torch's stream on it.
#pragma once

#include "common/check.h"
#include "common/export.h"

#if !NLD_EMULATED
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

// Null under a torch without CUDA; binds to libtorch_cuda otherwise. Weak, so that one library serves both.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#pragma weak aoti_torch_get_current_cuda_stream
#endif

// The library whose ops a file defines, and the dispatch key of their CUDA implementations. libnld_emulated_<variant>
// runs the same code on CPU tensors, as torch.ops.nld_emulated_<variant>: the build says which.
#if NLD_EMULATED
#define NLD_CUDA_KEY CPU
#else
#define NLD_NAMESPACE nld
#define NLD_CUDA_KEY CUDA
#endif

namespace nld {

#if NLD_EMULATED
class CudaScope {
 public:
  explicit CudaScope(const Tensor&) {}
  void* stream() const { return nullptr; }
};
#else
class CudaScope {
 public:
  explicit CudaScope(const Tensor& like) : guard_(like.get_device_index()) {
    if (aoti_torch_get_current_cuda_stream == nullptr) fail("nld_cuda: this torch has no CUDA");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream_));
  }
  void* stream() const { return stream_; }  // a cudaStream_t

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};
#endif

// A GPU that no code is built for shows itself as a failed launch ("no kernel image"), so say what is built.
inline void check_launch(const char* op, const char* error) {
  if (error == nullptr) return;
#if NLD_EMULATED
  fail(op, ": the CUDA launch must succeed, got: ", error);
#else
  fail(op, ": the CUDA launch must succeed, got: ", error, " (built for ", nld_cuda_archs(), ")");
#endif
}

}  // namespace nld
