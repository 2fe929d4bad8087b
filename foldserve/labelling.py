"""Labels files one after another, here with the model itself or by a server, in the words of /predict."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.errors import FoldserveError

if TYPE_CHECKING:
    from service.classifier import Outcome
    from service.repository import Model

# What a folder is searched for; a file that is named is always tried, whatever its name.
SUFFIXES = frozenset({".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})

# What a server tells of its calls, in the words of this command; by the name of the problem.
WAYS_OUT = {
    "not-authenticated": "; here: --api-key-file FILE, which holds the key",
    "no-such-path": "; --url is the root of the service, such as http://localhost:8000",
}


class PredictionRefused(FoldserveError):
    """The files, the server, or the way to it, gave no prediction."""


@dataclass(frozen=True, slots=True)
class Query:
    """What is wanted of each image."""

    model: str | None
    version: int | None
    top_k: int
    logits: bool


@dataclass(frozen=True, slots=True)
class Labelled:
    """One image: which model answered (`model`, `version`, `form`; empty where none did), and its prediction."""

    head: dict[str, Any]
    prediction: dict[str, Any]


def find_images(paths: Sequence[Path], *, recursive: bool) -> list[Path]:
    """Return the files that are named, and where asked for the images in folders, sorted. Raises PredictionRefused."""
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise PredictionRefused(f"{path}: No such file or directory")
        if not path.is_dir():
            found.append(path)
        elif not recursive:
            raise PredictionRefused(f"{path}: Is a directory; --recursive takes the images in it")
        elif images := sorted(one for one in path.rglob("*") if one.suffix.lower() in SUFFIXES and one.is_file()):
            found += images
        else:
            raise PredictionRefused(f"{path}: no image in this folder; names end in {', '.join(sorted(SUFFIXES))}")
    return found


def run_here(models: Path, paths: Sequence[Path], query: Query) -> Iterator[Labelled]:
    """Yield the labels of files by a model of this repository; a file that cannot be read has an error of its own.

    Raises PredictionRefused and what loading raises.
    """
    from service.answers import predict_body
    from service.engine import choose_device, open_engine
    from service.preprocessing import refuse_warnings
    from service.repository import Repository
    from service.upkeep import find

    refuse_warnings()  # as the service does
    repository = Repository(models, open_engine)
    names = repository.names()
    if query.model is None and len(names) > 1:
        raise PredictionRefused(f"{models} holds {', '.join(names)}; choose one with --model")
    name = query.model or names[0]
    _, version = find(models, name, query.version)  # the stable one, as a service would
    model = repository.load(name, choose_device("auto"), version)
    for path in paths:
        try:
            outcome = _classify(model, path.read_bytes())
        except OSError as error:
            yield Labelled({}, _unread(path, error))
            continue
        body = predict_body(model, [str(path)], [outcome], k=query.top_k, with_logits=query.logits)
        yield _labelled(body)


def ask_server(url: str, paths: Sequence[Path], query: Query, *, api_key: str | None = None) -> Iterator[Labelled]:
    """Yield the labels of files by a server; a file that cannot be read has an error of its own.

    Raises PredictionRefused, KeyRefused, ServerUnreachable.
    """
    import httpx

    from foldserve.client import Client
    from foldserve.conversation import RequestRefused

    parameters = {name: value for name, value in asdict(query).items() if value is not None}
    unread: dict[Path, OSError] = {}

    def encoded() -> Iterator[bytes]:
        for path in paths:
            try:
                yield path.read_bytes()
            except OSError as error:
                unread[path] = error
                yield b""  # which is not sent

    try:
        with Client(url, api_key=api_key) as client:
            head = _served(client.models(), query)
            answers = client.predict_many(encoded(), **parameters)
            for path, answer in zip(paths, answers, strict=True):
                if path in unread:
                    yield Labelled(head, _unread(path, unread[path]))
                elif isinstance(answer, RequestRefused):
                    yield Labelled(head, {"filename": str(path), "error": answer.problem})
                else:
                    answer["predictions"][0]["filename"] = str(path)
                    yield _labelled(answer)
    except RequestRefused as refusal:
        kind = str(refusal.problem.get("type")).rpartition(":")[2]
        raise PredictionRefused(f"{refusal}{WAYS_OUT.get(kind, '')}") from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise PredictionRefused(f"{url}: {error or type(error).__name__}") from None


def _labelled(body: dict[str, Any]) -> Labelled:
    (prediction,) = body.pop("predictions")
    return Labelled(body, prediction)


def _served(body: dict[str, Any], query: Query) -> dict[str, Any]:
    """Return the model that will answer, where that is clear beforehand: images that all fail do not tell."""
    models = [one for one in body.get("models", []) if query.model in (None, one["name"])]
    if not models or query.version not in (None, models[0]["version"]):
        return {}
    return {"model": models[0]["name"], "version": models[0]["version"], "form": models[0]["form"]}


def _unread(path: Path, error: OSError) -> dict[str, Any]:
    """Return what stands in place of a file's prediction, as RFC 9457 has it."""
    problem = {"type": "about:blank", "title": "File not read", "detail": str(error.strerror)}
    return {"filename": str(path), "error": problem}


def _classify(model: "Model", encoded: bytes) -> "Outcome":
    from service.classifier import Answered
    from service.errors import ServiceError
    from service.preprocessing import decode

    try:
        pixels = decode(encoded, model.manifest.preprocessing)
        return Answered(pixels, model.run(pixels[None])[0])  # alone: (1, H, W, C) → (1, K)
    except ServiceError as error:
        return error
