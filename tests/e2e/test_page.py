"""The page and the API document in a real browser, which is told to reach nothing but the server."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

pytestmark = pytest.mark.e2e

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


@pytest.fixture
def page(server) -> Iterator[Page]:
    """A page whose every request to another host is a failure of the test."""
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine; Debian's package `chromium` brings it")
    strangers: list[str] = []
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS) as browser:
        page = browser.new_page()
        page.on("request", lambda request: strangers.append(request.url))
        page.goto(server.url)
        yield page
        own = (server.url, f"blob:{server.url}", "data:")
        assert [url for url in strangers if not url.startswith(own)] == []


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
    page.set_input_files("#files", [str(text), str(image)])
    expect(page.locator("#answers .bad .label")).to_contain_text("Format not accepted")
    expect(page.locator("#answers li:not(.bad) tbody tr")).to_have_count(3)


def test_page_does_not_run_what_a_file_name_says(page: Page, image: Path):
    path = image.rename(image.with_name("<img src=x onerror=alert(1)>.png"))
    page.set_input_files("#files", [str(path)])
    expect(page.locator(".name")).to_have_text(path.name)


def test_api_document_renders_without_another_host(page: Page, server):
    page.goto(f"{server.url}/docs")
    expect(page.locator(".opblock").first).to_be_visible()
    expect(page.locator(".opblock-summary-path").first).to_contain_text("/predict")
