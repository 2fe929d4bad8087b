"""The forms of one version side by side: accuracy as recorded, size, CPU time measured here, headroom."""

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from service.artifact import has_exact_form
from service.engine import choose_device, open_engine
from service.manifest import ExactLayer, Form
from service.repository import Model, Repository

BATCH_SIZES = (1, 8)
RUNS = 15


@dataclass(frozen=True, slots=True)
class Side:
    """One form; `cpu_ms` is CPU milliseconds an image on one thread by batch size, `accuracy` a share, 0 to 1."""

    form: Form
    digest: str
    bytes: int
    accuracy: float | None
    cpu_ms: dict[int, float]


@dataclass(frozen=True, slots=True)
class Comparison:
    """The forms of one version, and the layers of the exact one."""

    model: Model
    sides: tuple[Side, ...]
    validation_images: int
    layers: tuple[ExactLayer, ...]

    @property
    def tightest(self) -> ExactLayer | None:
        """The layer with the least headroom, where there is an exact form."""
        return min(self.layers, key=lambda layer: layer.headroom_bits, default=None)


def compare_forms(root: Path, name: str, version: int, runs: int = RUNS) -> Comparison:
    """Load each form on the CPU, check its golden images, and measure it. Raises ArtifactError."""
    forms: tuple[Form, ...] = ("float", "exact") if has_exact_form(root / name / str(version)) else ("float",)
    repository, device = Repository(root, open_engine), choose_device("cpu")
    models = [repository.load(name, device, version, form) for form in forms]
    costs = [_costs(models, size, runs) for size in BATCH_SIZES]
    record = models[-1].manifest.exact
    judged = {"float": record.float_accuracy, "exact": record.accuracy} if record else {}
    sides = tuple(
        Side(
            model.form,
            model.digest,
            len(model.artifact.model_bytes),
            judged.get(model.form),
            {size: cost[at] for size, cost in zip(BATCH_SIZES, costs, strict=True)},
        )
        for at, model in enumerate(models)
    )
    return Comparison(models[-1], sides, record.validation_images if record else 0, record.layers if record else ())


def _costs(models: list[Model], batch_size: int, runs: int) -> list[float]:
    """Return each model's median CPU milliseconds an image, taken in turns so that a slow moment is everybody's."""
    golden = models[0].artifact.golden.pixels
    images = np.resize(golden, (batch_size, *golden.shape[1:]))
    rounds = [[_cpu_s(model, images) for model in models] for _ in range(runs + 1)][1:]  # the first warms up
    return [1000 * statistics.median(column) / batch_size for column in zip(*rounds, strict=True)]


def _cpu_s(model: Model, images: np.ndarray) -> float:
    started = time.process_time()
    model.run(images)
    return time.process_time() - started
