"""Mends running statistics: takes the initial share out exactly, or gathers them anew from images. Keeps the old ones.

An exponential mean that began at (0, 1) and was updated n times is m = (1 − r)·μ̂ and v = r + (1 − r)·σ̂², with
r = (1 − momentum)^n, so μ̂ = m/(1 − r) and σ̂² = (v − r)/(1 − r): no data is needed.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from safetensors.numpy import save

from service.engine import choose_device, open_engine
from training.checkpoint import write_atomically
from training.doctor.graph import norm_names, norm_nodes
from training.doctor.norms import Array, Layer
from training.doctor.numbers import share_of
from training.errors import FileRefused
from training.folding.graph_constants import names_read_inside
from training.folding.graph_reading import GIVEN_APART, infer_shapes
from training.folding.graph_writing import Names

CHUNK = 8
WORDS = {3: "mean", 4: "var"}  # by the place among the inputs of BatchNormalization
Statistics = tuple[Array, Array]


@dataclass(frozen=True, slots=True, eq=False)
class Mended:
    """One layer before and after; `share` is what was taken out, None where it was estimated from images."""

    name: str
    before: Statistics
    after: Statistics
    share: float | None

    def line(self) -> str:
        """Say what changed, in one line."""
        (mean, var), (new_mean, new_var) = self.before, self.after
        how = "from images" if self.share is None else f"{self.share:.2%} taken out"
        moved = f"mean {np.abs(mean).mean():.4g} → {np.abs(new_mean).mean():.4g} on average (absolute)"
        return f"{self.name}: {how}; {moved}, variance {var.mean():.4g} → {new_var.mean():.4g}"


def without_initial_share(layer: Layer) -> Mended:
    """Return the layer's statistics without what is left of mean 0 and variance 1, in float64.

    Raises FileRefused where the share is unknown or whole, or where the numbers contradict it.
    """
    share = share_of(layer)
    if layer.running_mean is None or layer.running_var is None:
        raise FileRefused(f"{layer.name} has no running statistics; re-estimate them from images: --data FOLDER")
    if share is None:
        raise FileRefused(f"{layer.name}: the initial share is unknown; give --momentum M, and --updates N for ONNX")
    if share >= 1:
        raise FileRefused(f"{layer.name} was never updated; nothing is behind its statistics: re-estimate with --data")
    mean, var = layer.running_mean / (1 - share), (layer.running_var - share) / (1 - share)
    if not (np.isfinite(mean).all() and np.isfinite(var).all() and (var >= -1e-6).all()):  # float32 rounds a var of 0
        raise FileRefused(
            f"{layer.name}: a variance of {layer.running_var.min():.3g} cannot hold an initial share of {share:.3g}; "
            "the momentum or the count is another, or the statistics are damaged: re-estimate with --data"
        )
    return Mended(layer.name, (layer.running_mean, layer.running_var), (mean, np.maximum(var, 0)), share)


def mend_graph(model: onnx.ModelProto, mended: Iterable[Mended]) -> None:
    """Write statistics into BatchNormalization nodes, in place, in the type that they have; all else stays as it is.

    An initializer that something else reads too is left alone, and so is what is none: the node gets one of its own.
    Raises FileRefused where the type cannot hold a number, or where the graph has no node of a layer's name.
    """
    by_name = {one.name: one.after for one in mended}
    graph, kinds = model.graph, _types(model)
    names = norm_names(graph)
    if lacking := sorted(set(by_name) - set(names)):
        raise FileRefused(
            f"the graph has no BatchNormalization called {lacking[0]}, nothing was written; give each of its nodes a "
            "name of its own"
        )
    for node, name in zip(norm_nodes(graph), names, strict=True):
        for place, values in enumerate(by_name.get(name, ()), start=3):
            stored = _in_type(values, kinds.get(node.input[place], onnx.TensorProto.FLOAT), name)
            _write(model, node, place, stored)


def estimate(model: onnx.ModelProto, layers: Iterable[Layer], images: NDArray[np.generic]) -> list[Mended]:
    """Gather population statistics layer by layer, each behind those already mended; `model` is changed in place.

    Mean and variance are over all images and pixels, merged from batches in float64 by Chan's rule
    (Chan, Golub, LeVeque 1983, equation 2.1), without Bessel's correction. `images` is what the model takes.
    """
    found, by_name = [], {layer.name: layer for layer in layers}
    for node, name in zip(norm_nodes(model.graph), norm_names(model.graph), strict=True):
        layer = by_name.get(name)
        if layer is None:
            continue
        statistics = population(up_to(model, node.input[0]), images)
        zeros = np.zeros_like(statistics[0])
        before = layer.running_mean if layer.running_mean is not None else zeros
        old_var = layer.running_var if layer.running_var is not None else zeros + 1
        found.append(Mended(layer.name, (before, old_var), statistics, None))
        mend_graph(model, found[-1:])
    return found


def population(model: onnx.ModelProto, images: NDArray[np.generic]) -> Statistics:
    """Return mean and variance of each channel of the one output (N, C, …) over all images, in float64."""
    run: Callable[..., NDArray[np.float32]] = open_engine(model.SerializeToString(), choose_device("cpu")).run
    count, mean, squares = 0, np.zeros(1), np.zeros(1)
    for start in range(0, len(images), CHUNK):
        values = run(images[start : start + CHUNK]).astype(np.float64)
        flat = np.moveaxis(values, 1, 0).reshape(values.shape[1], -1)  # (C, N · pixels)
        here, added = flat.mean(1), flat.shape[1]
        delta = here - mean
        squares = squares + ((flat - here[:, None]) ** 2).sum(1) + delta**2 * count * added / (count + added)
        mean = mean + delta * added / (count + added)
        count += added
    return mean, squares / count


def accuracy(model: onnx.ModelProto, inputs: NDArray[np.generic], targets: NDArray[np.int64]) -> float:
    """Return the share of images whose largest score, of the one output (N, K, …), is their target's."""
    run: Callable[..., NDArray[np.float32]] = open_engine(model.SerializeToString(), choose_device("cpu")).run
    answers = [run(inputs[start : start + CHUNK]) for start in range(0, len(inputs), CHUNK)]
    scores = np.concatenate(answers).reshape(len(inputs), -1)
    return float((scores.argmax(1) == targets).mean())


def up_to(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """Return the part of a graph that computes the value `name`, as its only output."""
    part = onnx.ModelProto()
    part.CopyFrom(model)
    needed, kept = {name}, []
    for node in reversed(model.graph.node):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(node.input)
    del part.graph.node[:], part.graph.output[:], part.graph.value_info[:]
    part.graph.node.extend(reversed(kept))
    part.graph.output.append(onnx.ValueInfoProto(name=name))
    part.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    return part


def beside(path: Path) -> Path:
    """Return where the old statistics of a mended file lie."""
    return path.with_name(f"{path.stem}.before.safetensors")


def keep_old(path: Path, mended: Iterable[Mended]) -> Path:
    """Write the old statistics beside the mended file, as safetensors, and return where."""
    tensors = {}
    for one in mended:
        tensors[f"{one.name}.running_mean"], tensors[f"{one.name}.running_var"] = one.before
    aside = beside(path)
    write_atomically(aside, save(tensors))
    return aside


def with_updates(layers: Iterable[Layer], updates: int | None) -> tuple[Layer, ...]:
    """Return the layers with a count of batches where the file has none."""
    return tuple(
        replace(one, num_batches_tracked=updates) if one.num_batches_tracked is None else one for one in layers
    )


def _types(model: onnx.ModelProto) -> dict[str, int]:
    types = {value.name: value.type.tensor_type.elem_type for value in infer_shapes(model).graph.value_info}
    return types | {tensor.name: tensor.data_type for tensor in model.graph.initializer}


def _in_type(values: Array, kind: int, name: str) -> NDArray[Any]:
    with np.errstate(over="ignore"):
        stored: NDArray[Any] = values.astype(helper.tensor_dtype_to_np_dtype(kind))
    if not np.isfinite(stored.astype(np.float64)).all():
        raise FileRefused(f"{name}: a statistic of {np.abs(values).max():.3g} is beyond {stored.dtype}; widen the file")
    return stored


def _write(model: onnx.ModelProto, node: onnx.NodeProto, place: int, values: NDArray[Any]) -> None:
    """Put one statistic where the node reads it from."""
    graph, old = model.graph, node.input[place]
    new = numpy_helper.from_array(values, old)
    tensor = next((tensor for tensor in graph.initializer if tensor.name == old), None)
    if tensor is not None and _uses(graph, old) == 1 and list(tensor.dims) == list(new.dims):
        for field in ("float_data", "int32_data", "double_data"):
            tensor.ClearField(field)
        tensor.raw_data = new.raw_data
        return
    new.name = node.input[place] = Names(graph).fresh(f"{node.output[0]}_mended_{WORDS[place]}")
    graph.initializer.append(new)
    if model.ir_version < GIVEN_APART:
        graph.input.append(helper.make_tensor_value_info(new.name, new.data_type, new.dims))


def _uses(graph: onnx.GraphProto, name: str) -> int:
    reads = [one for node in graph.node for one in node.input]
    return [*reads, *names_read_inside(graph.node), *(output.name for output in graph.output)].count(name)
