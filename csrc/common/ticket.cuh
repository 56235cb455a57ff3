// The last CTA to finish its share of a request goes on with the whole of it, in the same launch.
#pragma once

#include "common/ptx.cuh"

namespace nld {

// Adds to a ticket. What the CTA wrote before (a barrier ago) is released to whoever adds later, what those wrote who
// added earlier is acquired (for the CTA: after a barrier).
__device__ __forceinline__ uint32_t add_to_ticket(uint32_t* ticket, uint32_t weight) {
  if (NLD_BUG(ticket_no_release)) {
    const uint32_t before = atomicAdd(ticket, weight);
    ptx::fence_acq_rel();
    return before;
  }
  if (NLD_BUG(ticket_no_acquire)) {
    ptx::fence_acq_rel();
    return atomicAdd(ticket, weight);
  }
  return ptx::atomic_add_acq_rel(ticket, weight);
}

// Called by all threads of a CTA after they have written their results to global memory. True in every thread of the
// CTA whose arrival makes the weights that came to `ticket` add up to `expected`; what the other CTAs wrote before they
// arrived may then be read. The ticket is 0 before the first arrival of a launch and again after the last one.
// `flag` is shared memory. Who is last is up to the schedule: what the last one does must not depend on it.
__device__ __forceinline__ bool arrive_last(int32_t* ticket, int32_t weight, int32_t expected, int32_t* flag) {
  if (!NLD_BUG(ticket_no_barrier)) __syncthreads();  // before thread 0 speaks for the CTA
  if (threadIdx.x == 0) {
    const int32_t arrived = static_cast<int32_t>(add_to_ticket(reinterpret_cast<uint32_t*>(ticket), weight)) + weight;
    NLD_DEVICE_CHECK(arrived <= expected, "tickets must be zero on entry, cu_seqlens must not decrease");
    *flag = arrived == expected;
    if (arrived == expected && !NLD_BUG(ticket_not_reset)) *ticket = 0;
  }
  __syncthreads();
  return *flag != 0;
}

}  // namespace nld
