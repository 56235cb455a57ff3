"""fp8 caches in the model and decode loops: memory, scales, calibration, nld-tiny."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch

import nld_cuda
import tiny_tasks
from compare import assert_equal
from decode_cases import prompt, tiny_model
from nld_cuda import KVScales, reference
from nld_cuda.decode.kv_cache import KVCache
from nld_cuda.model import ModelConfig
from tiny_model import config_fields

FP8 = torch.float8_e4m3fn
MODES = ("ar", "linear_spec", "quadratic_spec", "diffusion")


def config() -> ModelConfig:
    return ModelConfig.from_dict(config_fields())


def test_half_the_memory() -> None:
    caches = [KVCache(config(), 7, 16, "cpu", d) for d in (torch.bfloat16, FP8)]
    assert caches[0].num_bytes == 2 * caches[1].num_bytes > 0
    assert set(caches[1].k_scales + caches[1].v_scales) == {None}


def test_growing_keeps_codes_and_scales() -> None:
    scales = KVScales(torch.full((3, 2), 0.5), torch.full((3, 2), 0.25))
    cache = KVCache(config(), 2, 4, "cpu", FP8, scales)
    assert_equal(torch.stack(cache.v_scales), scales.v, "v_scales")
    before = torch.randint(0, 256, cache.k.shape, dtype=torch.uint8)
    cache.k.view(torch.uint8).copy_(before)
    cache.grow(5)
    assert_equal(cache.k.view(torch.uint8)[:, :2], before, "codes")
    assert cache.k.dtype == FP8 and cache.k_scales[2].tolist() == [0.5, 0.5]


def test_bad_scales() -> None:
    good = KVScales(torch.ones(3, 2), torch.ones(3, 2))
    with pytest.raises(ValueError, match="scales must be None unless fp8, got some for"):
        KVCache(config(), 2, 4, "cpu", torch.float32, good)
    with pytest.raises(ValueError, match=r"scales must have shape \[3, 2\], got \[\[3, 2\], \[2"):
        KVCache(config(), 2, 4, "cpu", FP8, KVScales(good.k, good.v[:2]))
    with pytest.raises(ValueError, match="load: kv_dtype must be auto or fp8, got int4"):
        nld_cuda.load("nld-tiny", kv_dtype="int4")


def filled(model: nld_cuda.NLDModel, ids: list[int], cache: KVCache) -> KVCache:
    """The cache, of one page, after a causal pass over the tokens."""
    num = len(ids)
    index = torch.arange(num, dtype=torch.int32)
    lens = [torch.tensor(x, dtype=torch.int32) for x in ([num], [0, num], [1])]
    model.forward(
        torch.tensor(ids), index, index, cache, torch.zeros(1, 1, dtype=torch.int32), *lens
    )
    return cache


def test_calibration_takes_the_largest_magnitude_of_each_head() -> None:
    model = copy.copy(tiny_model(61).model)  # the other tests share it
    prompts = [prompt(9, 61, seed=1), prompt(23, 61, seed=2)]
    scales = nld_cuda.calibrate_kv(model, prompts, margin=1.5)
    assert model.kv_scales is scales
    largest = torch.zeros_like(scales.k), torch.zeros_like(scales.v)
    for ids in prompts:
        cache = filled(model, ids, KVCache(model.config, 1, len(ids), "cpu", model.dtype))
        for most, stored in zip(largest, (cache.k, cache.v), strict=True):
            most.copy_(torch.maximum(most, stored.abs().amax(dim=(1, 2, 4))))
    for name, most in zip("kv", largest, strict=True):
        want = most * 1.5 / 448
        torch.testing.assert_close(getattr(scales, name), want, msg=name)
    for wrong, message in (
        ({"prompts": []}, "must hold at least one, got none"),
        ({"prompts": [[]]}, "a prompt must hold at least one token"),
        ({"prompts": [[1]], "margin": 0.0}, "margin must be > 0, got 0.0"),
    ):
        with pytest.raises(ValueError, match="calibrate_kv: .*" + message):
            nld_cuda.calibrate_kv(model, **wrong)


def test_the_model_quantises_with_the_scales_of_its_layers() -> None:
    """The first layer's entries do not depend on what is read from the cache: equal codes."""
    model = copy.copy(tiny_model(61).model)  # the other tests share it
    ids = prompt(30, 61, seed=3)
    scales = nld_cuda.calibrate_kv(model, [ids])
    plain = filled(model, ids, KVCache(model.config, 1, len(ids), "cpu", model.dtype))
    model.kv_dtype = FP8
    cache = filled(model, ids, KVCache.of(model, 1, len(ids)))
    for name in ("k", "v"):
        stored, exact = getattr(cache, name), getattr(plain, name)
        want = reference.as_stored(exact[0, 0], FP8, getattr(scales, name)[0])
        assert_equal(stored[0, 0].view(torch.uint8), want.view(torch.uint8), f"{name} of layer 0")
        assert 112 < stored[0].float().abs().max() <= 448, "scaled to the range of e4m3"
        last = stored[-1].float() * getattr(scales, name)[-1][:, None]
        assert (last - exact[-1]).norm() < 0.1 * exact[-1].norm()


@pytest.mark.parametrize("calibrated", [False, True])
def test_nld_tiny_answers_with_fp8(calibrated: bool) -> None:
    model = nld_cuda.load("nld-tiny", kv_dtype="fp8")
    problems = tiny_tasks.make_heldout(2)
    if calibrated:
        nld_cuda.calibrate_kv(model, [p.prompt + p.answer for p in problems])
    for mode in MODES:
        options = {"threshold": 0.9} if mode == "diffusion" else {}
        prompts = [p.prompt for p in problems]
        result = nld_cuda.generate(model, prompts, mode, max_new_tokens=192, **options)
        right = [tiny_tasks.check(p, t) for p, t in zip(problems, result.text, strict=True)]
        assert sum(right) >= len(problems) - (mode == "diffusion"), mode


def test_a_session_keeps_its_fp8_cache() -> None:
    model = nld_cuda.load("nld-tiny", kv_dtype="fp8")
    session = nld_cuda.Session(model)
    first = tiny_tasks.make_heldout(1)[0]
    done = nld_cuda.generate(model, first.prompt, "ar", max_new_tokens=24, session=session)
    longer = model.tokenizer.encode(first.prompt) + done.tokens[0][:20]
    again = nld_cuda.generate(model, [longer], "ar", max_new_tokens=100, session=session)
    assert session.num_reused >= len(longer) - 1
    fresh = nld_cuda.generate(model, [longer], "ar", max_new_tokens=100)
    assert again.tokens == fresh.tokens


def test_cli() -> None:
    problem = tiny_tasks.make_heldout(1)[0]
    command = [sys.executable, "-m", "nld_cuda", "generate", "--kv-dtype", "fp8", problem.prompt]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert tiny_tasks.check(problem, done.stdout.strip()), done.stdout
