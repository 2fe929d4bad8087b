"""The model file's contract: read it, validate it, describe it. No web, no torch, no session.

    models/<name>/<version>/model.onnx   uint8 pixels (batch, height, width, channels) → float32 logits (batch, classes)
                            exact.onnx   the same contract, computed with integers; not every model has one
                            golden.npz   real images and the answers that the model must give on any machine

`training.export` writes what is read here, through the same records.
"""

import hashlib
import io
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import onnx
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from service.errors import ArtifactError, ServiceError
from service.preprocessing import Preprocessing, decode

MANIFEST_KEY = "foldserve"
MODEL_FILE = "model.onnx"
EXACT_FILE = "exact.onnx"
GOLDEN_FILE = "golden.npz"
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")  # no separators, no hidden folders
INPUT_NAME = "image"
OUTPUT_NAME = "logits"

Form = Literal["float", "exact"]
FILES: dict[Form, str] = {"float": MODEL_FILE, "exact": EXACT_FILE}
Run = Callable[[NDArray[np.uint8]], NDArray[np.float32]]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FoldRecord(_Record):
    """One BatchNorm, or arithmetic like it, that stood `place` a layer and went into it, past the steps `through`.

    `error` is the largest relative difference seen in float64, `weight_max` and `bias_max` are the layer's as folded.
    """

    norm: str
    norm_kind: str = "BatchNorm"
    into: str
    kind: str
    place: Literal["after", "before"] = "after"
    through: tuple[str, ...] = ()
    scale_min: float
    scale_max: float
    weight_max: float
    bias_max: float
    float16_headroom: float | None = Field(None, description="65504 / the largest of both; none where all are 0")
    error: float | None = None


class FoldError(_Record):
    """How far the folded network is from the unfolded one in float64, relative to the largest logit.

    `float64` with the folded weights before rounding: the algebra alone; `float32` as stored, which is narrower where
    the file is; `float32_unfolded` the same for the network before folding: what rounding costs without it.
    """

    float64: float
    float32: float
    float32_unfolded: float


class KeptRecord(_Record):
    """One BatchNorm that stays in the graph, and why folding it would be wrong."""

    norm: str
    reason: str


class NormRecord(_Record):
    """The health of one BatchNorm as trained; `initial_share` is what is left of the initial statistics, 0 to 1."""

    norm: str
    eps: float
    momentum: float | None
    num_batches_tracked: int | None
    initial_share: float | None


class Parity(_Record):
    """ONNX Runtime against the unfolded model in float64, over real images at several batch sizes."""

    images: int
    batch_sizes: tuple[int, ...]
    max_abs_difference: float
    float32_noise: float = Field(description="the same for the unfolded model in float32: what rounding alone costs")
    argmax_flips: int


class ExactLayer(_Record):
    """How near a layer of an exact model comes to the bound; see `service.independence.exactness`."""

    name: str
    weight_bits: int
    terms: int
    bound: int
    headroom_bits: float


class ExactRecord(_Record):
    """How an exact model was made and what it costs: shares of images, 0 to 1, against the float form."""

    theorem: int
    layers: tuple[ExactLayer, ...]
    calibration_images: int
    is_equalized: bool
    fine_tuned_epochs: int
    agreement: float = Field(description="share of calibration images with the float form's label")
    checked_images: int = Field(description="images on which every execution gave the integers' bits")
    differing_executions: tuple[str, ...] = Field((), description="executions that this machine's kernels got wrong")
    validation_images: int = 0
    accuracy: float | None = None
    float_accuracy: float | None = None


class PixelStatistics(_Record):
    """Per-channel mean and deviation of the training pixels, scaled to 0–1: what live traffic is held against."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class Manifest(_Record):
    """What a model file says about itself, stored as JSON in its metadata."""

    schema_version: Literal[1] = 1
    name: str
    labels: tuple[str, ...] = Field(min_length=1)
    preprocessing: Preprocessing
    folds: tuple[FoldRecord, ...] = ()
    kept: tuple[KeptRecord, ...] = ()
    fold_error: FoldError | None = None
    batchnorm: tuple[NormRecord, ...] = ()
    parity: Parity | None = None
    exact: ExactRecord | None = None
    pixels: PixelStatistics | None = None
    training: dict[str, Any] = {}
    licence: str | None = None

    @model_validator(mode="after")
    def _labels_differ(self) -> Self:
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("labels must differ from one another")
        return self


@dataclass(frozen=True, slots=True)
class Golden:
    """Real images with the answers that a model must give; see `check`.

    Shapes: pixels uint8 (n, height, width, channels), logits_float64 (n, classes); encoded holds n image files.
    `logits_exact`, float32 (n, classes), is there where the model has an exact form.
    """

    encoded: tuple[bytes, ...]
    pixels: NDArray[np.uint8]
    logits_float64: NDArray[np.float64]
    tolerance: float
    logits_exact: NDArray[np.float32] | None = None

    def to_bytes(self) -> bytes:
        """Return the npz file, readable without pickle: `encoded` joined, with int64 `offsets` (n + 1)."""
        buffer = io.BytesIO()
        exact: dict[str, Any] = {} if self.logits_exact is None else {"logits_exact": self.logits_exact}
        np.savez_compressed(
            buffer,
            encoded=np.frombuffer(b"".join(self.encoded), np.uint8),
            offsets=np.cumsum([0, *(len(image) for image in self.encoded)], dtype=np.int64),
            pixels=self.pixels,
            logits_float64=self.logits_float64,
            tolerance=np.float64(self.tolerance),
            **exact,
        )
        return buffer.getvalue()

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Read `to_bytes`'s format. Raises ArtifactError for a file that is missing or damaged."""
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise ArtifactError(f"{path} is missing; export the model again") from None
        except OSError as error:
            raise ArtifactError(f"{path} cannot be read ({error.strerror}); export the model again") from None
        try:
            golden = cls._from_arrays(np.load(io.BytesIO(content), allow_pickle=False))
        except Exception as error:  # noqa: BLE001 - zipfile, zlib and NumPy raise types of their own at damage
            raise ArtifactError(f"{path} is damaged ({error}); export the model again") from None
        if not len(golden.encoded) == len(golden.pixels) == len(golden.logits_float64) > 0:
            raise ArtifactError(f"{path} is damaged (its arrays differ in length); export the model again")
        return golden

    @classmethod
    def _from_arrays(cls, arrays: Any) -> Self:
        joined, offsets = arrays["encoded"].tobytes(), arrays["offsets"]
        if offsets.dtype != np.int64 or offsets.ndim != 1 or offsets[-1] != len(joined):
            raise ValueError("offsets do not fit")
        encoded = tuple(joined[start:end] for start, end in pairwise(offsets.tolist()))
        exact = arrays.get("logits_exact")
        golden = cls(encoded, arrays["pixels"], arrays["logits_float64"], float(arrays["tolerance"]), exact)
        if golden.pixels.dtype != np.uint8 or golden.pixels.ndim != 4:
            raise ValueError("pixels are not uint8 (n, height, width, channels)")
        if golden.logits_float64.dtype != np.float64 or golden.logits_float64.ndim != 2:
            raise ValueError("logits_float64 are not float64 (n, classes)")
        if not 0 <= golden.tolerance < float("inf"):
            raise ValueError(f"the tolerance is {golden.tolerance}")
        if exact is not None and (exact.dtype != np.float32 or exact.shape != golden.logits_float64.shape):
            raise ValueError("logits_exact are not float32 (n, classes)")
        return golden

    def check(self, run: Run, spec: Preprocessing, form: Form = "float") -> float:
        """Decode and run every golden image alone; return the largest difference from `logits_float64` seen.

        Raises ArtifactError when a pixel differs, a logit by more than the tolerance, or, in the exact form, by a bit.
        """
        if form == "exact":
            return self._check_exact(run, spec)
        differences = [self._check_one(index, run, spec) for index in range(len(self.encoded))]
        if max(differences) > self.tolerance:
            raise ArtifactError(
                f"golden image {int(np.argmax(differences))}: logits differ by {max(differences):.3g} from those at "
                f"export, tolerance {self.tolerance:.3g}; this runtime computes another function of the same file"
            )
        return max(differences)

    def _check_exact(self, run: Run, spec: Preprocessing) -> float:
        if self.logits_exact is None:
            raise ArtifactError("golden.npz has no answers of the exact form; export the model again")
        worst = 0.0
        for index, wanted in enumerate(self.logits_exact):
            logits = run(self._decoded(index, spec)[np.newaxis])[0]
            if logits.tobytes() != wanted.tobytes():
                raise ArtifactError(f"golden image {index}: the exact form gives other bits than its integers")
            worst = max(worst, float(np.abs(logits - self.logits_float64[index]).max()))
        return worst

    def _check_one(self, index: int, run: Run, spec: Preprocessing) -> float:
        difference = run(self._decoded(index, spec)[np.newaxis]) - self.logits_float64[index]
        return float(np.abs(difference).max()) if np.isfinite(difference).all() else float("inf")

    def _decoded(self, index: int, spec: Preprocessing) -> NDArray[np.uint8]:
        try:
            pixels = decode(self.encoded[index], spec)
        except ServiceError as error:
            raise ArtifactError(f"golden image {index} cannot be decoded here: {error}") from None
        if not np.array_equal(pixels, self.pixels[index]):
            raise ArtifactError(f"golden image {index} decodes to other pixels than at export; see Pillow's version")
        return pixels


@dataclass(frozen=True, slots=True)
class Artifact:
    """A model file that was read and found to keep the contract."""

    path: Path
    model_bytes: bytes = field(repr=False)
    digest: str  # sha256 of model_bytes, hexadecimal
    manifest: Manifest
    golden: Golden = field(repr=False)
    form: Form = "float"

    @classmethod
    def load(cls, folder: Path, form: Form = "float") -> Self:
        """Read one form of models/<name>/<version>/. Raises ArtifactError naming the file and what is wrong with it."""
        path = folder / FILES[form]
        try:
            model_bytes = path.read_bytes()
        except OSError as error:
            raise ArtifactError(f"{path} cannot be read ({error.strerror}); export the model again") from None
        digest = hashlib.sha256(model_bytes).hexdigest()
        manifest, golden = read_manifest(path, model_bytes), Golden.from_file(folder / GOLDEN_FILE)
        artifact = cls(path, model_bytes, digest, manifest, golden, form)
        artifact._golden_fits()
        return artifact

    def _golden_fits(self) -> None:
        spec = self.manifest.preprocessing
        shapes = self.golden.pixels.shape[1:], self.golden.logits_float64.shape[1:]
        if shapes != ((*spec.size, spec.channels), (len(self.manifest.labels),)):
            raise ArtifactError(f"{self.path.parent / GOLDEN_FILE} belongs to another model; export the model again")


def has_exact_form(folder: Path) -> bool:
    """True where models/<name>/<version>/ holds an exact form."""
    return (folder / EXACT_FILE).is_file()


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
