"""Reads checkpoints: the state_dict, and what training scripts save around it. Nothing that is pickled is ever run."""

import json
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from training.checkpoint import AVERAGE_PREFIX, FACTS_KEY, OPTIMIZER_PREFIX
from training.errors import FileRefused

CHECKPOINTS = (".safetensors", ".pt", ".pth")
AVERAGE_KEYS = ("state_dict_ema", "model_ema", "ema_state_dict", "model_ema_state_dict", "ema", "swa_state_dict")
STATE_KEYS = ("state_dict", "model_state_dict", "model", *AVERAGE_KEYS, "module", "net")
STEP_KEYS = ("global_step", "step", "steps", "iteration", "num_updates")
OPTIMIZER_KEYS = ("optimizer", "optimizer_state_dict")
WRAPPERS = re.compile(r"^(module\.|_orig_mod\.|model\.(?=module\.|_orig_mod\.))+")  # DDP and torch.compile
AVERAGED = "n_averaged"  # what torch.optim.swa_utils.AveragedModel adds to a state_dict
REPAIRED_KEY = "foldserve_repaired"  # in the metadata of a safetensors file that `repair` wrote

State = dict[str, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """A state_dict under plain names. `average` is the moving average of weights that lies beside it, under `key`.

    `is_average`: the state itself is such an average. `steps` are the optimizer's, None where nothing tells them.
    """

    state: State
    average: State = field(default_factory=dict)
    key: str = ""
    is_average: bool = False
    steps: int | None = None


def read_state(path: Path) -> State:
    """Return the tensors of a checkpoint by their plain names. Raises FileRefused."""
    return read_checkpoint(path).state


def read_checkpoint(path: Path) -> Checkpoint:
    """Read `.safetensors`, `.pt` or `.pth`; wrappers' prefixes are gone from all names.

    Raises FileRefused: a `.pt` is read with weights_only=True, which builds tensors and runs no code.
    """
    try:
        found = _of_safetensors(path) if path.suffix.lower() == ".safetensors" else _of_content(path, _unpickle(path))
    except FileNotFoundError:
        raise FileRefused(f"{path} cannot be read: No such file or directory") from None
    except (OSError, SafetensorError, ValueError, RuntimeError, EOFError, KeyError) as error:
        reason = "it is none of torch.save's" if isinstance(error, KeyError) else _first_sentence(error)
        raise FileRefused(f"{path} is not a sound checkpoint ({reason}); save it again") from None
    if not found.state:
        raise FileRefused(f"{path} holds no tensors; expected a state_dict, as `model.state_dict()` gives it")
    return found


def _first_sentence(error: Exception) -> str:
    """What torch says after the first one is advice, and to a maker of files."""
    return str(error).strip().partition("\n")[0].partition(". ")[0] or type(error).__name__


def says_it_is_corrected(path: Path) -> bool:
    """Whether the file says that nothing of the initial statistics is left in it, whatever its counters suggest.

    `repair` wrote it, or it is a foldserve checkpoint with corrected or population statistics.
    """
    if path.suffix.lower() != ".safetensors":
        return False
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    return REPAIRED_KEY in metadata or _kind_of_statistics(metadata) in {"corrected", "population"}


def _kind_of_statistics(metadata: Mapping[str, str]) -> str | None:
    try:
        facts = json.loads(metadata.get(FACTS_KEY, "{}"))
    except ValueError:
        return None
    return facts.get("statistics") if isinstance(facts, dict) else None


def _of_safetensors(path: Path) -> Checkpoint:
    if not path.exists():
        raise FileNotFoundError
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    of_average = {name: value for name, value in tensors.items() if name.startswith(AVERAGE_PREFIX)}
    optimizer = {name: value for name, value in tensors.items() if name.startswith(OPTIMIZER_PREFIX)}
    steps = [int(value) for name, value in optimizer.items() if name.endswith(".step") and value.numel() == 1]
    beside = {*of_average, *optimizer}
    state, is_average = _plain({name: value for name, value in tensors.items() if name not in beside})
    average, _ = _plain({name.removeprefix(AVERAGE_PREFIX): value for name, value in of_average.items()})
    key = f"{AVERAGE_PREFIX}*" if average else ""
    return Checkpoint(state, average, key, is_average, max(steps, default=None))


def _of_content(path: Path, content: Any) -> Checkpoint:
    """Find the state_dict in what training scripts save around it."""
    around = content if isinstance(content, Mapping) else {}
    taken = ""
    for key in STATE_KEYS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content, taken = content[key], key
    if not isinstance(content, Mapping):
        raise FileRefused(f"{path} holds a {type(content).__name__}, expected a state_dict")
    state, is_average = _plain(content)
    beside = next((key for key in AVERAGE_KEYS if key != taken and isinstance(around.get(key), Mapping)), "")
    average, _ = _plain(around[beside]) if beside else ({}, False)
    return Checkpoint(state, average, beside, is_average or taken in AVERAGE_KEYS, _steps(around))


def _plain(tensors: Mapping[Any, Any]) -> tuple[State, bool]:
    """Return the tensors under plain names, in their order, and whether AveragedModel saved them."""
    named = {WRAPPERS.sub("", str(name)): value for name, value in tensors.items() if isinstance(value, Tensor)}
    return named, named.pop(AVERAGED, None) is not None


def _steps(around: Mapping[Any, Any]) -> int | None:
    """Return how many steps the optimizer took, as the file counts them, or as its optimizer does."""
    told = [around[key] for key in STEP_KEYS if isinstance(around.get(key), int)]
    for key in OPTIMIZER_KEYS:
        slots = around[key].get("state") if isinstance(around.get(key), Mapping) else None
        for slot in slots.values() if isinstance(slots, Mapping) else ():
            count = slot.get("step") if isinstance(slot, Mapping) else None
            if isinstance(count, int | float | Tensor):
                told.append(int(count))
    return max(told, default=None)


def _unpickle(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's remarks on old pickle protocols
            return torch.load(path, map_location="cpu", weights_only=True)
    except RuntimeError as error:
        if "TorchScript" not in str(error):
            raise
        raise FileRefused(
            f"{path} is a TorchScript archive, which holds code, and was not run; save plain tensors: "
            "torch.save(model.state_dict(), …), or safetensors"
        ) from None
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|Unsupported class) (\S+)", str(error))
        what = f" ({found[1]})" if found else ""
        raise FileRefused(
            f"{path} holds pickled code{what} and was not run; save plain tensors: torch.save(model.state_dict(), …), "
            "or safetensors"
        ) from None
