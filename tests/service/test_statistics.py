"""Statistics in the words of the Open Inference Protocol, and what the protocol has and this service has not."""

import pytest
from PIL import Image
from support import assert_problem, encode, random_pixels, serving

from service.config import Settings

FILES = [encode(Image.fromarray(one), "PNG") for one in random_pixels(4, seed=77)]


@pytest.fixture
def ask(models):
    with serving(Settings(models=models, device="cpu", share_identical=False, spot_check_share=0)) as asked:
        yield asked


def statistics(ask, path: str = "/v2/models/stats") -> dict:
    (found,) = ask("GET", path).json()["model_stats"]
    return found


def test_requests_images_and_runs_are_counted_from_when_the_model_was_served(ask):
    before = statistics(ask)
    for content in FILES:
        assert ask("POST", "/predict", content=content).status_code == 200
    files = [("file", (f"{index}.png", content)) for index, content in enumerate(FILES)]
    assert ask("POST", "/predict", files=files).status_code == 200
    assert ask("POST", "/predict", content=b"no image").status_code == 415
    after = statistics(ask)

    told = after["inference_stats"]
    assert (after["name"], after["version"]) == ("tiny", "1")
    assert after["inference_count"] - before["inference_count"] == 8
    assert 5 <= after["execution_count"] - before["execution_count"] <= 8
    assert (told["success"]["count"], told["fail"]["count"]) == (5, 1)
    assert told["queue"]["count"] - before["inference_stats"]["queue"]["count"] == 8
    assert told["compute_infer"]["count"] == after["execution_count"]
    for duration in ("success", "fail", "compute_input", "compute_infer", "compute_output"):
        assert 0 < told[duration]["ns"] < 60e9, duration


@pytest.mark.parametrize("path", ["/v2/models/tiny/stats", "/v2/models/tiny/versions/1/stats"])
def test_one_version_can_be_asked_for(ask, path):
    assert statistics(ask, path).keys() == statistics(ask).keys()


def test_what_is_looked_at_is_no_request_of_the_model(ask):
    ask("GET", "/models/tiny")
    ask("GET", "/v2/models/tiny")

    assert statistics(ask)["inference_stats"]["success"]["count"] == 0


def test_404_for_statistics_of_a_model_that_is_not_served(ask):
    assert_problem(ask("GET", "/v2/models/dog/stats"), 404, "model-not-found")


@pytest.mark.parametrize(
    "method, path",
    [
        ("GET", "/v2/systemsharedmemory/status"),
        ("POST", "/v2/systemsharedmemory/region/one/register"),
        ("POST", "/v2/cudasharedmemory/unregister"),
        ("GET", "/v2/trace/setting"),
        ("POST", "/v2/models/tiny/trace/setting"),
        ("GET", "/v2/logging"),
    ],
)
def test_what_is_not_to_be_had_is_said_plainly_with_what_to_do(ask, method, path):
    problem = assert_problem(ask(method, path), 404, "not-supported")

    assert problem["error"] == problem["detail"]
    assert "not" in problem["detail"]
    assert ";" in problem["detail"], "and what to do"
