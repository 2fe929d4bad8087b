"""Checkpoints: a safetensors file with every parameter and every BatchNorm buffer, and its facts as JSON inside.

Written whole or not at all. `last` also carries the optimizer, so that a run resumes where it stopped.
"""

import contextlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from training.errors import RunError

FACTS_KEY = "foldserve"
OPTIMIZER_PREFIX = "optimizer."


@dataclass(frozen=True, slots=True)
class Facts:
    """What a checkpoint is: the epoch it ends, how it does on validation, and which BatchNorm statistics it holds."""

    epoch: int
    validation_accuracy: float
    best_epoch: int
    best_validation_accuracy: float
    best_validation_loss: float
    seconds: float
    statistics: Literal["running"] = "running"


def save_checkpoint(
    path: Path, model: nn.Module, facts: Facts, optimizer_state: dict[str, Tensor] | None = None
) -> None:
    """Write model state, and the optimizer's where given, in one atomic step. Raises RunError when the disk refuses."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    for name, tensor in (optimizer_state or {}).items():
        tensors[OPTIMIZER_PREFIX + name] = tensor.detach().cpu().contiguous()
    write_atomically(path, save(tensors, metadata={FACTS_KEY: json.dumps(asdict(facts))}))


def load_checkpoint(path: Path, model: nn.Module) -> tuple[Facts, dict[str, Tensor]]:
    """Load a checkpoint into `model`; return its facts and the optimizer's tensors.

    Raises RunError naming the file and the first key that is missing, unknown or of another shape.
    """
    try:
        with safe_open(path, framework="pt") as file:
            facts = Facts(**json.loads((file.metadata() or {})[FACTS_KEY]))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except FileNotFoundError:
        raise RunError(f"{path} is missing; train first, or name the run folder") from None
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise RunError(f"{path} is not a sound checkpoint: {error}") from None
    optimizer = {
        name.removeprefix(OPTIMIZER_PREFIX): tensors.pop(name)
        for name in list(tensors)
        if name.startswith(OPTIMIZER_PREFIX)
    }
    _check_keys(path, model.state_dict(), tensors)
    model.load_state_dict(tensors)
    return facts, optimizer


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new one. Raises RunError when the disk refuses."""
    partial = path.with_name(f".{path.name}.part")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):  # the folder itself may be what is wrong
            partial.unlink(missing_ok=True)
        raise RunError(f"{path} cannot be written: {error.strerror}; what was there is untouched") from None


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's state as named tensors: `<parameter number>.<name>`."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": value
        for index, slots in state.items()
        for name, value in slots.items()
        if isinstance(value, Tensor)
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` returned."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, _, slot = name.partition(".")
        state.setdefault(int(index), {})[slot] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _check_keys(path: Path, wanted: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    for name, tensor in wanted.items():
        if name not in found:
            hint = "; BatchNorm statistics were not saved, only trainable variables" if "running_" in name else ""
            raise RunError(f"{path} has no {name}{hint}")
        if found[name].shape != tensor.shape:
            shapes = f"{tuple(found[name].shape)}, the network needs {tuple(tensor.shape)}"
            raise RunError(f"{path}: {name} has shape {shapes}; it belongs to another network")
    if unknown := sorted(set(found) - set(wanted)):
        raise RunError(f"{path} has {unknown[0]}, which the network has not; it belongs to another network")
