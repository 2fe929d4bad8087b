"""The subcommand `serve`. Loads the web and the runtime only to run them."""

import argparse
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from service.config import Settings


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommands to the command line."""
    serve = subparsers.add_parser("serve", help="serve the models over REST", description="Serve models over REST.")
    for name, field in Settings.model_fields.items():
        _add_flag(serve, name, field)
    serve.set_defaults(run=_serve)


def _add_flag(parser: argparse.ArgumentParser, name: str, field: FieldInfo) -> None:
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else None
    default = ",".join(field.default) if isinstance(field.default, tuple) else field.default
    shown = "" if default is None or "[" in str(field.description) else f" [{default}]"
    parser.add_argument(
        f"--{name.replace('_', '-')}",
        choices=choices,
        metavar=None if choices else _metavar(field.annotation),
        help=f"{field.description}{shown}",
    )


def _metavar(annotation: Any) -> str:
    if annotation in (int, float):
        return "N"
    return "DIR" if annotation is Path else "TEXT"


def _serve(arguments: argparse.Namespace) -> int:
    from service import logs, server

    flags = {name: getattr(arguments, name) for name in Settings.model_fields}
    logs.configure("info")
    settings = Settings.load(**flags)
    logs.configure(settings.log_level)
    server.serve(settings)
    return 0
