#include "attention/launch_sm90.cuh"

namespace nld {
template LaunchError launch_wgmma<f16, 96, f16>(const HopperParams&, void* stream);
}
