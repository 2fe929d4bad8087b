"""A foreign ONNX classifier becomes an artifact: preprocessing put in, head checked, folded, proved, measured."""
