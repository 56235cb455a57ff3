#include "attention/launch_sm80.cuh"

namespace nld {
template LaunchError launch_mma<f16, 64, f16>(const MmaParams&, void* stream);
template int mma_resident_clusters<f16, 64, f16>(int tile_rows, int size);
}  // namespace nld
