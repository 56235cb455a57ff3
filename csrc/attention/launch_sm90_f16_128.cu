#include "attention/launch_sm90.cuh"

namespace nld {
template LaunchError launch_wgmma<f16, 128, f16>(const HopperParams&, void* stream);
template int wgmma_resident_clusters<f16, 128, f16>(int tile_rows, int size);
}  // namespace nld
