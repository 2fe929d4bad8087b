"""Serves image classifiers over REST. Knows neither torch nor `training`; see `service.app` for how it is wired."""

import os

# ONNX Runtime reports to its makers unless told not to before it is imported: what runs here is nobody else's business.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
