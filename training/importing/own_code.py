"""Calls a person's own function; what their code raises is told as theirs, with the line, in one sentence."""

import importlib
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from training.errors import FileRefused, UsageError

WHOLE = "FOLDSERVE_LOG_LEVEL=debug shows the whole traceback"
INSTALLED = re.compile(rf"{re.escape(sysconfig.get_path('stdlib'))}/|.*/(site|dist)-packages/")


def call_function(function: str) -> nn.Module:
    """Import and call what PACKAGE.MODULE:FUNCTION names; the current folder is looked in too, as Python does.

    Raises UsageError where it names no function that returns a module, FileRefused where their code raises.
    """
    module_name, _, name = function.partition(":")
    _check_name(function, module_name)
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    module = _run(f"{function}: importing {module_name}", partial(_import, function, module_name))
    made_by = getattr(module, name, None)
    if not callable(made_by):
        raise UsageError(f"{function}: {module_name} has no function {name or 'without a name'}")
    network = _run(function, made_by)
    if not isinstance(network, nn.Module):
        raise UsageError(f"{function} returned a {type(network).__name__}, expected a torch.nn.Module")
    return network


def told(error: BaseException) -> str:
    """Return what was raised: its type, the first line of its text, and the last line of their code that led there."""
    text = str(error).strip().partition("\n")[0]
    what = f"{type(error).__name__}: {text}" if text else type(error).__name__
    place = _place(error)
    return f"{what} ({place})" if place and place not in what else what


def _check_name(function: str, module_name: str) -> None:
    path = module_name.removesuffix(".py")
    if path != module_name or not all(part.isidentifier() for part in module_name.split(".")):
        meant = ".".join(part for part in Path(path).parts if part.isidentifier())
        example = f"{meant}:{function.rpartition(':')[2]}" if meant else "nets.mine:build"
        raise UsageError(f"{function}: expected PACKAGE.MODULE:FUNCTION as Python imports it, like {example}")


def _import(function: str, module_name: str) -> Any:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise UsageError(f"{function}: there is no module {error.name} here; run where it can be imported") from None


def _run(what: str, theirs: Callable[[], Any]) -> Any:
    try:
        return theirs()
    except UsageError:
        raise
    except (Exception, SystemExit) as error:  # a person's own code may raise anything
        hint = "mend it there" if _steps(error) else "it is called without arguments"
        raise FileRefused(f"{what} raised {told(error)}; {hint}; {WHOLE}") from error


def _place(error: BaseException) -> str:
    """Return file and line of the last step in code that is not installed, which is a person's own; "" for none."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}"
    own = [step for step in _steps(error) if not INSTALLED.match(step.filename)]
    return f"{own[-1].filename}, line {own[-1].lineno}, in {own[-1].name}" if own else ""


def _steps(error: BaseException) -> list[traceback.FrameSummary]:
    """Return the way to an error but for the steps that are ours and the import system's."""
    ours = ("<frozen", str(Path(__file__).parent))
    return [step for step in traceback.extract_tb(error.__traceback__) if not step.filename.startswith(ours)]
