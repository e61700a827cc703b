"""The page as a reader meets it, in Chromium: on a desk, a tablet and a phone, and in print; offline."""

import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers import replaced_at
from made_up import NEURONS, SELECTION_OF_NEURONS, made_up
from pages import reported
from PIL import Image

from sparc3_lightning.report.page import write_report

pytestmark = pytest.mark.browser
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
A4 = {"width": 700, "height": 1000}  # what Chromium lays a page of A4 out in, about
# How far an element's box reaches beyond the document, of those that are seen.
OUTSIDE = """() => [...document.querySelectorAll('body *')]
    .filter(element => element.checkVisibility() && !element.closest('thead'))
    .filter(element => { const box = element.getBoundingClientRect();
        return box.width > 0 && (box.right > document.documentElement.clientWidth + 1 || box.left < -1) })
    .map(element => element.outerHTML.slice(0, 80))"""
CUT_OFF = """() => [...document.querySelectorAll('body *')]
    .filter(element => element.checkVisibility() && !element.closest('thead, .masked'))
    .filter(element => element.scrollWidth > element.clientWidth + 1 && getComputedStyle(element).display != 'inline')
    .map(element => element.outerHTML.slice(0, 80))"""
COLOR = "element => getComputedStyle(element).color"
TRANSPARENT = "rgba(0, 0, 0, 0)"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A Chromium that is installed; none is downloaded."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install '.[test]'")
    executable = next((found for name in NAMES if (found := shutil.which(name))), None)
    if executable is None:
        pytest.skip(f"no Chromium is installed: none of {', '.join(NAMES)} is on the path")
    with sync_api.sync_playwright() as playwright:
        # As root, as in a container, Chromium has no sandbox.
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def context(browser: Any) -> Any:
    """One profile for all pages, since making one takes longer than a test."""
    return browser.new_context()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with all its parts, and with words and names that are long."""
    folder = tmp_path_factory.mktemp("report")
    SELECTION_OF_NEURONS.save(folder / "selection.json")
    (folder / "config.yaml").write_text("seed_everything: 0\nsource: " + "a/long/path" * 30 + "\n")
    results, rows = made_up()
    results = replaced_at(results, "checkpoint", "/a/folder/with/a/long/name" * 6 + "/A-Model-" + "x" * 60)
    results = replaced_at(results, "protocol/perplexity/text", "pypi:a==1/" + "folder/" * 20 + "text.txt")
    results = replaced_at(results, "neurons", "/a/folder/of/a list/" + "x" * 200 + "/neurons.json")
    for row in rows:
        row["continuation"] += " " + "o" * 200 + " stupid" * 5
    write_report(folder / "report.html", reported(results, rows, NEURONS, folder), rows)
    return folder / "report.html"


@contextmanager
def opened(context: Any, report: Path, width: int, height: int = 900) -> Iterator[Any]:
    """Open the page; at the end, see that it asked for nothing but itself, and reported no error."""
    page = context.new_page()
    asked: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text))
    page.set_viewport_size({"width": width, "height": height})
    page.goto(report.as_uri())
    yield page
    page.close()
    assert report.as_uri() in asked
    assert [url[:80] for url in asked if url != report.as_uri() and not url.startswith("data:")] == []
    assert errors == []


@pytest.fixture(scope="module", params=(1200, 768, 390))
def any_page(context: Any, report: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The page on a desk, a tablet and a phone; a test leaves it as it was."""
    with opened(context, report, request.param) as page:
        yield page


@pytest.fixture
def page(context: Any, report: Path) -> Iterator[Any]:
    """The page on a desk, newly opened."""
    with opened(context, report, 1200) as page:
        yield page


def test_the_page_fits_its_window(any_page):
    page = any_page
    width = page.viewport_size["width"]
    for is_open in ("true", "false"):
        page.evaluate(f"document.querySelectorAll('details').forEach(details => details.open = {is_open})")
        assert page.evaluate("document.documentElement.clientWidth") == width
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(OUTSIDE) == []
        assert page.evaluate(CUT_OFF) == []


def test_every_picture_is_loaded_and_large_enough_to_be_read(any_page):
    page = any_page
    pictures = page.locator("img").evaluate_all(
        "all => all.map(img => [img.complete, img.naturalWidth, img.getBoundingClientRect().width, img.alt])"
    )
    assert len(pictures) == 6
    for complete, natural, shown, alt in pictures:
        assert complete
        assert natural == 960
        assert 330 <= shown <= 560, alt
        assert alt


def test_the_verdict_is_seen_first(any_page):
    page = any_page
    results, _ = made_up()
    verdict = page.locator(".verdict")
    assert verdict.is_visible()
    text = verdict.inner_text().replace("\xa0", " ")
    for sentence in results.verdict.split(". "):
        assert sentence in text
    strong = page.locator(".verdict strong")
    assert strong.bounding_box()["y"] < 450
    assert "95 % interval" in strong.inner_text().replace("\xa0", " ")
    assert float(strong.evaluate("e => parseFloat(getComputedStyle(e).fontSize)")) > 16


def test_every_figure_of_a_table_stands_below_or_beside_its_name(any_page):
    page = any_page
    row = page.locator("tbody tr", has_text="Mean toxicity").first
    cells = row.locator("td")
    head = page.locator("table").first.locator("thead")
    names = cells.evaluate_all("all => all.map(cell => getComputedStyle(cell, '::before').content)")
    if page.viewport_size["width"] == 390:
        assert head.bounding_box()["height"] <= 1
        assert [name.strip('"') for name in names[:3]] == ["before", "after", "change"]
        tops = cells.evaluate_all("all => all.map(cell => cell.getBoundingClientRect().top)")
        assert tops == [tops[0]] * 3 + [tops[3]] * 3, "three side by side"
    else:
        assert head.bounding_box()["height"] > 15
        assert set(names) == {"none"}
    sizes = page.locator("td").evaluate_all("all => all.map(cell => parseFloat(getComputedStyle(cell).fontSize))")
    assert min(sizes) >= 13


def test_masked_words_cannot_be_read_until_they_are_clicked(page):
    words = page.locator(".masked span")
    assert words.count() > 80
    assert set(words.evaluate_all(f"all => all.map({COLOR})")) == {TRANSPARENT}
    assert set(words.evaluate_all("all => all.map(word => getComputedStyle(word).userSelect)")) == {"none"}
    word = words.first
    assert word.inner_text() == "stupid"
    word.click()
    assert word.evaluate(COLOR) == "rgb(29, 35, 48)"
    assert words.nth(1).evaluate(COLOR) == TRANSPARENT, "the others stay masked"
    word.click()
    assert word.evaluate(COLOR) == TRANSPARENT


def number_of_colors(picture: bytes) -> int:
    """Return how many colours a picture has, less its edges, which are round."""
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    return len(set(image.crop((4, 4, image.width - 4, image.height - 4)).getdata()))


def test_a_masked_word_looks_like_a_black_bar(page):
    page.set_viewport_size({"width": 390, "height": 900})
    word = page.locator(".masked span").first
    colors = [number_of_colors(word.screenshot())]
    word.click()
    colors.append(number_of_colors(word.screenshot()))
    assert colors[0] == 1
    assert colors[1] > 10


def test_a_masked_word_is_shown_by_keyboard(page):
    box = page.locator(".masked input").first
    word = page.locator(".masked span").first
    page.locator("#all").focus()
    page.keyboard.press("Tab")
    assert box.evaluate("element => element === document.activeElement")
    assert word.evaluate("element => getComputedStyle(element).outlineStyle") == "solid", "one sees where one is"
    page.keyboard.press("Space")
    assert word.evaluate(COLOR) != TRANSPARENT
    page.keyboard.press("Space")
    assert word.evaluate(COLOR) == TRANSPARENT


def test_all_masked_words_can_be_shown_at_once(page):
    page.set_viewport_size({"width": 390, "height": 900})
    words = page.locator(".masked span")
    page.get_by_label("show all masked words").check()
    assert TRANSPARENT not in words.evaluate_all(f"all => all.map({COLOR})")
    page.get_by_label("show all masked words").uncheck()
    assert set(words.evaluate_all(f"all => all.map({COLOR})")) == {TRANSPARENT}


def test_masked_words_stay_masked_where_the_system_chooses_the_colours(page):
    page.emulate_media(forced_colors="active")
    words = page.locator(".masked span")
    assert set(words.evaluate_all(f"all => all.map({COLOR})")) == {TRANSPARENT}
    words.first.click()
    assert words.first.evaluate(COLOR) != TRANSPARENT


def test_in_print_nothing_is_cut_off_and_masked_words_stay_masked(page):
    page.set_viewport_size(A4)
    page.emulate_media(media="print")
    details = page.locator("details")
    assert details.count() == 4
    assert not any(details.nth(i).is_visible() for i in range(4))
    assert not page.locator("#all").is_visible()
    words = page.locator(".masked span")
    assert set(words.evaluate_all(f"all => all.map({COLOR})")) == {TRANSPARENT}
    assert set(words.evaluate_all("all => all.map(e => getComputedStyle(e).printColorAdjust)")) == {"exact"}
    assert page.evaluate("document.documentElement.scrollWidth") <= A4["width"]
    assert page.evaluate(OUTSIDE) == []
    assert page.evaluate(CUT_OFF) == []
    assert page.locator("thead").first.bounding_box()["height"] > 10, "tables are tables"
    details.first.evaluate("element => element.open = true")
    assert details.first.is_visible(), "what the reader opened is printed"
    assert page.evaluate(CUT_OFF) == []


def test_it_prints_on_a_few_pages(page, tmp_path):
    content = page.pdf(path=tmp_path / "report.pdf", format="A4")
    assert content.startswith(b"%PDF")
    assert 3 <= content.count(b"/Type /Page\n") <= 12


@pytest.mark.parametrize("width", [400, 800, 1280])
def test_the_commands_wrap_and_an_option_is_not_broken(context, report, width):
    with opened(context, report, width) as page:
        assert page.evaluate("document.documentElement.scrollWidth") == width
        box = page.locator(".commands")
        assert box.locator("pre").count() == 4
        assert box.locator("span").all_inner_texts() == ["--model.neurons", "--model.export", "--model.neurons"]
        assert box.locator("span").evaluate_all("all => all.map(span => span.getClientRects().length)") == [1, 1, 1]
        box.locator("pre").first.click()
        selected = page.evaluate("getSelection().toString()").strip()
        assert selected == box.locator("pre").first.inner_text().strip()
        assert "\n" not in selected


def test_there_is_no_script_and_none_is_needed(browser, report):
    context = browser.new_context(java_script_enabled=False, offline=True)
    page = context.new_page()
    page.goto(report.as_uri())
    assert page.locator("script").count() == 0
    box = page.locator(".masked input").first
    page.locator(".masked span").first.click()
    assert box.is_checked()
    assert page.locator(".verdict").is_visible()
    context.close()
