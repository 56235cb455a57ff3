#include "attention/launch_sm90.cuh"

namespace nld {
template LaunchError launch_wgmma<bf16, 128, e4m3>(const HopperParams&, void* stream);
template int wgmma_resident_clusters<bf16, 128, e4m3>(int tile_rows, int size);
}  // namespace nld
