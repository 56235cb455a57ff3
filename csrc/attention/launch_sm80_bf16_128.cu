#include "attention/launch_sm80.cuh"

namespace nld {
template LaunchError launch_mma<bf16, 128, bf16>(const MmaParams&, void* stream);
}
