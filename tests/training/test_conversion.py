"""What the manifest says is left of BatchNorm is left in the file that was written."""

from pathlib import Path

import onnx
import torch
from conversion_support import artifact_of
from torch import nn
from torch.nn.utils import parametrizations
from training_support import aged

from service.artifact import Artifact
from service.independence.proof import prove
from service.manifest import Manifest
from service.preprocessing import Preprocessing
from training.exact.options import ExactOptions
from training.export import export_network
from training.importing.images import synthetic_images

SIDE, CLASSES = 12, 4
ORIGIN = {
    "images": "synthetic", "source": "this test", "source_sha256": "none", "producer": "nobody", "date": "today",
    "versions": {},
}  # fmt: skip


class Standardised(nn.Module):
    """A weight that the module computes, so that no module can be folded into it, though an exported graph could."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = parametrizations.weight_norm(nn.Conv2d(3, 6, 3)), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.bn(self.conv(images))).mean((2, 3)))


class Attending(Standardised):
    """The same, beside attention, of whose scale and shapes the exporter writes chains of nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = torch.relu(self.bn(self.conv(images))).flatten(2).transpose(1, 2)  # (batch, positions, channels)
        attended, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        return self.head(attended.mean(1))


def test_a_network_with_attention_is_proved_where_batchnorm_is_kept():
    torch.manual_seed(0)
    model = artifact_of(aged(Attending()), side=SIDE)
    assert sum(node.op_type == "BatchNormalization" for node in model.graph.node) == 1
    assert prove(model).verdict == "independent"
    onnx.checker.check_model(model, full_check=True)


def test_what_is_recorded_as_kept_is_in_the_file(tmp_path: Path):
    torch.manual_seed(0)
    third = (0.5, 0.5, 0.5)
    spec = Preprocessing(mode="RGB", size=(SIDE, SIDE), mean=third, std=third, resize="exact", filter="bilinear")
    manifest = Manifest(name="net", labels=tuple("abcd"), preprocessing=spec, training=ORIGIN)
    images, off = synthetic_images(spec), ExactOptions("off")
    network = aged(Standardised()).eval()
    exported = export_network(network, manifest, images, tmp_path, exact=off, material=None, say=lambda _: None)

    artifact = Artifact.load(exported.folder)
    norms = [node for node in onnx.load(artifact.path).graph.node if node.op_type == "BatchNormalization"]
    assert len(norms) == 1
    assert [record.norm for record in artifact.manifest.kept] == ["bn"]
