// The launcher of the Hopper kernels: where they run, what they have instances for, and the maps of K and V.
#include <cstring>
#include <numeric>

#include "attention/cluster.h"
#include "attention/heuristic.h"
#include "attention/ring_sm90.cuh"
#include "common/tensor_map.h"

namespace nld {
namespace {

struct WgmmaInstance {
  LaunchError (*launch)(const HopperParams&, void* stream);  // null: there is no instance
  int (*resident_clusters)(int tile_rows, int size);
};
template <class T, int kHeadDim, class Kv = T>
constexpr WgmmaInstance kWgmmaInstance = {launch_wgmma<T, kHeadDim, Kv>, wgmma_resident_clusters<T, kHeadDim, Kv>};

WgmmaInstance wgmma_instance(DType dtype, int64_t head_dim, bool is_fp8) {
  const bool is_bf16 = dtype == DType::kBF16;
  if (is_fp8) {  // the instances that attention_mma_takes knows
    if (!is_bf16) return {};
    return head_dim == 64    ? kWgmmaInstance<bf16, 64, e4m3>
           : head_dim == 128 ? kWgmmaInstance<bf16, 128, e4m3>
                             : WgmmaInstance{};
  }
  switch (head_dim) {
    case 64:
      return is_bf16 ? kWgmmaInstance<bf16, 64> : kWgmmaInstance<f16, 64>;
    case 96:
      return is_bf16 ? kWgmmaInstance<bf16, 96> : kWgmmaInstance<f16, 96>;
    case 128:
      return is_bf16 ? kWgmmaInstance<bf16, 128> : kWgmmaInstance<f16, 128>;
  }
  return {};
}

// Code for sm_90a runs on 9.0 and nowhere else.
bool is_hopper() {
#if defined(NLD_CUDA_ARCH_NAMES)
  if (std::strstr(NLD_CUDA_ARCH_NAMES, "90a") == nullptr) return false;
#endif
  return compute_capability() == 90;
}

// Tokens of the boxes in which pages are copied: the most that divide a page and the beginnings of all tiles, so that
// no box has two pages. 0 where that is less than the 8 rows of a swizzle.
int box_rows(const AttentionCudaParams& op) {
  const int64_t starts = op.plan_shape.split_len > 0 ? op.plan_shape.split_len : kPlanKeys;
  const int64_t rows = std::gcd(std::gcd(op.page_size, starts), int64_t{kHopperKeys});
  return rows >= 8 ? static_cast<int>(rows) : 0;
}

LaunchError map_pages(ptx::TensorMap* map, const AttentionCudaParams& op, const KvPages& pages, int box_rows) {
  TensorMapSpec spec = {pages.data,
                        op.dtype,
                        4,
                        {op.head_dim, op.page_size, op.num_kv_heads, op.num_pages},
                        {1, pages.token_stride, pages.head_stride, pages.page_stride},
                        {64, box_rows, 1, 1},
                        ptx::Swizzle::k128};
  for (int i = 1; i < 4; ++i) {
    if (spec.dims[i] == 1) spec.strides[i] = 8;  // the stride of one element may be anything, but not for the map
  }
  return make_tensor_map(map, spec);
}

}  // namespace

bool attention_wgmma_takes(const AttentionParams& p, int32_t tile_rows) {
  return tile_rows >= 64 && attention_mma_takes(p) && wgmma_instance(p.dtype, p.head_dim, p.is_fp8).launch != nullptr &&
         is_hopper();
}

int32_t attention_wgmma_cluster_size(const AttentionCudaParams& p) {
  const auto resident = wgmma_instance(p.dtype, p.head_dim, p.is_fp8).resident_clusters;
  const int32_t tile_rows = p.plan_shape.tile_rows;
  return attention_cluster_size(p.plan_shape, p.num_kv_heads, p.max_pages * p.page_size, p.num_sms,
                                [&](int32_t size) { return resident(tile_rows, size); });
}

LaunchError launch_attention_wgmma(const AttentionCudaParams& op, void* stream) {
  const bool reads_once =
      attention_reads_keys_once(op.total_q, op.batch, op.plan_shape.heads_per_kv, op.plan_shape.tile_rows);
  HopperParams p = {
      mma_params(op), {}, {}, op.is_fp8 ? 0 : box_rows(op), reads_once ? ptx::L2Keep::kLeast : ptx::L2Keep::kNormally};
  // What has no map (a stride of 0, say) is gathered.
  if (p.box_rows > 0 &&
      (map_pages(&p.k_map, op, op.k, p.box_rows) != nullptr || map_pages(&p.v_map, op, op.v, p.box_rows) != nullptr)) {
    p.box_rows = 0;
  }
  return wgmma_instance(op.dtype, op.head_dim, op.is_fp8).launch(p, stream);
}

}  // namespace nld
