"""`foldserve predict`: label images here with the model itself, or ask a server."""

import argparse
import contextlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.errors import FoldserveError

if TYPE_CHECKING:
    import httpx

    from service.classifier import Outcome
    from service.repository import Model

TIMEOUT_S = 30.0


class PredictionRefused(FoldserveError):
    """The server, or the way to it, gave no prediction."""


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand to the command line."""
    parser = subparsers.add_parser(
        "predict", help="label images, here or by a server", description="Label images, here or by asking a server."
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image file")
    parser.add_argument("--model", metavar="NAME", help="model to use [the only one]")
    parser.add_argument("--models", type=Path, default=Path("models"), metavar="DIR", help="model repository [models]")
    parser.add_argument("--top-k", type=_positive, default=5, metavar="N", help="classes to list with --json [5]")
    parser.add_argument("--logits", action="store_true", help="add the raw float32 logits")
    parser.add_argument("--json", action="store_true", help="print the body of /predict")
    parser.add_argument("--url", help="ask the server at this address, for instance http://localhost:8000")
    parser.set_defaults(run=_predict)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number from 1")
    return int(text)


def _predict(arguments: argparse.Namespace) -> int:
    encoded = [(str(path), _read(path)) for path in arguments.images]
    body = _ask_server(arguments, encoded) if arguments.url else _run_here(arguments, encoded)
    if arguments.json:
        print(json.dumps(body, indent=2, ensure_ascii=False))
    else:
        print("\n".join(_table(body["predictions"], with_logits=arguments.logits)))
    return 1 if any("error" in one for one in body["predictions"]) else 0


def _read(path: Path) -> bytes:
    try:
        encoded = path.read_bytes()
    except OSError as error:
        raise PredictionRefused(f"{path}: {error.strerror}") from None
    if not encoded:
        raise PredictionRefused(f"{path}: the file is empty")
    return encoded


def _run_here(arguments: argparse.Namespace, encoded: list[tuple[str, bytes]]) -> dict[str, Any]:
    from service.answers import predict_body
    from service.engine import choose_device, open_engine
    from service.repository import Repository

    repository = Repository(arguments.models, open_engine)
    names = repository.names()
    if arguments.model is None and len(names) > 1:
        raise PredictionRefused(f"{arguments.models} holds {', '.join(names)}; choose one with --model")
    model = repository.load(arguments.model or names[0], choose_device("auto"))
    outcomes = [_classify(model, data) for _, data in encoded]
    return predict_body(model, [name for name, _ in encoded], outcomes, k=arguments.top_k, with_logits=arguments.logits)


def _classify(model: "Model", encoded: bytes) -> "Outcome":
    from service.classifier import Answered
    from service.errors import ServiceError
    from service.preprocessing import decode

    try:
        pixels = decode(encoded, model.manifest.preprocessing)
        return Answered(pixels, model.run(pixels[None])[0])  # alone: (1, H, W, C) → (1, K)
    except ServiceError as error:
        return error


def _ask_server(arguments: argparse.Namespace, encoded: list[tuple[str, bytes]]) -> dict[str, Any]:
    import httpx

    parameters = {"top_k": arguments.top_k, "logits": arguments.logits}
    if arguments.model is not None:
        parameters["model"] = arguments.model
    try:
        with httpx.Client(base_url=arguments.url, timeout=TIMEOUT_S) as client:
            body = _served(client.get("/models"), arguments.model)
            answers = [
                _answer(client.post("/predict", content=data, params=parameters), name) for name, data in encoded
            ]
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise PredictionRefused(f"{arguments.url}: {error or type(error).__name__}") from None
    for answer in answers:
        body |= {**answer, "predictions": body["predictions"] + answer["predictions"]}
    return body


def _served(response: "httpx.Response", name: str | None) -> dict[str, Any]:
    """Return the head of a body without predictions yet: the model that will answer, where that is clear beforehand."""
    models = [one for one in _json(response).get("models", []) if name in (None, one["name"])]
    head = {"model": models[0]["name"], "version": models[0]["version"], "form": models[0]["form"]} if models else {}
    return {**head, "predictions": []}


def _answer(response: "httpx.Response", name: str) -> dict[str, Any]:
    """Return the body of one answer; a refused image becomes an error in its place, as in a request of several."""
    body = _json(response)
    if response.status_code in {413, 415, 422}:
        return {"predictions": [{"filename": name, "error": body}]}
    if response.is_error or "predictions" not in body:
        raise PredictionRefused(f"{response.url}: {body.get('detail', response.status_code)}")
    body["predictions"] = [{**one, "filename": name} for one in body["predictions"]]
    return body


def _json(response: "httpx.Response") -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        body = response.json()
        if isinstance(body, dict):
            return body
    raise PredictionRefused(f"{response.url}: status {response.status_code}, and not foldserve's JSON")


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
