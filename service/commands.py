"""The subcommands `serve` and `certify`. Loads the web and the runtime only to run them."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import SecretStr
from pydantic.fields import FieldInfo

from service import model_commands
from service.cgroup import ControlGroup
from service.config import Settings
from service.errors import ConfigurationError
from service.memory import check_before_loading


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommands to the command line."""
    serve = subparsers.add_parser("serve", help="serve the models over REST", description="Serve models over REST.")
    for name in _flags():
        _add_flag(serve, name, Settings.model_fields[name])
    serve.add_argument("--dry-run", action="store_true", help="load, certify, predict the golden images, and exit")
    serve.set_defaults(run=_serve)
    certify = subparsers.add_parser(
        "certify",
        help="prove a model's batch independence here",
        description="Prove that an image's answer does not depend on its batch, on this machine. Exit 1 when refused.",
    )
    certify.add_argument("model", metavar="NAME[@VERSION]", help="model, by default its highest version")
    certify.add_argument("--quick", action="store_true", help="a short probe, whose certificate is not kept")
    certify.add_argument("--fresh", action="store_true", help="probe in full even where a certificate is kept")
    certify.add_argument("--demo", action="store_true", help="then show one image alone and in a crowd, in numbers")
    certify.add_argument("--json", action="store_true", help="print the certificate as JSON")
    for name in ("models", "state", "device", "form", "max_batch_size"):
        _add_flag(certify, name, Settings.model_fields[name])
    certify.set_defaults(run=_certify)
    model_commands.register(subparsers)
    openapi = subparsers.add_parser("openapi", help="print the API document", description="Print the API document.")
    openapi.add_argument("--out", type=Path, metavar="FILE", help="write it there, for instance docs/openapi.json")
    openapi.set_defaults(run=_openapi)


def _openapi(arguments: argparse.Namespace) -> int:
    from service.app import create_app

    text = json.dumps(create_app(Settings()).openapi(), indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    if arguments.out is None:
        print(text, end="")
        return 0
    try:
        arguments.out.write_text(text)
    except OSError as error:
        raise ConfigurationError(f"cannot write {arguments.out}: {error.strerror}") from None
    return 0


def _flags() -> list[str]:
    """Return the settings that may be flags; secrets would show in the list of processes."""
    return [name for name, field in Settings.model_fields.items() if SecretStr not in get_args(field.annotation)]


def _add_flag(parser: argparse.ArgumentParser, name: str, field: FieldInfo) -> None:
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else None
    default = ",".join(field.default) if isinstance(field.default, tuple) else field.default
    shown = "" if default is None or "[" in str(field.description) else f" [{default}]"
    flag = f"--{name.replace('_', '-')}"
    if field.annotation is bool:
        usual = "" if default else "not "
        text = f"{field.description} [{usual}set]"
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        return
    parser.add_argument(
        flag,
        choices=choices,
        metavar=None if choices else _metavar(field.annotation),
        help=f"{field.description}{shown}",
    )


def _metavar(annotation: Any) -> str:
    if annotation in (int, float):
        return "N"
    if annotation is Path:
        return "DIR"
    return "FILE" if Path in get_args(annotation) else "TEXT"


def _serve(arguments: argparse.Namespace) -> int:
    from service import logs

    flags = {name: getattr(arguments, name) for name in _flags()}
    logs.configure("info")
    settings = Settings.load(**flags)
    logs.configure(settings.log_level, settings.log_format)
    check_before_loading(settings, ControlGroup())
    if arguments.dry_run:
        return _rehearse(settings)
    if settings.workers > 1:
        from service.workers.supervisor import supervise  # without the runtime and the models

        supervise(settings)
    else:
        from service.server import serve

        serve(settings)
    return 0


def _rehearse(settings: Settings) -> int:
    import asyncio

    from service.rehearsal import rehearse

    rehearsals = asyncio.run(rehearse(settings))
    for one in rehearsals:
        print(one.line)
    return 0 if all(one.is_right for one in rehearsals) else 1


def _certify(arguments: argparse.Namespace) -> int:
    from service.certification import certify_named
    from service.independence.demo import demo
    from service.independence.report import table

    if arguments.json and arguments.demo:
        raise ConfigurationError("--json and --demo exclude each other")
    flags = {name: getattr(arguments, name) for name in ("models", "state", "device", "form", "max_batch_size")}
    settings = Settings.load(**flags)
    subject, certificate = certify_named(
        arguments.model, settings, quick=arguments.quick, fresh=arguments.fresh, report=_show_progress
    )
    print(certificate.model_dump_json(indent=2) if arguments.json else table(certificate))
    if arguments.demo and certificate.verdict == "certified":
        print("\n" + "\n".join(demo(subject, certificate)))
    return 0 if certificate.verdict == "certified" else 1


def _show_progress(step: str, done: float) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[Kprobing {done:4.0%}  {step}" if done < 1 else "\r\033[K")
        sys.stderr.flush()
