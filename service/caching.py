"""The answers given last, by the digest of the pixels. Right only where an answer hangs on nothing else."""

from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]


class AnswerCache:
    """Keeps the `size` answers used last; used on one event loop only."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._answers: OrderedDict[str, Logits] = OrderedDict()

    def __len__(self) -> int:
        return len(self._answers)

    def find(self, digest: str) -> Logits | None:
        """Return the logits (classes,) that these pixels were given, or None."""
        found = self._answers.get(digest)
        if found is not None:
            self._answers.move_to_end(digest)
        return found

    def keep(self, digest: str, logits: Logits) -> None:
        """Keep an answer, and let the one go that was not used for longest."""
        if not self.size:
            return
        self._answers[digest] = logits.copy()  # a row of a batch would keep the whole batch alive
        self._answers.move_to_end(digest)
        if len(self._answers) > self.size:
            self._answers.popitem(last=False)

    def clear(self) -> None:
        """Forget everything."""
        self._answers.clear()
