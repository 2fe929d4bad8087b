"""The BatchNorm doctor: what is wrong with the BatchNorm of a checkpoint or an ONNX file, and how to mend it."""
