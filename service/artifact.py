"""The model file's contract: read it, validate it, describe it. No web, no torch, no session.

    models/<name>/<version>/model.onnx   uint8 pixels (batch, height, width, channels) → float32 logits (batch, classes)
                            exact.onnx   the same contract, computed with integers; not every model has one
                            golden.npz   real images and the answers that the model must give on any machine

`training.export` writes what is read here, through the records of `service.manifest` and `service.golden`.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import onnx
from pydantic import ValidationError

from service.errors import ArtifactError, ConfigurationError
from service.golden import Golden
from service.manifest import Form, Manifest

MANIFEST_KEY = "foldserve"
MODEL_FILE = "model.onnx"
EXACT_FILE = "exact.onnx"
GOLDEN_FILE = "golden.npz"
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")  # no separators, no hidden folders
INPUT_NAME = "image"
OUTPUT_NAME = "logits"

FILES: dict[Form, str] = {"float": MODEL_FILE, "exact": EXACT_FILE}


@dataclass(frozen=True, slots=True)
class Artifact:
    """A model file that was read and found to keep the contract."""

    path: Path
    digest: str  # sha256 of the file, hexadecimal
    manifest: Manifest
    golden: Golden = field(repr=False)
    form: Form = "float"
    _kept: list[bytes] = field(default_factory=list, repr=False, compare=False)  # the file, until it is forgotten

    @classmethod
    def load(cls, folder: Path, form: Form = "float") -> Self:
        """Read one form of models/<name>/<version>/. Raises ArtifactError naming the file and what is wrong with it."""
        path = folder / FILES[form]
        model_bytes = _read(path)
        digest = hashlib.sha256(model_bytes).hexdigest()
        manifest, golden = read_manifest(path, model_bytes), Golden.from_file(folder / GOLDEN_FILE)
        artifact = cls(path, digest, manifest, golden, form, [model_bytes])
        artifact._golden_fits()
        return artifact

    @property
    def model_bytes(self) -> bytes:
        """The file as it was read; once it is forgotten, read anew.

        Raises ArtifactError where it is gone then, or is another file.
        """
        if self._kept:
            return self._kept[0]
        model_bytes = _read(self.path)
        if hashlib.sha256(model_bytes).hexdigest() != self.digest:
            raise ArtifactError(f"{self.path} has changed since it was read; write models beside it and rename them")
        return model_bytes

    def forget(self) -> None:
        """Hold the file no longer: while a model is served it would be in memory for nothing."""
        self._kept.clear()

    def _golden_fits(self) -> None:
        spec = self.manifest.preprocessing
        shapes = self.golden.pixels.shape[1:], self.golden.logits_float64.shape[1:]
        if shapes != ((*spec.size, spec.channels), (len(self.manifest.labels),)):
            raise ArtifactError(f"{self.path.parent / GOLDEN_FILE} belongs to another model; export the model again")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error.strerror}); export the model again") from None


def has_exact_form(folder: Path) -> bool:
    """True where models/<name>/<version>/ holds an exact form."""
    return (folder / EXACT_FILE).is_file()


def parse_model(word: str) -> tuple[str, int | None]:
    """Return the parts of `NAME` or `NAME@VERSION`. Raises ConfigurationError for a version that cannot be one."""
    name, at, version = word.partition("@")
    if at and not (version.isdecimal() and int(version)):
        raise ConfigurationError(f"{word}: a version is a positive integer")
    return name, int(version) if at else None


def versions(folder: Path) -> list[int]:
    """Return the versions of the model in `folder`, ascending: the subfolders named by a positive integer."""
    if not folder.is_dir():
        return []
    entries = (entry for entry in folder.iterdir() if re.fullmatch(r"[1-9]\d{0,8}", entry.name))
    return sorted(int(entry.name) for entry in entries if entry.is_dir())


def read_manifest(path: Path, model_bytes: bytes) -> Manifest:
    """Parse an ONNX file, check its inputs and outputs against its manifest, and return the manifest.

    `path` is for messages only. Raises ArtifactError.
    """
    try:
        model = onnx.load_model_from_string(model_bytes)
        onnx.checker.check_model(model)
    except Exception as error:  # noqa: BLE001 - protobuf and the checker raise types of their own
        reason = str(error).strip().partition("\n")[0]
        raise ArtifactError(f"{path} is not a sound ONNX file ({reason}); export the model again") from None
    external = [one.name or "without a name" for one in stored_tensors(model) if one.data_location == one.EXTERNAL]
    if external:
        raise ArtifactError(
            f"{path} keeps its weight {external[0]} in another file; a model is one self-contained file"
        )
    entries = {entry.key: entry.value for entry in model.metadata_props}
    if MANIFEST_KEY not in entries:
        raise ArtifactError(f"{path} has no foldserve manifest; only models that `foldserve` exported can be served")
    try:
        manifest = Manifest.model_validate_json(entries[MANIFEST_KEY])
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ArtifactError(f"{path}: manifest entry {where or 'JSON'}: {first['msg']}") from None
    _check_interface(path, model.graph, manifest)
    return manifest


def stored_tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Yield every tensor that the file stores: in its graph, in the graphs inside it, and in its functions."""
    yield from _weights_of_graph(model.graph)
    for function in model.functions:
        yield from _weights_of_nodes(function.node)


def _weights_of_graph(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _weights_of_nodes(graph.node)


def _weights_of_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for attribute in (attribute for node in nodes for attribute in node.attribute):
        yield from (attribute.t, *attribute.tensors)
        for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
            yield from (sparse.values, sparse.indices)
        for graph in (attribute.g, *attribute.graphs):
            yield from _weights_of_graph(graph)


def _check_interface(path: Path, graph: onnx.GraphProto, manifest: Manifest) -> None:
    spec = manifest.preprocessing
    tensors = {
        "input": (list(graph.input), INPUT_NAME, onnx.TensorProto.UINT8, [*spec.size, spec.channels]),
        "output": (list(graph.output), OUTPUT_NAME, onnx.TensorProto.FLOAT, [len(manifest.labels)]),
    }
    for kind, (values, name, element_type, shape) in tensors.items():
        wanted = f"one {kind} `{name}`, {onnx.TensorProto.DataType.Name(element_type)} [batch, {str(shape)[1:]}"
        if len(values) != 1 or not _has_form(values[0], name, element_type, shape):
            raise ArtifactError(f"{path}: expected {wanted} with a symbolic batch; export the model again")


def _has_form(value: onnx.ValueInfoProto, name: str, element_type: int, shape: list[int]) -> bool:
    tensor = value.type.tensor_type
    batch, *rest = tensor.shape.dim or [onnx.TensorShapeProto.Dimension()]
    return (
        value.name == name
        and tensor.elem_type == element_type
        and bool(batch.dim_param)
        and [dim.dim_value for dim in rest] == shape
    )
