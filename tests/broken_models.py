"""Tiny models that went wrong on the way, with golden images that fit: what a service must refuse, or report."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper
from support import CPU, FILTERS, SIDE, TinyModel

from service.engine import open_engine
from service.golden import Golden

MIXING_NODE = "backbone/norm1"
UNKNOWN_NODE = "backbone/crop1"


def mix_images(model: onnx.ModelProto) -> None:
    """Put a BatchNormalization in training mode behind the convolution: it takes the statistics of its batch."""
    parameters = {"gamma": 1, "beta": 0, "running_mean": 0, "running_var": 1}
    for name, value in parameters.items():
        model.graph.initializer.append(numpy_helper.from_array(np.full(FILTERS, value, np.float32), name))
    outputs = ["normal", "next_mean", "next_var"]
    _insert(
        model,
        helper.make_node("BatchNormalization", ["convolved", *parameters], outputs, name=MIXING_NODE, training_mode=1),
    )


def use_unknown_operator(model: onnx.ModelProto) -> None:
    """Put an operator behind the convolution that changes nothing here, for which no rule says so."""
    model.graph.initializer.append(numpy_helper.from_array(np.array([SIDE, SIDE], np.int64), "sides"))
    node = helper.make_node("CenterCropPad", ["convolved", "sides"], ["normal"], name=UNKNOWN_NODE, axes=[2, 3])
    _insert(model, node)


def _insert(model: onnx.ModelProto, node: onnx.NodeProto) -> None:
    following = next(index for index, one in enumerate(model.graph.node) if one.op_type == "Relu")
    model.graph.node[following].input[0] = "normal"
    model.graph.node.insert(following, node)


def write_broken(models: Path, edit: Callable[[onnx.ModelProto], None], tiny: TinyModel | None = None) -> Path:
    """Write an edited tiny model, whose golden answers are those that it gives to an image alone."""
    tiny = tiny or TinyModel()
    model = tiny.onnx()
    edit(model)
    model.metadata_props.add(key="foldserve", value=tiny.manifest().model_dump_json())
    content = model.SerializeToString()
    golden, engine = tiny.golden(), open_engine(content, CPU)
    alone = np.concatenate([engine.run(pixels[np.newaxis]) for pixels in golden.pixels]).astype(np.float64)
    folder = tiny.write(models)
    (folder / "model.onnx").write_bytes(content)
    (folder / "golden.npz").write_bytes(Golden(golden.encoded, golden.pixels, alone, 1e-4).to_bytes())
    return folder
