// Launcher of attention_plan.
#include "attention/attention.h"
#include "attention/plan.cuh"

namespace nld {

int32_t device_sms() { return num_sms(); }

LaunchError launch_attention_plan(const AttentionPlanParams& p, void* stream) {
  NLD_LAUNCH(attention_plan_kernel, 1, kPlanThreads, sizeof(PlanSmem), stream, p);
  return launch_result();
}

}  // namespace nld
