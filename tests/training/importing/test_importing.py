"""`foldserve import`: foreign files of every form become artifacts that answer as the originals do."""

import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from foreign_support import CLASSES, FILTERS, SIDE, Graph, network, torch_export
from onnx import TensorProto, helper
from PIL import Image

from foldserve.cli import main
from service.artifact import MANIFEST_KEY, Artifact, read_manifest
from service.engine import choose_device, open_engine
from service.independence.proof import prove
from service.preprocessing import Preprocessing, decode
from training.errors import ExportRefused, FileRefused, UsageError
from training.importing.images import folder_material
from training.importing.pipeline import Order, import_model, take
from training.importing.preprocessing import Wishes


def hush(_: str) -> None:
    """Say nothing."""


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return tmp_path / "models"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    random = np.random.default_rng(1)
    for index in range(12):
        folder = tmp_path / "photos" / str(index % 3)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (20, 30, 3), np.uint8)).save(folder / f"{index}.png")
    return tmp_path / "photos"


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    return exponentials / exponentials.sum(1, keepdims=True)


def original_answers(graph: Graph, pixels: np.ndarray, mean, std) -> np.ndarray:
    """Run the file by ONNX's own reference, in NumPy, on inputs that this test prepares."""
    from onnx.reference import ReferenceEvaluator

    images = ((pixels / 255 - np.array(mean)) / np.array(std)).astype(np.float32)
    images = images if graph.channels_last else images.transpose(0, 3, 1, 2)
    kind = helper.tensor_dtype_to_np_dtype(graph.element_type)
    return ReferenceEvaluator(graph.model()).run(None, {graph.input_name: images.astype(kind)})[0]


FORMS = {
    "float NCHW": Graph(),
    "float NHWC": Graph(channels_last=True),
    "fixed batch": Graph(batch=1),
    "batch of 3": Graph(batch=3),
    "softmax": Graph(softmax=True),
    "another name": Graph(input_name="image"),
    "a name with a colon": Graph(input_name="input_1:0"),
    "bias": Graph(conv_bias=True),
    "gray": Graph(channels=1),
    "opset 14": Graph(opset=14),
    "opset 17": Graph(opset=17),
    "opset 23": Graph(opset=23),
    "Keras's eps": Graph(epsilon=1e-3, channels_last=True, batch=1, softmax=True),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_becomes_an_artifact_that_answers_as_the_file_did(tmp_path: Path, models: Path, form: str):
    graph = FORMS[form]
    mean, std = (0.4,) * graph.channels, (0.25,) * graph.channels
    exported = import_model(Order(graph.write(tmp_path), "it", Wishes(mean=mean, std=std)), models, say=hush)
    artifact = Artifact.load(exported.folder)
    model = onnx.load(artifact.path)
    assert not [node for node in model.graph.node if node.op_type in ("BatchNormalization", "Softmax")]
    assert [record.norm for record in artifact.manifest.folds] == ["norm"]
    assert prove(model).verdict == "independent"
    pixels = np.random.default_rng(3).integers(0, 256, (5, SIDE, SIDE, graph.channels), np.uint8)
    logits = open_engine(artifact.model_bytes, choose_device("cpu")).run(pixels)
    if isinstance(graph.batch, int):
        pixels = np.concatenate([pixels, pixels[-1:]])[: 6 // graph.batch * graph.batch]
        groups = pixels.reshape(-1, graph.batch, *pixels.shape[1:])
        wanted = np.concatenate([original_answers(graph, group, mean, std) for group in groups])[:5]
        logits = logits[: len(wanted)]
    else:
        wanted = original_answers(graph, pixels, mean, std)
    found = softmax(logits.astype(np.float64)) if graph.softmax else logits
    # 27 products, 144 pixels, 6 features, each rounded in float32 on magnitudes below 10
    np.testing.assert_allclose(found, wanted, rtol=0, atol=200 * 2**-24 * 10)


def test_opset_9_with_what_it_required_is_taken(tmp_path: Path, models: Path):
    graph = Graph(opset=9)
    model = graph.model()
    model.ir_version = 3  # every initializer had to be an input too
    gemm = next(node for node in model.graph.node if node.op_type == "Gemm")
    gemm.input.append("zeros")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(CLASSES, np.float32), "zeros"))
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    onnx.save(model, tmp_path / "old.onnx")
    exported = import_model(Order(tmp_path / "old.onnx", "old"), models, say=hush)
    assert [value.name for value in onnx.load(exported.folder / "model.onnx").graph.input] == ["image"]


def test_float16_files_are_widened(tmp_path: Path, models: Path):
    graph = Graph(element_type=TensorProto.FLOAT16)
    exported = import_model(Order(graph.write(tmp_path), "half"), models, say=hush)
    kinds = {tensor.data_type for tensor in onnx.load(exported.folder / "model.onnx").graph.initializer}
    assert TensorProto.FLOAT16 not in kinds


def test_external_data_becomes_one_file(tmp_path: Path, models: Path):
    path = Graph().write(tmp_path, save_as_external_data=True, location="w.data", size_threshold=0)
    exported = import_model(Order(path, "one"), models, say=hush)
    assert {entry.name for entry in exported.folder.iterdir()} == {"model.onnx", "golden.npz", "README.md"}


def test_the_entry_is_the_contracts(tmp_path: Path, models: Path):
    exported = import_model(Order(Graph().write(tmp_path), "it"), models, say=hush)
    model = onnx.load(exported.folder / "model.onnx")
    assert [node.op_type for node in model.graph.node][:4] == ["Transpose", "Cast", "Sub", "Mul"]


def test_a_keras_transpose_is_not_done_twice(tmp_path: Path, models: Path):
    exported = import_model(Order(Graph(channels_last=True).write(tmp_path), "it"), models, say=hush)
    kinds = [node.op_type for node in onnx.load(exported.folder / "model.onnx").graph.node]
    assert kinds.count("Transpose") == 1
    assert kinds[:4] == ["Transpose", "Cast", "Sub", "Mul"]


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "script"])
def test_a_torch_export_is_imported(tmp_path: Path, models: Path, photos: Path, dynamo: bool):
    path = tmp_path / "torch.onnx"
    torch_export(network(), path, dynamo=dynamo, as_people_do=True)
    exported = import_model(Order(path, "torch", data=photos), models, say=hush)
    assert exported.manifest.training["images"] == "real"
    assert exported.parity.images == 12


def test_a_reshape_with_the_batch_written_in_is_freed(tmp_path: Path, models: Path):
    model = Graph(batch=1).model()
    flatten = next(node for node in model.graph.node if node.op_type == "Flatten")
    flatten.op_type = "Reshape"
    flatten.input.append("target")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1, FILTERS]), "target"))
    onnx.save(model, tmp_path / "x.onnx")
    exported = import_model(Order(tmp_path / "x.onnx", "x"), models, say=hush)
    engine = open_engine((exported.folder / "model.onnx").read_bytes(), choose_device("cpu"))
    assert engine.run(np.zeros((5, SIDE, SIDE, 3), np.uint8)).shape == (5, CLASSES)


def test_a_model_that_takes_pixels_gets_no_arithmetic(tmp_path: Path, models: Path):
    model = Graph().model()
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    model.graph.node.insert(0, helper.make_node("Cast", ["x"], ["floats"], to=TensorProto.FLOAT))
    conv = next(node for node in model.graph.node if node.op_type == "Conv")
    conv.input[0] = "floats"
    onnx.save(model, tmp_path / "x.onnx")
    exported = import_model(Order(tmp_path / "x.onnx", "x"), models, say=hush)
    kinds = [node.op_type for node in onnx.load(exported.folder / "model.onnx").graph.node]
    assert kinds[:3] == ["Transpose", "Cast", "Conv"]


@pytest.mark.parametrize("wishes", [Wishes(), Wishes("imagenet1k_v1", size=SIDE)], ids=["no flags", "a preset"])
def test_a_model_that_takes_pixels_and_scales_them_is_not_told_so(wishes: Wishes):
    model = Graph().model()
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(1 / 255, np.float32), "small"))
    model.graph.node.insert(0, helper.make_node("Mul", ["floats", "small"], ["scaled"]))
    model.graph.node.insert(0, helper.make_node("Cast", ["x"], ["floats"], to=TensorProto.FLOAT))
    next(node for node in model.graph.node if node.op_type == "Conv").input[0] = "scaled"
    lines: list[str] = []
    taken = take(model, wishes, lines.append)
    assert not any("scales pixels" in line for line in lines)
    assert taken.spec.std != (1 / 255,), "nothing uses it"


def test_the_manifest_tells_where_the_model_is_from_and_what_it_was_checked_with(tmp_path: Path, models: Path):
    lines: list[str] = []
    exported = import_model(Order(Graph(conv_bias=True).write(tmp_path), "it"), models, say=lines.append)
    facts = exported.manifest.training
    assert (facts["source"], facts["images"], facts["opset"]) == ("foreign.onnx", "synthetic", 20)
    assert re.fullmatch("[0-9a-f]{64}", facts["source_sha256"])
    assert exported.manifest.fold_error is not None
    assert all(record.error is not None and record.error < 1e-10 for record in exported.manifest.folds)
    text = "\n".join(lines)
    assert "made-up images" in text
    assert "mean 0, std 1" in text
    card = (exported.folder / "README.md").read_text()
    assert facts["source_sha256"] in card
    assert "synthetic images" in card


BROKEN = {
    "two inputs": (Graph(inputs=("more",)), FileRefused, "2 inputs"),
    "training mode": (Graph(training_mode=True), ExportRefused, "training mode"),
    "NaN": (Graph(values={"matrix": np.full((CLASSES, FILTERS), np.nan)}), ExportRefused, "not finite"),
    "negative variance": (Graph(values={"var": -np.ones(FILTERS)}), ExportRefused, "negative variance"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_would_answer_wrongly_is_refused_and_nothing_is_written(tmp_path: Path, models: Path, case: str):
    graph, error, words = BROKEN[case]
    with pytest.raises(error, match=words):
        import_model(Order(graph.write(tmp_path), "it"), models, say=hush)
    assert not models.exists()


def _changed(change) -> onnx.ModelProto:
    model = Graph().model()
    change(model.graph)
    return model


def _shape(value: onnx.ValueInfoProto, *extents: int | str) -> None:
    kind = value.type.tensor_type.elem_type
    value.CopyFrom(helper.make_tensor_value_info(value.name, kind, list(extents)))


def _text(graph: onnx.GraphProto) -> None:
    del graph.node[:]
    graph.input[0].type.tensor_type.elem_type = TensorProto.INT64
    _shape(graph.input[0], "batch", 128)
    graph.node.append(helper.make_node("Cast", ["x"], ["scores"], to=TensorProto.FLOAT))


def _detector(graph: onnx.GraphProto) -> None:
    graph.output.append(helper.make_tensor_value_info("convolved", TensorProto.FLOAT, ["batch", FILTERS, SIDE, SIDE]))


def _segmenter(graph: onnx.GraphProto) -> None:
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info("positive", TensorProto.FLOAT, ["batch", FILTERS, SIDE, SIDE]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_text, "as text models do"),
        (_detector, "2 outputs .*, as detectors do"),
        (_segmenter, r"expected \(batch, classes\)"),
        (lambda graph: _shape(graph.input[0], "batch", 3, 0, 12), "axis of size 0"),
        (lambda graph: _shape(graph.input[0], "batch", 5, 12, 12), "neither axis 1 nor axis 3"),
    ],
    ids=["text", "detector", "segmenter", "size 0", "5 channels"],
)
def test_what_is_no_image_classifier_is_told_so_and_why(tmp_path: Path, models: Path, capsys, change, words: str):
    (tmp_path / "x.onnx").write_bytes(_changed(change).SerializeToString())
    assert main(["import", str(tmp_path / "x.onnx"), "--name", "x", "--models", str(models)]) == 1
    assert re.search(f"not an image classifier, because .*{words}", capsys.readouterr().err)
    assert not models.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [("a\nb\nc\n", "3 labels, the model has 4 classes"), ("a\nb\na\nc\n", "'a' is there twice")],
)
def test_labels_that_do_not_fit_are_refused(tmp_path: Path, models: Path, content: str, words: str):
    (tmp_path / "labels.txt").write_text(content)
    order = Order(Graph().write(tmp_path), "it", labels=tmp_path / "labels.txt")
    with pytest.raises(UsageError, match=words):
        import_model(order, models, say=hush)
    assert not models.exists()


@pytest.mark.parametrize(
    "content",
    [
        "cat\ndog\nowl\nfox\n",
        '["cat", "dog", "owl", "fox"]',
        '{"0": "cat", "1": "dog", "2": "owl", "3": ["n1", "fox"]}',
        '{"fox": 3, "cat": 0, "owl": 2, "dog": 1}',
    ],
)
def test_labels_come_by_line_or_as_json(tmp_path: Path, models: Path, content: str):
    path = tmp_path / ("labels.json" if content[0] in "[{" else "labels.txt")
    path.write_text(content)
    exported = import_model(Order(Graph().write(tmp_path), "it", labels=path), models, say=hush)
    assert exported.manifest.labels == ("cat", "dog", "owl", "fox")


def own_model(tmp_path: Path, change: dict[str, object]) -> Path:
    """Write a model of foldserve whose manifest says other things than any default."""
    exported = import_model(Order(Graph().write(tmp_path), "own"), tmp_path / "before", say=hush)
    manifest = exported.manifest.model_dump(mode="json")
    manifest["preprocessing"] |= {"resize": "shorter_side", "resize_to": SIDE + 4, "mean": [0.2, 0.3, 0.4]}
    manifest |= {"labels": ["cat", "dog", "owl", "fox"], "licence": "of the photographs"}
    manifest |= {"pixels": {"mean": [0.2, 0.3, 0.4], "std": [0.1, 0.1, 0.1]}, **change}
    model = onnx.load(exported.folder / "model.onnx")
    (entry,) = (entry for entry in model.metadata_props if entry.key == MANIFEST_KEY)
    entry.value = json.dumps(manifest)
    onnx.save(model, tmp_path / "own.onnx")
    return tmp_path / "own.onnx"


def test_a_model_of_our_own_brings_along_what_no_flag_says(tmp_path: Path, models: Path):
    path = own_model(tmp_path, {})
    (tmp_path / "labels.txt").write_text("a\nb\nc\nd\n")
    wanted = read_manifest(path, path.read_bytes())
    same = import_model(Order(path, "it"), models, say=hush).manifest
    named = import_model(Order(path, "it", labels=tmp_path / "labels.txt"), models, say=hush).manifest
    (tmp_path / "cfg.json").write_text(
        json.dumps({"input_size": [3, SIDE, SIDE], "crop_pct": 1, "mean": [0.5], "std": [0.5]})
    )
    sized = import_model(Order(path, "it", Wishes(size=SIDE)), models, say=hush).manifest
    cut = import_model(Order(path, "it", Wishes(str(tmp_path / "cfg.json"))), models, say=hush).manifest

    for found in (same, named, sized):
        assert found.preprocessing == wanted.preprocessing
        assert (found.licence, found.pixels) == ("of the photographs", wanted.pixels)
    assert (same.labels, named.labels) == (("cat", "dog", "owl", "fox"), ("a", "b", "c", "d"))
    assert (cut.preprocessing.resize_to, cut.pixels) == (SIDE, None), "statistics are of other pixels now"
    assert (cut.preprocessing.mean, cut.preprocessing.std) == (wanted.preprocessing.mean, wanted.preprocessing.std)
    assert len(same.folds) >= len(wanted.folds) > 0, "what was folded before is told still"


@pytest.mark.parametrize("wishes", [Wishes(mean=(0.5,)), Wishes(std=(0.5,))], ids=["mean", "std"])
def test_a_model_that_takes_pixels_is_told_no_arithmetic_that_it_does_not_do(
    tmp_path: Path, models: Path, wishes: Wishes
):
    with pytest.raises(UsageError, match="--mean and --std would change nothing"):
        import_model(Order(own_model(tmp_path, {}), "it", wishes), models, say=hush)
    assert not models.exists()


def test_what_a_damaged_file_says_of_itself_is_not_believed(tmp_path: Path, models: Path):
    said: list[str] = []
    found = import_model(Order(own_model(tmp_path, {"labels": "cat"}), "it"), models, say=said.append).manifest
    assert found.labels == ("0", "1", "2", "3")
    assert any(line.startswith("warning") and "manifest entry labels" in line for line in said)


def test_an_exact_form_is_judged_by_images_that_it_was_not_made_with(tmp_path: Path):
    random = np.random.default_rng(2)
    for index in range(17):
        folder = tmp_path / "photos" / "ab"[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(folder / f"{index:02}.png")
    spec = Preprocessing(mode="RGB", size=(SIDE, SIDE), mean=(0.0,) * 3, std=(1.0,) * 3)

    found = folder_material(tmp_path / "photos", spec, ("a", "b"))
    unnamed = folder_material(tmp_path / "photos", spec, ("0", "1"))

    assert found.validation is not None
    made, judged = ({one.tobytes() for one in images} for images in (found.calibration, found.validation.images))
    assert (len(made), len(judged), made & judged) == (9, 8, set())
    assert found.validation.targets.tolist() == [0] * 4 + [1] * 4
    assert (len(unnamed.calibration), unnamed.validation) == (17, None)


def test_a_model_that_sees_a_centre_crop_is_imported_with_golden_images(tmp_path: Path, models: Path, photos: Path):
    config = {"input_size": [3, SIDE, SIDE], "crop_pct": 0.6, "interpolation": "bicubic", "mean": [0.5], "std": [0.5]}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    wishes = Wishes(str(tmp_path / "cfg.json"))
    exported = import_model(Order(Graph().write(tmp_path), "it", wishes, data=photos), models, say=hush)
    artifact = Artifact.load(exported.folder)
    spec = artifact.manifest.preprocessing
    assert (spec.resize, spec.resize_to) == ("shorter_side", 20)
    decoded = np.stack([decode(encoded, spec) for encoded in artifact.golden.encoded])
    assert np.array_equal(decoded, artifact.golden.pixels)
