"""What a model file says about itself: the records of its manifest. Knows no file and no ONNX.

`training` fills them, `service.artifact` reads them out of the file.
"""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from service.preprocessing import Preprocessing

Form = Literal["float", "exact"]


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
