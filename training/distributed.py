"""Several processes under torchrun: who this one is, and sums over all. Alone, everything is the identity."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import distributed

from service.wording import counted
from training.environment import Launched, launched_processes


@contextmanager
def processes(device: torch.device, say: Callable[[str], None] = print) -> Iterator[torch.device]:
    """Join the other processes that torchrun started, if any; give this one's device. Raises UsageError."""
    launched = launched_processes()
    if launched is None or distributed.is_initialized():
        yield device
        return
    backend = "gloo"
    if device.type == "cuda":
        gpus = torch.cuda.device_count()
        index, backend = place(launched, gpus)
        if backend == "gloo" and launched.local_rank == 0:
            say(slow(launched, gpus))
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    distributed.init_process_group(backend, device_id=device if backend == "nccl" else None)
    try:
        yield device
    finally:
        distributed.destroy_process_group()


def place(launched: Launched, gpus: int) -> tuple[int, str]:
    """Return the number of this process's GPU, and what carries sums.

    NCCL takes one process a GPU. Where processes share one, gloo carries the sums over the CPU: slower, and right.
    """
    return launched.local_rank % gpus, "nccl" if launched.local_world_size <= gpus else "gloo"


def slow(launched: Launched, gpus: int) -> str:
    """Say that sums take the CPU, and how they would not."""
    return (
        f"{counted(launched.local_world_size, 'process')} on this machine see {counted(gpus, 'GPU')}: sums go through "
        "gloo over the CPU, which is slow; start as many as there are GPUs, and let each process see all of them"
    )


def rank() -> int:
    """Return this process's number; 0 writes."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def is_joined() -> bool:
    """True where torchrun started this process, be it the only one."""
    return distributed.is_initialized()


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


def gathered(text: str) -> list[str]:
    """Return the texts of all processes, by rank."""
    texts = [text] * world_size()
    if distributed.is_initialized():
        distributed.all_gather_object(texts, text)
    return texts
