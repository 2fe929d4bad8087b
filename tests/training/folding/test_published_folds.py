"""Every published wrong fold that is known: each report by its name, and that foldserve gets it right.

Most are patterns, which the page about tools shows too; they go through both front ends. The rest stand below.
"""

import copy

import numpy as np
import onnx
import pytest
import torch
from folding_oracle import Joined, float64, images_for, outputs, relative_error
from onnx import numpy_helper
from torch import nn
from training_support import aged, relative_difference

from benchmarks.fold_modules import to_modules
from benchmarks.fold_patterns import PATTERNS, Pattern
from benchmarks.fold_sketch import Sketch
from service.engine import choose_device, open_engine
from training.errors import NotFoldable
from training.folding.graphs import fold_graph
from training.folding.modules import fold, verify

TOLERANCE = 1e-10  # relative, in float64; a wrong fold is off by 0.01 or more
REPORTS = {(report, pattern) for pattern in PATTERNS for report in pattern.seen.split(", ") if report}
KNOWN = {
    "pytorch#169178", "pytorch#166797", "pytorch#174042", "D-FINE-seg#40", "onnxscript#2867", "pytorch#180995",
    "pytorch#184076", "onnxscript#3027", "pytorch#197539", "ultralytics#25364", "pytorch#118990", "pytorch#72049",
    "pytorch/ao#4116", "LeViT#22", "optimum#348", "TNN#808", "onnxruntime-qnn#582", "onnx/optimizer#255",
    "onnx/optimizer#133", "onnx/optimizer#174", "onnx-tensorrt#594", "tensorflow-onnx#2186", "tensorflow-onnx#2300",
    "pytorch#52758",
}  # fmt: skip


def test_no_published_report_is_without_its_pattern():
    assert {report for report, _ in REPORTS} - {"border pixels"} == KNOWN


ordered = sorted(REPORTS, key=lambda one: (one[0], one[1].name))


@pytest.mark.parametrize(
    ("report", "pattern"), ordered, ids=[f"{report}, {pattern.name}" for report, pattern in ordered]
)
def test_what_was_reported_is_right_in_an_onnx_file(report: str, pattern: Pattern):
    model = pattern.build()
    folded = fold_graph(model)
    images = images_for(model)
    wanted = outputs(float64(model), images)
    assert relative_error(outputs(float64(folded.model, folded.exact), images), wanted) <= TOLERANCE
    assert bool(folded.report.kept) != pattern.folds, report


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.name)
def test_every_known_pattern_folds_as_pytorch_modules_too(pattern: Pattern):
    model = pattern.build()
    network = Joined(to_modules(model)).double().eval()
    images = torch.from_numpy(images_for(model))
    folded = verify(fold(network, images), images)
    assert relative_difference(folded.module(images), network(images)) <= TOLERANCE
    assert bool(folded.kept) != pattern.folds
    assert all(record.reason for record in folded.kept)


@pytest.mark.parametrize("widths", [(5, 4), (4, 4)], ids=["other widths", "equal widths"])
@pytest.mark.parametrize("is_affine", [True, False], ids=["γ and β", "neither γ nor β"])
def test_pytorch_72049_and_118990_a_linear_layer_of_any_width_folds_without_gamma_and_beta_too(widths, is_affine: bool):
    """pytorch#118990: widths in and out that differ were a shape error; pytorch#72049: affine=False was a crash."""
    model = aged(nn.Sequential(nn.Linear(*widths), nn.BatchNorm1d(widths[1], affine=is_affine)))
    images = torch.randn(3, widths[0], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    folded = verify(fold(model, images), images)
    assert len(folded.folds) == 1
    assert relative_difference(folded.module(images), copy.deepcopy(model).double()(images)) <= TOLERANCE


@pytest.mark.parametrize("missing", ["weight", "bias"], ids=["γ", "β"])
def test_optimum_348_a_missing_gamma_is_one_and_a_missing_beta_is_zero_behind_a_bias(missing: str):
    """optimum#348: a missing β was taken for 1, and the convolution's own bias was not scaled."""
    norm = nn.BatchNorm2d(4)
    model = aged(nn.Sequential(nn.Conv2d(3, 4, 3, bias=True), norm))
    norm.register_parameter(missing, None)
    images = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    folded = verify(fold(model, images), images)
    (conv,) = [one for one in folded.module.modules() if isinstance(one, nn.Conv2d)]
    scale = (norm.weight if norm.weight is not None else 1) / (norm.running_var.double() + norm.eps).sqrt()
    shift = 0 if norm.bias is None else norm.bias
    wanted = (model[0].bias.double() - norm.running_mean.double()) * scale + shift
    torch.testing.assert_close(conv.bias, wanted.detach(), rtol=1e-14, atol=1e-14)


def test_optimizer_255_a_folded_file_in_float32_is_off_by_its_rounding_alone():
    """onnx/optimizer#255: 3.8e-6 of difference after a fold; here every logit is within its own bound of float64.

    A sum of n products in float32 is within (n + 2)·2⁻²⁴ of the sum of their sizes; weight and bias are rounded once.
    """
    s = Sketch(16, size=(6, 6))
    model = s.model(s.norm(s.conv("images", 8, kernel=1)))
    images = images_for(model).astype(np.float32)
    folded = fold_graph(model)
    found = open_engine(folded.model.SerializeToString(), choose_device("cpu")).run(images)
    (wanted,) = outputs(float64(model), images.astype(np.float64))
    weight, bias = (np.abs(folded.exact[name]) for name in folded.model.graph.node[0].input[1:])
    sizes = np.einsum("kc,nchw->nkhw", weight[:, :, 0, 0], np.abs(images)) + bias[:, None, None]
    assert (np.abs(found - wanted) <= (16 + 3) * 2**-24 * sizes).all()


@pytest.mark.parametrize("stored", ["initializers", "Constant nodes"])
def test_optimizer_133_weights_fold_wherever_they_are_stored(stored: str):
    """onnx/optimizer#133: from 0.3.9 on, the fold was for Constant nodes alone, and spoiled files with initializers."""
    s = Sketch()
    model = s.model(s.norm(s.conv("images")))
    if stored == "Constant nodes":
        nodes = [onnx.helper.make_node("Constant", [], [one.name], value=one) for one in model.graph.initializer]
        nodes += list(model.graph.node)
        del model.graph.node[:], model.graph.initializer[:]
        model.graph.node.extend(nodes)
    folded = fold_graph(model).model
    onnx.checker.check_model(folded, full_check=True)
    assert [node.op_type for node in folded.graph.node] == ["Conv"]


def test_coreai_torch_54_a_variance_that_half_precision_made_infinite_is_refused():
    """apple/coreai-torch#54: a variance over 65504 cast to float16 is infinite, and zeroed the whole output."""
    s = Sketch()
    model = s.model(s.norm(s.conv("images")), half=True)
    name = model.graph.node[1].input[4]
    variance = next(one for one in model.graph.initializer if one.name == name)
    with np.errstate(over="ignore"):
        values = np.full(6, 7e4).astype(np.float16)
    variance.CopyFrom(numpy_helper.from_array(values, name))
    with pytest.raises(NotFoldable, match="running_var is not finite"):
        fold_graph(model)
