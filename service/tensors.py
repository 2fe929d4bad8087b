"""The Open Inference Protocol's tensors: a request body to images, logits to an answer body. Knows no web.

    JSON                       binary_data_size absent: values are in the JSON; BYTES are base64 (RFC 4648, section 4)
    JSON ─ bytes of `image`    with Inference-Header-Content-Length: UINT8 raw, BYTES each after a little-endian length

Sources: KServe's `required_api.md`, Triton's extensions `binary_data` and `classification`.
"""

import base64
import binascii
import json
import math
import struct
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from service.errors import MalformedRequest, TooLarge
from service.postprocessing import top_k
from service.preprocessing import Pixels

INPUT, OUTPUT = "image", "logits"
LENGTH = struct.Struct("<I")
MARKS = b",[{"
# What stands between JSON values: each value costs up to 200 bytes, and their parser lets nothing else run meanwhile.
# Thirteen images of 224 × 224 × 3 fit; as a binary tensor any number that the body's own limit allows.
MOST_MARKS, MANY_MARKS = 2**21, 2**16
ONE_OF_MANY = threading.Lock()  # so that several such bodies cost the memory of one


class InputParameters(BaseModel):
    """What may be said about the input; shared memory cannot be had."""

    binary_data_size: int | None = Field(None, ge=0)
    shared_memory_region: str | None = None


class InferInput(BaseModel):
    """The one input: UINT8 pixels [n, height, width, channels], or BYTES [n] that hold encoded images."""

    name: str
    shape: list[int] = Field(min_length=1, max_length=8)
    datatype: str
    parameters: InputParameters = InputParameters()
    data: Any = None


class OutputParameters(BaseModel):
    """How the output is wanted; `classification` asks for so many classes as text instead of logits."""

    binary_data: bool | None = None
    classification: int | None = Field(None, ge=1)
    shared_memory_region: str | None = None


class InferOutput(BaseModel):
    """A wanted output."""

    name: str
    parameters: OutputParameters = OutputParameters()


class InferParameters(BaseModel):
    """Parameters of the whole request; others are ignored, as the protocol allows."""

    binary_data_output: bool = False
    timeout: int | None = Field(
        None, ge=0, description="deadline in microseconds, at most the service's own; 0, as in Triton, names none"
    )
    priority: int = Field(0, ge=0, description="0 the default, 1 high, 2 normal, 3 and above low")


class InferBody(BaseModel):
    """The JSON of an inference request."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"inputs": [{"name": INPUT, "shape": [1], "datatype": "BYTES", "data": ["<base64>"]}]}]
        }
    )

    id: str | None = None
    parameters: InferParameters = InferParameters()
    inputs: list[InferInput] = Field(max_length=8)
    outputs: list[InferOutput] = Field([], max_length=8)


@dataclass(frozen=True, slots=True)
class InferRequest:
    """A request that was understood: encoded images or pixels, uint8 (height, width, channels), one or the other."""

    images: Sequence[bytes] | Sequence[Pixels]
    id: str | None
    timeout_us: int | None
    priority: int  # Triton's scale: 0 is the default, 1 the highest
    binary: bool
    classes: int | None


def parse_infer(body: bytes, header_length: int | None, size: tuple[int, int, int], max_images: int) -> InferRequest:
    """Return the request in a body whose first `header_length` bytes are JSON, all of it when None.

    `size` is the model's height, width and channels. Raises MalformedRequest or TooLarge.
    """
    if header_length is not None and header_length > len(body):
        raise MalformedRequest(f"Inference-Header-Content-Length is {header_length}, the body has {len(body)} bytes")
    split = len(body) if header_length is None else header_length
    marks = sum(body.count(mark, 0, split) for mark in MARKS)
    if marks > MOST_MARKS:
        raise TooLarge(f"the JSON has over {MOST_MARKS} values; send the tensor as binary data")
    with ONE_OF_MANY if marks > MANY_MARKS else nullcontext():
        asked = _parse_json(body[:split])
        tensor = _the_input(asked)
        binary, classes = _wanted(asked)
        images = _images(tensor, memoryview(body)[split:], size, max_images)
    return InferRequest(images, asked.id, asked.parameters.timeout, asked.parameters.priority, binary, classes)


def _parse_json(text: bytes) -> InferBody:
    """Return the JSON of a request; made to Python's objects once, for pydantic would copy all of it for each error."""
    try:
        return InferBody.model_validate(from_json(text))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the body"
        raise MalformedRequest(f"{where}: {first['msg']}") from None
    except ValueError as error:
        raise MalformedRequest(f"the body: Invalid JSON: {error}") from None


def infer_answer(
    request: InferRequest, head: dict[str, Any], logits: NDArray[np.float32], labels: tuple[str, ...]
) -> tuple[bytes, bytes]:
    """Return the JSON and the binary part of an answer; `logits` float32 (images, classes), `head` names the model."""
    if request.classes is None:
        output: dict[str, Any] = {"name": OUTPUT, "datatype": "FP32", "shape": list(logits.shape)}
        values: list[Any] = logits.astype(np.float64).ravel().tolist()
        raw = logits.astype("<f4").tobytes()
    else:
        rows = [_classes(row, labels, request.classes) for row in logits]
        output = {"name": OUTPUT, "datatype": "BYTES", "shape": [len(rows), min(request.classes, len(labels))]}
        values = [one for row in rows for one in row]
        raw = b"".join(LENGTH.pack(len(one.encode())) + one.encode() for one in values)
    output |= {"parameters": {"binary_data_size": len(raw)}} if request.binary else {"data": values}
    answer = {**head, **({"id": request.id} if request.id is not None else {}), "outputs": [output]}
    return json.dumps(answer, ensure_ascii=False).encode(), raw if request.binary else b""


def _classes(logits: NDArray[np.float32], labels: tuple[str, ...], k: int) -> list[str]:
    """Return `value:index:label`, largest first; nine digits read back to the same float32."""
    return [f"{logits[one.index]:.9g}:{one.index}:{one.label}" for one in top_k(logits, labels, k)]


def _the_input(asked: InferBody) -> InferInput:
    names = [one.name for one in asked.inputs]
    if names != [INPUT]:
        found = ", ".join(names[:8]) or "none"
        raise MalformedRequest(f"the model has one input, `{INPUT}`; the request has {len(names)}: {found}")
    tensor = asked.inputs[0]
    if tensor.parameters.shared_memory_region is not None:
        raise MalformedRequest("shared memory is not supported; send the tensor in the body")
    return tensor


def _wanted(asked: InferBody) -> tuple[bool, int | None]:
    names = [one.name for one in asked.outputs]
    if names not in ([], [OUTPUT]):
        raise MalformedRequest(f"the model has one output, `{OUTPUT}`; the request asks for {', '.join(names[:8])}")
    wanted = asked.outputs[0].parameters if asked.outputs else OutputParameters()
    if wanted.shared_memory_region is not None:
        raise MalformedRequest("shared memory is not supported; read the output from the answer")
    binary = asked.parameters.binary_data_output if wanted.binary_data is None else wanted.binary_data
    return binary, wanted.classification


def _images(
    tensor: InferInput, rest: memoryview, size: tuple[int, int, int], max_images: int
) -> list[bytes] | list[Pixels]:
    count = tensor.shape[0]
    expected = {"UINT8": [[count, *size]], "BYTES": [[count], [count, 1]]}.get(tensor.datatype)
    if expected is None or tensor.shape not in expected or count < 1:
        raise MalformedRequest(
            f"{INPUT} is {tensor.datatype} {tensor.shape}; expected UINT8 [n, {', '.join(map(str, size))}] with "
            "pixels, or BYTES [n] with encoded images, n at least 1"
        )
    if count > max_images:
        raise TooLarge(f"{count} images in one request, the limit is {max_images}")
    length = tensor.parameters.binary_data_size
    if (len(rest) if length is None else length) != (0 if length is None else len(rest)):
        raise MalformedRequest(f"{len(rest)} bytes follow the JSON, binary_data_size says {length or 0}")
    if tensor.datatype == "BYTES":
        found = _base64(tensor.data) if length is None else _split(rest, count)
        _check_count(len(found), count)
        return found
    pixels = _pixels(tensor.data) if length is None else rest
    _check_count(len(pixels), math.prod(tensor.shape))
    return list(np.frombuffer(pixels, np.uint8).reshape(tensor.shape))


def _check_count(found: int, expected: int) -> None:
    if found != expected:
        raise MalformedRequest(f"{INPUT} holds {found} values, its shape says {expected}")


def _split(rest: memoryview, count: int) -> list[bytes]:
    """Return the elements of a BYTES tensor. Raises MalformedRequest when the lengths do not add up."""
    found: list[bytes] = []
    at = 0
    while at < len(rest):
        start = at + LENGTH.size
        at = start + LENGTH.unpack(rest[at:start])[0] if start <= len(rest) else len(rest) + 1
        if at > len(rest) or len(found) == count:
            raise MalformedRequest(f"the BYTES of {INPUT} are not {count} elements, each after its length in 4 bytes")
        found.append(bytes(rest[start:at]))
    return found


def _base64(data: Any) -> list[bytes]:
    found = [one for row in data for one in (row if isinstance(row, list) else [row])] if isinstance(data, list) else []
    try:
        return [base64.b64decode(one, validate=True) for one in found]
    except (binascii.Error, ValueError, TypeError):
        raise MalformedRequest(
            f"BYTES in JSON are base64 text (RFC 4648, section 4); `data` of {INPUT} is not"
        ) from None


def _pixels(data: Any) -> bytes:
    """Return the numbers of `data`, flat or nested in any regular shape. Raises MalformedRequest."""
    values = data if isinstance(data, list) else [] if data is None else [data]
    while values and set(map(type, values)) == {list} and len(set(map(len, values))) == 1:
        values = list(chain.from_iterable(values))
    try:
        if set(map(type, values)) <= {int}:
            return bytes(values)
    except ValueError:
        pass
    raise MalformedRequest(f"`data` of {INPUT} holds something else than whole numbers from 0 to 255")
