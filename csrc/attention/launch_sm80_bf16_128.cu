#include "attention/launch_sm80.cuh"

namespace nld {
template LaunchError launch_mma<bf16, 128, bf16>(const MmaParams&, void* stream);
template int mma_resident_clusters<bf16, 128, bf16>(int tile_rows, int size);
}  // namespace nld
