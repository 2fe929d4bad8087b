"""Is this an image classifier? Reads the inputs and outputs of a foreign graph, and says plainly why not."""

import math
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import onnx
from onnx import TensorProto, helper

from service.independence.proof.verdict import OPSETS
from training.errors import FileRefused
from training.folding.graph_constants import Constants, opset_of
from training.folding.graph_reading import infer_shapes
from training.foreign.precision import FLOATS
from training.foreign.read import inputs_of

TEXT = frozenset({TensorProto.INT64, TensorProto.INT32, TensorProto.STRING})
CHANNELS = (1, 3)
MOST_NUMBERS = 2**29  # in one value: 2 GiB of float32, where 4096² attention in 16 heads is half of it
PASSED = frozenset({"Identity", "Cast", "Transpose"})
DOZENS = 50  # between the mean of standardised pixels, below 4, and of pixels 0–255, above 100


@dataclass(frozen=True, slots=True)
class Interface:
    """What goes in and comes out of a foreign classifier; size is None where the file leaves it open."""

    input_name: str
    output_name: str
    channels: int
    channels_last: bool
    size: tuple[int, int] | None
    batch: int | None
    takes_bytes: bool
    classes: int


def read_interface(model: onnx.ModelProto) -> Interface:
    """Return the interface. Raises FileRefused, "not an image classifier, because …"."""
    inputs, outputs = inputs_of(model.graph), list(model.graph.output)
    if len(inputs) != 1:
        _refuse(f"it has {len(inputs)} inputs ({_names(inputs)}), expected one, the images")
    image = inputs[0]
    _check_type(image)
    shape = [_extent(dim) for dim in image.type.tensor_type.shape.dim]
    if len(shape) != 4:
        _refuse(f"its input {image.name} has {len(shape)} axes, expected 4: batch, channels, height, width")
    if 0 in shape:
        _refuse(f"its input {image.name} has an axis of size 0: {_shown(shape)}")
    channels_last = shape[1] not in CHANNELS and shape[3] in CHANNELS
    channels = shape[3] if channels_last else shape[1]
    if channels is None or channels not in CHANNELS:
        _refuse(f"its input {image.name} has shape {_shown(shape)}, and neither axis 1 nor axis 3 is 1 or 3 channels")
    height, width = shape[1:3] if channels_last else shape[2:4]
    return Interface(
        image.name,
        outputs[0].name,
        channels,
        channels_last,
        (height, width) if height and width else None,
        shape[0],
        image.type.tensor_type.elem_type == TensorProto.UINT8,
        _classes(outputs),
    )


def refuse_unknown(model: onnx.ModelProto) -> None:
    """Raise FileRefused for an opset or an operator that nothing here can judge."""
    opset = opset_of(model)
    if opset not in OPSETS:
        span = f"{OPSETS.start} to {OPSETS.stop - 1}"
        raise FileRefused(f"the file is of opset {opset}, expected {span}; export it again with opset_version=20")
    own = {(function.domain, function.name) for function in model.functions}
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx") and (node.domain, node.op_type) not in own:
            raise FileRefused(
                f"the graph has the operator {node.op_type} of {node.domain}, which is not one of ONNX's own; nothing "
                "can be said of what it does. Export the model again with ONNX's operators alone"
            )


def refuse_huge(model: onnx.ModelProto, interface: Interface, size: tuple[int, int]) -> None:
    """Raise FileRefused where a value of one image of `size` is too large to run: few bytes can ask for any number.

    The shapes that the file tells are of its own batch, so they are left out.
    """
    one = onnx.ModelProto()
    one.CopyFrom(model)
    del one.graph.value_info[:]
    for output in one.graph.output:
        output.type.tensor_type.ClearField("shape")
    given = next(value for value in one.graph.input if value.name == interface.input_name)
    shape = (1, *size, interface.channels) if interface.channels_last else (1, interface.channels, *size)
    given.CopyFrom(helper.make_tensor_value_info(given.name, given.type.tensor_type.elem_type, shape))
    for value in infer_shapes(one).graph.value_info:
        tensor = value.type.tensor_type
        if tensor.HasField("shape") and all(dim.HasField("dim_value") for dim in tensor.shape.dim):
            numbers = math.prod(dim.dim_value for dim in tensor.shape.dim)
            if numbers > MOST_NUMBERS:
                raise FileRefused(
                    f"the graph makes {numbers:.3g} numbers of one image ({value.name}), more than the "
                    f"{MOST_NUMBERS:.3g} that are taken; look at the sizes that its node asks for"
                )


def scales_itself(model: onnx.ModelProto, interface: Interface) -> str | None:
    """Say how the graph scales pixels 0–255 by itself, as Keras's Rescaling layer does; None where it does not.

    What is given pixels 0–1 never begins by dividing them by dozens, nor by subtracting dozens.
    """
    known, name = Constants.of(model), interface.input_name
    readers = [node for node in model.graph.node if name in node.input]
    while len(readers) == 1 and readers[0].op_type in PASSED:
        name = readers[0].output[0]
        readers = [node for node in model.graph.node if name in node.input]
    if len(readers) != 1 or len(readers[0].input) != 2:
        return None
    constant = next((known.array(one) for one in readers[0].input if one != name and known.has(one)), None)
    if constant is None or not constant.size:
        return None
    size, kind = float(np.abs(constant).max()), readers[0].op_type
    is_scaling = {"Mul": size <= 1 / DOZENS, "Div": size >= DOZENS, "Sub": size >= DOZENS, "Add": size >= DOZENS}
    return f"{kind} by {constant.ravel()[0]:.4g}" if is_scaling.get(kind, False) else None


def _check_type(image: onnx.ValueInfoProto) -> None:
    kind = image.type.tensor_type.elem_type
    if kind in TEXT:
        _refuse(f"its input {image.name} holds {TensorProto.DataType.Name(kind).lower()} numbers, as text models do")
    if kind not in FLOATS | {TensorProto.UINT8}:
        _refuse(f"its input {image.name} is {TensorProto.DataType.Name(kind).lower()}, expected float or uint8")


def _classes(outputs: list[onnx.ValueInfoProto]) -> int:
    if len(outputs) != 1:
        _refuse(f"it has {len(outputs)} outputs ({_names(outputs)}), as detectors do; expected one, the scores")
    shape = [_extent(dim) for dim in outputs[0].type.tensor_type.shape.dim]
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]  # (batch, classes, 1, 1), as fully convolutional heads have it
    classes = shape[1] if len(shape) == 2 else None
    if not classes:
        _refuse(f"its output {outputs[0].name} has shape {_shown(shape)}, expected (batch, classes)")
    if classes < 2:
        _refuse(f"its output {outputs[0].name} has {classes} class; expected at least 2")
    return classes


def _refuse(why: str) -> NoReturn:
    raise FileRefused(f"not an image classifier, because {why}")


def _extent(dim: onnx.TensorShapeProto.Dimension) -> int | None:
    return dim.dim_value if dim.HasField("dim_value") else None


def _shown(shape: list[int | None]) -> str:
    return "(" + ", ".join("?" if extent is None else str(extent) for extent in shape) + ")"


def _names(values: list[onnx.ValueInfoProto]) -> str:
    return ", ".join(value.name for value in values)
