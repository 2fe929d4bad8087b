"""BentoML: worker processes with dynamic batches. The body is the image as a multipart part."""

from pathlib import Path

import bentoml
from predicting import DELAY_MS, MAX_BATCH_SIZE, WORKERS, Predictor, decode


@bentoml.service(name="classify", workers=WORKERS, traffic={"timeout": 30}, metrics={"enabled": True})
class Classify:
    """Gets files, as BentoML hands images over."""

    def __init__(self) -> None:
        self._predictor = Predictor()

    @bentoml.api(batchable=True, max_batch_size=MAX_BATCH_SIZE, max_latency_ms=1000 * DELAY_MS)
    def predict(self, images: list[Path]) -> list[dict]:
        return self._predictor.predict([decode(image.read_bytes()) for image in images])
