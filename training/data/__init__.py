"""Data sets as pixels and targets, split once and for all: training, validation, test. No augmentation.

`best` checkpoints are chosen on the validation part, which comes out of the training images; the test part is
looked at once, at the end. Readers by format: `idx`, `cifar`, `svhn`, `folders`; `loading` chooses.
"""

from training.data.idx import IDX_SOURCES, IdxSource, find_idx, read_idx
from training.data.loading import dataset_names, load
from training.data.parts import Dataset, Split, concatenated, hold_out, limited

__all__ = [
    "IDX_SOURCES",
    "Dataset",
    "IdxSource",
    "Split",
    "concatenated",
    "dataset_names",
    "find_idx",
    "hold_out",
    "limited",
    "load",
    "read_idx",
]
