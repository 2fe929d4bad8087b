"""LitServe: FastAPI in front, worker processes behind queues, dynamic batches. The body is base64 in JSON."""

import base64

import litserve
from predicting import DELAY_MS, MAX_BATCH_SIZE, WORKERS, Predictor, decode, port


class Classify(litserve.LitAPI):
    """Decodes in the worker."""

    def setup(self, device):
        self._predictor = Predictor()

    def decode_request(self, request):
        return decode(base64.b64decode(request["image"]))

    def batch(self, inputs):
        return list(inputs)

    def predict(self, batch):
        return self._predictor.predict(batch)

    def unbatch(self, output):
        return output

    def encode_response(self, output):
        return output


if __name__ == "__main__":
    api = Classify(max_batch_size=MAX_BATCH_SIZE, batch_timeout=DELAY_MS / 1000)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=WORKERS)
    server.run(host="127.0.0.1", port=port(), generate_client_file=False, log_level="warning")
