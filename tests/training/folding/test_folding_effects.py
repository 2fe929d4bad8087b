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


class Parts(Statement):
    """Two parts of the features, by index, of which the second is taken before the first changes, or after."""

    def __init__(
        self, first, second, *, is_late: bool, read=lambda features, first, second: torch.cat([first, second], 1)
    ):
        super().__init__(nothing, nothing)
        self.first, self.second, self.is_late, self.read = first, second, is_late, read

    def forward(self, images):
        features = super().forward(images)
        half = features.shape[1] // 2
        early = None if self.is_late else features[self.second(half)]
        first = features[self.first(half)]
        functional.relu_(first)
        second = features[self.second(half)] if early is None else early
        second.tanh_()
        return self.read(features, first, second)


APART = {
    "numbers": (lambda _: (slice(None), slice(2)), lambda _: (slice(None), slice(2, None))),
    "from the end": (lambda _: (slice(None), slice(-1)), lambda _: (slice(None), slice(-1, None))),
    "every other": (lambda _: (slice(None), slice(0, None, 2)), lambda _: (slice(None), slice(1, None, 2))),
    "a bound that is computed": (
        lambda half: (slice(None), slice(half)),
        lambda half: (slice(None), slice(half, None)),
    ),
}


@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize("parts", APART.values(), ids=APART)
def test_parts_that_share_nothing_may_change_one_after_the_other(parts, is_late: bool):
    assert len(folded_and_compared(aged(Parts(*parts, is_late=is_late))).folds) == 1


@pytest.mark.parametrize("is_late", [False, True])
def test_parts_that_share_a_channel_are_refused_with_what_to_write_instead(is_late: bool):
    network = aged(Parts(lambda _: (slice(None), slice(3)), lambda _: (slice(None), slice(2, None)), is_late=is_late))
    with pytest.raises(NotFoldable, match=r"that is read later; make a new tensor instead, .* with torch\.cat"):
        fold(network, IMAGES)


def test_parts_that_changed_are_refused_where_the_whole_is_read():
    network = aged(Parts(*APART["numbers"], is_late=True, read=lambda features, _first, _second: features))
    with pytest.raises(NotFoldable, match="relu_ changes in place what norm shows too"):
        fold(network, IMAGES)


def test_a_split_that_is_read_whole_after_a_part_of_it_changed_is_refused():
    class Rejoined(Statement):
        def forward(self, images):
            parts = super().forward(images).chunk(2, 1)
            functional.relu_(parts[0])
            return torch.cat(parts, 1)

    with pytest.raises(NotFoldable, match="relu_ changes in place what chunk shows too"):
        fold(aged(Rejoined(nothing, nothing)), IMAGES)


def test_a_part_of_a_part_may_change_while_another_is_read():
    class Nested(Statement):
        def forward(self, images):
            features = super().forward(images)
            half = features[:, :2]
            quarter = half[:, :1].flatten(2)
            functional.relu_(quarter)
            return torch.cat([quarter, half[:, 1:].flatten(2), features[:, 2:].flatten(2)], 1)

    assert len(folded_and_compared(aged(Nested(nothing, nothing))).folds) == 1


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
