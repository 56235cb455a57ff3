"""Process groups: joining the one that torchrun started, and doing something on all ranks alike."""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
# Of a collective. Long, because the ranks of `nld chat` wait for what rank 0 reads; a rank that
# fails ends the others much sooner, through torchrun or its closed connections.
TIMEOUT = timedelta(days=1)


def was_launched() -> bool:
    """Whether torchrun (or a launcher that sets its variables) started several processes."""
    given = all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))
    return given and int(os.environ["WORLD_SIZE"]) > 1


def init() -> Any:
    """Join the processes that torchrun started and return their group, as `load` takes it.

    NCCL carries CUDA tensors, gloo those of the CPU. A group that is initialised already is used.

    Returns:
        A `torch.distributed.ProcessGroup`; None where this process runs alone.

    Raises:
        RuntimeError: this torch has no torch.distributed.
    """
    if not was_launched() and not (dist.is_available() and dist.is_initialized()):
        return None
    if not dist.is_available():
        raise RuntimeError("parallel: torch must be built with torch.distributed, this one is not")
    if not dist.is_initialized():
        nccl = torch.cuda.is_available() and dist.is_nccl_available()
        dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo", timeout=TIMEOUT)
        atexit.register(_leave)
    return dist.group.WORLD


def _leave() -> None:
    """End the group before Python does.

    A thread of gloo drops the Python objects of a collective a moment after it has finished. One
    that has to wait for the interpreter lock while Python shuts down takes the process with it.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    time.sleep(0.1)


def check_group(group: Any) -> None:
    """Raise TypeError or ValueError unless `group` is one that holds this process."""
    if not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise TypeError(
            "load: process_group must be a torch.distributed.ProcessGroup or None, got "
            f"{type(group).__name__}"
        )
    if dist.get_rank(group) < 0:
        raise ValueError("load: process_group must hold this process, got one without it")


def local_device(group: Any) -> torch.device:
    """The GPU of this process: cuda:LOCAL_RANK, which becomes torch's current device.

    Raises:
        ValueError: torch finds fewer GPUs than processes of this machine.
    """
    index, found = (
        int(os.environ.get("LOCAL_RANK", dist.get_rank(group))),
        torch.cuda.device_count(),
    )
    if index >= found:
        raise ValueError(
            f"load: device must be one GPU per process, cuda:{index} for this one, but torch finds "
            f"{found}"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def together(group: Any, what: str, work: Callable[[], T]) -> T:
    """Do `work` on every rank; where it fails on one, fail on all instead of waiting for it.

    Raises:
        Whatever `work` raises here; RuntimeError where it has failed on other ranks only.
    """
    failure: Exception | None = None
    try:
        result = work()
    except Exception as error:
        failure = error
    messages = gather_objects(group, None if failure is None else str(failure))
    if failure is not None:
        raise failure
    for rank, message in enumerate(messages):
        if message is not None:
            raise RuntimeError(f"{what}: every rank must succeed, rank {rank} got: {message}")
    return result


def require_equal(values: list[Any], what: str) -> None:
    """Raise ValueError unless all ranks gave the same, of `gather_objects`: on all or on none."""
    for rank, value in enumerate(values):
        if value != values[0]:
            raise ValueError(
                f"{what} must be the same on all ranks, rank {rank} got others than rank 0"
            )


def gather_objects(group: Any, value: Any) -> list[Any]:
    """`value` of every rank, in order. Pickled: for small host objects of our own."""
    values = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values
