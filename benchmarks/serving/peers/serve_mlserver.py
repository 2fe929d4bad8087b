"""MLServer: inference processes behind a REST server, adaptive batches. The body is base64 in Open Inference JSON."""

import base64
import json

import numpy as np
from mlserver import MLModel
from mlserver.codecs import StringCodec
from mlserver.types import InferenceRequest, InferenceResponse
from predicting import Predictor, decode


class Classify(MLModel):
    """Images come as strings, so that MLServer can batch them before they are decoded."""

    async def load(self) -> bool:
        self._predictor = Predictor()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        found = np.atleast_1d(payload.inputs[0].data.root).ravel().tolist()
        answers = self._predictor.predict([decode(base64.b64decode(one)) for one in found])
        output = StringCodec.encode_output("top", [json.dumps(one) for one in answers])
        return InferenceResponse(model_name=self.name, outputs=[output])
