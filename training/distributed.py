"""Several processes under torchrun: who this one is, and sums over all. Alone, everything is the identity."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed

from training.config import launched_processes


@contextmanager
def processes(device: torch.device) -> Iterator[torch.device]:
    """Join the other processes that torchrun started, if any; give this one's device."""
    launched = launched_processes()
    if launched is None or distributed.is_initialized():
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", launched.local_rank)
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        distributed.destroy_process_group()


def rank() -> int:
    """Return this process's number; 0 writes."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def barrier() -> None:
    """Wait for every process."""
    if distributed.is_initialized():
        distributed.barrier()


def summed(values: list[float], device: torch.device) -> list[float]:
    """Return the sums over all processes, in float64."""
    if not distributed.is_initialized():
        return values
    total = torch.tensor(values, dtype=torch.float64, device=device)
    distributed.all_reduce(total)
    sums: list[float] = total.tolist()
    return sums
