"""The model file's contract: what keeps it is read, what breaks it is refused in one line that says what to do."""

import hashlib
import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from support import TinyModel

from service.artifact import Artifact, parse_model, read_manifest
from service.errors import ArtifactError, ConfigurationError
from service.manifest import Manifest

TINY = TinyModel()


def write_model(folder, model: onnx.ModelProto, manifest: object = None) -> None:
    """Write a model with a manifest: the tiny one's unless another, or "" for none, is given."""
    if manifest is None:
        manifest = TINY.manifest().model_dump_json()
    if manifest:
        model.metadata_props.add(key="foldserve", value=manifest)
    (folder / "model.onnx").write_bytes(model.SerializeToString())


@pytest.fixture
def folder(tmp_path):
    return TINY.write(tmp_path)


def refusal(folder) -> str:
    with pytest.raises(ArtifactError) as caught:
        Artifact.load(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


def test_a_sound_artifact_is_read_whole(folder):
    artifact = Artifact.load(folder)

    stored = (folder / "model.onnx").read_bytes()
    assert artifact.model_bytes == stored
    assert artifact.digest == hashlib.sha256(stored).hexdigest()
    assert artifact.manifest == TINY.manifest()
    assert artifact.form == "float"


def test_a_missing_model_file_is_named(folder):
    (folder / "model.onnx").unlink()

    assert "model.onnx cannot be read (No such file or directory)" in refusal(folder)


@pytest.mark.parametrize("damage", ["empty", "cut", "text"])
def test_a_damaged_model_file_is_refused(folder, damage):
    whole = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "text": b"hello"}[damage])

    assert "model.onnx is not a sound ONNX file" in refusal(folder)


def test_a_model_that_the_checker_rejects_is_refused(folder):
    model = TINY.onnx()
    model.graph.node[0].op_type = "NoSuchOperator"
    write_model(folder, model)

    assert "NoSuchOperator" in refusal(folder)


def test_a_model_without_a_manifest_is_refused(folder):
    write_model(folder, TINY.onnx(), "")

    assert "no foldserve manifest" in refusal(folder)


def changed_manifest(**changes) -> str:
    content = {**json.loads(TINY.manifest().model_dump_json()), **changes}
    return json.dumps({key: value for key, value in content.items() if value is not ...})


@pytest.mark.parametrize(
    "manifest, reason",
    [
        ("{", "manifest entry JSON"),
        ("[]", "manifest entry JSON"),
        (changed_manifest(schema_version=2), "manifest entry schema_version"),
        (changed_manifest(surprise=1), "manifest entry surprise"),
        (changed_manifest(labels=...), "manifest entry labels: Field required"),
        (changed_manifest(labels=[]), "manifest entry labels"),
        (changed_manifest(labels=["cat", "cat", "owl"]), "labels must differ"),
        (changed_manifest(preprocessing={"mode": "RGB"}), "manifest entry preprocessing.size"),
    ],
)
def test_a_wrong_manifest_is_refused_by_its_key(folder, manifest, reason):
    write_model(folder, TINY.onnx(), manifest)

    assert reason in refusal(folder)


def image(name="image", kind=TensorProto.UINT8, shape=("batch", 8, 8, 3)):
    return helper.make_tensor_value_info(name, kind, shape)


def logits(name="logits", kind=TensorProto.FLOAT, shape=("batch", 3)):
    return helper.make_tensor_value_info(name, kind, shape)


@pytest.mark.parametrize(
    "given",
    [
        image("pixels"),
        image(kind=TensorProto.FLOAT),
        image(shape=(1, 8, 8, 3)),
        image(shape=(None, 8, 8, 3)),
        image(shape=("batch", 3, 8, 8)),
        image(shape=("batch", "height", 8, 3)),
        image(shape=("batch", 8, 8)),
        image(shape=()),
    ],
)
def test_an_input_of_another_form_is_refused(given):
    with pytest.raises(
        ArtifactError, match=r"expected one input `image`, UINT8 .batch, 8, 8, 3. with a symbolic batch"
    ):
        read_interface(given, logits())


@pytest.mark.parametrize(
    "given", [logits("scores"), logits(kind=TensorProto.DOUBLE), logits(shape=(1, 3)), logits(shape=("batch", 4))]
)
def test_an_output_of_another_form_is_refused(given):
    with pytest.raises(ArtifactError, match=r"expected one output `logits`, FLOAT .batch, 3. with a symbolic batch"):
        read_interface(image(), given)


def test_a_second_input_is_refused():
    with pytest.raises(ArtifactError, match="expected one input"):
        read_interface(image(), logits(), helper.make_tensor_value_info("mask", TensorProto.BOOL, [1]))


def read_interface(*values: onnx.ValueInfoProto) -> Manifest:
    """Read a model with just this input, this output and these further inputs; the node between them is not checked."""
    given, answer, *further = values
    graph = helper.make_graph([], "none", [given, *further], [answer])
    if given.name != answer.name:
        graph.node.append(helper.make_node("Cast", [given.name], [answer.name], to=TensorProto.FLOAT))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    model.metadata_props.add(key="foldserve", value=TINY.manifest().model_dump_json())
    return read_manifest("model.onnx", model.SerializeToString())


def test_the_interface_that_the_others_vary_is_accepted():
    assert read_interface(image(), logits()) == TINY.manifest()


def test_the_manifest_survives_its_own_json():
    manifest = TINY.manifest()

    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest


def test_float_lists_come_back_to_the_same_bits():
    thirds = tuple(float(np.float32(1) / 3) for _ in range(3))
    manifest = TINY.manifest().model_copy(
        update={"preprocessing": TINY.spec.model_copy(update={"mean": thirds, "std": thirds})}
    )

    assert Manifest.model_validate_json(manifest.model_dump_json()).preprocessing.mean == thirds


def test_a_model_is_named_with_a_version_or_without():
    assert parse_model("mnist") == ("mnist", None)
    assert parse_model("mnist@12") == ("mnist", 12)


@pytest.mark.parametrize("word", ["mnist@", "mnist@0", "mnist@-1", "mnist@one", "mnist@1.0", "mnist@²"])
def test_a_version_that_cannot_be_one_is_refused(word: str):
    with pytest.raises(ConfigurationError, match=f"{word}: a version is a positive integer"):
        parse_model(word)


def test_a_file_that_has_changed_since_it_was_read_is_not_taken_for_it(folder):
    artifact, path = Artifact.load(folder), folder / "model.onnx"
    stored = path.read_bytes()
    path.write_bytes(stored + b"\n")
    assert artifact.model_bytes == stored, "as long as it is not forgotten"
    artifact.forget()

    with pytest.raises(ArtifactError, match=r"model\.onnx has changed since it was read"):
        _ = artifact.model_bytes
    path.unlink()
    with pytest.raises(ArtifactError, match=r"model\.onnx cannot be read"):
        _ = artifact.model_bytes
