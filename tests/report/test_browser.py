"""The report in a real browser: headless Chromium, without a network, from disk."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from m3agiqa.report import write_report
from tests.scored import SCRIPT, scored_folder

CHROMIUM = next((p for name in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(name))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (.ci/run installs it)"),
]

# Goes into a copy of the page and says into its title what a reader would see and do.
PROBE = """
<script>
const errors = [];
addEventListener("error", (event) => errors.push(String(event.message)));
addEventListener("securitypolicyviolation", (event) => errors.push(event.violatedDirective));
addEventListener("load", async () => {
  const pictures = [...document.querySelectorAll(".strip img")];
  await Promise.all(pictures.map((image) => image.decode()));
  const button = document.querySelector(".strip button");
  button.focus();
  button.click();
  const card = document.getElementById("card");
  const opened = card.open;
  const first = document.getElementById("card-title").textContent;
  card.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }));
  const second = document.getElementById("card-title").textContent;
  card.close();
  await new Promise((resolve) => setTimeout(resolve, 50));
  const paint = performance.getEntriesByName("first-contentful-paint")[0];
  const found = {
    errors, opened, turned: first !== second, pictures: pictures.length,
    shown: pictures.every((image) => image.naturalWidth > 0),
    back: document.activeElement?.closest(".strip") !== null && !card.open,
    wide: document.documentElement.scrollWidth > innerWidth,
    paint_ms: paint ? paint.startTime : null,
  };
  document.body.dataset.found = JSON.stringify(found);
});
</script>
"""


def visit_until(sign: str, page: Path, tmp_path: Path, *flags: str) -> str:
    """The same once the page has said `sign`. Chromium's virtual time does not wait for pictures that a busy machine
    is still decoding: then the page is seen before it has run to its end, and visited again.
    """
    for attempt in range(6):
        dom = visit(page, tmp_path / str(attempt), *flags)
        if sign in dom:
            return dom
    raise AssertionError(f"the page did not say {sign!r}")


def visit(page: Path, tmp_path: Path, *flags: str) -> str:
    """The page's elements after it has run, as HTML. A home of its own: other browsers may run beside it."""
    command = [
        str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        f"--user-data-dir={tmp_path / 'browser'}", "--virtual-time-budget=20000", *flags, "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = scored_folder(tmp_path_factory.mktemp("browser") / "run", 60)
    write_report(str(folder))
    return folder / "report.html"


def probed(report: Path, tmp_path: Path) -> Path:
    """The page with the probe, which the page's own policy would keep from running."""
    source = report.read_text()
    assert source.count("script-src &#39;sha256-") == 1
    copy = tmp_path / "probed.html"
    open_policy = re.sub("script-src &#39;sha256-[^&]+&#39;", "script-src 'unsafe-inline'", source)
    copy.write_text(open_policy.replace("<title>", PROBE + "<title>", 1))
    return copy


@pytest.mark.parametrize("width", [1200, 390])
def test_a_reader_sees_the_pictures_and_opens_one(report, tmp_path, width):
    dom = visit_until('data-found="', probed(report, tmp_path), tmp_path, f"--window-size={width},900")
    told = re.search(r'data-found="([^"]*)"', dom)
    assert told is not None
    found = json.loads(told[1].replace("&quot;", '"'))
    print(f"first contentful paint after {found.pop('paint_ms')} ms, {report.stat().st_size / 1e3:.0f} kB")
    assert found.pop("pictures") > 100
    expected = {"errors": [], "opened": True, "turned": True, "shown": True, "back": True, "wide": False}
    assert found == expected


def test_a_prompt_with_a_script_stays_text(report, tmp_path):
    as_text = SCRIPT.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")[:40]
    dom = visit_until(as_text, report, tmp_path)
    assert "<title>run · m3agiqa report</title>" in dom
    assert dom.count("<script") == 2


def test_its_own_script_alone_may_run(report, tmp_path):
    attacked = tmp_path / "attacked.html"
    attacked.write_text(report.read_text().replace("</main>", "<script>document.title = 'broken in'</script></main>"))
    dom = visit_until("<img", attacked, tmp_path)
    assert "<title>run · m3agiqa report</title>" in dom
