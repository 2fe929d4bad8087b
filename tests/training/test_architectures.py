"""`training.architectures`: every network with every normalization answers, folds, and can be served."""

import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn
from training_support import aged, relative_difference

from service.engine import choose_device, open_engine
from service.independence.proof import prove
from training.architectures import ARCHITECTURES, build
from training.architectures.lenet import crelu
from training.errors import UsageError
from training.export import Classifier, to_onnx
from training.folding.modules import fold, verify
from training.loop import Normalize
from training.normalization import batch_norms

NORMS = ("batch", "layer", "group", "none")
SERVED = [("small_cnn", norm) for norm in NORMS] + [(name, "batch") for name in ARCHITECTURES if name != "small_cnn"]


def past(name: str, norm: str, size: int = 16, channels: int = 1) -> nn.Module:
    """Build a network whose BatchNorm has seen something."""
    torch.manual_seed(0)
    return aged(build(name, channels=channels, classes=7, size=size, norm=norm))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_network_folds_with_every_norm_and_leaves_no_batchnorm(name: str, norm: str):
    network, images = past(name, norm), torch.randn(3, 1, 16, 16)
    norms = list(batch_norms(network))
    assert bool(norms) == (norm == "batch")
    folded = verify(fold(network, images), images)
    assert (len(folded.folds), folded.kept, list(batch_norms(folded.module))) == (len(norms), (), [])
    found, wanted = folded.module(images.double()), network.double()(images.double())
    assert found.shape == (3, 7)
    assert relative_difference(found, wanted) < 1e-10


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("size, channels", [(8, 1), (28, 1), (29, 3), (66, 3)])
def test_every_network_takes_images_of_any_usual_size(name: str, size: int, channels: int):
    network = build(name, channels=channels, classes=5, size=size).eval()
    with torch.no_grad():
        assert network(torch.randn(2, channels, size, size)).shape == (2, 5)


@pytest.mark.parametrize("name, norm", SERVED)
def test_what_is_exported_is_proved_and_answers_as_torch_does(name: str, norm: str):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 1), dtype=np.uint8)
    normalize = Normalize((0.1,), (0.3,))
    folded = fold(past(name, norm), torch.randn(2, 1, 16, 16))
    wanted = Classifier(normalize, folded.unfolded)(torch.from_numpy(pixels)).detach()
    model = to_onnx(Classifier(normalize, folded.module), pixels[:2])
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}
    assert prove(model).verdict == "independent", prove(model)
    found = open_engine(model.SerializeToString(), choose_device("cpu")).run(pixels)
    # float32 through 53 layers with γ drawn from N(0, 4) keeps about four digits; a wrong fold keeps none
    assert relative_difference(torch.from_numpy(np.array(found)).double(), wanted) < 1e-3


@pytest.mark.parametrize("norm", ["layer", "group", "none"])
def test_without_batchnorm_an_image_is_trained_without_regard_to_its_batch(norm: str):
    network = build("small_cnn", channels=1, classes=4, size=16, norm=norm).train()
    images = torch.randn(6, 1, 16, 16)
    assert torch.allclose(network(images)[:1], network(images[:1]), atol=1e-5)
    with_batchnorm = build("small_cnn", channels=1, classes=4, size=16).train()
    assert not torch.allclose(with_batchnorm(images)[:2], with_batchnorm(images[:2]), atol=1e-2)


def test_a_layer_has_a_bias_exactly_where_its_norm_brings_none():
    for norm in NORMS:
        block = build("small_cnn", channels=1, classes=4, size=16, norm=norm).block1
        assert (block.conv.bias is not None) == (norm == "none")


def test_momentum_eps_and_dropout_reach_the_layers():
    network = build("lenet_crelu", channels=1, classes=10, size=28, bn_momentum=0.05, bn_eps=1e-3, dropout=0.3)
    assert {(norm.momentum, norm.eps) for _, norm in batch_norms(network)} == {(0.05, 1e-3)}
    assert network.dropout.p == 0.3


def test_crelu_keeps_both_signs_side_by_side():
    assert crelu(torch.tensor([[2.0, -3.0]])).tolist() == [[2.0, 0.0, 0.0, 3.0]]


def test_the_published_experiment_has_its_published_sizes():
    network = build("lenet_crelu", channels=1, classes=10, size=28)
    shapes = [tuple(weight.shape) for weight in network.parameters() if weight.ndim > 1]
    assert shapes == [(16, 1, 5, 5), (32, 32, 5, 5), (1024, 64 * 7 * 7), (10, 2048)]


def test_an_unknown_network_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match=r"resnet-18 is not known \(did you mean resnet18\?\)"):
        build("resnet-18", channels=1, classes=2, size=8)


def test_timm_is_asked_for_by_name_and_says_how_to_get_it_where_it_is_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("training.architectures.catalogue.find_spec", lambda _: None)
    with pytest.raises(UsageError, match="timm:resnet18 needs timm: pip install timm"):
        build("timm:resnet18", channels=1, classes=2, size=8)


class Timm(ModuleType):
    """Stands in for timm: one model, which records how it was asked for."""

    def __init__(self) -> None:
        super().__init__("timm")
        self.asked: dict[str, object] = {}

    def list_models(self) -> list[str]:
        """Return the one name."""
        return ["tiny_net"]

    def create_model(self, name: str, **options: object) -> nn.Module:
        """Return a convolution with BatchNorm."""
        self.asked = {"name": name, **options}
        return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.LazyLinear(4))


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> Timm:
    """timm, as good as installed."""
    module = Timm()
    monkeypatch.setitem(sys.modules, "timm", module)
    monkeypatch.setattr("training.architectures.catalogue.find_spec", lambda _: object())
    return module


def test_a_timm_network_takes_our_channels_classes_and_batchnorm(timm: Timm):
    network = build("timm:tiny_net", channels=1, classes=4, size=8, bn_momentum=0.2, dropout=0.5)
    assert timm.asked == {
        "name": "tiny_net", "pretrained": False, "in_chans": 1, "num_classes": 4, "drop_rate": 0.5,
    }  # fmt: skip
    assert [norm.momentum for _, norm in batch_norms(network)] == [0.2]


@pytest.mark.usefixtures("timm")
@pytest.mark.parametrize(
    "name, norm, words",
    [("timm:tiny-net", "batch", r"did you mean tiny_net\?"), ("timm:tiny_net", "group", "norm = group")],
)
def test_what_timm_does_not_have_is_refused(name: str, norm: str, words: str):
    with pytest.raises(UsageError, match=words):
        build(name, channels=1, classes=4, size=8, norm=norm)
