"""Does this runtime compute an exact model's functions as their 256 values say, in every vector lane?"""

from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto, helper

from service.engine import Engine
from service.integers import Table, read_steps

VALUES = 257 * 64  # a walk through 256 values and one more, 64 times: each value meets each place of a vector


def wrong_tables(model: onnx.ModelProto, open_model: Callable[[bytes], Engine]) -> list[str]:
    """Return the names of the functions that `open_model`'s runtime gives another byte for."""
    held = {one.name: one for one in model.graph.initializer}
    opset = model.opset_import[0].version
    return [table.name for table in read_steps(model).tables() if not _agrees(table, opset, held, open_model)]


def _agrees(table: Table, opset: int, held: dict[str, onnx.TensorProto], open_model: Callable[[bytes], Engine]) -> bool:
    values = (np.arange(VALUES) % 257 % 256).astype(np.uint8)
    return np.array_equal(open_model(_model_of(table, opset, held)).run(values), table.entries[values])


def _model_of(table: Table, opset: int, held: dict[str, onnx.TensorProto]) -> bytes:
    """Return a model of the function alone, with the file's very nodes and constants."""
    used = {name for node in table.nodes for name in node.input if name in held}
    graph = helper.make_graph(
        list(table.nodes),
        "table",
        [helper.make_tensor_value_info(table.x, TensorProto.UINT8, ["values"])],
        [helper.make_tensor_value_info(table.y, TensorProto.UINT8, ["values"])],
        [held[name] for name in sorted(used)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    content: bytes = model.SerializeToString()
    return content
