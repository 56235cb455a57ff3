#include "attention/launch_sm90.cuh"

namespace nld {
template LaunchError launch_wgmma<bf16, 64, bf16>(const HopperParams&, void* stream);
template int wgmma_resident_clusters<bf16, 64, bf16>(int tile_rows, int size);
}  // namespace nld
