"""The emulator itself: its primitives, the rules it enforces, its race checker and its counters.

The kernels are C++ (csrc/emulator/tests): right ones, about which nothing may be reported, and ones
that break one rule each.
"""

from __future__ import annotations

import os
import re
import subprocess

import pytest
import torch

import emulated
from nld_cuda import ops

NUM_CASES = 27


def check(variant: str, order: str, landing: str, seed: int, max_resident: int) -> None:
    emulated.make(f"nld_emulator_test_{variant}")
    program = emulated.BUILD / f"nld_emulator_test_{variant}"
    numbers = [emulated.ORDERS.index(order), emulated.LANDINGS.index(landing), seed, max_resident]
    # A launch that fails abandons its fibers, and what their frames own.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(
        [str(program), *map(str, numbers)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert done.returncode == 0 and "\n0 failed" in done.stdout, done.stdout + done.stderr
    assert len(re.findall(r"^ok ", done.stdout, re.MULTILINE)) == NUM_CASES, done.stdout


@pytest.mark.parametrize("max_resident", [0, 1024])
@pytest.mark.parametrize("landing", emulated.LANDINGS)
@pytest.mark.parametrize("order", emulated.ORDERS)
def test_emulator(order: str, landing: str, max_resident: int) -> None:
    check("plain", order, landing, 3, max_resident)


@pytest.mark.parametrize("max_resident", [0, 1024])
@pytest.mark.parametrize("order", emulated.ORDERS)
def test_race_checker(order: str, max_resident: int) -> None:
    check("checked", order, "random", 5, max_resident)


def test_emulator_under_address_sanitizer() -> None:
    check("asan", "random", "random", 7, 1024)


def test_traffic_of_a_known_op(traffic) -> None:
    """rope_append_: q read and written, k and v read, both cache rows written, each once."""
    tokens, heads, kv_heads, dim = 6, 4, 2, 32
    q = torch.randn(tokens, heads, dim)
    k, v = torch.randn(tokens, kv_heads, dim), torch.randn(tokens, kv_heads, dim)
    k_cache, v_cache = torch.zeros(3, 4, kv_heads, dim), torch.zeros(3, 4, kv_heads, dim)
    positions = torch.arange(tokens, dtype=torch.int32)
    slots = torch.tensor([0, 5, -1, 7, 8, 11], dtype=torch.int32)
    inv_freq = torch.rand(dim // 2)
    with traffic(q) as of_q, traffic(k) as of_k, traffic(k_cache) as of_k_cache, traffic(v) as of_v:
        ops.rope_append_(q, k, v, k_cache, v_cache, positions, slots, inv_freq)
    kv_bytes = kv_heads * dim * 4
    assert (of_q.read_bytes, of_q.written_bytes) == (q.nbytes, q.nbytes)
    assert (of_k_cache.read_bytes, of_k_cache.written_bytes) == (0, 5 * kv_bytes)
    assert of_k.written_bytes == of_v.written_bytes == 0
    assert {of_k.read_bytes, of_v.read_bytes} <= {5 * kv_bytes, 6 * kv_bytes}


def test_reports_become_exceptions() -> None:
    """What the emulator has to say reaches Python, with the place in the sources."""
    library = emulated.load()
    library.configure()
    cache = torch.zeros(1, 2, 2, 1, 4)
    table, base = torch.tensor([[0, 1]]).int(), torch.tensor([0]).int()
    kept = torch.tensor([2]).int()
    with pytest.raises(RuntimeError, match=r"must hold: (.|\n)*kernel\.cuh:\d+, block \(0,0,0\)"):
        library.ops.compact_(cache, cache.clone(), table, base, torch.tensor([[3, 1]]).int(), kept)
    offsets = torch.tensor([[1, 3]]).int()
    library.ops.compact_(cache, cache.clone(), table, base, offsets, kept)  # and it goes on
