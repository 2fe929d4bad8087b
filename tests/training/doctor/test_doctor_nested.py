"""BatchNorm in the branches of an ONNX graph: its numbers are examined, and where the reach ends is said."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from foldserve.cli import main
from training.doctor.examine import inspect

FRESH = {"mean": np.zeros(3), "var": np.ones(3)}
PAST = {"mean": np.full(3, 0.4), "var": np.full(3, 0.05)}


def branch(name: str, statistics: dict[str, np.ndarray], **attributes) -> onnx.GraphProto:
    numbers = {"gamma": np.full(3, 1.5), "beta": np.full(3, 0.5)} | statistics
    norm = helper.make_node(
        "BatchNormalization", ["x", *(f"{name}_{word}" for word in numbers)], [f"{name}_out"], name, **attributes
    )
    return helper.make_graph(
        [norm],
        name,
        [],
        [helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(one.astype(np.float32), f"{name}_{word}") for word, one in numbers.items()],
    )


def write(folder: Path, statistics: dict[str, np.ndarray], **attributes) -> Path:
    nodes = [
        helper.make_node(
            "If",
            ["choice"],
            ["chosen"],
            then_branch=branch("one", statistics, **attributes),
            else_branch=branch("two", PAST),
        ),
        helper.make_node("GlobalAveragePool", ["chosen"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["scores"]),
    ]
    graph = helper.make_graph(
        nodes,
        "branches",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(np.array(True), "choice")],
    )
    path = folder / "branches.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.mark.parametrize(
    ("statistics", "attributes", "check"),
    [
        (FRESH, {}, "never-updated"),
        (PAST | {"var": np.full(3, -1.0)}, {}, "negative-variance"),
        (PAST, {"training_mode": 1}, "training-mode"),
    ],
)
def test_the_numbers_and_modes_of_a_branch_are_examined(tmp_path: Path, statistics, attributes, check: str):
    report = inspect(write(tmp_path, statistics, **attributes))
    assert report.layers == 2
    assert [(one.check, one.where) for one in report.errors] == [(check, ("one",))]


def looped(folder: Path, carried: dict[str, np.ndarray]) -> Path:
    """Write three rounds of BatchNorm in a Loop; what is carried from round to round is no constant of the body."""
    stored = {"gamma": np.full(3, 1.5), "beta": np.full(3, 0.5)} | PAST
    norm = helper.make_node("BatchNormalization", ["state", *stored], ["normed"], "inside")
    kept = [helper.make_node("Identity", [one], [f"{one}_after"]) for one in ("proceed", *carried)]
    entry = helper.make_tensor_value_info
    body = helper.make_graph(
        [norm, *kept],
        "round",
        [
            entry("round", TensorProto.INT64, []),
            entry("proceed", TensorProto.BOOL, []),
            entry("state", TensorProto.FLOAT, ["n", 3, 8, 8]),
            *(entry(one, TensorProto.FLOAT, [3]) for one in carried),
        ],
        [
            entry("proceed_after", TensorProto.BOOL, []),
            entry("normed", TensorProto.FLOAT, ["n", 3, 8, 8]),
            *(entry(f"{one}_after", TensorProto.FLOAT, [3]) for one in carried),
        ],
    )
    nodes = [
        helper.make_node(
            "Loop",
            ["rounds", "go", "x", *(f"first_{one}" for one in carried)],
            ["last", *(f"last_{one}" for one in carried)],
            body=body,
        ),
        helper.make_node("GlobalAveragePool", ["last"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["scores"]),
    ]
    numbers = {name: values.astype(np.float32) for name, values in stored.items() if name not in carried}
    numbers |= {f"first_{name}": values.astype(np.float32) for name, values in carried.items()}
    numbers |= {"rounds": np.array(3), "go": np.array(True)}
    graph = helper.make_graph(
        nodes,
        "rounds",
        [entry("x", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [entry("scores", TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(values, name) for name, values in numbers.items()],
    )
    path = folder / "rounds.onnx"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("carried", [PAST, {"var": PAST["var"]}, {"mean": PAST["mean"]}])
def test_statistics_that_a_loop_carries_are_not_called_healthy(tmp_path: Path, carried, capsys):
    path = looped(tmp_path, carried)
    assert [(one.check, one.where) for one in inspect(path).findings] == [("unknown-statistics", ("inside",))]
    assert main(["inspect", str(path)]) == 0
    told = capsys.readouterr().out
    assert "statistics that cannot be known from the file" in told
    assert "healthy" not in told


def test_statistics_that_a_loop_reads_from_around_it_are_known(tmp_path: Path):
    assert inspect(looped(tmp_path, {})).findings == ()


def test_a_healthy_branch_is_counted_and_its_limits_are_told(tmp_path: Path):
    report = inspect(write(tmp_path, PAST))
    assert (report.layers, report.findings) == (2, ())
    assert report.notes[0].startswith("2 of the BatchNorm layers lie in branches or loops")


def test_a_repair_of_a_branch_is_refused_and_nothing_is_written(tmp_path: Path, capsys):
    out = tmp_path / "mended.onnx"
    arguments = ["repair", str(write(tmp_path, FRESH)), "--out", str(out), "--momentum", "0.1", "--updates", "9"]
    assert main(arguments) == 1
    assert "two, one in a branch or a loop of the graph" in capsys.readouterr().err
    assert not out.exists()


def test_a_branch_that_reads_the_images_reads_the_prepared_ones(tmp_path: Path, capsys):
    path, models = write(tmp_path, PAST), tmp_path / "models"
    flags = ["--mean", "0.5", "--std", "0.25", "--exact", "off"]
    assert main(["import", str(path), "--name", "branches", "--models", str(models), *flags]) == 0
    assert "0 labels flipped" in capsys.readouterr().out
