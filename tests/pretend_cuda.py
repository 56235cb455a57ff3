"""Pretend that this machine has a GPU: rehearse on the CPU what tests and decoding do on CUDA.

Inside `rehearsal()`, tensors with device "cuda" exist. They lie in CPU memory and are computed on
by the CPU, but they report `is_cuda`, and an op that mixes them with CPU tensors fails as it would
on a GPU machine. So a test body that forgets to move a tensor, or code that makes a helper tensor
on the wrong device, is found where there is no GPU. The ops of `torch.ops.nld` run their CPU code.
Reads and copies that make the host wait for the device are counted in `Rehearsal.num_syncs`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
# Torch accepts CPU operands beside CUDA ones here: copies, and tensors that serve as indices.
COPIES = {aten.copy_.default, aten._to_copy.default, aten.copy.default}
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}
SYNCS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default}


class PretendCuda(Tensor):
    """A CPU tensor that says it is on the GPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> PretendCuda:
        made = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=CUDA,
        )  # fmt: skip
        made.inner = inner
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"cuda:{self.inner!r}"

    # Torch would move lists of indices to the device behind our back.
    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(_lists_to_tensors(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_lists_to_tensors(index), value)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {}, None)


def _lists_to_tensors(index: Any) -> Any:
    if isinstance(index, tuple):
        return tuple(_lists_to_tensors(i) for i in index)
    return torch.tensor(index) if isinstance(index, list) else index


def _is_cuda(x: Any) -> bool:
    return isinstance(x, PretendCuda)


def _check_devices(func: Any, leaves: list[Any]) -> bool:
    """Return whether an op runs on the pretended GPU; fail where torch would."""
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    on_cuda = [x for x in tensors if _is_cuda(x)]
    if on_cuda and func not in COPIES:
        others = [x for x in tensors if not _is_cuda(x)]
        if func in INDEXED:
            others = [] if _is_cuda(tensors[0]) else others
        is_ours = func.namespace.startswith("nld")
        # Torch takes a CPU tensor without dimensions for a number; our ops do not.
        if bad := [x for x in others if x.dim() > 0 or is_ours]:
            raise RuntimeError(
                f"{func}: expected all tensors to be on the same device, got cuda:0 and cpu "
                f"{[tuple(x.shape) for x in bad]}"
            )
    return bool(on_cuda)


def _call(func: Any, args: Any, kwargs: dict[str, Any], mode: Rehearsal | None) -> Any:
    leaves, spec = tree_flatten((args, kwargs))
    on_cuda = _check_devices(func, leaves)
    device = kwargs.get("device")
    to_cuda = on_cuda if device is None else torch.device(device).type == "cuda"
    if func is aten.copy_.default:
        to_cuda = _is_cuda(args[0])
    if mode is not None:
        between = func in COPIES and to_cuda != _is_cuda(args[-1 if len(args) > 1 else 0])
        mode.num_syncs += between or (func in SYNCS and on_cuda)
    plain = [x.inner if _is_cuda(x) else x for x in leaves]
    inner_args, inner_kwargs = tree_unflatten(plain, spec)
    if device is not None:
        inner_kwargs["device"] = torch.device("cpu")
    result = func(*inner_args, **inner_kwargs)
    if not to_cuda:
        return result
    # An in-place op returns the very object it was given.
    given = {id(x.inner): x for x in leaves if _is_cuda(x)}

    def wrap(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return given[id(x)] if id(x) in given else PretendCuda(x)

    return tree_map(wrap, result)


class Rehearsal(TorchDispatchMode):
    """The mode that catches every op. `num_syncs`: host reads of pretended CUDA tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.num_syncs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {}, self)


@contextlib.contextmanager
def rehearsal() -> Iterator[Rehearsal]:
    """Let tensors be made on "cuda" inside, and torch.cuda.is_available() be true.

    Needs a torch that was built with CUDA; a driver it needs not.
    """
    assert torch.version.cuda, f"the rehearsal needs a torch with CUDA, got {torch.__version__}"
    torch._C._ensureCUDADeviceGuardSet()
    make_tensor = torch.tensor

    def tensor(*args: Any, device: Any = None, **options: Any) -> Tensor:
        made = make_tensor(*args, **options, device="cpu")  # for another it asks for a driver
        return made.to(torch.empty(0).device if device is None else device)

    with (
        mock.patch.object(torch, "tensor", tensor),
        # Views of our kind of tensor are not made in inference mode; no_grad is all that is needed.
        mock.patch.object(torch.inference_mode, "__enter__", lambda self: None),
        mock.patch.object(torch.inference_mode, "__exit__", lambda self, *error: None),
        torch.no_grad(),
        mock.patch.object(torch.cuda, "_lazy_init", lambda: None),
        mock.patch.object(torch.cuda, "is_available", lambda: True),
        mock.patch.object(torch.cuda, "device_count", lambda: 1),
        mock.patch.object(torch.cuda, "current_device", lambda: 0),
        mock.patch.object(torch.cuda, "synchronize", lambda device=None: None),
        mock.patch.object(torch.cuda, "reset_peak_memory_stats", lambda device=None: None),
        mock.patch.object(torch.cuda, "max_memory_allocated", lambda device=None: 0),
        Rehearsal() as mode,
    ):
        yield mode
