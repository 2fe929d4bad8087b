"""Blocks of the well-known networks, built by hand in torch and exported by both of its exporters."""

import io
import re
import warnings
from pathlib import Path
from typing import Any

import onnx
import pytest
from proof_cases.oracle import refutation

from service.independence.proof import prove

torch = pytest.importorskip("torch", reason="NOT RUN: exported blocks need torch")
pytest.importorskip("onnxscript", reason="NOT RUN: the dynamo exporter needs onnxscript")
nn = torch.nn

ROOT = Path(__file__).parents[3]
EXPORTERS = {"dynamo, opset 20": (True, 20), "script, opset 14": (False, 14), "script, opset 17": (False, 17)}


class Residual(nn.Module):  # type: ignore[name-defined,misc]
    """ResNet's basic block with its head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x: Any) -> Any:
        """Logits."""
        x = torch.relu(x + self.second(torch.relu(self.norm(self.first(x)))))
        return self.head(torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1))


class Shuffle(nn.Module):  # type: ignore[name-defined,misc]
    """ShuffleNet's channel shuffle, by the input's own shape."""

    def forward(self, x: Any) -> Any:
        """Channels of two branches interleaved."""
        first, second = x.chunk(2, dim=1)
        x = torch.cat((first, torch.relu(second)), dim=1)
        n, c, h, w = x.size()
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class Excitation(nn.Module):  # type: ignore[name-defined,misc]
    """MobileNet v3's inverted residual with squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)
        self.norm, self.gate = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

    def forward(self, x: Any) -> Any:
        """Features."""
        found = nn.functional.hardswish(self.norm(self.depthwise(x)))
        return x + found * nn.functional.hardsigmoid(self.gate(found.mean((2, 3), keepdim=True)))


class Next(nn.Module):  # type: ignore[name-defined,misc]
    """ConvNeXt's block, channels last within, and its head."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(4, 4, 7, padding=3, groups=4)
        self.norm, self.wide, self.narrow = nn.LayerNorm(4), nn.Linear(4, 8), nn.Linear(8, 4)
        self.scale = nn.Parameter(torch.full((4, 1, 1), 0.1))

    def forward(self, x: Any) -> Any:
        """Pooled features."""
        found = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        found = self.narrow(nn.functional.gelu(self.wide(found))).permute(0, 3, 1, 2)
        return (x + self.scale * found).mean([-2, -1])


class Dense(nn.Module):  # type: ignore[name-defined,misc]
    """DenseNet's concatenations and transition, then Inception's parallel pools."""

    def __init__(self) -> None:
        super().__init__()
        self.grow, self.norm = nn.Conv2d(4, 2, 3, padding=1), nn.BatchNorm2d(6)

    def forward(self, x: Any) -> Any:
        """Features."""
        x = torch.relu(self.norm(torch.cat([x, self.grow(x)], 1)))
        pools = nn.functional.avg_pool2d(x, 3, 1, 1), nn.functional.max_pool2d(x, 3, 1, 1, ceil_mode=True)
        return nn.functional.dropout(torch.cat(pools, 1), 0.5, self.training).flatten(1)


class Attention(nn.Module):  # type: ignore[name-defined,misc]
    """Attention with the length in front of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(4, 2)

    def forward(self, x: Any) -> Any:
        """Tokens attended to and averaged."""
        tokens = x.flatten(2).permute(2, 0, 1)  # (16, N, 4)
        return self.attend(tokens, tokens, tokens, need_weights=False)[0].mean(0)


BLOCKS = (Residual, Shuffle, Excitation, Next, Dense, Attention)


def export(module: Any, dynamo: bool, opset: int, training: bool = False) -> onnx.ModelProto:
    """The module as a model with a symbolic batch, in memory."""
    images, buffer = torch.zeros(3, 4, 4, 4), io.BytesIO()
    target = None if dynamo else buffer
    module.train(training)
    options: dict[str, Any] = {"dynamic_axes": {"x": {0: "batch"}}}
    if dynamo:
        options = {"dynamic_shapes": ({0: torch.export.Dim("batch")},), "verbose": False}
    elif training:
        options |= {"training": torch.onnx.TrainingMode.TRAINING, "do_constant_folding": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the older exporter warns that it is the older one
        program = torch.onnx.export(
            module, (images,), target, dynamo=dynamo, opset_version=opset, input_names=["x"], **options
        )
    return program.model_proto if dynamo else onnx.load_from_string(buffer.getvalue())


@pytest.mark.parametrize("exporter", EXPORTERS.values(), ids=EXPORTERS)
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.__name__)
def test_an_exported_block_is_proved_and_no_run_refutes_it(block: Any, exporter: tuple[bool, int]) -> None:
    torch.manual_seed(0)
    model = export(block(), *exporter)
    found = prove(model)
    assert found.verdict == "independent", found
    assert refutation(model) is None


@pytest.mark.parametrize("opset", [9, 11, 13, 14, 17])
@pytest.mark.parametrize("block", [Residual, Excitation, Dense], ids=lambda block: block.__name__)
def test_a_block_exported_in_training_mode_is_mixed(block: Any, opset: int) -> None:
    model = export(block(), dynamo=False, opset=opset, training=True)
    found = prove(model)
    assert found.verdict == "mixed", found
    assert found.operator in ("BatchNormalization", "Dropout")
    assert found.node in {node.name for node in model.graph.node}


def test_the_file_decides_and_not_the_mode_of_the_module() -> None:
    """The dynamo exporter of torch 2.13 folds a BatchNorm in training mode as if at inference."""
    model = export(Residual(), dynamo=True, opset=20, training=True)
    assert (prove(model).verdict == "independent") == (refutation(model) is None)


def test_the_committed_table_has_nothing_left_unproven() -> None:
    page = (ROOT / "docs" / "zoo-proof.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if re.match(r"\| (torchvision|timm) ", line)]
    assert len(rows) >= 25
    assert all(row.endswith("| proved |") for row in rows)


@pytest.mark.parametrize("stem", ["torchvision-shufflenet_v2_x0_5-script-9", "timm-mobilenetv3_small_050-dynamo-20"])
def test_a_network_of_the_zoo_exported_now_is_proved(stem: str, tmp_path: Path) -> None:
    from benchmarks import zoo

    wanted = next(entry for entry in zoo.ZOO if entry.stem == stem)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library = zoo.declare_missing_operators()  # before timm, which imports torchvision
        for package in ("torchvision", "timm"):
            pytest.importorskip(package, reason=f"NOT RUN: the zoo needs {package}")
        path = zoo.write(wanted, tmp_path)
    del library
    assert prove(onnx.load(path, load_external_data=False)).verdict == "independent"
