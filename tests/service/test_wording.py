"""`service.wording`: counts with their words, and that no message writes a share in another way than the others."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.wording import counted

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("count", "word", "words"),
    [
        (1, "image", "1 image"),
        (0, "image", "0 images"),
        (10_000, "training image", "10,000 training images"),
        (2, "batch", "2 batches"),
        (2, "branch", "2 branches"),
        (2, "epoch", "2 epochs"),
        (2, "class", "2 classes"),
        (1, "process", "1 process"),
    ],
)
def test_a_count_stands_with_its_word_in_the_right_number(count: int, word: str, words: str):
    assert counted(count, word) == words


def texts(path: Path) -> Iterator[str]:
    """Yield the texts of a source that may be printed; a number that is put into one is 0, docstrings are left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    told = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "0" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts | told:
            yield node.value


@pytest.mark.parametrize("package", ["foldserve", "service", "training"])
def test_a_share_stands_with_its_sign_in_every_message(package: str):
    apart = [
        (path.name, text)
        for path in (ROOT / package).rglob("*.py")
        for text in texts(path)
        if re.search(r"(\d|f|\}) %%?(?![\w(%])", text)
    ]
    assert apart == []
