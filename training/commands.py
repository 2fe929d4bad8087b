"""The subcommands that train: `train`, `export`, `presets`. torch is loaded only when one of them runs."""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from service.wording import counted
from training import reporting_commands
from training.config import TrainConfig, parse_assignments, read_config_file
from training.doctor import commands as doctor
from training.environment import MODELS_HELP, default_models, launched_processes, prepare_arithmetic
from training.errors import UsageError
from training.exact.commands import add_exact, exact_options
from training.importing import commands as importing
from training.presets import PRESETS, preset

if TYPE_CHECKING:
    from training.packaging import Exported

RUNS = Path("runs")


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommands to the command line."""
    _register_train(subparsers)
    _register_export(subparsers)
    doctor.register(subparsers)
    importing.register(subparsers)
    reporting_commands.register(subparsers)
    presets = subparsers.add_parser("presets", help="list the training presets", description="List the presets.")
    presets.set_defaults(run=_presets)


def _register_train(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "train", help="train a classifier", description="Train a classifier from a preset; see `foldserve presets`."
    )
    parser.add_argument("preset", metavar="PRESET", help=f"one of {', '.join(PRESETS)}")
    parser.add_argument("--config", type=Path, metavar="FILE", help="JSON or TOML with keys that override the preset's")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="assignments", help="override one key; repeats"
    )
    parser.add_argument("--out", type=Path, metavar="RUN", help="run folder [runs/PRESET]")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="where data sets lie [FOLDSERVE_DATA]")
    parser.add_argument("--download", action="store_true", help="fetch a data set that is missing, checksums verified")
    parser.add_argument("--resume", action="store_true", help="continue the run in RUN with its own configuration")
    parser.add_argument(
        "--skip-bad", action="store_true", help="go on without the images that cannot be decoded; as skip_bad=true"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the run that RUN holds")
    tries = parser.add_mutually_exclusive_group()
    tries.add_argument("--dry-run", action="store_true", help="load everything, take two steps, write nothing")
    tries.add_argument(
        "--overfit", type=int, metavar="N", help="learn N training images by heart, write nothing; exit 1 if it cannot"
    )
    parser.set_defaults(run=_train)


def _register_export(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "export",
        help="fold a run's BatchNorm, or a torch module's, and write a model",
        description="Fold, convert to ONNX, check, write. PACKAGE.MODULE:FUNCTION returns a torch module. A run with "
        "BatchNorm for each domain gives a model for each, NAME-DOMAIN.",
    )
    parser.add_argument(
        "source", metavar="RUN|PACKAGE.MODULE:FUNCTION", help="run folder of `foldserve train`, or code"
    )
    parser.add_argument("--name", required=True, metavar="NAME", help="model name")
    parser.add_argument("--models", type=Path, default=default_models(), metavar="DIR", help=MODELS_HELP)
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="a run: where data sets lie [FOLDSERVE_DATA]")
    module = parser.add_argument_group("a torch module")
    module.add_argument("--checkpoint", type=Path, metavar="FILE", help="its weights: .safetensors, .pt or .pth")
    module.add_argument("--labels", type=Path, metavar="FILE", help="one label a line, or a JSON list [numbers]")
    module.add_argument("--data", type=Path, metavar="FOLDER", help="real images to check with [made-up ones]")
    doctor.add_preprocessing(module)
    add_exact(parser)
    parser.set_defaults(run=_export)


def _config(arguments: argparse.Namespace) -> TrainConfig:
    config = preset(arguments.preset)
    if arguments.config is not None:
        config = config.with_values(read_config_file(arguments.config))
    assignments = parse_assignments(arguments.assignments)
    return config.with_values({**assignments, **({"skip_bad": True} if arguments.skip_bad else {})})


def _train(arguments: argparse.Namespace) -> int:
    if arguments.resume and (arguments.assignments or arguments.config or arguments.overwrite or arguments.skip_bad):
        raise UsageError(
            "--resume continues with the run's own configuration; leave out --set, --config, --skip-bad and --overwrite"
        )
    is_tried = arguments.dry_run or arguments.overfit is not None
    if is_tried and arguments.resume:
        raise UsageError("--dry-run and --overfit try a configuration, not a run; leave out --resume")
    config = _config(arguments)
    run = arguments.out or RUNS / arguments.preset
    prepare_arithmetic(_own_config(run, config) if arguments.resume else config)
    if is_tried:
        return _try(arguments, config)
    from training.run import train

    result = train(
        config,
        run,
        data_dir=arguments.data_dir,
        download=arguments.download,
        resume=arguments.resume,
        overwrite=arguments.overwrite,
    )
    launched = launched_processes()
    if launched is not None and launched.rank > 0:
        return 0
    print(
        f"best epoch {result['best_epoch']} by validation ({result['validation_accuracy']:.2%}): "
        f"test accuracy {result['test_accuracy']:.2%} of {counted(result['test_images'], 'image')}, "
        f"{result['seconds']} s"
    )
    for domain, accuracy in result["domains"].items():
        print(f"  {domain}: test accuracy {accuracy:.2%}")
    print(f"next: foldserve export {run} --name {arguments.preset}")
    return 0


def _own_config(run: Path, otherwise: TrainConfig) -> TrainConfig:
    """Return what a run that goes on was configured with; where it cannot be read, `train` says so in its own words."""
    with contextlib.suppress(UsageError):
        return TrainConfig.from_mapping(read_config_file(run / "config.json"))
    return otherwise


def _try(arguments: argparse.Namespace, config: TrainConfig) -> int:
    if arguments.overfit is not None and arguments.overfit < 2:
        raise UsageError(f"--overfit {arguments.overfit}: BatchNorm needs at least 2 images")
    from training.trial import dry_run, overfit

    source = {"data_dir": arguments.data_dir, "download": arguments.download}
    if arguments.dry_run:
        dry_run(config, **source)
    else:
        overfit(config, arguments.overfit, **source)
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from training.packaging import check_name

    check_name(arguments.name)  # before the data set is read
    is_module = ":" in arguments.source and not Path(arguments.source).is_dir()
    for exported in _export_module(arguments) if is_module else _export_run(arguments):
        print(exported.summary)
    print(f"next: foldserve serve --models {arguments.models}")
    return 0


def _export_run(arguments: argparse.Namespace) -> Iterator["Exported"]:
    from training.export import export
    from training.packaging import check_name
    from training.run import load_run

    trained = load_run(Path(arguments.source), arguments.data_dir)
    named = {f"{arguments.name}-{domain}": one for domain, one in trained.by_domain().items()}
    for name in named:
        check_name(name)
    if named and arguments.float_twin is not None:
        raise UsageError("--float-twin writes one file, and this run has a model for each domain")
    for name, one in (named or {arguments.name: trained}).items():
        yield export(one, arguments.models, name, exact=exact_options(arguments))


def _export_module(arguments: argparse.Namespace) -> Iterator["Exported"]:
    from training.importing.module import ModuleOrder, export_module

    if arguments.checkpoint is None:
        raise UsageError("a torch module needs its weights: --checkpoint FILE")
    wishes = doctor.wishes_of(arguments)
    order = ModuleOrder(
        arguments.source, arguments.checkpoint, arguments.name, wishes, arguments.labels, arguments.data
    )
    yield export_module(order, arguments.models, exact=exact_options(arguments))


def _presets(_: argparse.Namespace) -> int:
    width = max(len(name) for name in PRESETS)
    for name, config in PRESETS.items():
        sys.stdout.write(
            f"{name:{width}}  {config.architecture} on {config.dataset}, {counted(config.epochs, 'epoch')} of batches "
            f"of {config.batch_size}, peak learning rate {config.learning_rate}\n"
        )
    return 0
