"""The grammar of `exact.onnx`: which graphs compute with integers alone, and what each of their steps means.

    uint8 pixels ─ Move, Convolution, Pair, Table ─ uint8 … ─ Head ─ float32 logits

A file is read into steps here, and by nobody else: the proof, the integer reference and every execution of the file
start from the same steps. What is not in the grammar is refused with the node's name.
"""

from service.integers.reading import read_steps
from service.integers.steps import Convolution, Head, Move, Pair, Step, Steps, Table

__all__ = ["Convolution", "Head", "Move", "Pair", "Step", "Steps", "Table", "read_steps"]
