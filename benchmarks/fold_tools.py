"""The tools that `benchmarks/folding.py` compares, each as a function from file to file.

Run as `python -m benchmarks.fold_tools TOOL FIRST`: one JSON line for each pattern from number FIRST on.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import ModelProto, helper

from benchmarks.fold_patterns import PATTERNS

RESCALES = {"BatchNormalization", "Mul", "Sub", "Div"}
LIMITS = {np.float32: 1e-4, np.float16: 2e-2}  # rounding is far below; a wrong fold is off by 0.01 of float32 or more


def foldserve(model: ModelProto) -> ModelProto:
    """This project."""
    from training.folding.graphs import fold_graph

    return fold_graph(model).model


def onnxscript(model: ModelProto) -> ModelProto:
    """What `torch.onnx.export` runs by default."""
    from onnxscript import optimizer, rewriter

    return rewriter.rewrite(optimizer.optimize(model))


def onnxoptimizer(model: ModelProto) -> ModelProto:
    """Every fusion and elimination, to a fixed point."""
    import onnxoptimizer as tool

    return tool.optimize(model, tool.get_fuse_and_elimination_passes(), fixed_point=True)


def onnxslim(model: ModelProto) -> ModelProto:
    """Its one function."""
    import onnxslim as tool

    return tool.slim(model)


def onnxsim(model: ModelProto) -> ModelProto:
    """Its one function, without its own check."""
    import onnxsim as tool

    return tool.simplify(model)[0]


def ort(model: ModelProto) -> ModelProto:
    """Its basic level, where BatchNorm is folded, written out."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return onnx.load(options.optimized_model_filepath)


TOOLS: dict[str, Callable[[ModelProto], ModelProto]] = {
    "onnxscript": onnxscript,
    "onnxoptimizer": onnxoptimizer,
    "onnxslim": onnxslim,
    "onnxsim": onnxsim,
    "onnxruntime": ort,
    "foldserve": foldserve,
}


def run(model: ModelProto, images: np.ndarray) -> list[np.ndarray]:
    """Run a file as it is, with nothing optimized."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: images})


def rescales(model: ModelProto) -> set[str]:
    """Return the operators that still rescale what comes from the images; arithmetic on weights is done at load."""
    flowing, found = {model.graph.input[0].name}, set()
    for node in model.graph.node:
        if flowing.intersection(node.input):
            flowing.update(node.output)
            found |= RESCALES & {node.op_type}
    return found


def verdict(tool: str, model: ModelProto) -> str:
    """Return right (folded, same answers), kept (same answers), or wrong."""
    entry = model.graph.input[0].type.tensor_type
    dtype = helper.tensor_dtype_to_np_dtype(entry.elem_type).type
    shape = [dim.dim_value for dim in entry.shape.dim]
    images = np.random.default_rng(0).standard_normal((2, *shape[1:])).astype(dtype)
    wanted = run(model, images)
    if tool == "torch.fx":
        found, left = through_torch(model, images)
    else:
        folded = TOOLS[tool](ModelProto.FromString(model.SerializeToString()))
        found, left = run(folded, images), rescales(folded)
    errors = [np.abs(one - two).max() / np.abs(two).max() for one, two in zip(found, wanted, strict=True)]
    if not max(errors) <= LIMITS[dtype]:
        return "wrong"
    return "kept" if left else "right"


def why_kept(tool: str, model: ModelProto) -> str:
    """Return foldserve's own reasons; the other tools give none."""
    if tool != "foldserve":
        return ""
    from training.folding.graphs import fold_unmeasured

    return "; ".join(record.reason for record in fold_unmeasured(model).report.kept)


def through_torch(model: ModelProto, images: np.ndarray) -> tuple[list[np.ndarray], set[str]]:
    """Build the same network of PyTorch modules, and fuse it."""
    import torch
    from torch import nn
    from torch.fx.experimental.optimization import fuse

    from benchmarks.fold_modules import to_modules

    module = to_modules(model)
    with torch.no_grad():
        plain = module(torch.from_numpy(images))
        fused = fuse(module)
        found = [one.numpy() for one in fused(torch.from_numpy(images))]
    wanted = run(model, images)
    assert all(np.allclose(one, two, atol=1e-3, rtol=1e-2) for one, two in zip(plain, wanted, strict=True))
    left = {type(one).__name__ for one in fused.modules() if isinstance(one, nn.modules.batchnorm._BatchNorm)}  # noqa: SLF001 - no public base
    left |= {str(node.target) for node in fused.graph.nodes if node.op == "call_function" and "mul" in str(node.target)}
    return found, left


def main() -> None:
    """Judge the patterns from a number on."""
    tool, first = sys.argv[1], int(sys.argv[2])
    for number, pattern in list(enumerate(PATTERNS))[first:]:
        say({"number": number, "verdict": "crash", "detail": "the process ended"})  # stands unless overwritten
        try:
            model = pattern.build()
            answer: dict[str, Any] = {"verdict": verdict(tool, model), "detail": why_kept(tool, model)}
        except ImportError as error:
            answer = {"verdict": "missing", "detail": str(error)}
        except Exception as error:  # noqa: BLE001 - whatever a tool raises is a row of the table
            answer = {"verdict": "crash", "detail": f"{type(error).__name__}: {str(error).strip()[:200]}"}
        say({"number": number, **answer})


def say(line: dict[str, Any]) -> None:
    """Print at once, for the next moment may be the last."""
    sys.stdout.write("@" + json.dumps(line) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
