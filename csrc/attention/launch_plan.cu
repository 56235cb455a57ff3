// Launcher of attention_plan.
#include "attention/attention.h"
#include "attention/plan.cuh"

namespace nld {

int32_t device_sms() { return num_sms(); }

LaunchError launch_attention_plan(const AttentionPlanParams& p, void* stream) {
  const LaunchShape shape = {.grid = 1,
                             .block = kPlanThreads,
                             .smem_bytes = sizeof(PlanSmem),
                             .overlaps_previous = can_overlap(attention_plan_kernel)};
  NLD_LAUNCH_SHAPED(attention_plan_kernel, shape, stream, p);
  return launch_result();
}

}  // namespace nld
