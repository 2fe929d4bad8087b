"""The subcommands `models list|show|remove|rollback`. The runtime is loaded only where a model runs."""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.columns import aligned
from service.config import Settings
from service.errors import ArtifactError, ConfigurationError

if TYPE_CHECKING:
    from service.comparing import Comparison
    from service.manifest import Manifest

LABELS_SHOWN = 20
NOTICE = (
    "a running service takes it at its next look (--watch-interval-s), its next load call "
    "(POST /v2/repository/models/{name}/load) or a restart"
)


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand to the command line."""
    parser = subparsers.add_parser(
        "models", help="list, show and remove models, roll back", description="What the model repository holds."
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="every version, and what it is served as", description="List versions.")
    show = actions.add_parser(
        "show",
        help="one version: what it says of itself, its forms side by side",
        description="What a version says of itself, and its forms side by side; CPU time is measured here.",
    )
    show.add_argument("model", metavar="NAME[@VERSION]", help="model, by default its stable version")
    show.add_argument("--layers", action="store_true", help="the headroom of each layer of the exact form")
    show.add_argument("--runs", type=int, default=15, metavar="N", help="runs of which the median counts [15]")
    remove = actions.add_parser("remove", help="remove a version", description="Remove a version, whole or not at all.")
    remove.add_argument("model", metavar="NAME@VERSION", help="which one")
    remove.add_argument("--yes", action="store_true", help="do not ask, and remove what is served or the only one, too")
    back = actions.add_parser(
        "rollback", help="serve the version before", description="Make the version before stable, in serving.json."
    )
    back.add_argument("model", metavar="NAME", help="which model")
    back.add_argument("--to", type=int, metavar="VERSION", help="this one [the version before the stable one]")
    for action, run in ((listing, _list), (show, _show), (remove, _remove), (back, _rollback)):
        action.add_argument("--models", metavar="DIR", help="folder of models, <name>/<version>/model.onnx [models]")
        action.set_defaults(run=run)
    for action in (listing, show):
        action.add_argument("--json", action="store_true", help="print JSON")


def _root(arguments: argparse.Namespace) -> Path:
    return Settings.load(models=arguments.models).models


def _list(arguments: argparse.Namespace) -> int:
    from service.upkeep import listing

    found = listing(_root(arguments))
    if arguments.json:
        print(json.dumps([asdict(one) for one in found], indent=2))
        return 0
    rows = [("model", "version", "served as", "forms", "MB", "classes", "")]
    for one in found:
        classes = "?" if one.classes is None else str(one.classes)
        size, roles = f"{one.bytes / 1e6:.2f}", ", ".join(one.roles) or "-"
        rows.append((one.name, str(one.version), roles, "+".join(one.forms) or "-", size, classes, one.problem))
    print(aligned(rows))
    return 0


def _show(arguments: argparse.Namespace) -> int:
    if arguments.runs < 1:
        raise ConfigurationError(f"--runs {arguments.runs}: expected at least 1")
    from service.artifact import parse_model
    from service.comparing import compare_forms
    from service.upkeep import find, roles_of

    root, (name, version) = _root(arguments), parse_model(arguments.model)
    folder, version = find(root, name, version)
    compared, roles = compare_forms(root, name, version, arguments.runs), roles_of(folder, version)
    if arguments.json:
        print(json.dumps(_document(compared, roles), indent=2))
        return 0
    served = ", ".join(roles) or "not served"
    print(aligned([("model", f"{name} version {version} ({served})"), *_facts(compared.model.manifest)]))
    print(f"\n{aligned(_sides(compared))}")
    if arguments.layers and compared.layers:
        print(f"\n{aligned(_layers(compared))}")
    return 0


def _document(compared: "Comparison", roles: tuple[str, ...]) -> dict[str, Any]:
    model = compared.model
    head = {"model": model.name, "version": model.version, "roles": roles}
    return {
        **head,
        "forms": [asdict(one) for one in compared.sides],
        "manifest": model.manifest.model_dump(mode="json"),
    }


def _facts(manifest: "Manifest") -> Iterator[tuple[str, str]]:
    spec, labels = manifest.preprocessing, manifest.labels
    more = f", … {len(labels) - LABELS_SHOWN} more" if len(labels) > LABELS_SHOWN else ""
    yield "labels", f"{len(labels)}: {', '.join(labels[:LABELS_SHOWN])}{more}"
    yield "input", f"{spec.size[0]} × {spec.size[1]} {spec.mode}, mean {_numbers(spec.mean)}, std {_numbers(spec.std)}"
    how = spec.resize if spec.resize_to is None else f"{spec.resize} {spec.resize_to}"
    yield "pixels", f"resize {how}, {spec.filter}; EXIF {spec.exif}; alpha {spec.alpha}"
    norms = [one for one in manifest.folds if one.norm_kind.startswith("BatchNorm")]  # the rest was plain arithmetic
    yield "BatchNorm", f"{len(norms)} folded, {len(manifest.kept)} kept"
    for kept in manifest.kept:
        yield "", f"kept {kept.norm}: {kept.reason}"
    for key, value in manifest.training.items():
        if isinstance(value, str | int | float):
            yield f"training {key}", f"{value}"
    yield "licence", manifest.licence or "not said"


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:g}" for value in values)


def _sides(compared: "Comparison") -> Iterator[tuple[str, ...]]:
    from service.comparing import BATCH_SIZES

    sides, tightest = compared.sides, compared.tightest
    yield "", *(one.form for one in sides)
    shares = ("not recorded" if one.accuracy is None else f"{one.accuracy:.2%}" for one in sides)
    judged = f" ({compared.validation_images:,} validation images)" if compared.validation_images else ""
    yield f"accuracy{judged}", *shares
    yield "size, MB", *(f"{one.bytes / 1e6:.2f}" for one in sides)
    for size in BATCH_SIZES:
        yield f"CPU ms an image here, batch {size}, one thread", *(f"{one.cpu_ms[size]:.3f}" for one in sides)
    if tightest is not None:
        yield "headroom of 24 bits, tightest layer", "-", f"{tightest.headroom_bits:.1f} ({tightest.name})"


def _layers(compared: "Comparison") -> Iterator[tuple[str, ...]]:
    yield "layer", "weight bits", "terms", "largest sum", "headroom, bits"
    for one in compared.layers:
        yield one.name, str(one.weight_bits), f"{one.terms:,}", f"{one.bound:,}", f"{one.headroom_bits:.1f}"


def _remove(arguments: argparse.Namespace) -> int:
    from service.artifact import parse_model
    from service.upkeep import find, reasons_to_keep, remove

    root, (name, asked) = _root(arguments), parse_model(arguments.model)
    if asked is None:
        raise ConfigurationError(f"{name}: which version? name it as {name}@VERSION")
    folder, version = find(root, name, asked)
    if not arguments.yes:
        if reasons := reasons_to_keep(folder, version):
            raise ArtifactError(
                f"{name} version {version} is kept: {' and '.join(reasons)}; --yes removes it all the same"
            )
        if sys.stdin.isatty() and not _agrees(f"remove {folder / str(version)}? [y/N] "):
            print("nothing was removed")
            return 1
    left = remove(folder, version)
    print(f"removed {name} version {version}; {left}")
    print(NOTICE.format(name=name))
    return 0


def _agrees(question: str) -> bool:
    try:
        return input(question).strip().lower() in {"y", "yes"}
    except EOFError:  # Ctrl-D
        return False


def _rollback(arguments: argparse.Namespace) -> int:
    from service.upkeep import find, roll_back

    folder = find(_root(arguments), arguments.model)[0]
    before, now = roll_back(folder, arguments.to)
    print(f"{folder.name}: version {now} is stable, until now it was {before} (written to {folder / 'serving.json'})")
    print(NOTICE.format(name=folder.name))
    return 0
