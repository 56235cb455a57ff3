"""Every NLD_BUG of the kernels, switched on: the tests must see it, each in the way written here.

A row names the switch, a test body that passes without it, and what must become of that body:
  NUMBERS   wrong results, in the plain library;
  RACE      a report of the race checker (missing barriers and fences, reads of what nobody wrote);
  DEADLOCK  threads that wait for each other, or meet at two different barriers;
  CHECK     an NLD_DEVICE_CHECK;
  CLUSTER   use of a CTA's shared memory before that CTA has started.
A race is reported whatever the schedule of the run was; in numbers it may not show.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import emulated
import test_attention
import test_attention_cluster
import test_attention_mma
import test_attention_plan
import test_fp8
import test_kv_cache
import test_sampler
import test_sampler_kernel
import test_shards
import test_verify
from cases import ATTENTION_CORRECT, CAUSAL, FULL, QUADRATIC, AttentionCase, Request
from conftest import Backend
from nld_cuda import _library, ops
from test_attention_cluster import BLACKWELL, HOPPER

CSRC = Path(__file__).parents[1] / "csrc"
BF16, F32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class How:
    name: str
    variant: str
    error: type[Exception]
    message: str


NUMBERS = How("numbers", "plain", AssertionError, "")
RACE = How(
    "race",
    "checked",
    RuntimeError,
    r"(race: |never written|still in flight|without fence|may not have started)(.|\n)*\.cuh:\d+",
)
DEADLOCK = How("deadlock", "plain", RuntimeError, "deadlock|divergent")
EARLY = How("early", "checked", RuntimeError, "before wait_for_previous_kernel")
EXITED = How("exited", "plain", RuntimeError, "whose shared memory is wanted has exited")
CHECK = How("check", "plain", RuntimeError, "must hold: ")
CLUSTER = How("cluster", "plain", RuntimeError, "may not have started")


@dataclass(frozen=True)
class Bug:
    name: str
    body: Callable[[Backend], None]
    how: How
    gpu: int = 80  # compute capability

    def __str__(self) -> str:
        gpu = "" if self.gpu == 80 else f"-sm{self.gpu}"
        return f"{self.name}-{self.body.__name__}-{self.how.name}{gpu}"


def rope(b: Backend) -> None:
    test_kv_cache.test_rope_append(test_kv_cache.CASES[1], F32, b)


def rope_fp8(b: Backend) -> None:
    test_fp8.test_append(test_kv_cache.CASES[1], F32, b)


def attention_fp8(b: Backend) -> None:
    test_fp8.run(ATTENTION_CORRECT[1], BF16, b)


def attention_fp8_in_warps(b: Backend) -> None:
    test_fp8.run(AttentionCase("x", (Request(3, 403, CAUSAL),), dim=128), BF16, b)


def attention_fp8_ahead(b: Backend) -> None:
    """Tiles of 128 rows: the next one is converted while this one is multiplied."""
    test_fp8.run(AttentionCase("x", (Request(50, 260, FULL),), heads=4, kv_heads=1), BF16, b)


def attention_fp8_nan(b: Backend) -> None:
    test_fp8.test_nan_is_not_lost((37, 15), 0x7F, b)


def compact(b: Backend) -> None:
    test_kv_cache.test_compact(4, 3, "dense", b)


def attention(b: Backend) -> None:
    test_attention_mma.run(
        AttentionCase("x", (Request(3, 203, CAUSAL), Request(20, 131, FULL)), dim=64), BF16, b
    )


def attention_one_slot_again(b: Backend) -> None:
    """The last tile of V lies where the results are put together."""
    test_attention_mma.run(AttentionCase("x", (Request(20, 100, FULL),), dim=128), BF16, b)


def attention_in_warps(b: Backend) -> None:
    """Tiles of 16 rows: warps share the keys, and wait for none but themselves until the end."""
    requests = (Request(3, 403, CAUSAL), Request(2, 131, FULL))
    test_attention_mma.run(AttentionCase("x", requests, dim=128), BF16, b)


def attention_of_hopper(b: Backend) -> None:
    """Whole tiles by the copy engine, last ones gathered; several items per CTA."""
    requests = (Request(20, 330, CAUSAL), Request(70, 131, FULL))
    test_attention_mma.run(AttentionCase("x", requests, kv_heads=4, dim=128), BF16, b)


def attention_groups(b: Backend) -> None:
    """A tile of rows lies in the last of three groups: a hole before its own."""
    case = AttentionCase("x", (Request(240, 300, QUADRATIC, 79),), heads=1, kv_heads=1)
    test_attention_mma.run(case, BF16, b)


def attention_groups_in_float32(b: Backend) -> None:
    test_attention_mma.run(AttentionCase("x", (Request(20, 60, QUADRATIC, 4),)), F32, b)


def attention_in_splits(b: Backend) -> None:
    test_attention.test_matches_reference(ATTENTION_CORRECT[1], F32, b)


def attention_in_a_cluster(b: Backend) -> None:
    case = AttentionCase("x", (Request(20, 203, CAUSAL), Request(30, 131, FULL)), kv_heads=1)
    test_attention_cluster.run(case, 2, BLACKWELL, b)


def attention_in_a_cluster_sm90(b: Backend) -> None:
    case = AttentionCase("x", (Request(20, 203, CAUSAL), Request(30, 131, FULL)), kv_heads=1)
    test_attention_cluster.run(case, 2, HOPPER, b)


def attention_of_one_row(b: Backend) -> None:
    """One CTA of the cluster merges it, from the memory of those that have nothing left to do."""
    case = AttentionCase("x", (Request(1, 203),), heads=1, kv_heads=1)
    test_attention_cluster.run(case, 4, BLACKWELL, b)


def attention_after_attention(b: Backend) -> None:
    """A cluster works through two tiles."""
    test_attention_cluster.test_more_tiles_than_clusters(BLACKWELL, b)


def attention_after_attention_sm90(b: Backend) -> None:
    test_attention_cluster.test_more_tiles_than_clusters(HOPPER, b)


def attention_in_a_cluster_of_four(b: Backend) -> None:
    test_attention_cluster.test_equal_splits_give_equal_bits(64, BLACKWELL, 4, b)


def launches(b: Backend) -> None:
    test_attention_cluster.test_dependent_launches_wait(BF16, BLACKWELL, b)


def launches_sm90(b: Backend) -> None:
    test_attention_cluster.test_dependent_launches_wait(BF16, HOPPER, b)


def launches_without_tensor_cores(b: Backend) -> None:
    test_attention_cluster.test_dependent_launches_wait(F32, HOPPER, b)


def plan(b: Backend) -> None:
    test_attention_plan.test_plans_agree(test_attention_plan.BATCHES["equals"])


def commit(b: Backend) -> None:
    test_sampler.test_against_reference(test_sampler.CASES[2], F32, b)


def commit_in_slices(b: Backend) -> None:
    test_sampler.test_against_reference(test_sampler.CASES[5], F32, b)


def commit_draws(b: Backend) -> None:
    test_sampler.test_against_reference(test_sampler.CASES[4], F32, b)


def commit_unaligned(b: Backend) -> None:
    test_sampler_kernel.test_alignment_changes_no_bit(F32, b)


def commit_long_block(b: Backend) -> None:
    test_sampler_kernel.test_long_blocks(ops.CommitRule.QUOTA, b)


def commit_with_tickets(b: Backend) -> None:
    tickets = torch.zeros(5, dtype=torch.int32)
    data = test_sampler.make(test_sampler.CASES[2]) | {"tickets": tickets}
    test_sampler.run(ops.commit_, data)
    assert not tickets.any(), "tickets must be zero again"


def ties(b: Backend) -> None:
    logits = torch.zeros(2, 20485)
    logits[:, [5, 20000]] = 5.0
    candidates = test_sampler.run(ops.commit_, test_sampler.small(logits))["candidates"]
    assert candidates.tolist() == [5, 5]


def verify(b: Backend) -> None:
    modes = [test_verify.GREEDY, test_verify.SAMPLED, test_verify.REJECTION]
    test_verify.check(test_verify.make([3, 4, 5], 8200, modes))


def verify_refusals(b: Backend) -> None:
    test_verify.check(test_verify.make([3, 4, 5], 8200, [test_verify.REJECTION] * 3))


def verify_plain_steps(b: Backend) -> None:
    modes = [test_verify.SAMPLED, test_verify.GREEDY]
    test_verify.check(test_verify.make([1, 1], 8200, modes, draft_probs=False, spare=0))


def verify_certain_drafts(b: Backend) -> None:
    modes = [test_verify.REJECTION] * 20
    test_verify.check(test_verify.make([2] * 20, 3, modes, draft_probs=False))


def verify_with_tickets(b: Backend) -> None:
    test_verify.test_tickets_are_zero_again(b)


def commit_shards(b: Backend) -> None:
    """Two slices in the second shard, which begins between two multiples of 4."""
    data = test_sampler.make(test_sampler.Case((4, 2), 8300, sampled=True))
    test_shards.check_commit(data, [70])


def verify_shards(b: Backend) -> None:
    modes = [test_verify.GREEDY, test_verify.SAMPLED, test_verify.SAMPLED, test_verify.COMMIT]
    args = test_verify.make([3, 3, 4, 2], 40, modes, draft_probs=False)
    test_shards.check_verify(args, [14, 30])


BUGS = [
    Bug("rope_no_barrier", rope, RACE),
    Bug("rope_lost_tail", rope, NUMBERS),
    Bug("rope_wrong_half", rope, NUMBERS),
    Bug("rope_wrong_page", test_kv_cache.test_append_follows_the_page_order, NUMBERS),
    Bug("rope_wrong_scale", rope_fp8, NUMBERS),
    Bug("compact_no_barrier", compact, RACE),
    Bug("compact_lost_tail", compact, NUMBERS),
    Bug("compact_wrong_place", compact, NUMBERS),
    Bug("attention_missing_barrier", attention, RACE),
    Bug("attention_early_reuse", attention, RACE),
    Bug("attention_wait_depth", attention, RACE),
    Bug("attention_wait_depth", attention, NUMBERS),
    Bug("attention_missing_barrier", attention_in_warps, RACE),
    Bug("attention_early_reuse", attention_in_warps, RACE),
    Bug("attention_wait_depth", attention_in_warps, RACE),
    Bug("attention_ring_in_use", attention_one_slot_again, RACE),
    Bug("attention_ring_in_use", attention_in_warps, RACE),
    Bug("attention_merge_early", attention_in_warps, RACE),
    Bug("attention_lost_tail", attention, NUMBERS),
    Bug("attention_mask_edge", attention, NUMBERS),
    Bug("attention_swapped_fragment", attention, NUMBERS),
    Bug("attention_wrong_page", attention, NUMBERS),
    Bug("attention_wrong_scale", attention_fp8, NUMBERS),
    Bug("attention_sm90_wrong_phase", attention_of_hopper, RACE, 90),
    Bug("attention_sm90_early_release", attention_of_hopper, RACE, 90),
    Bug("attention_sm90_missing_barrier", attention_of_hopper, RACE, 90),
    Bug("attention_sm90_no_proxy_fence", attention_of_hopper, RACE, 90),
    Bug("attention_sm90_dirty_tail", attention_of_hopper, NUMBERS, 90),
    Bug("attention_sm90_lost_tail", attention_of_hopper, NUMBERS, 90),
    Bug("attention_sm90_wrong_page", attention_of_hopper, NUMBERS, 90),
    Bug("attention_mask_edge", attention_of_hopper, NUMBERS, 90),
    Bug("attention_fp8_no_barrier", attention_fp8, RACE),
    Bug("attention_fp8_no_barrier", attention_fp8_in_warps, RACE),
    Bug("attention_fp8_lost_nan", attention_fp8_nan, NUMBERS),
    Bug("attention_fp8_lost_nan", attention_fp8_nan, NUMBERS, 90),
    Bug("attention_sm90_no_proxy_fence", attention_fp8_ahead, RACE, 90),
    Bug("attention_wait_depth", attention_fp8_ahead, RACE),
    Bug("attention_missing_barrier", attention_fp8_ahead, RACE),
    Bug("attention_head_stride", attention_groups, NUMBERS),
    Bug("attention_group_edge", attention_groups, NUMBERS),
    Bug("attention_hole_end", attention_groups, NUMBERS),
    Bug("attention_head_stride", attention_groups_in_float32, NUMBERS),
    Bug("simt_no_barrier", attention_in_splits, RACE),
    Bug("simt_lost_tail", attention_in_splits, NUMBERS),
    Bug("simt_mask_edge", attention_in_splits, NUMBERS),
    Bug("simt_wrong_page", attention_in_splits, NUMBERS),
    Bug("combine_wrong_weight", attention_in_splits, NUMBERS),
    Bug("cluster_merges_early", attention_in_a_cluster, RACE),
    Bug("cluster_parts_in_use", attention_of_one_row, EXITED),
    Bug("cluster_parts_in_use", attention_after_attention, RACE),
    Bug("cluster_merges_early", attention_in_a_cluster_sm90, RACE),
    Bug("cluster_parts_in_use", attention_after_attention_sm90, RACE),
    Bug("cluster_parts_too_early", attention_in_a_cluster_sm90, RACE),
    Bug("cluster_lost_rows", attention_in_a_cluster, NUMBERS),
    Bug("cluster_wrong_order", attention_in_a_cluster_of_four, NUMBERS),
    Bug("combine_wrong_weight", attention_in_a_cluster, NUMBERS),
    Bug("plan_no_wait", launches, EARLY),
    Bug("attention_no_wait", launches, EARLY),
    Bug("attention_sm90_no_wait", launches_sm90, EARLY),
    Bug("simt_no_wait", launches_without_tensor_cores, EARLY),
    Bug("combine_no_wait", launches, EARLY),
    Bug("plan_no_barrier", plan, RACE),
    Bug("plan_no_barrier", plan, NUMBERS),
    Bug("commit_no_barrier", commit, RACE),
    Bug("commit_judges_early", commit, RACE),
    Bug("commit_changes_early", commit_long_block, RACE),
    Bug("scan_lost_tail", commit, NUMBERS),
    Bug("scan_wrong_neighbour", commit_unaligned, NUMBERS),
    Bug("scan_bound_too_low", commit_draws, NUMBERS),
    Bug("scan_merge_weight", commit_in_slices, NUMBERS),
    Bug("scan_tie_to_higher_id", ties, NUMBERS),
    Bug("ticket_no_barrier", commit_in_slices, RACE),
    Bug("ticket_no_release", commit, RACE),
    Bug("ticket_no_acquire", commit, RACE),
    Bug("ticket_not_reset", commit_with_tickets, NUMBERS),
    Bug("ticket_not_reset", verify_with_tickets, NUMBERS),
    Bug("ticket_no_release", verify, RACE),
    Bug("ticket_no_acquire", verify, RACE),
    Bug("verify_no_barrier", verify, RACE),
    Bug("verify_walk_no_barrier", verify, RACE),
    Bug("verify_accepts_too_few", verify, NUMBERS),
    Bug("verify_rolls_back_too_few", verify, NUMBERS),
    Bug("verify_residual_keeps_draft", verify_certain_drafts, NUMBERS),
    Bug("verify_probs_no_wait", verify_refusals, RACE),
    Bug("verify_probs_no_wait", verify_refusals, RACE, gpu=90),
    Bug("verify_no_barrier", verify_plain_steps, RACE, gpu=90),
    Bug("verify_cluster_sends_early", verify_plain_steps, CLUSTER, gpu=90),
    Bug("verify_cluster_no_wait", verify_plain_steps, RACE, gpu=90),
    Bug("verify_cluster_lost_part", verify_plain_steps, RACE, gpu=90),
    Bug("verify_cluster_task_early", verify_refusals, RACE, gpu=90),
    Bug("shard_noise_not_shifted", commit_shards, NUMBERS),
    Bug("shard_id_not_global", commit_shards, NUMBERS),
    Bug("shard_wrong_stride", commit_shards, NUMBERS),
    Bug("shard_lost_slice", commit_shards, NUMBERS),
    Bug("commit_no_barrier", commit_shards, RACE),
    Bug("shard_noise_not_shifted", verify_shards, NUMBERS),
    Bug("shard_wrong_stride", verify_shards, NUMBERS),
    Bug("verify_walk_no_barrier", verify_shards, RACE),
    Bug("ticket_no_release", verify_refusals, RACE, gpu=90),
    Bug("ticket_no_acquire", verify_refusals, RACE, gpu=90),
    Bug("ticket_not_reset", verify_with_tickets, NUMBERS, gpu=90),
]


def run(bug: Bug, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(20261121)
    library = emulated.load(bug.how.variant)
    library.configure()
    monkeypatch.setattr(_library, "nld", library.ops)
    # Bodies that go to the library themselves get the variant too.
    monkeypatch.setattr(emulated, "Ops", lambda: library.ops)
    monkeypatch.setattr(emulated, "load", lambda variant=None: library)
    monkeypatch.setattr(emulated, "configure", library.configure)
    with library.gpu(bug.gpu):
        bug.body(Backend("emulated", "cpu", capability=bug.gpu))


@pytest.mark.parametrize("bug", BUGS, ids=str)
def test_is_caught(bug: Bug, monkeypatch: pytest.MonkeyPatch) -> None:
    run(bug, monkeypatch)  # without the bug there is nothing to catch
    with (
        emulated.load(bug.how.variant).bug(bug.name),
        pytest.raises(bug.how.error, match=bug.how.message or None),
    ):
        run(bug, monkeypatch)


def test_every_bug_has_a_row() -> None:
    text = "".join(
        path.read_text(encoding="utf-8")
        for path in CSRC.rglob("*.cu*")
        if path.name != "prelude.cuh" and "tests" not in path.parts
    )
    names = set(re.findall(r"\bNLD_BUG\((\w+)\)", text))
    assert len(names) > 20
    assert names == {bug.name for bug in BUGS}
