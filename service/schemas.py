"""Bodies of requests and answers, as the API document shows them."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from service.independence.certificate import Certificate
from service.independence.receipts import Receipt
from service.manifest import ExactRecord, FoldRecord, KeptRecord, NormRecord, Parity
from service.preprocessing import Preprocessing
from service.rollout import Others, Share, Version


def schema_of(model: type[BaseModel]) -> dict[str, Any]:
    """Return a body's JSON Schema in one piece, for operations that read their bodies themselves."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})

    def put_in(part: Any) -> Any:
        if isinstance(part, list):
            return [put_in(one) for one in part]
        if not isinstance(part, dict):
            return part
        name = str(part.get("$ref", "")).rpartition("/")[2]
        return put_in(definitions[name]) if name else {key: put_in(value) for key, value in part.items()}

    found: dict[str, Any] = put_in(schema)
    return found


class PredictQuery(BaseModel):
    """Query parameters of /predict; an unknown one is an error, not a surprise."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: str | None = Field(None, description="which model; needed only where several are served")
    version: int | None = Field(None, ge=1, description="which version, of those that are loaded")
    top_k: int = Field(5, ge=1, le=1000, description="how many classes to list, most probable first")
    logits: bool = Field(False, description="add the raw float32 logits, which read back to the same bits")
    receipt: bool = Field(False, description="add a receipt, which /verify replays")


class ModelQuery(BaseModel):
    """Query parameters of /models/{name}; an unknown one is an error, or a misspelt version would show another."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: int | None = Field(None, ge=1, description="which version, of those that are loaded [the stable one]")


class ImagesBody(BaseModel):
    """The JSON form of a request."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"images": ["iVBORw0KGgo…"]}]})

    images: list[str] = Field(min_length=1, description="image files in base64")


class CandidateBody(BaseModel):
    """One class and its softmax probability."""

    label: str
    index: int
    score: float = Field(ge=0, le=1)


class Problem(BaseModel):
    """RFC 9457 problem details."""

    type: str = Field(examples=["urn:foldserve:problem:invalid-image"])
    title: str
    status: int
    detail: str


class PredictionBody(CandidateBody):
    """The answer for one image."""

    filename: str | None = None
    top: list[CandidateBody]
    logits: list[float] | None = None
    receipt: Receipt | None = None


class FailureBody(BaseModel):
    """An image that could not be answered, in its place among the others."""

    filename: str | None = None
    error: Problem


SEVEN: dict[str, Any] = {"label": "7", "index": 7, "score": 0.9991}
EXAMPLE: dict[str, Any] = {
    "model": "mnist",
    "version": 3,
    "form": "float",
    "predictions": [{"filename": "seven.png", **SEVEN, "top": [SEVEN, {"label": "9", "index": 9, "score": 0.0004}]}],
}


class PredictBody(BaseModel):
    """The answer of /predict: one shape for one image and for many, in the order in which they were sent."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE]})

    model: str
    version: int
    form: Literal["float", "exact"]
    predictions: list[PredictionBody | FailureBody]


class ModelBody(BaseModel):
    """One served model, in short."""

    name: str
    version: int
    form: Literal["float", "exact"]
    digest: str = Field(description="sha256 of the stored model file")
    labels: list[str]


class ServingBody(BaseModel):
    """Which versions are loaded, and which of them answers whom."""

    stable: int
    canary: int | None
    canary_share: float = Field(ge=0, le=1, description="share of requests that the canary answers")
    shadow: int | None
    loaded: list[int]


class FlipBody(BaseModel):
    """How often the shadow took for another class what the stable version took for this one."""

    stable: str
    shadow: str
    count: int


class ShadowBody(BaseModel):
    """How the shadow's answers compare with the stable version's, since it was loaded."""

    version: int
    images: dict[str, int] = Field(description="by what came of it: same bits, same label, flipped, failed, dropped")
    flips: list[FlipBody]
    largest_difference: dict[str, float] = Field(description="largest logit difference seen, by class")


class ModelDetailBody(ModelBody):
    """One served model with everything that its file says about itself."""

    preprocessing: Preprocessing
    folds: list[FoldRecord]
    kept: list[KeptRecord]
    batchnorm: list[NormRecord]
    parity: Parity | None
    exact: ExactRecord | None
    training: dict[str, Any]
    licence: str | None
    golden_images: int
    golden_difference: float
    certificate: Certificate | None
    serving: ServingBody
    shadow: ShadowBody | None


class VerifyBody(BaseModel):
    """What a replay of a receipt showed; `same_bits` is null where the answers are not comparable."""

    comparable: bool
    same_pixels: bool
    same_bits: bool | None
    signature: Literal["valid", "invalid", "not checked"]
    detail: str


class ModelsBody(BaseModel):
    """What is served; `default` answers who names no model, and is null where a name is needed."""

    models: list[ModelBody]
    default: str | None


class LoadParameters(BaseModel):
    """What a load may ask for; what is left out is as serving.json says."""

    model_config = ConfigDict(extra="forbid")

    version: Version | None = Field(None, description="version that becomes stable, whatever serving.json says")
    canary: Version | None = Field(
        None, description="version that answers a share of the requests in its place; null is none"
    )
    canary_share: Share = Field(0.0, description="that share, 0 to 1")
    shadow: Version | None = Field(None, description="version that is compared and never answers; null is none")
    also: Others = Field((), description="versions that answer only who asks for them with ?version=; [] is none")


class LoadBody(BaseModel):
    """The body of a load call."""

    model_config = ConfigDict(extra="forbid")

    parameters: LoadParameters = LoadParameters()


class UnloadParameters(BaseModel):
    """Models here have no dependents; clients of the protocol send this all the same."""

    model_config = ConfigDict(extra="forbid")

    unload_dependents: bool = False


class UnloadBody(BaseModel):
    """The body of an unload call."""

    model_config = ConfigDict(extra="forbid")

    parameters: UnloadParameters = UnloadParameters()


class IndexQueryBody(BaseModel):
    """The body of an index call."""

    model_config = ConfigDict(extra="forbid")

    ready: bool = Field(False, description="only versions that are loaded")


class IndexEntryBody(BaseModel):
    """One version in the repository."""

    name: str
    version: str
    state: Literal["READY", "UNAVAILABLE"]
    reason: str


class HealthBody(BaseModel):
    """Live or ready."""

    status: str
