"""Float artifacts written node by node, for what no exporter writes and for thousands of random networks."""

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 20


class FloatGraph:
    """An artifact in the making: each call adds a node behind the tensor given, and returns the tensor it makes."""

    def __init__(self, channels: int = 3, side: int = 8, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.channels, self.side = channels, side
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []
        moved = self.add("Transpose", "image", perm=[0, 3, 1, 2])
        means = self.rng.uniform(60, 190, (1, channels, 1, 1)).astype(np.float32)
        centred = self.add("Sub", self.add("Cast", moved, to=TensorProto.FLOAT), self.constant(means))
        self.start = self.add("Mul", centred, self.constant(np.float32(1 / 64)))

    def constant(self, value: Any) -> str:
        name = f"constant{len(self._constants)}"
        self._constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def add(self, operator: str, *inputs: str, outputs: int = 1, **given: Any) -> Any:
        """Add a node, called by its operator and its place."""
        name = f"{operator}_{len(self._nodes)}"
        made = [f"t{len(self._nodes)}_{at}" for at in range(outputs)]
        self._nodes.append(helper.make_node(operator, inputs, made, name=name, **given))
        return made[0] if outputs == 1 else made

    def conv(self, x: str, inputs: int, outputs: int, kernel: int = 3, **given: Any) -> str:
        groups = given.get("group", 1)
        shape = (outputs, inputs // groups, kernel, kernel)
        weight = self.rng.normal(0, (2 / np.prod(shape[1:])) ** 0.5, shape).astype(np.float32)
        bias = self.rng.normal(0, 0.3, outputs).astype(np.float32)
        half = kernel // 2
        return self.add("Conv", x, self.constant(weight), self.constant(bias), **({"pads": [half] * 4} | given))

    def relu_conv(self, x: str, inputs: int, outputs: int, kernel: int = 3, **given: Any) -> str:
        return self.add("Relu", self.conv(x, inputs, outputs, kernel, **given))

    def head(self, x: str, inputs: int, classes: int = 5) -> str:
        """Pool x (N, inputs, H, W) and give each class its logit."""
        flat = self.add("Flatten", self.add("GlobalAveragePool", x))
        weight = self.rng.normal(0, inputs**-0.5, (classes, inputs)).astype(np.float32)
        bias = self.rng.normal(0, 0.1, classes).astype(np.float32)
        return self.add("Gemm", flat, self.constant(weight), self.constant(bias), transB=1)

    def model(self, logits: str, classes: int = 5) -> onnx.ModelProto:
        """Return the artifact whose answer is the tensor `logits`."""
        self._nodes[-1].output[0] = "logits"
        assert logits.startswith(f"t{len(self._nodes) - 1}_"), "the last node gives the logits"
        image = helper.make_tensor_value_info(
            "image", TensorProto.UINT8, ["batch", self.side, self.side, self.channels]
        )
        answer = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", classes])
        graph = helper.make_graph(self._nodes, "float", [image], [answer], self._constants)
        opset = [helper.make_opsetid("", OPSET)]
        return helper.make_model(graph, opset_imports=opset, ir_version=10)
