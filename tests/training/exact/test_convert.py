"""`training.exact.convert`: what it asks of images and layers, and when it trains the rounding in."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from conversion_graphs import FloatGraph
from conversion_support import exact_of, logits_of, random_images, smooth_images
from onnx import numpy_helper

from training.errors import NotConvertible
from training.exact.calibration import FEWEST_IMAGES
from training.exact.checking import Labelled, accuracy
from training.exact.convert import Material, convert
from training.exact.finetuning import fine_tune
from training.exact.reading import read_network
from training.exact.writing import write_exact
from training.export import Exported
from training.run import Trained

SIDE = 8
COARSE = 80  # times the step that 256 values would have: three or so are left


def _model(shift: float = 0.0) -> onnx.ModelProto:
    graph = FloatGraph()
    x = graph.relu_conv(graph.relu_conv(graph.start, 3, 4), 4, 4)
    model = graph.model(graph.head(x, 4))
    if shift:
        _change(model, "Conv", 1, lambda _, bias: bias - np.float32(shift), place=2)
    return model


def _change(model: onnx.ModelProto, operator: str, which: int, change, place: int = 1) -> None:
    """Change a constant of the `which`-th node of its kind: `change(node, array)`."""
    node = [one for one in model.graph.node if one.op_type == operator][which]
    (tensor,) = [one for one in model.graph.initializer if one.name == node.input[place]]
    made = change(node, numpy_helper.to_array(tensor))
    tensor.CopyFrom(numpy_helper.from_array(np.asarray(made), tensor.name))


@pytest.mark.parametrize("count", [0, 1, FEWEST_IMAGES - 1])
def test_too_few_calibration_images_are_refused_with_both_numbers(count: int):
    with pytest.raises(NotConvertible, match=rf"at least {FEWEST_IMAGES} real images.*got {count}"):
        convert(_model(), Material(random_images(count, side=SIDE)))


@pytest.mark.parametrize("shape", [(9, 8, 3), (8, 8, 1), (16, 16, 3)])
def test_calibration_images_of_another_size_are_refused_with_both_sizes(shape: tuple[int, int, int]):
    images = np.zeros((FEWEST_IMAGES, *shape), np.uint8)
    with pytest.raises(NotConvertible, match=rf"{shape[0]} × {shape[1]} × {shape[2]}.*8 × 8 × 3"):
        convert(_model(), Material(images))


def test_a_dead_layer_is_refused_by_its_name():
    with pytest.raises(NotConvertible, match=r"layer Conv_\d+ gives 0 for every calibration image: a dead"):
        convert(_model(shift=1000), Material(random_images(64, side=SIDE)))


def test_a_constant_layer_is_refused_by_its_name():
    model = _model()
    _change(model, "Conv", 1, lambda _, weight: 0 * weight)
    _change(model, "Conv", 1, lambda _, bias: 0 * bias + np.float32(0.5), place=2)
    with pytest.raises(NotConvertible, match=r"layer Conv_\d+ gives 0\.5 for every calibration image"):
        convert(model, Material(random_images(64, side=SIDE)))


def test_one_dead_channel_among_others_converts():
    model = _model()

    def kill(_, weight: np.ndarray) -> np.ndarray:
        weight = weight.copy()
        weight[2] = 0
        return weight

    _change(model, "Conv", 1, kill)
    converted = convert(model, Material(random_images(64, side=SIDE)))
    assert converted.record.checked_images == 64


def test_images_that_are_all_black_are_refused_by_the_layer_that_they_leave_constant():
    """Without padding every position sees the same; a range cannot be told from one value."""
    graph = FloatGraph()
    x = graph.relu_conv(graph.start, 3, 4, 3, pads=[0] * 4)
    model = graph.model(graph.head(graph.add("GlobalAveragePool", graph.relu_conv(x, 4, 1, 1, pads=[0] * 4)), 1))
    _change(model, "Conv", 1, lambda _, bias: bias + np.float32(1), place=2)
    with pytest.raises(NotConvertible, match=r"layer \w+ gives .* for every calibration image.*images that are all"):
        convert(model, Material(np.zeros((64, SIDE, SIDE, 3), np.uint8)))


def test_the_record_counts_what_was_done():
    images = smooth_images(80, side=SIDE)
    model = _model()
    converted = convert(model, Material(images))
    record = converted.record
    assert (record.calibration_images, record.checked_images, record.fine_tuned_epochs) == (80, 80, 0)
    assert record.accuracy is None
    assert record.differing_executions == ()
    same = logits_of(converted.model, images).argmax(1) == logits_of(model, images).argmax(1)
    assert record.agreement == same.mean()
    bounds = {layer.name: layer for layer in converted.exactness.layers}
    assert {layer.name for layer in record.layers} == set(bounds)
    assert all(layer.bound == bounds[layer.name].bound < 2**24 for layer in record.layers)


def test_fine_tuning_is_skipped_where_little_is_lost():
    images = smooth_images(100, side=SIDE)
    model = _model()
    exact = exact_of(read_network(model), images).model
    labelled = Labelled(images, logits_of(exact, images).argmax(1))
    record = convert(model, Material(images, labelled, labelled)).record
    assert record.fine_tuned_epochs == 0


def _spoiled(exported: Exported, loudness: float, *, is_even: bool) -> onnx.ModelProto:
    """Return the digits' float form, the same function, with one channel louder than the others of its tensor.

    Behind a ReLU equalization takes it back in part; a Clip it does not pass.
    """
    model = onnx.load(exported.folder / "model.onnx")
    _change(model, "Conv", 2, lambda _, weight: weight / _loud(weight.shape[1], loudness, axes=2)[None])
    for place, axes in ((1, 3), (2, 0)):
        _change(model, "Conv", 1, lambda _, one, axes=axes: one * _loud(len(one), loudness, axes), place=place)
    if not is_even:
        model.graph.initializer.append(numpy_helper.from_array(np.float32(0), "nothing"))
        for node in model.graph.node:
            if node.op_type == "Relu":
                node.op_type = "Clip"
                node.input.append("nothing")
                node.input.append("plenty")
        model.graph.initializer.append(numpy_helper.from_array(np.float32(1e6), "plenty"))
    return model


def _loud(channels: int, loudness: float, axes: int) -> np.ndarray:
    scale = np.ones(channels, np.float32)
    scale[0] = loudness
    return scale.reshape(-1, *[1] * axes)


@pytest.mark.parametrize("is_even", [True, False], ids=["equalized", "not equalized"])
def test_a_conversion_fine_tunes_where_a_coarse_grid_costs_accuracy_and_records_how_it_came_about(
    exported: Exported, trained: Trained, is_even: bool
):
    model = _spoiled(exported, 1000 if is_even else 300, is_even=is_even)
    split = trained.dataset.validation
    labelled = Labelled(split.images, split.targets.astype(np.int64))
    images = split.images[:128]
    plain = convert(model, Material(images, labelled)).record
    tuned = convert(model, Material(images, labelled, labelled)).record
    assert plain.float_accuracy == tuned.float_accuracy == accuracy(logits_of(model, split.images), labelled)
    assert plain.accuracy < plain.float_accuracy - 0.005, "otherwise nothing would be fine-tuned"
    assert (plain.fine_tuned_epochs, tuned.fine_tuned_epochs > 0) == (0, True)
    assert tuned.accuracy > plain.accuracy + 0.005, (plain.accuracy, tuned.accuracy)
    assert plain.is_equalized is tuned.is_equalized is is_even


def test_fine_tuning_gives_back_what_coarse_grids_took_from_digits_and_the_same_weights_twice(
    exported: Exported, trained: Trained
):
    network = read_network(onnx.load(exported.folder / "model.onnx"))
    split = trained.dataset.validation
    labelled = Labelled(split.images, split.targets.astype(np.int64))
    made = exact_of(network, split.images[:256])
    coarse = {name: replace(grid, scale=grid.scale * COARSE) for name, grid in made.grids.items()}
    torch.manual_seed(5)
    *_, first = fine_tune(network, coarse, labelled, lambda *_: None)
    torch.manual_seed(6)
    *_, second = fine_tune(network, coarse, labelled, lambda *_: None)
    for one, other in zip(first.weighted(), second.weighted(), strict=True):
        np.testing.assert_array_equal(one.weight, other.weight)
    before, after = (write_exact(one, coarse, made.observed)[0] for one in (network, first))
    scores = [accuracy(logits_of(one, split.images), labelled) for one in (before, after)]
    assert scores[1] > scores[0] + 0.01, scores
