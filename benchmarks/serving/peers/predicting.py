"""What every peer does with an image: the same float model, the same pixels, ONNX Runtime on one thread.

Runs in the peer's own Python, so it knows nothing of foldserve. What to serve is read from the environment, the one
thing that all of their launchers pass on.
"""

import io
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image

WORKERS, MAX_BATCH_SIZE, DELAY_MS = 2, 8, 2  # the setting that was best for all of them on two cores


def port() -> int:
    """Return the port to listen on."""
    return int(os.environ["BENCHMARK_PORT"])


def decode(encoded: bytes) -> np.ndarray:
    """Return an image as the model wants it, uint8 (side, side, 3): the centre, shorter side to `side`."""
    side = int(os.environ["BENCHMARK_SIDE"])
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    if image.size != (side, side):
        width, height = image.size
        edge = min(width, height)
        left, top = (width - edge) / 2, (height - edge) / 2
        image = image.resize((side, side), Image.Resampling.BILINEAR, box=(left, top, left + edge, top + edge))
    return np.asarray(image)


class Predictor:
    """A session, and the five most probable classes of each image."""

    def __init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        model = os.environ["BENCHMARK_MODEL"]
        self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def predict(self, images: Sequence[np.ndarray]) -> list[dict[str, Any]]:
        """Return for each image of uint8 (side, side, 3) what a JSON answer holds."""
        logits = self._session.run(None, {"image": np.stack(images)})[0].astype(np.float64)
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        scores = weights / weights.sum(axis=1, keepdims=True)
        tops = np.argsort(-logits, axis=1, kind="stable")[:, :5]
        return [
            {"top": [{"index": index, "score": float(row[index])} for index in top.tolist()]}
            for row, top in zip(scores, tops, strict=True)
        ]
