"""What nobody can import is told so in a sentence, with exit 1 or 2, and nothing is written."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from foreign_support import CLASSES, FILTERS, SIDE, Graph
from onnx import TensorProto, helper

from foldserve.cli import main
from training.importing.interface import read_interface, refuse_huge


def _edited(change: Callable[[onnx.ModelProto], object]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        model = Graph().model()
        change(model)
        path = folder / "x.onnx"
        path.write_bytes(model.SerializeToString())
        return path

    return write


def _content(content: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / "x.onnx").write_bytes(content)
        return folder / "x.onnx"

    return write


def _external(damage: Callable[[Path], object]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = Graph().write(folder, save_as_external_data=True, location="w.data", size_threshold=0)
        damage(path)
        return path

    return write


def _cut(path: Path) -> None:
    data = path.with_name("w.data")
    data.write_bytes(data.read_bytes()[:-50])


def _linked(link: Callable[[Path, Path], object]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        data = path.with_name("w.data")
        data.rename(data.with_name("elsewhere.data"))
        link(data, data.with_name("elsewhere.data"))

    return change


def _moved(location: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        model = onnx.load(path, load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = location
        path.write_bytes(model.SerializeToString())

    return change


def _told(**entries: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        model = onnx.load(path, load_external_data=False)
        for tensor in model.graph.initializer:
            told = {entry.key: entry.value for entry in tensor.external_data} | entries
            del tensor.external_data[:]
            for key, value in told.items():
                tensor.external_data.add(key=key, value=value)
        path.write_bytes(model.SerializeToString())

    return change


def _read_again_and_again(path: Path) -> None:
    """One sparse gigabyte, asked for by every weight."""
    with path.with_name("w.data").open("r+b") as file:
        file.truncate(2**30)
    _told(offset="0", length=str(2**30))(path)


def _unknown_type(path: Path) -> None:
    model = onnx.load(path, load_external_data=False)
    model.graph.initializer[0].data_type = 99
    path.write_bytes(model.SerializeToString())


def _magnified(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1, 1, 2**12, 2**12]), "times"))
    next(node for node in model.graph.node if node.op_type == "Conv").input[0] = "huge"
    model.graph.node.insert(0, helper.make_node("Tile", ["x", "times"], ["huge"]))


def _made_huge(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([2**17, 2**17]), "size"))
    next(node for node in model.graph.node if node.op_type == "Gemm").input.append("most")
    model.graph.node.insert(0, helper.make_node("ReduceMax", ["huge"], ["most"], keepdims=0))
    model.graph.node.insert(0, helper.make_node("ConstantOfShape", ["size"], ["huge"]))


def _large(folder: Path) -> Path:
    with (folder / "x.onnx").open("wb") as file:
        file.truncate(2**31)  # sparse: it takes no room
    return folder / "x.onnx"


def _reshaped(*extents: int | str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        image = model.graph.input[0]
        image.CopyFrom(helper.make_tensor_value_info(image.name, TensorProto.FLOAT, list(extents)))

    return change


def _detector(model: onnx.ModelProto) -> None:
    boxes = helper.make_tensor_value_info("convolved", TensorProto.FLOAT, ["batch", FILTERS, SIDE, SIDE])
    model.graph.output.append(boxes)


def _text(model: onnx.ModelProto) -> None:
    del model.graph.node[:]
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.INT64, ["batch", 128]))
    model.graph.node.append(helper.make_node("Cast", ["x"], ["scores"], to=TensorProto.FLOAT))


def _foreign(model: onnx.ModelProto) -> None:
    relu = next(node for node in model.graph.node if node.op_type == "Relu")
    relu.op_type, relu.domain = "Fancy", "com.acme"
    model.opset_import.append(helper.make_opsetid("com.acme", 1))


def _opset(opset: int) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        model.opset_import[0].version = opset
        gemm = next(node for node in model.graph.node if node.op_type == "Gemm")
        gemm.input.append("zeros")  # before opset 11 it could not be left out
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(CLASSES, np.float32), "zeros"))

    return change


def _named(name: str) -> Callable[[Path], Path]:
    return lambda folder: folder / name


NO_CLASSIFIER = "not an image classifier, because "
CASES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "not ONNX": (_content(b"hello, no model\n" * 99), "is not an ONNX file, or was cut short; export the model again"),
    "empty": (_content(b""), "it holds no graph; name the exported .onnx file"),
    "cut short": (_content(Graph().model().SerializeToString()[:600]), "is not an ONNX file, or was cut short"),
    "no such file": (_named("gone.onnx"), "gone.onnx cannot be read: No such file or directory"),
    "external data cut short": (_external(_cut), "it was cut short; copy it again"),
    "external data outside": (_external(_moved("../w.data")), "outside its own folder; that is not read"),
    "external data missing": (_external(_moved("gone.data")), "in gone.data, which is missing; put it beside"),
    "external data at no number": (_external(_told(offset="abc")), "tells wrongly where its weight filters lies"),
    "external data before the start": (_external(_told(offset="-5")), "tells wrongly where its weight filters lies"),
    "external data of a name with NUL": (_external(_moved("w\0.data")), "tells wrongly where its weight filters lies"),
    "external data of no type": (_external(_unknown_type), "tells wrongly where its weight filters lies"),
    "external data by symbolic link": (
        _external(_linked(Path.symlink_to)),
        "links are not followed: copy the file itself",
    ),
    "external data by hard link": (
        _external(_linked(Path.hardlink_to)),
        "links are not followed: copy the file itself",
    ),
    "external data of 6 GB": (_external(_read_again_and_again), "with its weights it is over 2 GB"),
    "an image blown up": (_edited(_magnified), "makes 7.25e+09 numbers of one image (huge)"),
    "a constant blown up": (_edited(_made_huge), "makes 1.72e+10 numbers of one image (huge)"),
    "over 2 GB": (_large, "over 2 GB, more than protobuf can hold in one message; a model may have up to 2 GB"),
    "detector": (_edited(_detector), NO_CLASSIFIER + "it has 2 outputs (scores, convolved), as detectors do"),
    "text model": (_edited(_text), NO_CLASSIFIER + "its input x holds int64 numbers, as text models do"),
    "two inputs": (
        lambda folder: Graph(inputs=("more",)).write(folder),
        NO_CLASSIFIER + "it has 2 inputs (x, more), expected one, the images",
    ),
    "zero height": (
        _edited(_reshaped("batch", 3, 0, SIDE)),
        NO_CLASSIFIER + "its input x has an axis of size 0: (?, 3, 0, 12)",
    ),
    "zero batch": (_edited(_reshaped(0, 3, SIDE, SIDE)), NO_CLASSIFIER + "its input x has an axis of size 0"),
    "NaN": (
        lambda folder: Graph(values={"matrix": np.full((CLASSES, FILTERS), np.nan)}).write(folder),
        "would answer wrongly: numbers that are not finite (weights with NaN or Inf in matrix); nothing was written",
    ),
    "an operator of somebody's own": (
        _edited(_foreign),
        "the graph has the operator Fancy of com.acme, which is not one of ONNX's own",
    ),
    "opset 8": (_edited(_opset(8)), "the file is of opset 8, expected 9 to 23; export it again"),
    "opset 99": (_edited(_opset(99)), "the file is of opset 99, expected 9 to 23; export it again"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_file_that_cannot_be_imported_is_refused_in_a_sentence(tmp_path: Path, capsys, case: str):
    write, words = CASES[case]
    models = tmp_path / "models"
    assert main(["import", str(write(tmp_path)), "--name", "bad", "--models", str(models)]) == 1
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said
    assert not models.exists()


def test_the_shapes_that_a_file_tells_of_its_own_batch_make_no_image_too_large():
    model = onnx.shape_inference.infer_shapes(Graph(batch=2**20).model())
    assert any(value.type.tensor_type.shape.dim[0].dim_value == 2**20 for value in model.graph.value_info)
    refuse_huge(model, read_interface(model), (SIDE, SIDE))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet50.pt", "a checkpoint needs its network: `foldserve export PACKAGE.MODULE:FUNCTION --checkpoint FILE`"),
        ("net.keras", "write one with `model.export(FILE, format='onnx')`, or with tf2onnx"),
    ],
)
def test_a_file_of_another_library_is_told_the_way(tmp_path: Path, capsys, name: str, words: str):
    (tmp_path / name).write_bytes(b"PK")
    assert main(["import", str(tmp_path / name), "--name", "bad", "--models", str(tmp_path / "models")]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.txt", None, "none.txt cannot be read: No such file or directory\n"),
        *[
            (f"bad{number}.json", content, 'in a file named *.json, ["cat", "dog"], {"0": "cat"} or {"cat": 0}\n')
            for number, content in enumerate(
                ["[", "3", "null", '"abcd"', "[]", "[[],[],[],[]]", "[null,1,2,3]", '[{"x":1},2,3,4]', '{"a":"b"}']
            )
        ],
    ],
)
def test_labels_that_cannot_be_read_are_told_in_a_sentence(tmp_path: Path, capsys, name: str, content, words: str):
    if content is not None:
        (tmp_path / name).write_text(content)
    flags = ["--labels", str(tmp_path / name), "--models", str(tmp_path / "models")]
    assert main(["import", str(Graph().write(tmp_path)), "--name", "x", *flags]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"foldserve: --labels {tmp_path / name}")
    assert told.endswith(words)


def test_labels_of_another_number_than_classes_are_refused(tmp_path: Path, capsys):
    (tmp_path / "labels.txt").write_text("a\nb\nc\n")
    flags = ["--labels", str(tmp_path / "labels.txt"), "--models", str(tmp_path / "models")]
    assert main(["import", str(Graph().write(tmp_path)), "--name", "bad", *flags]) == 2
    assert "labels.txt has 3 labels, the model has 4 classes" in capsys.readouterr().err
