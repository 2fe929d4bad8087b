"""Networks that change tensors in place, and layers with hooks: what a trace of who reads what does not tell."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from training_support import aged, folded_and_compared

from training.errors import NotFoldable
from training.folding.modules import fold

IMAGES = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Statement(nn.Module):
    """A convolution and a BatchNorm; behind each a function is called, whose answer nobody reads."""

    def __init__(self, after_conv, after_norm):
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.after_conv, self.after_norm = after_conv, after_norm

    def forward(self, images):
        features = self.conv(images)
        self.after_conv(self, features)
        normed = self.norm(features)
        self.after_norm(self, normed)
        return normed


def nothing(_network, _features):
    pass


CHANGES = {
    "method": lambda _, features: features.relu_(),
    "function": lambda _, features: functional.relu_(features),
    "function told so": lambda _, features: functional.relu(features, inplace=True),
    "function told so by place": lambda _, features: functional.relu(features, True),
    "module": lambda network, features: network.relu(features),
    "output": lambda _, features: torch.add(features, 1, out=features),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_in_place_whose_answer_nobody_reads_is_not_lost(change):
    assert len(folded_and_compared(aged(Statement(nothing, change))).folds) == 1
    folded_and_compared(aged(Statement(change, nothing)))


@pytest.mark.parametrize("shown", [lambda images: images, lambda images: images[:, :3].contiguous()])
def test_the_images_of_the_caller_are_left_alone(shown):
    class Centred(Statement):
        def forward(self, images):
            images = shown(images)
            images.sub_(0.5).div_(2)
            return super().forward(images)

    images = IMAGES.double()
    folded = fold(aged(Centred(nothing, nothing)), images)
    folded.module(images)
    assert torch.equal(images, IMAGES.double())
    assert len(folded_and_compared(aged(Centred(nothing, nothing))).folds) == 1


def test_what_is_changed_through_a_view_and_read_later_is_refused():
    network = aged(Statement(lambda _, features: features.flatten(2).relu_(), nothing))
    with pytest.raises(NotFoldable, match="relu_ changes in place what conv shows too"):
        fold(network, IMAGES)


@pytest.mark.parametrize(
    "passed",
    [
        lambda _, normed: functional.dropout(normed.flatten(2), 0.5, training=False, inplace=True),
        lambda network, normed: network.drop(normed.flatten(2)),
    ],
    ids=["function", "module"],
)
def test_dropout_in_place_changes_nothing_and_what_it_shows_may_be_read_later(passed):
    class Twice(Statement):
        def __init__(self):
            super().__init__(nothing, nothing)
            self.drop = nn.Dropout(0.5, inplace=True)

        def forward(self, images):
            normed = super().forward(images)
            return passed(self, normed).mean(2) + normed.mean((2, 3))

    assert len(folded_and_compared(aged(Twice())).folds) == 1


def test_one_part_of_a_split_may_change_while_the_other_is_read():
    class Split(Statement):
        def forward(self, images):
            first, second = super().forward(images).chunk(2, 1)
            self.relu(first)
            return torch.cat([first, second], 1)

    assert len(folded_and_compared(aged(Split(nothing, nothing))).folds) == 1


def test_an_and_of_two_masks_changes_nothing_in_place():
    class Masked(Statement):
        def forward(self, images):
            features = self.conv(images)
            first, second = features > 0, features < 1
            both = first & second
            return self.norm(features) * both + first

    folded_and_compared(aged(Masked(nothing, nothing)))


def test_what_a_hook_of_a_layer_does_is_not_folded_over():
    network = aged(Statement(nothing, nothing))
    network.conv.register_forward_hook(lambda _layer, _given, answer: answer.abs())
    assert folded_and_compared(network).folds == ()
    network.norm.register_forward_pre_hook(lambda _layer, given: (given[0] * 2,))
    folded_and_compared(network)


def test_a_network_that_answers_otherwise_than_its_trace_is_refused():
    class Drawing(Statement):
        def forward(self, images):
            return super().forward(images) + torch.rand(())

    with pytest.raises(NotFoldable, match=r"answers otherwise than the network itself.*import that file"):
        fold(aged(Drawing(nothing, nothing)), IMAGES)


def test_a_network_that_cannot_run_in_float64_is_refused_with_the_way_out():
    class Blurred(Statement):
        def forward(self, images):
            return functional.conv2d(super().forward(images), torch.ones(4, 1, 3, 3), groups=4)

    with pytest.raises(NotFoldable, match=r"cannot run in float64, in which it is folded: .*import that file"):
        fold(aged(Blurred(nothing, nothing)), IMAGES)
