"""Reads an ONNX file that may be anything: damaged, hostile, or too large. Judges the file, not the network."""

from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import external_data_helper, helper

from service.artifact import stored_tensors
from training.errors import FileRefused

LARGEST_BYTES = 2**31 - 1  # protobuf's own limit of one message
LIMIT = "a model may have up to 2 GB, weights included"
HALF_BYTES = (onnx.TensorProto.INT4, onnx.TensorProto.UINT4, onnx.TensorProto.FLOAT4E2M1)  # two values in one byte


def load_onnx(path: Path) -> onnx.ModelProto:
    """Return the model with all weights inside it, checked by onnx's own checker.

    External data is read from the file's own folder alone. Raises FileRefused, with the mend.
    """
    model = _parse(path)
    for tensor in stored_tensors(model):
        if tensor.data_location == tensor.EXTERNAL:
            _load_external(path, tensor)
    if model.ByteSize() > LARGEST_BYTES:
        raise FileRefused(f"{path}: with its weights it is over 2 GB; {LIMIT}")
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


def _load_external(path: Path, tensor: onnx.TensorProto) -> None:
    info = external_data_helper.ExternalDataInfo(tensor)
    folder = path.parent.resolve()
    target = (folder / str(info.location)).resolve()  # links followed: what counts is where the bytes would come from
    if not info.location or Path(info.location).is_absolute() or not target.is_relative_to(folder):
        raise FileRefused(
            f"{path} keeps its weight {tensor.name} in {info.location!r}, outside its own folder; that is not read"
        )
    if not target.is_file():
        raise FileRefused(f"{path} keeps its weight {tensor.name} in {info.location}, which is missing; put it beside")
    _check_length(path, tensor, info, target.stat().st_size)
    external_data_helper.load_external_data_for_tensor(tensor, str(folder))
    tensor.data_location = onnx.TensorProto.DEFAULT
    del tensor.external_data[:]


def _check_length(path: Path, tensor: onnx.TensorProto, info: external_data_helper.ExternalDataInfo, size: int) -> None:
    count = int(np.prod(tensor.dims, dtype=np.float64))
    bytes_each = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    needed = (count + 1) // 2 if tensor.data_type in HALF_BYTES else count * bytes_each
    start = int(info.offset or 0)
    length = needed if info.length is None else int(info.length)
    if length < needed or start + length > size:
        raise FileRefused(
            f"{path}: {info.location} holds {size} bytes, the weight {tensor.name} needs {needed} from byte {start}; "
            "it was cut short; copy it again"
        )
