"""A person's own code may raise anything, at import and when it is called: one line says what and where."""

from pathlib import Path

import pytest
import torch
from foreign_support import SIDE, network

from foldserve.cli import main


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """Export what a module of the given name and text makes; return the exit status and standard error."""
    monkeypatch.chdir(tmp_path)
    torch.save(network().state_dict(), "weights.pt")

    def export(text: str, name: str, function: str = "build", command: tuple[str, ...] = ()) -> tuple[int, str]:
        Path(f"{name}.py").write_text(text)
        where = f"{name}:{function}"
        usual = ("export", where, "--checkpoint", "weights.pt", "--name", "own", "--size", str(SIDE))
        return main(list(command) or [*usual, "--models", "models"]), capsys.readouterr().err

    yield export
    assert not Path("models").exists()


RAISING = {
    "when called": (
        "def build():\n    raise ValueError('no depth')\n",
        "raised ValueError: no depth ({}, line 2, in build)",
    ),
    "below": (
        "def depth():\n    return {}['depth']\n\ndef build():\n    return depth()\n",
        "raised KeyError: 'depth' ({}, line 2, in depth)",
    ),
    "in a library": (
        "import json\n\ndef build():\n    json.loads('[')\n",
        "raised JSONDecodeError: Expecting value: line 1 column 2 (char 1) ({}, line 4, in build)",
    ),
    "leaving": ("import sys\n\ndef build():\n    sys.exit()\n", "raised SystemExit ({}, line 4, in build)"),
    "at import": ("1 / 0\n", "importing {name} raised ZeroDivisionError: division by zero ({}, line 1, in <module>)"),
    "not Python": ("def build(:\n", "importing {name} raised SyntaxError: invalid syntax ("),
    "not installed": (
        "import no_such_library\n",
        "importing {name} raised ModuleNotFoundError: No module named 'no_such_library' ({}, line 1, in <module>)",
    ),
    "with arguments": (
        "def build(depth):\n    pass\n",
        "raised TypeError: build() missing 1 required positional argument: 'depth'; it is called without arguments",
    ),
}


@pytest.mark.parametrize("case", RAISING)
def test_what_a_function_raises_is_told_in_one_line_with_the_place(ask, tmp_path: Path, case: str):
    text, words = RAISING[case]
    name = "raising_" + case.replace(" ", "_")
    status, told = ask(text, name)
    assert status == 1
    wanted = words.replace("{name}", name).replace("{}", str(tmp_path / f"{name}.py"))
    assert told.startswith(f"foldserve: {name}:build")
    assert wanted in told
    assert told.endswith("; FOLDSERVE_LOG_LEVEL=debug shows the whole traceback\n")
    assert told.count("\n") == 1


def test_the_whole_traceback_is_shown_where_it_is_asked_for(ask, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FOLDSERVE_LOG_LEVEL", "debug")
    status, told = ask("def build():\n    raise ValueError('no depth')\n", "raising_openly")
    assert status == 1
    assert "Traceback (most recent call last)" in told
    assert "raise ValueError('no depth')" in told
    assert told.splitlines()[-1].startswith("foldserve: raising_openly:build raised ValueError: no depth (")


def test_the_doctor_tells_it_alike(ask):
    asked = ("inspect", "weights.pt", "--network", "raising_to_doctor:build")
    status, told = ask("def build():\n    raise ValueError('no depth')\n", "raising_to_doctor", command=asked)
    assert status == 1
    assert told.startswith("foldserve: raising_to_doctor:build raised ValueError: no depth (")


def test_a_network_that_fails_on_images_is_told_with_the_line_that_failed(ask, tmp_path: Path):
    text = (
        "from foreign_support import Network\n\nclass Mine(Network):\n    def forward(self, images):\n"
        "        assert images.shape[1] == 1, 'gray alone'\n\ndef build():\n    return Mine()\n"
    )
    status, told = ask(text, "failing_on_images")
    assert status == 1
    place = f"{tmp_path / 'failing_on_images.py'}, line 5, in forward"
    assert f": AssertionError: gray alone ({place}); is --size right?\n" in told


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("nets/mine.py:build", "like nets.mine:build"),
        ("mine.py:build", "like mine:build"),
        (":build", "like nets.mine:build"),
        (".mine:build", "expected PACKAGE.MODULE:FUNCTION"),
        ("foreign_support:", "has no function without a name"),
        ("foreign_support:SIDE", "has no function SIDE"),
        ("foreign_suppor:build", "there is no module foreign_suppor here"),
    ],
)
def test_what_names_no_function_is_wrong_usage(ask, function: str, words: str):
    command = ("export", function, "--checkpoint", "weights.pt", "--name", "own", "--models", "models")
    status, told = ask("", "unused", command=command)
    assert status == 2
    assert words in told


def test_a_run_folder_with_a_colon_in_its_name_is_a_run_folder(ask):
    Path("runs:1").mkdir()
    status, told = ask("", "unused", command=("export", "runs:1", "--name", "own", "--models", "models"))
    assert (status, told.count("Traceback")) == (1, 0)
    assert "runs:1" in told
    assert "--checkpoint" not in told
