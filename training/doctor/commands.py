"""The subcommands `inspect` and `repair`. torch is loaded only when it runs."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from training.errors import UsageError

if TYPE_CHECKING:
    from training.doctor.attaching import Source
    from training.importing.preprocessing import Wishes


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand to the command line."""
    parser = subparsers.add_parser(
        "inspect",
        help="examine the BatchNorm of a file",
        description="Examine the BatchNorm of an ONNX file, a checkpoint or a run folder; exit 1 on errors.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help=".onnx, .safetensors, .pt, .pth or a run folder")
    parser.add_argument("--momentum", type=_momentum, metavar="M", help="PyTorch's sense, 1 − TensorFlow's decay")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="images to hold the statistics against")
    _add_network(parser)
    add_preprocessing(parser)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the report as one page with pictures")
    parser.set_defaults(run=_inspect)
    _register_repair(subparsers)


def _register_repair(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "repair",
        help="mend running statistics",
        description="Take the initial share out of the running statistics exactly, or gather them anew from images.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help=".onnx, .safetensors, .pt, .pth or a run folder")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="new file; a checkpoint: .safetensors")
    parser.add_argument("--momentum", type=_momentum, metavar="M", help="PyTorch's sense, 1 − TensorFlow's decay")
    parser.add_argument(
        "--updates", type=_updates, metavar="N", help="training batches, where the file does not count them"
    )
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="images to gather the statistics from")
    _add_network(parser)
    add_preprocessing(parser)
    parser.set_defaults(run=_repair)


def _add_network(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--network", metavar="PACKAGE.MODULE:FUNCTION", help="the function that returns the network of a checkpoint"
    )
    parser.add_argument("--domain", metavar="NAME", help="whose images --data are, where BatchNorm is one for each")
    parser.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="a run with --data: where data sets lie [FOLDSERVE_DATA]"
    )


def add_preprocessing(parser: argparse._ActionsContainer) -> None:
    """Add the flags that say how images become the model's input; several commands share them."""
    parser.add_argument("--preprocessing", metavar="FILE|PRESET", help="timm's pretrained_cfg JSON, or a preset's name")
    parser.add_argument("--size", type=int, metavar="N", help="height and width, pixels [as the file says, else 224]")
    parser.add_argument("--mean", type=float, nargs="+", metavar="M", help="per channel, pixels scaled to 0–1 [0]")
    parser.add_argument("--std", type=float, nargs="+", metavar="S", help="per channel, pixels scaled to 0–1 [1]")


def _momentum(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text}: expected more than 0 and at most 1, PyTorch's sense (0.1 is usual)")
    return value


def _updates(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected the number of training batches, 1 or more")
    return int(text)


def _inspect(arguments: argparse.Namespace) -> int:
    from training.doctor.examine import examine
    from training.doctor.html import write_page
    from training.doctor.read import read_subject
    from training.doctor.text import as_text

    subject, wishes = read_subject(arguments.file, arguments.momentum), wishes_of(arguments)
    _check_images(arguments)
    if arguments.network is not None or arguments.data is not None:
        from training.doctor.attaching import attach

        source, for_images = _source_of(arguments), arguments.data is not None
        subject, wishes = attach(subject, source, wishes, for_images=for_images, say=_say_aside)
    report = examine(subject)
    if arguments.data is not None:
        from training.doctor.data import examine_data

        report = examine_data(report, subject, arguments.data, wishes)
    if arguments.html is not None:
        write_page(arguments.html, report, subject)
        _say_aside(f"wrote {arguments.html}")
    print(json.dumps(report.to_dict(), indent=2, ensure_ascii=False) if arguments.json else as_text(report))
    return int(bool(report.errors))


def _check_images(arguments: argparse.Namespace) -> None:
    """Raise UsageError where something is told of images, and none are given."""
    if arguments.domain is not None and arguments.data is None:
        raise UsageError("--domain says whose the images of --data are; without --data every domain is looked at")
    if arguments.data_dir is not None and arguments.data is None:
        raise UsageError(
            "--data-dir says where a run's data sets lie, which are read for --data FOLDER alone; add that"
        )


def _source_of(arguments: argparse.Namespace) -> "Source":
    from training.doctor.attaching import Source

    return Source(arguments.network, arguments.data_dir, arguments.domain)


def _say_aside(text: str) -> None:
    """Standard output is the report's, which may be JSON."""
    print(text, file=sys.stderr)


def _repair(arguments: argparse.Namespace) -> int:
    from training.doctor.mending import Repair, repair

    _check_images(arguments)
    order = Repair(
        arguments.file,
        arguments.out,
        momentum=arguments.momentum,
        updates=arguments.updates,
        data=arguments.data,
        source=_source_of(arguments),
        wishes=wishes_of(arguments),
    )
    repair(order)
    return 0


def wishes_of(arguments: argparse.Namespace) -> "Wishes":
    """Return what the shared preprocessing flags say."""
    from training.importing.preprocessing import Wishes

    mean, std = (None if values is None else tuple(values) for values in (arguments.mean, arguments.std))
    return Wishes(arguments.preprocessing, arguments.size, mean, std)
