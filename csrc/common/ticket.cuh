// The last CTA to finish its share of a request goes on with the whole of it, in the same launch.
#pragma once

#include "common/prelude.cuh"

namespace nld {

// Called by all threads of a CTA after they have written their results to global memory. True in every thread of the
// CTA whose arrival makes the weights that came to `ticket` add up to `expected`; what the other CTAs wrote before they
// arrived may then be read. The ticket is 0 before the first arrival of a launch and again after the last one.
// `flag` is shared memory. Who is last is up to the schedule: what the last one does must not depend on it.
__device__ __forceinline__ bool arrive_last(int32_t* ticket, int32_t weight, int32_t expected, int32_t* flag) {
  if (!NLD_BUG(ticket_no_barrier)) __syncthreads();  // before thread 0 speaks for the CTA
  if (threadIdx.x == 0) {
    if (!NLD_BUG(ticket_no_release)) __threadfence();  // release: the CTA's writes come before its arrival
    const int32_t arrived = atomicAdd(ticket, weight) + weight;
    if (!NLD_BUG(ticket_no_acquire)) __threadfence();  // acquire: what other CTAs wrote comes after seeing theirs
    NLD_DEVICE_CHECK(arrived <= expected, "tickets must be zero on entry, cu_seqlens must not decrease");
    *flag = arrived == expected;
    if (arrived == expected && !NLD_BUG(ticket_not_reset)) *ticket = 0;
  }
  __syncthreads();
  return *flag != 0;
}

}  // namespace nld
