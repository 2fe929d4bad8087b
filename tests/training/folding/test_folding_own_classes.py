"""Networks as people write them: layers called twice, layers of their own classes, functions in place of modules."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from training_support import aged, folded_and_compared

from training.folding.modules import Folded
from training.normalization import batch_norms


def weights_of(folded: Folded) -> int:
    return sum(1 for _, one in folded.module.named_parameters() if one.ndim > 1)


class Shared(nn.Module):
    """One convolution called twice, `norms` says behind which calls a BatchNorm stands; the second call by `alias`."""

    def __init__(self, norms: tuple[bool, bool], *, alias: bool = False):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.again = self.conv if alias else None
        self.first, self.second = (nn.BatchNorm2d(3) if one else nn.Sigmoid() for one in norms)

    def forward(self, images):
        second = self.conv if self.again is None else self.again
        return self.first(self.conv(images)) * torch.sigmoid(self.second(second(images)))


@pytest.mark.parametrize("alias", [False, True], ids=["one name", "two names"])
@pytest.mark.parametrize("norms", [(True, False), (False, True), (True, True)])
def test_pytorch_197539_each_call_of_a_shared_convolution_folds_its_own_batchnorm(norms, alias: bool):
    """pytorch#197539: the call without BatchNorm got the folded weights too."""
    folded = folded_and_compared(aged(Shared(norms, alias=alias)))
    assert len(folded.folds) == sum(norms)
    assert folded.kept == ()
    assert weights_of(folded) == 2


@pytest.mark.parametrize("alias", [False, True], ids=["one name", "two names"])
def test_a_shared_convolution_that_nothing_goes_into_stays_one(alias: bool):
    assert weights_of(folded_and_compared(Shared((False, False), alias=alias).eval())) == 1


class CalledThrice(nn.Module):
    """One convolution called three times, the first time before a BatchNorm."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, images):
        return self.conv(torch.sigmoid(self.conv(torch.sigmoid(self.norm(self.conv(images))))))


def test_the_calls_that_nothing_goes_into_share_one_copy():
    folded = folded_and_compared(aged(CalledThrice()))
    assert len(folded.folds) == 1
    assert weights_of(folded) == 2


class SharedByFunction(nn.Module):
    """The convolution's weight is used again, by a function."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, images):
        return self.norm(self.conv(images)) + functional.conv2d(images, self.conv.weight, padding=1)


def test_a_weight_that_a_function_uses_again_keeps_its_numbers_there():
    assert len(folded_and_compared(aged(SharedByFunction())).folds) == 1


class NormAndActivation(nn.BatchNorm2d):
    """A BatchNorm that brings its activation, as timm's do."""

    def forward(self, images):
        return functional.relu(super().forward(images))


class Slower(nn.BatchNorm2d):
    """A BatchNorm with other defaults and nothing else."""

    def __init__(self, width: int):
        super().__init__(width, eps=1e-12, momentum=0.4)


class Same(nn.Conv2d):
    """A convolution that pads by itself."""

    def forward(self, images):
        padded = functional.pad(images, (0, 1, 0, 1))
        return functional.conv2d(padded, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Upsampling(nn.ConvTranspose2d):
    """A transposed convolution in groups, by function."""

    def forward(self, images):
        return functional.conv_transpose2d(images, self.weight, self.bias, self.stride, groups=self.groups)


class Pool(nn.MaxPool2d):
    """A pool whose name says nothing of its axes."""


class Pool3x(nn.AvgPool2d):
    """A pool whose name says something else."""


class Standardised(nn.Conv2d):
    """A convolution whose weight is computed: it can take nothing in."""

    def forward(self, images):
        return functional.conv2d(images, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


def test_classes_of_ones_own_fold_like_those_they_derive_from():
    model = nn.Sequential(
        Same(3, 4, 3, bias=False), NormAndActivation(4), Upsampling(4, 6, 2, groups=2), Slower(6), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
    )  # fmt: skip
    folded = folded_and_compared(aged(model))
    assert [(record.norm, record.into) for record in folded.folds] == [("1", "0.conv2d"), ("3", "2.conv_transpose2d")]
    assert list(batch_norms(folded.module)) == []


@pytest.mark.parametrize("kind", [Pool, Pool3x])
def test_a_pool_of_ones_own_class_is_passed_whatever_it_is_called(kind: type[nn.Module]):
    model = aged(nn.Sequential(nn.Conv2d(3, 4, 3), kind(2), nn.BatchNorm2d(4)))
    with torch.no_grad():
        model[2].weight.abs_()  # max-pooling lets no negative scale pass
    assert folded_and_compared(model).kept == ()


class NamedAsTheCall(nn.Module):
    """A parameter has the name that tracing gives to the call of a function."""

    def __init__(self):
        super().__init__()
        self.weight, self.linear = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(5, 4))
        self.norm = nn.BatchNorm1d(4)

    def forward(self, images):
        features = self.norm(functional.linear(images.mean((2, 3)), self.weight))
        return functional.linear(features, self.linear)


def test_a_lifted_layer_takes_no_name_that_a_parameter_has():
    assert len(folded_and_compared(aged(NamedAsTheCall())).folds) == 1


def test_a_batchnorm_of_ones_own_class_that_cannot_fold_is_named():
    folded = folded_and_compared(aged(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), NormAndActivation(4))))
    assert [record.norm for record in folded.kept] == ["2"]


def test_a_convolution_whose_weight_is_computed_takes_nothing_in():
    folded = folded_and_compared(aged(nn.Sequential(Standardised(3, 4, 3), nn.BatchNorm2d(4))))
    assert [record.norm for record in folded.kept] == ["1"]


class Functions(nn.Module):
    """Pooling, dropout and permuting by function, between each convolution and its BatchNorm."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)
        self.head, self.norm3 = nn.Linear(6, 5), nn.BatchNorm1d(6)

    def forward(self, images):
        x = self.norm1(functional.max_pool2d(self.conv1(images), 2))
        x = functional.dropout(self.conv2(functional.relu(x)), 0.3, training=self.training)
        x = self.norm2(functional.avg_pool2d(x, 2))
        x = torch.flatten(functional.adaptive_avg_pool2d(functional.relu(x), 1), 1)
        return self.head(self.norm3(x))


def test_pooling_and_dropout_by_function_are_passed_as_their_modules_are():
    model = aged(Functions())
    with torch.no_grad():
        model.norm1.weight.abs_()  # max-pooling lets no negative scale pass
    folded = folded_and_compared(model)
    assert {(record.norm, record.into, record.place) for record in folded.folds} == {
        ("norm1", "conv1", "after"), ("norm2", "conv2", "after"), ("norm3", "head", "before"),
    }  # fmt: skip


def test_an_average_that_counts_its_padding_lets_no_shift_pass():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, images):
            return self.norm(functional.avg_pool2d(self.conv(images), 2, padding=1))

    assert "counts padded zeros" in folded_and_compared(aged(Counts())).kept[0].reason
