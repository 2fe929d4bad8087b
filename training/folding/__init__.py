"""Folds BatchNorm into the layer before it, in float64: `algebra` is the mathematics, `modules` meets PyTorch."""
