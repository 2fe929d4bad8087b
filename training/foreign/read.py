"""Reads an ONNX file that may be anything: damaged, hostile, or too large. Judges the file, not the network."""

import math
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import external_data_helper, helper

from service.artifact import stored_tensors
from service.wording import counted
from training.errors import FileRefused

LARGEST_BYTES = 2**31 - 1  # protobuf's own limit of one message
LIMIT = "a model may have up to 2 GB, weights included"
HALF_BYTES = (onnx.TensorProto.INT4, onnx.TensorProto.UINT4, onnx.TensorProto.FLOAT4E2M1)  # two values in one byte


def load_onnx(path: Path) -> onnx.ModelProto:
    """Return the model with all weights inside it, checked by onnx's own checker.

    External data is read from the file's own folder alone. Raises FileRefused, with the mend.
    """
    model = _parse(path)
    outside = [tensor for tensor in stored_tensors(model) if tensor.data_location == tensor.EXTERNAL]
    if sum(_bytes_outside(path, tensor) for tensor in outside) + path.stat().st_size > LARGEST_BYTES:
        raise FileRefused(f"{path}: with its weights it is over 2 GB; {LIMIT}")
    for tensor in outside:
        _load(path, tensor)
    try:
        onnx.checker.check_model(model)
    except Exception as error:  # noqa: BLE001 - the checker raises what its C++ half throws
        reason = str(error).strip().partition("\n")[0]
        raise FileRefused(f"{path} is not a sound ONNX file ({reason}); export the model again") from None
    return model


def inputs_of(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    """Return the inputs that a caller has to give: those without an initial value (IR version 3 lists all)."""
    given = {tensor.name for tensor in graph.initializer}
    return [value for value in graph.input if value.name not in given]


def _parse(path: Path) -> onnx.ModelProto:
    try:
        if path.stat().st_size > LARGEST_BYTES:
            raise FileRefused(f"{path} is over 2 GB, more than protobuf can hold in one message; {LIMIT}")
        content = path.read_bytes()
    except OSError as error:
        raise FileRefused(f"{path} cannot be read: {error.strerror}") from None
    model = onnx.ModelProto()
    try:
        model.ParseFromString(content)
    except DecodeError:
        raise FileRefused(f"{path} is not an ONNX file, or was cut short; export the model again") from None
    if not model.graph.node or not model.opset_import:
        raise FileRefused(f"{path} is not an ONNX model: it holds no graph; name the exported .onnx file")
    return model


def _bytes_outside(path: Path, tensor: onnx.TensorProto) -> int:
    """Return how many bytes of another file would be read for a weight. Raises FileRefused where they must not be."""
    try:
        info = external_data_helper.ExternalDataInfo(tensor)
        return _read_length(path, tensor, info)
    except (ValueError, KeyError) as error:  # numbers that are none, a NUL in the path, a type that is not ONNX's
        raise FileRefused(
            f"{path} tells wrongly where its weight {tensor.name} lies ({error}); export the model again"
        ) from None


def _load(path: Path, tensor: onnx.TensorProto) -> None:
    """Put a weight of another file into the model. Raises FileRefused for a link, which onnx does not read."""
    name = external_data_helper.ExternalDataInfo(tensor).location
    try:
        external_data_helper.load_external_data_for_tensor(tensor, str(path.parent.resolve()))
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise FileRefused(
            f"{path} keeps its weight {tensor.name} in {name}, which onnx does not read ({reason}); links are not "
            "followed: copy the file itself beside the model, as with `cp -L`"
        ) from None
    tensor.data_location = onnx.TensorProto.DEFAULT
    del tensor.external_data[:]


def _read_length(path: Path, tensor: onnx.TensorProto, info: external_data_helper.ExternalDataInfo) -> int:
    folder = path.parent.resolve()
    target = (folder / str(info.location)).resolve()  # links followed: what counts is where the bytes would come from
    if not info.location or Path(info.location).is_absolute() or not target.is_relative_to(folder):
        raise FileRefused(
            f"{path} keeps its weight {tensor.name} in {info.location!r}, outside its own folder; that is not read"
        )
    if not target.is_file():
        raise FileRefused(f"{path} keeps its weight {tensor.name} in {info.location}, which is missing; put it beside")
    size, start, needed = target.stat().st_size, int(info.offset or 0), _needed(tensor)
    length = size - start if info.length is None else int(info.length)
    if length < needed or start + length > size:
        raise FileRefused(
            f"{path}: {info.location} holds {counted(size, 'byte')}, the weight {tensor.name} needs {needed} from byte "
            f"{start}; it was cut short; copy it again"
        )
    return length


def _needed(tensor: onnx.TensorProto) -> int:
    count = math.prod(int(extent) for extent in tensor.dims)
    if tensor.data_type in HALF_BYTES:
        return (count + 1) // 2
    return count * int(helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
