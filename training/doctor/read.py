"""From a file, or a run folder, to what is examined. Nothing that is pickled is ever run."""

import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from service.artifact import MANIFEST_KEY
from service.manifest import Manifest
from training.doctor.graph import damaged_weights, layer_of, norm_nodes
from training.doctor.norms import Layer, Subject
from training.errors import FileRefused, UsageError
from training.fitting import BEST_FILE
from training.folding.graph_constants import Constants
from training.foreign.read import load_onnx
from training.run import CONFIG_FILE, read_config

CHECKPOINTS = (".safetensors", ".pt", ".pth")
STATE_KEYS = ("state_dict", "model_state_dict", "model", "state_dict_ema", "model_ema", "module", "net")
WRAPPERS = re.compile(r"^(module\.|_orig_mod\.|model\.(?=module\.|_orig_mod\.))+")  # DDP and torch.compile
OPTIMIZER = "optimizer."
REPAIRED_KEY = "foldserve_repaired"  # in the metadata of a safetensors file that `repair` wrote
NOT_BATCH_NORM = re.compile(r"(^|[._])(ln|gn|layer_?norm|group_?norm|rms_?norm)", re.IGNORECASE)
NAMED_BATCH_NORM = re.compile(r"(^|[._])(bn|batch_?norm)\d*$", re.IGNORECASE)


def read_subject(path: Path, momentum: float | None = None) -> Subject:
    """Read `.onnx`, `.safetensors`, `.pt`, `.pth` or a run folder; `momentum`, PyTorch's, holds for every layer.

    Raises FileRefused for a file that cannot be read safely, UsageError for one of another kind.
    """
    if path.is_dir():
        if not (path / CONFIG_FILE).exists():
            raise UsageError(f"{path} is not a run folder: it has no {CONFIG_FILE}; name a file, or a run folder")
        found = read_config(path).bn_momentum
        return state_subject(path, read_state(path / BEST_FILE), momentum or found, "run folder")
    if path.suffix == ".onnx":
        return onnx_subject(path, load_onnx(path), momentum)
    if path.suffix in CHECKPOINTS:
        subject = state_subject(path, read_state(path), momentum, "checkpoint")
        return _as_repaired(subject) if _was_repaired(path) else subject
    raise UsageError(f"{path}: expected .onnx, {', '.join(CHECKPOINTS)} or a run folder")


def onnx_subject(path: Path, model: onnx.ModelProto, momentum: float | None = None) -> Subject:
    """Return what a graph holds; where foldserve wrote it, its manifest tells of the layers that were folded away."""
    known = Constants.of(model)
    layers = [replace(layer_of(node, known), momentum=momentum) for node in norm_nodes(model.graph)]
    kept = {layer.name for layer in layers}
    manifest = _manifest(model)
    recorded = [] if manifest is None else list(_recorded(manifest, momentum, kept))
    return Subject(
        str(path),
        "ONNX graph" if manifest is None else "artifact",
        (*layers, *recorded),
        damaged=damaged_weights(model),
        folded=0 if manifest is None else len(manifest.folds),
        model=model,
    )


def read_state(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by their plain names; wrappers' prefixes and the optimizer's are gone.

    Raises FileRefused: a `.pt` is read with weights_only=True, which builds tensors and runs no code.
    """
    try:
        tensors = _read_safetensors(path) if path.suffix == ".safetensors" else _state_of(path, _unpickle(path))
    except FileNotFoundError:
        raise FileRefused(f"{path} cannot be read: no such file") from None
    except (OSError, SafetensorError, ValueError, RuntimeError, EOFError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise FileRefused(f"{path} is not a sound checkpoint ({reason}); save it again") from None
    plain = {WRAPPERS.sub("", name): tensor for name, tensor in tensors.items() if not name.startswith(OPTIMIZER)}
    if not plain:
        raise FileRefused(f"{path} holds no tensors; expected a state_dict, as `model.state_dict()` gives it")
    return plain


def state_subject(path: Path, state: Mapping[str, Tensor], momentum: float | None, kind: str) -> Subject:
    """Return the BatchNorm layers of a state_dict."""
    names = [name.removesuffix(".running_var") for name in state if name.endswith(".running_var")]
    halves = [name.removesuffix(".running_mean") for name in state if name.endswith(".running_mean")]
    halves += [name.removesuffix(".num_batches_tracked") for name in state if name.endswith(".num_batches_tracked")]
    layers = tuple(_layer(name, state, momentum) for name in names if f"{name}.running_mean" in state)
    complete = {layer.name for layer in layers}
    missing = sorted(({*names, *halves} - complete) | set(_bare_norms(state)))
    of_norms = tuple(f"{name}." for name in complete)
    damaged = [name for name, value in state.items() if not name.startswith(of_norms) and _is_damaged(value)]
    counts = kind != "ONNX graph"
    return Subject(str(path), kind, layers, counts_batches=counts, missing=tuple(missing), damaged=tuple(damaged))


def _layer(name: str, state: Mapping[str, Tensor], momentum: float | None) -> Layer:
    counter = state.get(f"{name}.num_batches_tracked")
    return Layer(
        name,
        running_mean=_array(state[f"{name}.running_mean"]),
        running_var=_array(state[f"{name}.running_var"]),
        weight=_array(state.get(f"{name}.weight")),
        bias=_array(state.get(f"{name}.bias")),
        momentum=momentum,
        num_batches_tracked=None if counter is None else int(counter),
        stored_as=str(state[f"{name}.running_var"].dtype).removeprefix("torch."),
    )


def _bare_norms(state: Mapping[str, Tensor]) -> Iterator[str]:
    """Yield what must be a BatchNorm without statistics: named one, or behind a convolution that has no bias.

    Convolutions leave their bias out because a BatchNorm follows; names of other norms are believed.
    """
    widths = {
        value.shape[0]
        for name, value in state.items()
        if name.endswith(".weight") and value.ndim >= 4 and f"{name.removesuffix('.weight')}.bias" not in state
    }
    for name, value in state.items():
        layer = name.removesuffix(".weight")
        is_norm = name.endswith(".weight") and value.ndim == 1 and f"{layer}.bias" in state
        if not is_norm or f"{layer}.running_var" in state or NOT_BATCH_NORM.search(layer):
            continue
        if NAMED_BATCH_NORM.search(layer) or value.shape[0] in widths:
            yield layer


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise FileNotFoundError
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict


def _was_repaired(path: Path) -> bool:
    if path.suffix != ".safetensors":
        return False
    with safe_open(path, framework="pt") as file:
        return REPAIRED_KEY in (file.metadata() or {})


def _as_repaired(subject: Subject) -> Subject:
    """The counters still tell of training, but nothing of the start is left."""
    return replace(subject, layers=tuple(replace(layer, initial_share=0.0) for layer in subject.layers))


def _unpickle(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's remarks on old pickle protocols
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)|Unsupported (?:global|operand|class)[: ]+(\S+)", str(error))
        what = f" ({next(word for word in found.groups() if word)})" if found else ""
        raise FileRefused(
            f"{path} holds pickled code{what} and was not run; save plain tensors: torch.save(model.state_dict(), …), "
            "or safetensors"
        ) from None


def _state_of(path: Path, content: Any) -> dict[str, Tensor]:
    """Find the state_dict in what training scripts save around it."""
    for key in STATE_KEYS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise FileRefused(f"{path} holds a {type(content).__name__}, expected a state_dict")
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def _manifest(model: onnx.ModelProto) -> Manifest | None:
    entry = next((one.value for one in model.metadata_props if one.key == MANIFEST_KEY), None)
    try:
        return None if entry is None else Manifest.model_validate_json(entry)
    except ValueError:
        return None  # `foldserve serve` says what is wrong with it; the graph can be examined all the same


def _recorded(manifest: Manifest, momentum: float | None, in_graph: set[str]) -> Iterator[Layer]:
    for record in manifest.batchnorm:
        if record.norm not in in_graph:
            known = record.momentum if momentum is None else momentum
            yield Layer(
                record.norm, eps=record.eps, momentum=known, num_batches_tracked=record.num_batches_tracked,
                initial_share=record.initial_share if momentum is None else None,
            )  # fmt: skip


def _array(tensor: Tensor | None) -> NDArray[np.float64] | None:
    return None if tensor is None else tensor.detach().double().numpy()


def _is_damaged(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
