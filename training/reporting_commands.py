"""The subcommands that report: `compare` and `evaluate`. torch and matplotlib are loaded only when one of them runs."""

import argparse
from dataclasses import replace
from pathlib import Path

from service.wording import counted
from training.comparison.experiments import EXPERIMENTS, Experiment, Scale, experiment
from training.config import parse_assignments
from training.environment import prepare_arithmetic
from training.errors import UsageError

COMPARISONS = Path("comparisons")


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommands to the command line."""
    _register_compare(subparsers)
    _register_evaluate(subparsers)


def _register_compare(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "compare",
        help="run an experiment in variants over seeds, and draw it",
        description="Run an experiment in variants over seeds, draw it, and write one page. What was run is kept: "
        "the same command again runs only what is missing.",
    )
    parser.add_argument("preset", metavar="PRESET", help=f"one of {', '.join(EXPERIMENTS)}")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the results [comparisons/PRESET]")
    parser.add_argument("--quick", action="store_true", help="two seeds and few images: minutes on two cores")
    parser.add_argument("--dry-run", action="store_true", help="two steps of every variant, and write nothing")
    parser.add_argument("--seeds", type=int, metavar="N", help="seeds for each variant, from 0")
    parser.add_argument("--images", type=int, metavar="N", help="training images shown to each trial, repeats counted")
    parser.add_argument("--evaluations", type=int, metavar="N", help="looks at the test images in each trial")
    parser.add_argument("--test-images", type=int, metavar="N", help="test images looked at, stratified")
    parser.add_argument(
        "--variant", action="append", default=[], metavar="NAME", dest="variants", help="only this one; repeats"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="assignments", help="for all variants; repeats"
    )
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="where data sets lie [FOLDSERVE_DATA]")
    parser.set_defaults(run=_compare)


def _register_evaluate(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "evaluate",
        help="report how good a finished run is",
        description="Confusion matrix, classes, calibration and worst images of a finished run, on its test images.",
    )
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="run folder of `foldserve train`")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the report [RUN/evaluation]")
    parser.add_argument("--worst", type=int, default=32, metavar="N", help="worst images shown [32]")
    parser.add_argument("--card", type=Path, metavar="DIR", help="a model's folder, whose card gets the numbers too")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="where data sets lie [FOLDSERVE_DATA]")
    parser.set_defaults(run=_evaluate)


def _scale(arguments: argparse.Namespace, chosen: Experiment) -> Scale:
    given = {name: getattr(arguments, name) for name in ("seeds", "images", "evaluations", "test_images")}
    for name, value in given.items():
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value}: expected at least 1")
    start = chosen.quick if arguments.quick else chosen.scale
    return replace(start, **{name: value for name, value in given.items() if value is not None})


def _compare(arguments: argparse.Namespace) -> int:
    chosen = experiment(arguments.preset)
    variants = chosen.only(arguments.variants)
    changes = parse_assignments(arguments.assignments)
    if "seed" in changes:
        raise UsageError("--set seed: the seeds run from 0; --seeds says how many")
    scale = _scale(arguments, chosen)
    prepare_arithmetic(chosen.base.with_values(changes))
    from training.comparison.running import Plan, compare, dry_run

    plan = Plan(arguments.preset, chosen, variants, changes, scale)
    if arguments.dry_run:
        dry_run(plan, data_dir=arguments.data_dir)
        return 0
    folder = arguments.out or COMPARISONS / arguments.preset
    for path in compare(plan, folder, data_dir=arguments.data_dir):
        print(f"wrote {path}")
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    if arguments.worst < 1:
        raise UsageError(f"--worst {arguments.worst}: expected at least 1")
    from training.evaluation.report import FOLDER, evaluate_run, for_card, write_card, write_evaluation
    from training.run import load_run

    trained = load_run(arguments.run_folder, arguments.data_dir)
    part = None if arguments.card is None else for_card(trained, arguments.card)
    found = evaluate_run(trained, worst_images=arguments.worst)
    for path in write_evaluation(trained, found, arguments.out or arguments.run_folder / FOLDER):
        print(f"wrote {path}")
    if part is not None:
        on_card = found if part is trained else evaluate_run(part, worst_images=arguments.worst)
        print(f"wrote {write_card(part, on_card, arguments.card)}")
    print(
        f"{found.accuracy:.2%} of {counted(len(trained.dataset.test), 'test image')}; "
        f"expected calibration error {found.calibration.error:.2%}"
    )
    return 0
