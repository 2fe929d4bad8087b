"""golden.npz: real images with the answers that a model must give on any machine. Written, read, and asked again."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from service.errors import ArtifactError, ServiceError
from service.manifest import Form
from service.preprocessing import Preprocessing, decode

Run = Callable[[NDArray[np.uint8]], NDArray[np.float32]]


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

    def answers(self, form: Form) -> tuple[NDArray[np.float64], float]:
        """Return what logits (n, classes) a form must give, and how far they may be off: an exact one not at all."""
        if form == "exact" and self.logits_exact is not None:
            return self.logits_exact.astype(np.float64), 0.0
        return self.logits_float64, self.tolerance

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
