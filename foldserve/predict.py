"""`foldserve predict`: label images here with the model itself, or ask a server."""

import argparse
import csv
import json
import sys
from collections.abc import Iterable
from itertools import chain, islice
from pathlib import Path
from typing import Any

from foldserve.labelling import Labelled, PredictionRefused, Query, ask_server, find_images, run_here
from foldserve.progress import progress_bar
from service.config import Settings
from service.errors import ConfigurationError

COLUMNS = ("filename", "label", "index", "score", "model", "version", "error")


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand to the command line."""
    parser = subparsers.add_parser(
        "predict", help="label images, here or by a server", description="Label images, here or by asking a server."
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="file, or folder with --recursive")
    parser.add_argument(
        "--model", metavar="NAME[@VERSION]", help="model to use [the only one, or the server's default; stable version]"
    )
    parser.add_argument("--models", type=Path, metavar="DIR", help="model repository [FOLDSERVE_MODELS, else models]")
    parser.add_argument("--top-k", type=_positive, default=5, metavar="N", help="classes to list with --json [5]")
    parser.add_argument("--logits", action="store_true", help="add the raw float32 logits")
    written = parser.add_mutually_exclusive_group()
    written.add_argument("--json", action="store_true", help="print the body of /predict")
    parser.add_argument("--recursive", action="store_true", help="take the images in folders, and in theirs")
    written.add_argument("--csv", type=Path, metavar="FILE", help="write one row per image, as the answers come")
    parser.add_argument("--url", help="ask the server at this address, for instance http://localhost:8000")
    parser.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help="file that holds the key for --url; a flag would show it"
    )
    parser.set_defaults(run=_predict)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number from 1")
    return int(text)


def _predict(arguments: argparse.Namespace) -> int:
    if arguments.url is None and arguments.api_key_file is not None:
        raise ConfigurationError("--api-key-file is for a server; name it with --url")
    if arguments.url is not None and arguments.models is not None:
        raise ConfigurationError("--models is for labelling here; a server (--url) has its own")
    paths = find_images(arguments.images, recursive=arguments.recursive)
    query = _query(arguments)
    if arguments.url is not None:
        source = ask_server(arguments.url, paths, query, api_key=_read_key(arguments.api_key_file))
    else:
        source = run_here(Settings.load(models=arguments.models).models, paths, query)
    if arguments.csv is not None:
        return 1 if _write_csv(arguments.csv, source, len(paths)) else 0
    found = list(source)
    predictions = [one.prediction for one in found]
    if arguments.json:
        print(_json({**_head_of(found), "predictions": predictions}))
    else:
        for line in _table(predictions, with_logits=arguments.logits):
            print(line.encode(errors="surrogateescape").decode(errors="replace"))
    return 1 if any("error" in one for one in predictions) else 0


def _query(arguments: argparse.Namespace) -> Query:
    from service.artifact import parse_model

    model, version = (None, None) if arguments.model is None else parse_model(arguments.model)
    return Query(model, version, arguments.top_k, arguments.logits)


def _read_key(path: Path | None) -> str | None:
    try:
        return path.read_text(errors="replace").strip() if path is not None else None
    except OSError as error:
        raise PredictionRefused(f"{path}: {error.strerror}") from None


def _head_of(found: list[Labelled]) -> dict[str, Any]:
    return next((one.head for one in reversed(found) if one.head), {})


def _json(body: dict[str, Any]) -> str:
    """Return a body as JSON in UTF-8; where a file's name is not, in ASCII, which reads back to the same name."""
    text = json.dumps(body, indent=2, ensure_ascii=False)
    return text if _is_unicode(text) else json.dumps(body, indent=2)


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= one <= "\udfff" for one in text)


def _write_csv(path: Path, source: Iterable[Labelled], count: int) -> int:
    """Write a row as each answer comes, so that what is done survives an interruption; return how many failed.

    A file that is there already is left alone until the first answer is: without one there is nothing to replace it.
    """
    answers, failed = iter(source), 0
    first = list(islice(answers, 1))
    try:
        file = path.open("w", newline="", encoding="utf-8", errors="surrogateescape")  # a name keeps its own bytes
    except OSError as error:
        raise PredictionRefused(f"{path}: {error.strerror}") from None
    with file:
        rows = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        rows.writeheader()
        show = progress_bar(count)
        for done, one in enumerate(chain(first, answers), 1):
            problem = one.prediction.get("error")
            rows.writerow({**one.head, **one.prediction, "error": problem["detail"] if problem else ""})
            failed += problem is not None
            show(done)
    print(f"{path}: {count - failed} labelled, {failed} failed", file=sys.stderr)
    return failed


def _table(predictions: list[dict[str, Any]], *, with_logits: bool) -> Iterable[str]:
    width = max(len(one["filename"]) for one in predictions)
    label_width = max((len(one["label"]) for one in predictions if "label" in one), default=0)
    for one in predictions:
        if "error" in one:
            yield f"{one['filename']:{width}}  {one['error']['title']}: {one['error']['detail']}"
            continue
        runner_up = "".join(f"   then {next_['label']} {next_['score']:.2%}" for next_ in one["top"][1:2])
        yield f"{one['filename']:{width}}  {one['label']:{label_width}}  {one['score']:7.2%}{runner_up}"
        if with_logits:
            yield f"{'':{width}}  logits " + " ".join(f"{logit:.9g}" for logit in one["logits"])
