"""A folded classifier → the same classifier in exact integers: ranges, equalization, bounds, fine-tune.

float ONNX ─ reading ─ Network ─ calibration ─ grids ─ quantizing ─ writing ─ exact.onnx ─ checking
"""
