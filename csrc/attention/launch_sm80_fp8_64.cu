#include "attention/launch_sm80.cuh"

namespace nld {
template LaunchError launch_mma<bf16, 64, e4m3>(const MmaParams&, void* stream);
}
