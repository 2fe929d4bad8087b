"""The subcommand `import`. torch is loaded only when it runs."""

import argparse
from pathlib import Path

from training.doctor.commands import add_preprocessing, wishes_of
from training.environment import MODELS_HELP, default_models
from training.exact.commands import add_exact, exact_options


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand to the command line."""
    parser = subparsers.add_parser(
        "import",
        help="make a model of a foreign ONNX classifier",
        description="Inspect, fold, prove, check and write a foreign ONNX classifier.",
    )
    parser.add_argument("file", type=Path, metavar="FILE.onnx", help="the classifier; weights may lie beside it")
    parser.add_argument("--name", required=True, metavar="NAME", help="model name")
    parser.add_argument("--labels", type=Path, metavar="FILE", help="one label a line, or a JSON list [numbers]")
    add_preprocessing(parser)
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="real images to check with [made-up ones]")
    parser.add_argument("--models", type=Path, default=default_models(), metavar="DIR", help=MODELS_HELP)
    add_exact(parser)
    parser.set_defaults(run=_import)


def _import(arguments: argparse.Namespace) -> int:
    from training.importing.pipeline import Order, import_model

    order = Order(
        arguments.file,
        arguments.name,
        wishes_of(arguments),
        arguments.labels,
        arguments.data,
        exact_options(arguments),
    )
    print(import_model(order, arguments.models).summary)
    print(f"next: foldserve serve --models {arguments.models}")
    return 0
