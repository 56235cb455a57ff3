"""Streams, CUDA graphs, devices and host synchronisation; and replays on every backend.

Tests marked `cuda` need a GPU. The others run everywhere: a graph's replay with changed lengths is
a second call with the same buffers, which the emulated kernels can be asked for as well (a ticket
that is not reset, a length that was baked in).
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import nld_cuda
from decode_cases import prompt, tiny_model
from nld_cuda import _library, ops
from nld_cuda.decode.options import make_requests, make_settings
from nld_cuda.decode.run import Run
from nld_cuda.decode.state import Pass
from nld_cuda.model import NLDModel, fp8, int4
from nld_cuda.model.transformer import Layer
from nld_cuda.quantize import quantize
from replay_cases import NUM_VARIANTS, REPLAY_CASES, Call, ReplayCase

HAS_CUDA = torch.cuda.is_available() and bool(_library.C.cuda_archs())


def needs_cuda(function: Callable) -> Callable:
    skip = pytest.mark.skipif(not HAS_CUDA, reason="no GPU here, or a library without CUDA code")
    return pytest.mark.cuda(skip(function))


cases = pytest.mark.parametrize("case", REPLAY_CASES, ids=str)
MODES = ["ar", "linear_spec", "quadratic_spec", "diffusion"]


def capture(function: Callable[[], object]) -> Callable[[], None]:
    """Capture a function in a CUDA graph, after one run on the side that warms things up."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


@cases
def test_replay_with_changed_lengths(case: ReplayCase, backend: Any) -> None:
    """The same buffers, every variant twice and in another order; on CUDA as a graph's replays."""
    call = Call(case, backend.device)
    replay: Callable[[], None] = call
    if backend.name == "cuda":
        replay = capture(call)
    for variant in [*range(NUM_VARIANTS), 2, 0, 0, 3, 1]:
        call.fill(variant)
        replay()
        call.check(variant)


@cases
def test_results_do_not_change(case: ReplayCase, backend: Any) -> None:
    """Equal inputs give equal bits, whatever ran before."""
    call = Call(case, backend.device)
    first = {}
    for variant in (1, 0, 1, 3, 1):
        call.fill(variant)
        call()
        for name in case.written:
            result = call.buffers[name].cpu().clone()
            if variant == 1:
                same = torch.equal(
                    result.view(torch.uint8), first.setdefault(name, result).view(torch.uint8)
                )
                assert same, name


def busy_ms(ms: float) -> None:
    """Keep the current stream busy for about so long, counting at 2 GHz."""
    torch.cuda._sleep(int(ms * 2e6))


@needs_cuda
@cases
def test_side_stream(case: ReplayCase) -> None:
    """An op runs on the current stream: after what was queued there, and nothing else waits."""
    call = Call(case, "cuda")
    sources = {
        name: x.pin_memory() for name, x in case.make(1).items() if isinstance(x, torch.Tensor)
    }
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()  # loads the kernels, and takes the workspace's memory for this stream
        side.synchronize()
        busy_ms(100)
        for name, x in sources.items():
            call.buffers[name].copy_(x, non_blocking=True)
        call()
        assert not side.query(), "the op waited for the device"
    assert torch.cuda.current_stream().query(), "the default stream has work it should not have"
    side.synchronize()
    call.check(1)


@needs_cuda
@cases
def test_no_host_sync(case: ReplayCase) -> None:
    """A call returns while the device is busy, and allocates nothing from the driver."""
    call = Call(case, "cuda")
    call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        segments = torch.cuda.memory_stats()["segment.all.allocated"]
        busy_ms(300)
        begin = time.perf_counter()
        for _ in range(3):
            call()
        seconds = time.perf_counter() - begin
        assert not torch.cuda.current_stream().query(), "the op waited for the device"
        assert seconds < 0.15, f"three calls took {seconds:.3f} s of host time"
        assert torch.cuda.memory_stats()["segment.all.allocated"] == segments
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()


@needs_cuda
@cases
def test_from_another_thread(case: ReplayCase) -> None:
    """A thread that never touched CUDA before finds the tensors' device."""
    call = Call(case, "cuda")
    call.fill(2)
    torch.cuda.synchronize()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            call()
            torch.cuda.synchronize()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures, failures
    call.check(2)


@needs_cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU here, two are needed")
@cases
def test_tensors_on_the_second_device(case: ReplayCase) -> None:
    call = Call(case, "cuda:1")
    call.fill(1)
    assert torch.cuda.current_device() == 0
    call()
    assert torch.cuda.current_device() == 0, "the current device must be given back"
    call.check(1)


@needs_cuda
def test_mixed_devices_are_refused() -> None:
    noise = torch.zeros(2, 8, device="cuda")
    seed, positions = torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="gumbel_noise_: seed must be on the device of noise"):
        ops.gumbel_noise_(noise, seed, positions.cuda())
    with pytest.raises(RuntimeError, match="gumbel_noise_: positions must be on the device"):
        ops.gumbel_noise_(noise, seed.cuda(), positions)


@needs_cuda
@pytest.mark.parametrize("rows", [32, 300])
@pytest.mark.parametrize("format", ["int4", "fp8", "fp8 scaled"])
def test_quantized_product_in_a_graph(format: str, rows: int) -> None:
    """A replay reads the rows anew, and equals the call."""
    weight, device = torch.randn(256, 512), torch.device("cuda")
    if format == "int4":
        codes, scales = int4.quantize(weight, 128)
        product = int4.make_matrix(int4.pack_words(codes), scales, device).product
    else:
        codes, scales = fp8.quantize(weight)
        way = fp8.scaled_product(device) if format == "fp8 scaled" else None
        product = fp8.Fp8Matrix(codes.cuda(), scales.float().cuda(), way).product
    x = torch.randn(rows, 512, device="cuda").bfloat16()
    out = x.new_empty(rows, 256)
    replay = capture(lambda: out.copy_(product(x)))
    x.normal_()
    replay()
    assert torch.equal(out, product(x))


# ---- whole decoding --------------------------------------------------------------------------


def on_cuda(model: NLDModel) -> NLDModel:
    """Return the same weights on the GPU."""

    def move(layer: Layer) -> Layer:
        names = ("input_norm", "qkv", "o", "mlp_norm", "gate_up", "down")
        weights = {name: getattr(layer, name).cuda() for name in names}
        lora = layer.lora
        if lora is not None:
            lora = replace(lora, a=lora.a.cuda(), b=lora.b.cuda())
        return Layer(**weights, lora=lora)

    embed = model.embed.cuda()
    head = embed if model.head is model.embed else model.head.cuda()
    return NLDModel(model.config, embed, [move(x) for x in model.layers], model.norm.cuda(), head)


def start(model: NLDModel, mode: str, heat: float) -> Run:
    given = dict.fromkeys(
        ("block_length", "threshold", "rule", "quota", "revise_threshold", "spec_sampling",
         "mask_token_id")
    )  # fmt: skip
    if mode != "ar":
        given["block_length"] = 4
    settings = make_settings(model, mode, lora="auto", page_size=4, **given)
    requests = make_requests(
        model, [prompt(n, 61, seed=3) for n in (5, 1, 9)], None, max_new_tokens=[24, 17, 30],
        temperature=heat, threshold=None, seed=7, eos_token_id=(), max_thinking_tokens=None,
        end_think_token_id=None,
    )  # fmt: skip
    run = Run(model, requests, settings)
    run.start()
    return run


def finish(run: Run) -> list[list[int]]:
    for _ in range(300):
        if run.state.all_done():
            return run.tokens()
        run.advance()
    raise AssertionError("the decode loop does not end")


@pytest.fixture
def exact_matmuls() -> Iterator[None]:
    """Full float32 products, so that CPU and GPU differ in the last bits only."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@needs_cuda
@pytest.mark.parametrize("heat", [0.0, 0.8])
@pytest.mark.parametrize("mode", MODES)
def test_decode_equals_cpu(mode: str, heat: float, exact_matmuls: None) -> None:
    model = tiny_model(61).model
    assert finish(start(on_cuda(model), mode, heat)) == finish(start(model, mode, heat))


@needs_cuda
@pytest.mark.parametrize("mode", MODES)
def test_decode_step_in_a_graph(mode: str, exact_matmuls: None) -> None:
    """One captured cycle, replayed to the end, gives the tokens of the eager loop."""
    model = on_cuda(tiny_model(61).model)
    expected = finish(start(model, mode, 0.8))
    run = start(model, mode, 0.8)

    @torch.inference_mode()
    def cycle() -> None:
        while run.mode.advance() == Pass.DRAFT and mode == "linear_spec":
            pass

    replay = capture(cycle)  # its warm-up has run one cycle
    for _ in range(100):
        if run.state.all_done():
            break
        replay()
    assert run.tokens() == expected


@needs_cuda
@pytest.mark.parametrize("mode", MODES)
def test_decode_steps_do_not_wait(mode: str, exact_matmuls: None) -> None:
    """Between two polls the host never waits for the device."""
    run = start(on_cuda(tiny_model(61).model), mode, 0.8)
    run.advance()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.inference_mode():
            for _ in range(4):
                run.mode.advance()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()


@needs_cuda
@pytest.mark.parametrize("format", ["int4", "fp8"])
def test_quantized_checkpoint(format: str, tmp_path: Path) -> None:
    """nld-tiny, quantised, solves problems in every mode."""
    quantize("nld-tiny", tmp_path, format=format, group_size=32 if format == "int4" else None)
    model = nld_cuda.load(tmp_path, device="cuda")
    lines = (nld_cuda.api.ASSETS / "nld-tiny/heldout.jsonl").read_text().splitlines()[:160:10]
    problems = [json.loads(line) for line in lines]
    for mode in MODES:
        found = nld_cuda.generate(model, [p["prompt"] for p in problems], mode, max_new_tokens=240)
        assert found.text is not None
        pairs = zip(found.text, problems, strict=True)
        assert sum(text.strip() != p["answer"].strip() for text, p in pairs) <= 1
