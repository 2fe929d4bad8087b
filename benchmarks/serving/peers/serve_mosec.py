"""mosec: a Rust front, Python workers, dynamic batches. The body is the image itself."""

import json

from mosec import Server, Worker
from mosec.errors import ValidationError
from predicting import DELAY_MS, MAX_BATCH_SIZE, WORKERS, Predictor, decode


class Classify(Worker):
    """Decodes in `deserialize`, as mosec's own examples do."""

    def __init__(self) -> None:
        super().__init__()
        self._predictor = Predictor()

    def deserialize(self, data):
        try:
            return decode(data)
        except OSError as error:
            raise ValidationError(str(error)) from error

    def forward(self, data):
        return self._predictor.predict(data)

    def serialize(self, data):
        return json.dumps(data).encode()


if __name__ == "__main__":
    server = Server()
    server.append_worker(Classify, num=WORKERS, max_batch_size=MAX_BATCH_SIZE, max_wait_time=DELAY_MS, timeout=30)
    server.run()
