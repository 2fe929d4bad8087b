"""The page and the API document in a real browser, which is told to reach nothing but the server."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from e2e_support import add_key
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright
from support import TinyModel

pytestmark = pytest.mark.e2e
expect.set_options(timeout=30_000)  # milliseconds; five seconds are little on a busy machine

CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@contextmanager
def browsing(url: str) -> Iterator[Page]:
    """A page whose every request to another host is a failure of the test."""
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine; Debian's package `chromium` brings it")
    strangers: list[str] = []
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS) as browser:
        page = browser.new_context().new_page()
        page.on("request", lambda request: strangers.append(request.url))
        page.goto(url)
        yield page
        own = (url, f"blob:{url}", "data:")
        assert [one for one in strangers if not one.startswith(own)] == []


@pytest.fixture
def page(server) -> Iterator[Page]:
    with browsing(server.url) as page:
        yield page


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "red.png"
    Image.new("RGB", (8, 8), "red").save(path)
    return path


def test_page_names_the_model_and_labels_a_chosen_image(page: Page, image: Path):
    expect(page.locator("#model")).to_contain_text("tiny, version 1")
    page.set_input_files("#files", [str(image)])
    expect(page.locator("#answers tbody tr")).to_have_count(3)
    assert page.locator(".label").text_content() in {"cat", "dog", "owl"}


def test_page_shows_the_error_of_a_bad_file_beside_the_good_one(page: Page, image: Path, tmp_path: Path):
    text = tmp_path / "notes.txt"
    text.write_text("no image")
    empty = tmp_path / "empty.png"
    empty.touch()
    page.set_input_files("#files", [str(text), str(empty), str(image)])
    labels = page.locator("#answers .bad .label")
    expect(labels).to_have_text([re.compile("^Format not accepted: (?!content type)"), "No image: the file is empty"])
    for number in (0, 1):
        expect(page.locator("#answers .bad img").nth(number)).to_have_css("visibility", "hidden")
    expect(page.locator("#answers li:not(.bad) tbody tr")).to_have_count(3)


def test_page_does_not_run_what_a_file_name_says(page: Page, image: Path):
    path = image.rename(image.with_name("<img src=x onerror=alert(1)>.png"))
    page.set_input_files("#files", [str(path)])
    expect(page.locator(".name")).to_have_text(path.name)


def test_api_document_renders_without_another_host(page: Page, server):
    page.goto(f"{server.url}/docs")
    expect(page.locator(".opblock").first).to_be_visible()
    expect(page.locator(".opblock-summary-path").first).to_contain_text("/predict")


def test_page_asks_the_default_model_until_another_is_chosen(start, image, tmp_path):
    for name in ("apples", "pears"):
        TinyModel(name=name).write(tmp_path / "models")
    server = start("--models", str(tmp_path / "models"), "--default-model", "pears")
    with browsing(server.url) as page:
        expect(page.locator("#choice")).to_be_visible()
        for name in ("pears", "apples"):
            if name == "apples":
                page.select_option("#chosen", name)
            with page.expect_response(lambda response: "/predict" in response.url) as answered:
                page.set_input_files("#files", [str(image)])
            assert answered.value.url.endswith(f"predict?model={name}")
            expect(page.locator("#answers tbody tr")).to_have_count(3)
            expect(page.locator("#chosen")).to_have_value(name)


def test_page_offers_no_choice_where_there_is_one_model(page: Page):
    expect(page.locator("#model")).to_contain_text("tiny")
    expect(page.locator("#choice")).to_be_hidden()


def test_page_asks_for_no_key_where_the_service_asks_for_none(page: Page):
    expect(page.locator("#model")).to_contain_text("tiny")
    expect(page.locator("#access")).to_be_hidden()
    expect(page.locator("#forget")).to_be_hidden()


def test_page_asks_for_a_key_where_the_service_does_and_keeps_it_in_its_tab_alone(start, models, image, tmp_path):
    keys = tmp_path / "keys"
    admin, key = add_key(keys, "admin", "ann"), add_key(keys, "predict", "bob")
    server = start("--models", str(models), "--api-keys-file", str(keys), "--log-requests", "all")
    with browsing(server.url) as page:
        for wrong, reason in (("fsk_no", "not known"), (admin, "may not predict")):
            page.fill("#key", wrong)
            page.click("#access button")
            expect(page.locator("#refusal")).to_contain_text(reason)
        page.fill("#key", key)
        page.click("#access button")
        expect(page.locator("#access")).to_be_hidden()
        expect(page.locator("#model")).to_contain_text("tiny, version 1")
        page.reload()
        page.set_input_files("#files", [str(image)])
        expect(page.locator("#answers tbody tr")).to_have_count(3)
        kept = [page.context.cookies(), page.url, page.content(), page.evaluate("JSON.stringify(localStorage)")]
        other = page.context.new_page()
        other.goto(server.url)
        expect(other.locator("#access")).to_be_visible()
        page.click("#forget")
        expect(page.locator("#access")).to_be_visible()

    assert key not in str(kept)
    assert key not in server.said()
