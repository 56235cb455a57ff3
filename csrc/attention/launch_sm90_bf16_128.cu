#include "attention/launch_sm90.cuh"

namespace nld {
template LaunchError launch_wgmma<bf16, 128, bf16>(const HopperParams&, void* stream);
template int wgmma_resident_clusters<bf16, 128, bf16>(int tile_rows, int size);
}  // namespace nld
