"""The flags about the exact form, which `export` and `import` share. Loads no torch."""

import argparse
from pathlib import Path

from training.exact.options import MAX_DROP, ExactOptions


def add_exact(parser: argparse.ArgumentParser) -> None:
    """Add the flags to a subcommand."""
    parser.add_argument(
        "--exact",
        choices=("auto", "require", "off"),
        default="auto",
        help="the exact form beside the float one: auto goes on without where there is none, require refuses [auto]",
    )
    parser.add_argument(
        "--max-drop",
        type=float,
        default=MAX_DROP,
        metavar="POINTS",
        help=f"most points of accuracy that the exact form may lose [{MAX_DROP:g}]",
    )
    parser.add_argument("--float-twin", type=Path, metavar="FILE", help="write the exact form in float32 too")


def exact_options(arguments: argparse.Namespace) -> ExactOptions:
    """Return what the flags ask for."""
    return ExactOptions(arguments.exact, arguments.max_drop, arguments.float_twin)
