"""The settings, each with its unit and default, and the only reader of the environment in `service`.

Flags win over environment variables (`FOLDSERVE_` and the upper-case name), those over the defaults here.
"""

import json
import logging
import math
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from service.cgroup import ControlGroup
from service.errors import ConfigurationError, nearest

ENVIRONMENT_PREFIX = "FOLDSERVE_"
ARITHMETIC_PREFIXES = ("NVIDIA_TF32", "CUBLAS", "CUDNN", "CUDA_", "ORT_", "OMP_", "MKL_")
READ_ELSEWHERE = frozenset({"FOLDSERVE_DATA"})  # where training finds data sets

ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s?#@]+")  # RFC 6454, section 6.2: no path, not even a slash
ADDRESS = re.compile(r"https?://[^/\s]+\S*")

RequestedForm = Literal["auto", "exact", "float"]

logger = logging.getLogger(__name__)


class Settings(BaseSettings):
    """Frozen settings of one service."""

    model_config = SettingsConfigDict(env_prefix=ENVIRONMENT_PREFIX, frozen=True, extra="forbid", allow_inf_nan=False)

    models: Path = Field(Path("models"), description="folder of models, <name>/<version>/model.onnx")
    watch_interval_s: float = Field(
        0.0, ge=0, description="how often to look for models that changed in the repository, seconds; 0 never looks"
    )
    default_model: str | None = Field(
        None, description="model that answers when a request names none [the only one, if there is one]"
    )
    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for every interface")
    port: int = Field(8000, ge=0, le=65535, description="TCP port; 0 takes a free one")
    device: Literal["auto", "cuda", "cpu"] = Field(
        "auto", description="where models run: auto takes CUDA where it works and says so where it does not"
    )
    form: RequestedForm = Field(
        "auto", description="which form of a model to serve: auto takes the exact one where it exists and is faster"
    )
    mode: Literal["strict", "report", "off"] = Field(
        "strict",
        description="batch independence: strict refuses a model without a certificate, report serves it and says so, "
        "off does not look",
    )
    state: Path = Field(
        Path.home() / ".cache" / "foldserve", description="folder for certificates [~/.cache/foldserve]"
    )
    spot_check_share: float = Field(
        0.001, ge=0, le=1, description="share of answers that are run again alone, off the hot path, and compared"
    )
    receipt_key: SecretStr | None = Field(
        None, description="secret that signs receipts (HMAC-SHA-256); from the environment alone"
    )
    api_keys_file: Path | None = Field(
        None, description="file of hashed API keys, made by `foldserve keys add` and re-read when it changes"
    )
    public_predict: bool = Field(False, description="let everybody predict although there is a file of API keys")
    workers: int = Field(
        1, ge=1, le=256, description="processes that serve, each with its share of the cores, the queue and the bytes"
    )
    lanes: int = Field(
        0,
        ge=0,
        description="batches that a process runs at once, one thread each [0: one per core of its share on a CPU]",
    )
    max_batch_size: int = Field(8, ge=1, description="most images in one run")
    max_queue_delay_ms: float = Field(0.0, ge=0, description="how long an idle engine waits for company, milliseconds")
    max_queue_size: int = Field(512, ge=1, description="images admitted and not yet answered")
    request_timeout_s: float = Field(
        10.0, gt=0, description="deadline of a request, and the most that X-Request-Timeout-Ms may ask for, seconds"
    )
    share_identical: bool = Field(
        True,
        description="identical images in flight run once, and answers carry an ETag; only under a certificate; "
        "switch it off to measure",
    )
    cache_answers: int = Field(
        0, ge=0, description="answers kept for images that come again; only under a certificate, with share_identical"
    )
    body_timeout_s: float = Field(10.0, gt=0, description="time a request body may take to arrive, seconds")
    grace_s: float = Field(
        2.0, ge=0, description="after SIGTERM: time for which what still arrives is answered, seconds"
    )
    drain_timeout_s: float = Field(30.0, ge=0, description="time that accepted work gets at shutdown, seconds")
    run_timeout_s: float = Field(60.0, gt=0, description="a run that takes longer hangs, and the process ends, seconds")
    worker_timeout_s: float = Field(
        30.0, gt=0, description="a worker that is silent for so long is killed and replaced, seconds"
    )
    max_connections: int = Field(
        0,
        ge=0,
        description="connections that a process holds, more are answered 503 [0: what its limit of open files allows]",
    )
    max_head_bytes: int = Field(
        32 * 2**10, ge=1024, description="largest head of a request: its line and its headers, bytes"
    )
    head_timeout_s: float = Field(10.0, gt=0, description="time a request's head may take to arrive, seconds")
    send_timeout_s: float = Field(
        30.0, gt=0, description="a caller who reads nothing of his answer for so long is cut off, seconds"
    )
    keep_alive_s: float = Field(5.0, ge=0, description="how long a connection is kept without a request, seconds")
    max_body_bytes: int = Field(20 * 2**20, ge=1, description="largest request body, bytes")
    max_bytes_in_flight: int = Field(
        256 * 2**20, ge=1, description="bodies that arrive or wait for their answer, all together, bytes"
    )
    max_image_pixels: int = Field(50_000_000, ge=1, description="largest image by its header, pixels")
    max_pixels_in_flight: int = Field(
        100_000_000, ge=1, description="pixels being decoded at once, by their headers, all images together"
    )
    max_images: int = Field(64, ge=1, description="most images in one request")
    decode_threads: int = Field(0, ge=0, description="images decoded at once [0: one per core]")
    formats: Annotated[tuple[str, ...], NoDecode] = Field(
        ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"), description="accepted image formats, comma-separated"
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="pages of other hosts that may call, comma-separated, for instance https://a.example [none]"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severe line to log")
    log_format: Literal["text", "json"] = Field("text", description="log lines for people, or one JSON object a line")
    log_requests: Literal["none", "errors", "all"] = Field(
        "errors",
        description="requests that get a log line: errors are those answered with 500 and above, but for 503, and for "
        "504, which share one every 10 s",
    )
    otlp_endpoint: str | None = Field(
        None,
        description="where OpenTelemetry traces go, as https://host:4318/v1/traces; needs the extra otel [nowhere]",
    )

    @field_validator("formats", mode="before")
    @classmethod
    def _split_formats(cls, value: object) -> object:
        return tuple(part.strip().upper() for part in value.split(",")) if isinstance(value, str) else value

    @field_validator("cors_origins", mode="before")
    @classmethod
    def _split_origins(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for one in origins:
            if one != "*" and not ORIGIN.fullmatch(one):
                raise ValueError(f"{one[:100]} is not an origin; write it as a browser sends it: https://a.example")
        return origins

    @field_validator("otlp_endpoint")
    @classmethod
    def _check_endpoint(cls, endpoint: str | None) -> str | None:
        if endpoint is not None and not ADDRESS.fullmatch(endpoint):
            raise ValueError(f"{endpoint[:100]} is no address; write it as https://host:4318/v1/traces")
        return endpoint

    @model_validator(mode="after")
    def _one_request_fits(self) -> Self:
        if self.max_images > self.max_queue_size:
            raise ValueError(f"max_images ({self.max_images}) may not exceed max_queue_size ({self.max_queue_size})")
        if self.max_body_bytes > self.max_bytes_in_flight:
            limit = self.max_bytes_in_flight
            raise ValueError(f"max_body_bytes ({self.max_body_bytes}) may not exceed max_bytes_in_flight ({limit})")
        if self.max_image_pixels > self.max_pixels_in_flight:
            limit = self.max_pixels_in_flight
            raise ValueError(
                f"max_image_pixels ({self.max_image_pixels}) may not exceed max_pixels_in_flight ({limit})"
            )
        return self

    @property
    def cores_share(self) -> int:
        """The cores that one of the workers may use."""
        return max(1, cpu_count() // self.workers)

    @property
    def queue_share(self) -> int:
        """The images that one of the workers admits; one whole request always fits."""
        return max(self.max_images, math.ceil(self.max_queue_size / self.workers))

    @property
    def bytes_share(self) -> int:
        """The bytes that one of the workers holds at once; one whole body always fits."""
        return max(self.max_body_bytes, self.max_bytes_in_flight // self.workers)

    @property
    def pixels_share(self) -> int:
        """The pixels that one of the workers decodes at once; one whole image always fits."""
        return max(self.max_image_pixels, self.max_pixels_in_flight // self.workers)

    def to_json(self) -> str:
        """Return all settings, secrets in clear: for the pipe to a worker, never for a log."""
        secrets = {name: value.get_secret_value() for name, value in self if isinstance(value, SecretStr)}
        return json.dumps(self.model_dump(mode="json") | secrets)

    @classmethod
    def load(cls, **flags: Any) -> Self:
        """Read the environment, let the flags that are not None win, and validate.

        Raises ConfigurationError with one line per wrong value; variables nobody knows are warned about.
        """
        _warn_about_unknown_variables(cls.model_fields)
        given = {name: value for name, value in flags.items() if value is not None}
        try:
            return cls(**given)
        except ValidationError as error:
            raise ConfigurationError(_explain(error, given)) from None


def arithmetic_environment() -> dict[str, str]:
    """Return the variables that can change how CUDA, cuDNN, cuBLAS or OpenMP compute."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(ARITHMETIC_PREFIXES)}


def pin_cuda_arithmetic() -> None:
    """Set what CUDA's libraries read once, when they are loaded, and no option of ONNX Runtime can set."""
    os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")  # where a plan without TF32 is missing, one with it is taken
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # too little room to split sums by the batch's size


def environment_with(**variables: str) -> dict[str, str]:
    """Return this process's environment and more, for a child of it."""
    return {**os.environ, **variables}


def cpu_count(group: ControlGroup | None = None) -> int:
    """Return how many threads can work at once: the cores this process may run on, or fewer by its group's quota.

    A quota of 1.5 counts as 1, for the kernel stops all threads of a group that has used its share of each 100 ms.
    """
    cores = len(os.sched_getaffinity(0))
    quota = (group or ControlGroup()).cpu_quota()
    return cores if quota is None else max(1, min(cores, int(quota)))


def _warn_about_unknown_variables(fields: Any) -> None:
    known = [ENVIRONMENT_PREFIX + name.upper() for name in fields] + sorted(READ_ELSEWHERE)
    for variable in sorted(os.environ):
        if variable.startswith(ENVIRONMENT_PREFIX) and variable not in known:
            logger.warning("environment variable %s is not a setting%s", variable, nearest(variable, known))


def _explain(error: ValidationError, flags: dict[str, Any]) -> str:
    lines = []
    for problem in error.errors():
        if not problem["loc"]:  # about several settings together
            lines.append(str(problem["msg"]).removeprefix("Value error, "))
            continue
        name = str(problem["loc"][0])
        where = f"--{name.replace('_', '-')}" if name in flags else ENVIRONMENT_PREFIX + name.upper()
        text = problem["msg"].removeprefix("Value error, ")
        given = ",".join(problem["input"]) if isinstance(problem["input"], tuple) else problem["input"]
        lines.append(f"{where} = {given}: {text[0].lower()}{text[1:]}")
    return "; ".join(lines)
