"""The run that can refute a proof: the same image among other neighbours, in other slots and batch sizes.

Knows ONNX Runtime and nothing of the rules. At a fixed size and slot an image's result must keep every bit
whatever its neighbours hold. At other sizes and slots kernels may round differently, so there it must stay
within 1e-3.
"""

import numpy as np
import onnx
import onnxruntime

TOLERANCE = 1e-3  # relative to the largest value of the result; rounding stays below 1e-5 in graphs this shallow
SIZE = 4


class Run:
    """A model in ONNX Runtime, on one thread."""

    def __init__(self, model: onnx.ModelProto) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self.name = self.session.get_inputs()[0].name

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """The first output for a batch of images."""
        return np.asarray(self.session.run(None, {self.name: images})[0])


def refutation(model: onnx.ModelProto, shape: tuple[int, ...] = (4, 4, 4), seed: int = 0) -> str | None:
    """How a run shows that an image's result depends on its batch; None where no run here shows it.

    Raises whatever ONNX Runtime raises where the model cannot be loaded or does not run at size 4.
    """
    run = Run(model)
    images = np.random.default_rng(seed).standard_normal((SIZE, *shape)).astype(np.float32)
    alone = run(images)
    if not _same_bits(alone, run(images)):
        return "two equal runs differ"
    if alone.ndim == 0 or len(alone) != SIZE:
        return f"{SIZE} images give a result of shape {alone.shape}"
    return _among_neighbours(run, images, alone) or _at_other_places(run, images, alone)


def _among_neighbours(run: Run, images: np.ndarray, alone: np.ndarray) -> str | None:
    for slot in range(SIZE):
        crowd = images[::-1] * np.float32(9) + np.float32(3)
        crowd[slot] = images[slot]
        if not _same_bits(run(crowd)[slot], alone[slot]):
            return f"other neighbours change slot {slot}"
    return None


def _at_other_places(run: Run, images: np.ndarray, alone: np.ndarray) -> str | None:
    for order in ([2], [3, 0], [1, 2, 0], [3, 2, 1, 0], [0, 0, 1, 3, 2, 1, 3]):
        try:
            found = run(images[order])
        except Exception as error:  # ONNX Runtime has no common error class
            return f"size {len(order)} does not run: {str(error).splitlines()[0]}"
        if found.ndim == 0 or len(found) != len(order) or not _close(found, alone[order]):
            return f"size {len(order)} with images {order} gives another result"
    return None


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.tobytes() == b.tobytes()


def _close(a: np.ndarray, b: np.ndarray) -> bool:
    if a.shape != b.shape:
        return False
    a, b = a.astype(np.float64), b.astype(np.float64)
    scale = max(float(np.abs(b).max(initial=0)), 1e-30)
    return bool(np.allclose(a, b, rtol=0, atol=TOLERANCE * scale, equal_nan=True))
