"""ONNX graphs for the tests, written in ONNX's own text form: `[name of node] result = Operator<attribute =
1>(input)`.
"""

from dataclasses import dataclass

import onnx
from onnx import parser

from service.independence.proof import Verdict, prove

IMAGES = "float[N,4,4,4] x"
NORM = """float[4] s = {1, 2, 3, 4}, float[4] b = {0, 1, 0, 1},
          float[4] m = {0, 0, 1, 1}, float[4] v = {1, 1, 2, 2}"""
KERNEL = "float[2, 4, 1, 1] w = {1, 2, 3, 4, 5, 6, 7, 8}"
SCALES = "float a = {0.05}, uint8 z = {128}, float[2] e = {0.1, 0.2}, uint8[2] f = {0, 0}"


@dataclass(frozen=True, slots=True)
class Case:
    """A graph in text, at some opsets; `runs` is False where ONNX Runtime cannot run it at other sizes."""

    body: str
    constants: str = ""
    opsets: tuple[int, ...] = (17,)
    images: str = IMAGES
    functions: str = ""
    runs: bool = True

    def model(self, opset: int) -> onnx.ModelProto:
        """The graph as a model."""
        return graph(self.body, opset=opset, images=self.images, constants=self.constants, functions=self.functions)


Instances = dict[str, tuple[Case, int]]


def at_opsets(cases: dict[str, Case]) -> Instances:
    """Every case at every opset it is for, by a name that says both."""
    return {f"{name}, opset {opset}": (case, opset) for name, case in cases.items() for opset in case.opsets}


def that_run(instances: Instances) -> Instances:
    """Those that ONNX Runtime can run."""
    return {name: (case, opset) for name, (case, opset) in instances.items() if case.runs}


def tensor(name: str, *shape: int) -> str:
    """An initializer of varied small values."""
    count = 1
    for extent in shape:
        count *= extent
    values = ", ".join(str((7 * index % 11 - 5) / 10) for index in range(count))
    return f"float{list(shape)} {name} = {{{values}}}"


def graph(
    body: str,
    *,
    opset: int = 17,
    images: str = IMAGES,
    constants: str = "",
    functions: str = "",
    output: str = "float y",
) -> onnx.ModelProto:
    """A model from `images` to `y`; `constants` are initializers such as `float[2] c = {1, 2}`."""
    text = f"""
    <ir_version: 8, opset_import: ["": {opset}, "com.microsoft": 1, "local": 1]>
    g ({images}) => ({output}) <{constants}> {{ {body} }}
    {functions}
    """
    model = parser.parse_model(text)
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")  # its rank differs from test to test, and nobody reads it
    return model


def verdict(body: str, **options: object) -> Verdict:
    """What the proof says of such a model."""
    return prove(graph(body, **options))  # type: ignore[arg-type]
