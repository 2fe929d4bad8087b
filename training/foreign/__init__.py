"""ONNX files that others wrote: read safely, batch made symbolic, precision changed, run in float64."""
