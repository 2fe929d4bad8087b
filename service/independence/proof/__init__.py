"""The static proof that no operator of an ONNX graph mixes images; see `verdict` for what it says and how."""

from service.independence.proof.verdict import Verdict, prove

__all__ = ["Verdict", "prove"]
