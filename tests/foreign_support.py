"""ONNX classifiers as others write them: small, with a BatchNorm that has a past, and one knob for each fault."""

import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm
from training_support import aged

from training.normalization.domains import separate

SIDE, FILTERS, CLASSES = 12, 6, 4


@dataclass
class Graph:
    """Conv → BatchNorm → ReLU → mean → Gemm by onnx.helper; each test breaks the part that it is about."""

    opset: int = 20
    batch: int | str = "batch"
    input_name: str = "x"
    channels_last: bool = False
    element_type: int = TensorProto.FLOAT
    softmax: bool = False
    conv_bias: bool = False
    dropout: bool = False
    training_mode: bool = False
    inputs: tuple[str, ...] = ()
    values: dict[str, np.ndarray] = field(default_factory=dict)
    epsilon: float = 1e-5
    channels: int = 3

    def weights(self) -> dict[str, np.ndarray]:
        random = np.random.default_rng(5)
        weights = {
            "filters": random.normal(size=(FILTERS, self.channels, 3, 3)) / 5,
            "gamma": random.uniform(0.5, 1.5, FILTERS),
            "beta": random.normal(size=FILTERS) / 5,
            "mean": random.normal(size=FILTERS) / 3,
            "var": random.uniform(0.05, 0.4, FILTERS),
            "matrix": random.normal(size=(CLASSES, FILTERS)),
        }
        if self.conv_bias:
            weights["conv_bias"] = random.normal(size=FILTERS)
        kind = helper.tensor_dtype_to_np_dtype(self.element_type)
        return {name: np.asarray(value, kind) for name, value in (weights | self.values).items()}

    def nodes(self) -> list[onnx.NodeProto]:
        first = "planes" if self.channels_last else self.input_name
        conv = ["filters", *(["conv_bias"] if self.conv_bias else [])]
        before = "dropped" if self.dropout else "convolved"
        mode = {"training_mode": 1} if self.training_mode else {}
        outputs = ["normed", "new_mean", "new_var"] if self.training_mode else ["normed"]
        nodes = [helper.make_node("Conv", [first, *conv], ["convolved"], pads=[1, 1, 1, 1], name="conv")]
        if self.channels_last:
            nodes.insert(0, helper.make_node("Transpose", [self.input_name], ["planes"], perm=[0, 3, 1, 2]))
        if self.dropout:
            nodes.append(helper.make_node("Dropout", ["convolved"], ["dropped"], name="drop"))
        nodes += [
            helper.make_node(
                "BatchNormalization", [before, "gamma", "beta", "mean", "var"], outputs, name="norm",
                epsilon=self.epsilon, **mode,
            ),
            helper.make_node("Relu", ["normed"], ["positive"]),
            helper.make_node("GlobalAveragePool", ["positive"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["features"]),
            helper.make_node("Gemm", ["features", "matrix"], ["scores"], transB=1),
        ]  # fmt: skip
        if self.softmax:
            nodes.append(helper.make_node("Softmax", ["scores"], ["probabilities"], axis=1))
        return nodes

    def model(self) -> onnx.ModelProto:
        planes = [self.channels, SIDE, SIDE]
        shape = [self.batch, *([SIDE, SIDE, self.channels] if self.channels_last else planes)]
        inputs = [helper.make_tensor_value_info(self.input_name, self.element_type, shape)]
        inputs += [helper.make_tensor_value_info(name, self.element_type, shape) for name in self.inputs]
        output = "probabilities" if self.softmax else "scores"
        graph = helper.make_graph(
            self.nodes(),
            "foreign",
            inputs,
            [helper.make_tensor_value_info(output, self.element_type, [self.batch, CLASSES])],
            [numpy_helper.from_array(value, name) for name, value in self.weights().items()],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=9)

    def write(self, folder: Path, **options) -> Path:
        path = folder / "foreign.onnx"
        onnx.save(self.model(), path, **options)
        return path


class Network(nn.Module):
    """Two convolutions with BatchNorm, and a linear head."""

    def __init__(self, *, track: bool = True, channels: int = 3):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, 8, 3, bias=False), nn.BatchNorm2d(8, track_running_stats=track)
        self.conv2, self.bn2 = nn.Conv2d(8, 16, 3, bias=False), nn.BatchNorm2d(16, track_running_stats=track)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, images):
        features = torch.relu(self.bn1(self.conv1(images)))
        features = torch.relu(self.bn2(self.conv2(features)))
        return self.head(features.mean((2, 3)))


def network(**options) -> nn.Module:
    """Return it with a past and positive γ: nothing for the doctor to find but what a test puts in."""
    torch.manual_seed(3)
    model = aged(Network(**options))
    with torch.no_grad():
        for norm in (model.bn1, model.bn2):
            norm.weight.abs_()
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.fill_(1000)
    return model


def build_network() -> nn.Module:
    """Return the bare network, as `package.module:function` names it."""
    return Network()


class NormAct(nn.BatchNorm2d):
    """As timm's BatchNormAct2d: it asks for a rank, which a trace keeps as a reader of the image, and activates."""

    def __init__(self, features: int):
        super().__init__(features)
        self.drop, self.act = nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, features):
        torch._assert(features.ndim == 4, "expected 4D input")
        return self.act(self.drop(super().forward(features)))


def build_with_activating_norms() -> nn.Module:
    """Return the bare network, whose BatchNorm layers activate what they answer."""
    built = Network()
    built.bn1, built.bn2 = NormAct(8), NormAct(16)
    return built


def build_with_computed_weights() -> nn.Module:
    """Return a network whose weights weight and spectral norm compute, by hooks and by parametrization."""
    built = network()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it is old, and in use
        weight_norm(built.conv1)
    spectral_norm(built.conv2)
    parametrizations.weight_norm(built.head)
    return built


class WithAuxiliaryHead(Network):
    """The network with a BatchNorm that only training runs."""

    def __init__(self):
        super().__init__()
        self.auxiliary = nn.BatchNorm2d(FILTERS)


def build_with_auxiliary_head() -> nn.Module:
    """Return a network one of whose BatchNorms no inference runs."""
    return WithAuxiliaryHead()


def build_for_two_domains() -> nn.Module:
    """Return the network with a BatchNorm for each of two domains."""
    return separate(Network(), ("day", "night"))


def torch_export(
    model: nn.Module, path: Path, *, dynamo: bool, opset: int = 18, training: bool = False, as_people_do=False
) -> Path:
    """Export as people do; the older exporter keeps BatchNorm only where it is told to preserve it."""
    import warnings

    images = torch.zeros(2, 3, SIDE, SIDE)
    mode = torch.onnx.TrainingMode.PRESERVE
    options = (
        {"dynamic_shapes": ({0: torch.export.Dim("batch")},), "optimize": False, "external_data": False}
        if dynamo
        else {"dynamic_axes": {"x": {0: "batch"}}, "training": mode, "do_constant_folding": False}
    )
    if as_people_do:
        options.pop("optimize", None), options.pop("training", None), options.pop("do_constant_folding", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model.train(training), (images,), str(path), dynamo=dynamo, opset_version=opset, input_names=["x"],
            verbose=False, **options,
        )  # fmt: skip
    return path
