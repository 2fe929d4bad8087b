"""The command line: one parser, and what an error looks like. Each half brings its own subcommands."""

import argparse
import re
import sys
import traceback
from typing import Any, NoReturn

from foldserve import __version__, keys, predict
from service import commands as serving
from service.errors import ConfigurationError, FoldserveError, nearest
from training import commands as training
from training.environment import wants_tracebacks
from training.errors import TrainingError, UsageError

DONE, REFUSED, WRONG_USAGE = 0, 1, 2
TRAINING_PACKAGES = frozenset({"torch", "matplotlib", "onnxscript", "rich", "safetensors", "sklearn", "tensorboard"})
RUNTIME = "onnxruntime"
SHORTEST = len("--abc")  # less of a flag is in too many


class Parser(argparse.ArgumentParser):
    """argparse that takes whole flags only, and suggests the nearest one."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)  # --api-key KEY would be --api-key-file KEY

    def parse_known_args(self, *arguments: Any, **options: Any) -> Any:
        """Tell of what is left over here, where the flags are that may have been meant; not above."""
        found, rest = super().parse_known_args(*arguments, **options)
        if rest:
            self.error("unrecognized arguments: " + " ".join(rest))
        return found, rest

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with 2."""
        prefix = "unrecognized arguments: "
        if message.startswith(prefix):
            word = message.removeprefix(prefix).split()[0].partition("=")[0]
            if word.startswith("-"):  # what follows may be a secret, and output is often kept
                message = f"{prefix}{word}"
            message += _meant(word, sorted(_flags_of(self)))
        elif found := re.search(r"invalid choice: '?([^']+?)'? \(choose from (.*)\)", message):
            message += nearest(found[1], re.findall(r"[\w-]+", found[2]))
        self.exit(WRONG_USAGE, f"{self.prog}: {message}\nTry: {self.prog} --help\n")


def main(argv: list[str] | None = None) -> int:
    """Run a command; return 0 done, 1 refused or unhealthy, 2 wrong usage."""
    parser = Parser(prog="foldserve", description="Train BatchNorm image classifiers, fold the BatchNorm, serve them.")
    parser.add_argument("--version", action="version", version=f"foldserve {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for half in (serving, predict, keys, training):
        half.register(subparsers)
    arguments = parser.parse_args(argv)
    try:
        status: int = arguments.run(arguments)
    except (FoldserveError, TrainingError) as error:
        if wants_tracebacks():
            traceback.print_exception(error)
        print(f"foldserve: {error}", file=sys.stderr)
        return WRONG_USAGE if isinstance(error, ConfigurationError | UsageError) else REFUSED
    except ModuleNotFoundError as error:
        return _explain_missing(error)
    except KeyboardInterrupt:
        print("foldserve: interrupted", file=sys.stderr)
        return REFUSED
    except BrokenPipeError:  # the reader of a pipe has left, as in `foldserve … | head`
        sys.stderr.close()
        return DONE
    return status


def _meant(word: str, flags: list[str]) -> str:
    """Return which flag may have been meant: the nearest of those that hold the word, else of all."""
    holding = [flag for flag in flags if len(word) >= SHORTEST and word.strip("-") in flag]
    return nearest(word, holding, likeness=0) or nearest(word, flags)


def _explain_missing(error: ModuleNotFoundError) -> int:
    package = (error.name or "").partition(".")[0]
    if package in TRAINING_PACKAGES:
        print(
            f"foldserve: this command needs {package}: pip install 'foldserve[train]', in a clone -e '.[cpu,train]'",
            file=sys.stderr,
        )
        return REFUSED
    if package == RUNTIME:
        print("foldserve: serving needs onnxruntime: pip install 'foldserve[cpu]' (or [gpu])", file=sys.stderr)
        return REFUSED
    raise error


def _flags_of(parser: argparse.ArgumentParser) -> set[str]:
    flags = set(parser._option_string_actions)  # noqa: SLF001 - argparse has no public list of its flags
    for action in parser._actions:  # noqa: SLF001 - nor of its subcommands
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001 - their only type
            for child in action.choices.values():
                flags |= _flags_of(child)
    return flags
