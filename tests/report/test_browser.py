"""The report in a real browser: headless Chromium, without a network, from disk, as it stands."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from m3agiqa.report import write_report
from tests.scored import SCRIPT, scored_folder

CHROMIUM = next((p for name in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(name))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (.ci/run installs it)"),
]

# On a busy machine a page may take long; nothing here measures how long.
_PATIENCE_MS = 120_000
_FACTS = """async () => {
  const pictures = [...document.querySelectorAll(".strip img")];
  await Promise.all(pictures.map((image) => image.decode()));
  return {
    pictures: pictures.length,
    shown: pictures.every((image) => image.naturalWidth > 0),
    wide: document.documentElement.scrollWidth > innerWidth,
  };
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"],
            timeout=_PATIENCE_MS,
        )
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = scored_folder(tmp_path_factory.mktemp("browser") / "run", 60)
    write_report(str(folder))
    return folder / "report.html"


def visit(browser: Browser, report: Path, width: int = 1200) -> tuple[Page, list[str]]:
    """The opened page, and what it complained of: errors of its script, and what its policy forbade."""
    page = browser.new_page(viewport={"width": width, "height": 900}, offline=True)
    page.set_default_timeout(_PATIENCE_MS)
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
    page.goto(report.as_uri(), wait_until="load")
    return page, complaints


@pytest.mark.parametrize("width", [1200, 390])
def test_a_reader_sees_the_pictures_and_opens_one(browser, report, width):
    page, complaints = visit(browser, report, width)
    facts = page.evaluate(_FACTS)
    assert facts.pop("pictures") > 100
    assert facts == {"shown": True, "wide": False}
    page.locator(".strip button").first.focus()
    page.keyboard.press("Enter")
    card, title = page.locator("#card"), page.locator("#card-title")
    card.wait_for(state="visible")
    first = title.inner_text()
    page.keyboard.press("ArrowRight")
    assert title.inner_text() not in ("", first)
    page.keyboard.press("Escape")
    card.wait_for(state="hidden")
    assert page.evaluate("document.activeElement.closest('.strip') !== null")
    assert complaints == []
    page.close()


def test_a_prompt_with_a_script_stays_text(browser, report):
    page, complaints = visit(browser, report)
    assert SCRIPT[:40] in page.locator("body").inner_text()
    assert page.title() == "run · m3agiqa report"
    assert page.locator("script").count() == 2
    assert complaints == []
    page.close()


def test_its_own_script_alone_may_run(browser, report, tmp_path):
    attacked = tmp_path / "attacked.html"
    attacked.write_text(report.read_text().replace("</main>", "<script>document.title = 'broken in'</script></main>"))
    page, complaints = visit(browser, attacked)
    assert page.title() == "run · m3agiqa report"
    assert ["script-src" in one for one in complaints] == [True]
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_follows_the_readers_colours(browser, report, scheme):
    page = browser.new_page(color_scheme=scheme)
    page.goto(report.as_uri())
    red, green, blue = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")[:3]
    assert (red + green + blue > 3 * 128) == (scheme == "light")
    page.close()
