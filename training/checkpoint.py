"""Checkpoints: a safetensors file with every parameter and every BatchNorm buffer, and its facts as JSON inside.

Written whole or not at all. `last` holds raw running statistics and also carries the optimizer and the average of
weights, so that a run resumes where it stopped; what is random follows from its epoch and step. Corrected and
population statistics go to `best` alone.
"""

import contextlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from training.errors import RunError
from training.normalization.layers import Statistics

FACTS_KEY = "foldserve"
OPTIMIZER_PREFIX = "optimizer."
AVERAGE_PREFIX = "average."
SLOTS = {  # what torch keeps for a weight
    "SGD": {"momentum_buffer"},
    "AdamW": {"step", "exp_avg", "exp_avg_sq"},
    "Adagrad": {"step", "sum"},
}
RUN_S_OWN = "let config.json be what the run was trained with, or train anew with another --out"
MISSING_STATISTICS = (
    "; BatchNorm statistics were not saved, only trainable variables: save the whole state_dict, or estimate them anew"
)


@dataclass(frozen=True, slots=True)
class Facts:
    """What a checkpoint is: where the run stood, how it does on validation, which BatchNorm statistics it holds.

    `epoch` epochs and `step` steps of the next one are done; `tally` are the sums of that one so far.
    """

    epoch: int
    validation_accuracy: float
    best_epoch: int
    best_validation_accuracy: float
    best_validation_loss: float
    seconds: float
    statistics: Statistics | Literal["running"] = "raw"  # running: what raw was called first
    step: int = 0
    tally: dict[str, float] = field(default_factory=dict)
    threads: int = 0
    compared: dict[str, float] = field(default_factory=dict)  # validation accuracy by kind of statistics
    loss_scale: dict[str, Any] = field(default_factory=dict)  # float16's, and steps skipped in a row
    data: str = ""  # the data set's digest
    warm_up_seconds: float = 0.0  # outside of `seconds`, each time that the run went on
    compiled: bool = False  # the steps since it went on last

    @classmethod
    def at_start(cls, data: str) -> Self:
        """Return the facts of a run that has not begun, on data of this digest."""
        return cls(0, 0.0, 0, -1.0, 0.0, 0.0, threads=torch.get_num_threads(), data=data)


def save_checkpoint(
    path: Path,
    model: nn.Module,
    facts: Facts,
    optimizer_state: dict[str, Tensor] | None = None,
    average_state: dict[str, Tensor] | None = None,
) -> None:
    """Write model state, and the optimizer's and average's where given, at once. Raises RunError on a full disk."""
    tensors = dict(model.state_dict())
    tensors |= {OPTIMIZER_PREFIX + name: tensor for name, tensor in (optimizer_state or {}).items()}
    tensors |= {AVERAGE_PREFIX + name: tensor for name, tensor in (average_state or {}).items()}
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, save(plain, metadata={FACTS_KEY: json.dumps(asdict(facts))}))


def load_checkpoint(path: Path, model: nn.Module) -> tuple[Facts, dict[str, Tensor]]:
    """Load a checkpoint into `model`; return its facts and the optimizer's tensors.

    Raises RunError naming the file and the first key that is missing, unknown or of another shape.
    """
    facts, tensors = _read(path)
    optimizer = _taken(tensors, OPTIMIZER_PREFIX)
    _taken(tensors, AVERAGE_PREFIX)
    _check_keys(path, model.state_dict(), tensors)
    model.load_state_dict(tensors)
    return facts, optimizer


def read_facts(path: Path) -> Facts:
    """Return a checkpoint's facts alone. Raises RunError."""
    return _read(path)[0]


def refuse_other_data(path: Path, digest: str) -> None:
    """Raise RunError where a checkpoint says that it was trained on data of another digest; older ones do not say."""
    recorded = read_facts(path).data
    if recorded and recorded != digest:
        raise RunError(
            f"{path}: the data set has changed since then; bring its images and labels back, or train anew with "
            "another --out"
        )


def load_average(path: Path, average: nn.Module) -> None:
    """Load the average of weights that a checkpoint carries. Raises RunError."""
    tensors = _taken(_read(path)[1], AVERAGE_PREFIX)
    _check_keys(path, average.state_dict(), tensors)
    average.load_state_dict(tensors)


def _read(path: Path) -> tuple[Facts, dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            facts = Facts(**json.loads((file.metadata() or {})[FACTS_KEY]))
            return facts, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except FileNotFoundError:
        raise RunError(f"{path} is missing; train first, or name the run folder") from None
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise RunError(f"{path} is not a sound checkpoint: {error}") from None


def _taken(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    names = [name for name in tensors if name.startswith(prefix)]
    return {name.removeprefix(prefix): tensors.pop(name) for name in names}


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


def restore_optimizer(path: Path, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` returned, each tensor in the memory layout of its weight.

    Files hold contiguous tensors, and torch's fused kernels refuse a state whose strides are not the weight's.
    Raises RunError where the state in `path` is that of another optimizer, or of other weights.
    """
    _check_slots(path, optimizer, tensors)
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, _, slot = name.partition(".")
        state.setdefault(int(index), {})[slot] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    for weight, slots in optimizer.state.items():
        for slot, value in slots.items():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                slots[slot] = torch.empty_like(weight, dtype=value.dtype, device=value.device).copy_(value)


def _check_slots(path: Path, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    wanted = SLOTS[type(optimizer).__name__]
    found: dict[int, set[str]] = {}
    for name, tensor in tensors.items():
        index, _, slot = name.partition(".")
        found.setdefault(int(index), set()).add(slot)
        if int(index) >= len(weights) or tensor.shape not in {weights[int(index)].shape, torch.Size()}:
            raise RunError(f"{path} holds an optimizer's state for other weights; {RUN_S_OWN}")
    if any(slots != wanted for slots in found.values()):
        told = ", ".join(sorted(set().union(*found.values())))
        raise RunError(f"{path} holds {told} of another optimizer than {type(optimizer).__name__}; {RUN_S_OWN}")


def _check_keys(path: Path, wanted: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    for name, tensor in wanted.items():
        if name not in found:
            hint = MISSING_STATISTICS if "running_" in name else "; it belongs to another network"
            raise RunError(f"{path} has no {name}{hint}")
        if found[name].shape != tensor.shape:
            shapes = f"{tuple(found[name].shape)}, the network needs {tuple(tensor.shape)}"
            raise RunError(f"{path}: {name} has shape {shapes}; it belongs to another network")
    if unknown := sorted(set(found) - set(wanted)):
        raise RunError(f"{path} has {unknown[0]}, which the network has not; it belongs to another network")
