// What the tensor-core kernels need beside the op's arguments: derived once per launch on the host. Knows no torch.
#pragma once

#include "attention/attention.h"
#include "common/fast_div.h"

namespace nld {

struct MmaParams {
  AttentionCudaParams op;
  FastDiv page_size, heads_per_kv;
  // Steps through the caches in chunks of 16 bytes; they and their sums fit 32 bits.
  uint32_t k_page_chunks, k_token_chunks, v_page_chunks, v_token_chunks;
  bool out_aligned;           // rows of out start at multiples of 16 bytes
  uint32_t q_signs;           // flips the signs of two elements of q where softmax_scale is negative
  float scale_log2;           // > 0: score * scale_log2 is in units of log2
  float cap_log2, cap_slope;  // softcap: cap_log2 * tanh(score * ...), cap_slope = 2 * log2(e) * scale / cap
};

MmaParams mma_params(const AttentionCudaParams&);

// Instances: launch_sm80_<dtype>_<head_dim>.cu, and of fp8 caches (Kv = e4m3) launch_sm80_fp8_<head_dim>.cu.
template <class T, int kHeadDim, class Kv = T>
const char* launch_mma(const MmaParams&, void* stream);
// Clusters of `size` CTAs that the current GPU holds at once; 0: it has none.
template <class T, int kHeadDim, class Kv = T>
int mma_resident_clusters(int tile_rows, int size);

}  // namespace nld
