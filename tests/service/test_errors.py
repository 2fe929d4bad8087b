"""The tree of errors and the one map from it to HTTP."""

import ast
import inspect
from collections.abc import Iterator

import pytest

from service import errors, problems
from service.errors import AllImagesFailed, InvalidImage, RetryLater, ServiceError, TooLarge, nearest


def descendants(kind: type) -> Iterator[type]:
    for child in kind.__subclasses__():
        yield child
        yield from descendants(child)


OURS = [kind for kind in descendants(ServiceError) if kind.__module__ == "service.errors"]


def example(kind: type[ServiceError]) -> ServiceError:
    if kind is AllImagesFailed:
        return AllImagesFailed([InvalidImage("bad"), TooLarge("big")])
    return kind("late", retry_after_s=3) if issubclass(kind, RetryLater) else kind("told")


@pytest.mark.parametrize("kind", [kind for kind in OURS if kind is not RetryLater])
def test_every_service_error_has_a_status_and_a_problem_document(kind):
    document = problems.problem(example(kind))

    assert document["status"] == problems.STATUS[kind]
    name = document["type"].removeprefix("urn:foldserve:problem:")
    assert document["title"] == problems.OWN_TITLE.get(name, problems.TITLE[document["status"]])
    assert name == problems.slug(example(kind))
    assert document["detail"]


def test_the_title_of_several_bad_images_does_not_hang_on_their_common_status():
    documents = [problems.problem(AllImagesFailed([kind("bad")] * 2)) for kind in (InvalidImage, TooLarge)]

    assert [document["status"] for document in documents] == [422, 413]
    assert {document["title"] for document in documents} == {"No image could be answered"}


def test_a_new_error_without_a_status_is_noticed():
    class Forgotten(ServiceError):
        pass

    with pytest.raises(KeyError):
        problems.status_of(Forgotten("no status"))


def test_the_map_holds_nothing_but_errors_of_the_tree():
    assert set(problems.STATUS) <= set(OURS)


@pytest.mark.parametrize("kind, name", [(InvalidImage, "invalid-image"), (errors.QueueFull, "queue-full")])
def test_types_are_stable_names(kind, name):
    assert problems.slug(example(kind)) == name


def test_several_images_with_one_status_keep_it():
    assert problems.status_of(AllImagesFailed([TooLarge("a"), TooLarge("b")])) == 413


def test_several_images_with_different_statuses_are_422_and_list_each():
    document = problems.problem(AllImagesFailed([TooLarge("a"), InvalidImage("b")]))

    assert document["status"] == 422
    assert [one["status"] for one in document["errors"]] == [413, 422]


def test_only_our_own_failures_are_5xx():
    ours = {errors.InferenceFailed, errors.NotReady, errors.DeadlineExceeded}

    assert {kind for kind, status in problems.STATUS.items() if status >= 500} == ours


def test_the_docstring_draws_the_whole_tree():
    drawn = inspect.getdoc(errors) or ""
    named = [node.name for node in ast.walk(ast.parse(inspect.getsource(errors))) if isinstance(node, ast.ClassDef)]

    assert [name for name in named if name not in drawn] == []


def test_nearest_offers_what_is_close_and_nothing_else():
    assert nearest("--prot", ["--port", "--host"]) == " (did you mean --port?)"
    assert not nearest("--zebra", ["--port", "--host"])
