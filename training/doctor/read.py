"""From a file, or a run folder, to what is examined: its BatchNorm layers, and what lies around them."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from service.artifact import MANIFEST_KEY, MODEL_FILE
from service.manifest import Manifest, NormRecord
from training.doctor.checkpoints import CHECKPOINTS, Checkpoint, read_checkpoint, says_it_is_corrected
from training.doctor.graph import damaged_weights, layer_of, nested_norms, norm_nodes
from training.doctor.norms import Layer, Subject
from training.errors import FileRefused, UsageError
from training.fitting import BEST_FILE
from training.folding.graph_constants import Constants, opset_of
from training.foreign.read import load_onnx
from training.foreign.settling import settle
from training.run import CONFIG_FILE, read_config

PER_CHANNEL = ("running_mean", "running_var", "weight", "bias")
NOT_BATCH_NORM = re.compile(r"(^|[._])(ln|gn|layer_?norm|group_?norm|rms_?norm)", re.IGNORECASE)
NAMED_BATCH_NORM = re.compile(r"(^|[._])(bn|batch_?norm)\d*$", re.IGNORECASE)


def read_subject(path: Path, momentum: float | None = None) -> Subject:
    """Read `.onnx`, `.safetensors`, `.pt`, `.pth` or a run folder; `momentum`, PyTorch's, holds for every layer.

    Raises FileRefused for a file that cannot be read safely, UsageError for one of another kind.
    """
    if path.is_dir():
        if not (path / CONFIG_FILE).exists():
            within = f", such as {model}" if (model := path / MODEL_FILE).exists() else ""
            raise UsageError(
                f"{path} is not a run folder: it has no {CONFIG_FILE}; name a file{within}, or a run folder"
            )
        best, found = path / BEST_FILE, read_config(path).bn_momentum
        return _heeded(best, state_subject(path, read_checkpoint(best), momentum or found, "run folder"))
    if path.suffix.lower() == ".onnx":
        return onnx_subject(path, settle(load_onnx(path)), momentum)
    if path.suffix.lower() in CHECKPOINTS:
        return _heeded(path, state_subject(path, read_checkpoint(path), momentum, "checkpoint"))
    raise UsageError(f"{path}: expected .onnx, {', '.join(CHECKPOINTS)} or a run folder")


def onnx_subject(path: Path, model: onnx.ModelProto, momentum: float | None = None) -> Subject:
    """Return what a graph holds; where foldserve wrote it, its manifest tells of the layers that were folded away."""
    known = Constants.of(model)
    layers = [replace(layer_of(node, known), momentum=momentum) for node in norm_nodes(model.graph)]
    nested = nested_norms(model.graph, known, opset_of(model))
    layers += [replace(layer_of(node, inner), momentum=momentum, nested=True) for node, inner in nested]
    manifest = _manifest(model)
    recorded: list[Layer] = []
    if manifest is not None:
        layers, recorded = _recorded(manifest, layers, momentum)
    return Subject(
        str(path),
        "ONNX graph" if manifest is None else "artifact",
        (*layers, *recorded),
        damaged=damaged_weights(model),
        folded=0 if manifest is None else len({one.norm for one in manifest.folds} & {one.name for one in recorded}),
        model=model,
    )


def state_subject(path: Path, checkpoint: Checkpoint, momentum: float | None, kind: str) -> Subject:
    """Return the BatchNorm layers of a state_dict. Raises FileRefused for one that no BatchNorm can have."""
    state = checkpoint.state
    names = [name.removesuffix(".running_var") for name in state if name.endswith(".running_var")]
    halves = [name.removesuffix(".running_mean") for name in state if name.endswith(".running_mean")]
    halves += [name.removesuffix(".num_batches_tracked") for name in state if name.endswith(".num_batches_tracked")]
    for name in names:
        _check_layer(path, name, state)
    layers = tuple(_layer(name, state, momentum) for name in names if f"{name}.running_mean" in state)
    complete = {layer.name for layer in layers}
    missing = sorted(({*names, *halves} - complete) | set(_bare_norms(state)))
    of_norms = tuple(f"{name}." for name in complete)
    damaged = [name for name, value in state.items() if not name.startswith(of_norms) and _is_damaged(value)]
    return Subject(
        str(path),
        kind,
        layers,
        counts_batches=True,
        missing=tuple(missing),
        damaged=tuple(damaged),
        checkpoint=checkpoint,
    )


def _check_layer(path: Path, name: str, state: Mapping[str, Tensor]) -> None:
    """Raise FileRefused where the tensors of a layer are not as many plain numbers each."""
    given = {word: state[f"{name}.{word}"] for word in PER_CHANNEL if f"{name}.{word}" in state}
    shapes = {word: tuple(tensor.shape) for word, tensor in given.items()}
    plain = all(one.layout == torch.strided and not one.is_meta for one in given.values())
    counter = state.get(f"{name}.num_batches_tracked")
    counts = counter is None or (counter.numel() == 1 and not counter.is_meta)
    channels = shapes["running_var"]
    if not (plain and counts and set(shapes.values()) == {channels} and len(channels) == 1 and channels[0]):
        found = ", ".join(f"{word} {shape}" for word, shape in shapes.items())
        raise FileRefused(
            f"{path}: {name} has {found}; expected dense tensors, one number a channel in each, and one count of "
            "batches; save `model.state_dict()` again"
        )


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
        frozen=any(_is_frozen(state.get(f"{name}.{word}")) for word in ("weight", "bias")),
    )


def _is_frozen(tensor: Tensor | None) -> bool:
    """Whether it is a parameter that was not trained, which a file tells only where parameters were saved whole."""
    return isinstance(tensor, nn.Parameter) and not tensor.requires_grad


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


def _heeded(path: Path, subject: Subject) -> Subject:
    """Heed what a file says of itself; told otherwise its statistics would be corrected twice."""
    if not says_it_is_corrected(path):
        return subject
    return replace(subject, layers=tuple(replace(layer, initial_share=0.0) for layer in subject.layers))


def _manifest(model: onnx.ModelProto) -> Manifest | None:
    entry = next((one.value for one in model.metadata_props if one.key == MANIFEST_KEY), None)
    try:
        return None if entry is None else Manifest.model_validate_json(entry)
    except ValueError:
        return None  # `foldserve serve` says what is wrong with it; the graph can be examined all the same


def _recorded(manifest: Manifest, layers: list[Layer], momentum: float | None) -> tuple[list[Layer], list[Layer]]:
    """Return the layers of the graph with what the manifest tells of them, and those that are folded away.

    An exporter gives the layers that stay other names, and the manifest has them in the order of their definition, the
    graph in that of their use: where they are as many, they are told what the manifest tells of each alike.
    """
    folded = {record.norm for record in manifest.folds}
    left = [record for record in manifest.batchnorm if record.norm not in folded]
    if len(left) != len(layers):
        names = {layer.name for layer in layers}
        return layers, [_told(Layer(one.norm), one, momentum) for one in manifest.batchnorm if one.norm not in names]
    is_alike = len({one.model_copy(update={"norm": ""}).model_dump_json() for one in left}) == 1
    stay = [_told(layer, left[0], momentum) for layer in layers] if is_alike else layers
    return stay, [_told(Layer(one.norm), one, momentum) for one in manifest.batchnorm if one.norm in folded]


def _told(layer: Layer, record: NormRecord, momentum: float | None) -> Layer:
    return replace(
        layer,
        eps=record.eps,
        momentum=record.momentum if momentum is None else momentum,
        num_batches_tracked=record.num_batches_tracked,
        initial_share=record.initial_share if momentum is None else None,
    )


def _array(tensor: Tensor | None) -> NDArray[np.float64] | None:
    return None if tensor is None else tensor.detach().double().numpy()


def _is_damaged(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
