"""The step's arithmetic through torch.compile, where that is asked for and this machine can. Knows no optimizer.

What is compiled is a function that calls the network: the network itself, its names and its state stay as they are.
"""

from collections.abc import Callable, Sequence
from subprocess import SubprocessError
from typing import Any, ParamSpec, TypeVar

import torch

from training.config import TrainConfig
from training.errors import RunError

P = ParamSpec("P")
R = TypeVar("R")
# What comes out of torch where a compiler, Triton or a library of theirs is missing or fails.
FAILURES = (RuntimeError, OSError, ImportError, SubprocessError)


def is_wanted(config: TrainConfig, device: torch.device) -> bool:
    """True where steps are to be compiled: `on`, or `auto` on CUDA."""
    return config.compile == "on" or (config.compile == "auto" and device.type == "cuda")


def compiled(run: Callable[P, R]) -> Callable[P, R]:
    """Return `run` compiled when it is first called, for one shape of batch, since training drops partial ones.

    What was compiled before is forgotten: torch keeps at most eight forms of a function, and then stops compiling.
    """
    torch.compiler.reset()
    return torch.compile(run, dynamic=False)


def refusal(reason: str) -> RunError:
    """Return in our words that a step could not be compiled here."""
    return RunError(
        f"compile = on: torch could not compile the step here ({reason}); it needs a C++ "
        "compiler on a CPU, Triton and a C compiler on CUDA, and a Python that it knows; or set compile = off"
    )


def failure(reasons: Sequence[str]) -> str | None:
    """Return the first reason of all processes, by rank, why one cannot compile; None where every one can."""
    for rank, reason in enumerate(reasons):
        if reason:
            return f"rank {rank} of {len(reasons)}: {reason}" if len(reasons) > 1 else reason
    return None


def reason_of(error: BaseException) -> str:
    """Return the innermost error's first line: torch wraps what a compiler says."""
    inner: Any = error
    while (deeper := getattr(inner, "inner_exception", None) or inner.__cause__) is not None:
        inner = deeper
    lines = str(inner).strip().splitlines()
    return lines[0] if lines else type(inner).__name__
