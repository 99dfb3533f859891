"""The page in a real browser: Chromium without a window, driven by Playwright.

Chromium is Debian's package (``apt-get install chromium``), or any other that is on the path or that
``CLOUDCKPT_CHROMIUM`` names; Playwright's own download is not used. The screenshots are for people, in ``build/ui``.

(Past 350 lines: one browser, kept for all that is looked at in it.)
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from cloudckpt import CheckpointManager
from cloudckpt.pruning import prune
from cloudckpt.tools import open_store

pytestmark = pytest.mark.processes

SHOTS = Path(__file__).parents[2] / "build" / "ui"
_PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

Serve = Callable[..., Any]


@dataclass
class Visit:
    """A page in a tab, and what the tab complained of and asked for since it was opened."""

    tab: Page
    trouble: list[str] = field(default_factory=list)
    places: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.tab.on(
            "console", lambda said: self.trouble.append(said.text) if said.type in {"error", "warning"} else None
        )
        self.tab.on("pageerror", lambda error: self.trouble.append(str(error)))
        self.tab.on("request", lambda request: self.places.add(urlsplit(request.url).netloc))

    def check_barriers(self) -> None:
        """What is shown now has no barrier that axe knows."""
        said = list(self.trouble)
        barriers = Axe().run(self.tab)
        self.trouble[:] = said  # axe's own script may trip over our policy: what the console says of that is not ours
        assert barriers.violations_count == 0, barriers.generate_report()

    def refresh(self) -> None:
        """What somebody does who does not want to wait."""
        self.tab.get_by_role("button", name="Refresh now").click()


# For this file alone: while Playwright runs, its event loop is this thread's, and other suites need their own.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A browser without a window; in CI it may not be missing."""
    named = os.environ.get("CLOUDCKPT_CHROMIUM")
    program = named or next(filter(None, map(shutil.which, _PROGRAMS)), None)
    if program is None:
        missing = "there is no Chromium: apt-get install chromium, or name one in CLOUDCKPT_CHROMIUM"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    # How long a machine with other work may take; nothing waits for longer than it has to.
    expect.set_options(timeout=30_000)
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=program)
        yield found
        found.close()


@pytest.fixture
def visit(browser: Browser, page_of: Serve) -> Iterator[Callable[..., Visit]]:
    """Opens the page of a root in a tab of its own; whatever happens there, nothing else was asked than our server."""
    opened: list[tuple[Visit, str]] = []

    def act(root: str, *, width: int = 1200, scheme: Any = "light", page: Any = None) -> Visit:
        served = page or page_of(root)
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        found = Visit(context.new_page())
        opened.append((found, urlsplit(served.url).netloc))
        found.tab.goto(served.url)
        return found

    yield act
    for found, place in opened:
        found.tab.context.close()
        assert found.places == {place}


def rows_of(tab: Page, table: str) -> Locator:
    """The rows below a table's head."""
    return tab.get_by_role("table", name=table, exact=True).locator("tbody").get_by_role("row")


def ground(tab: Page) -> str:
    """The colour behind everything."""
    return str(tab.evaluate("getComputedStyle(document.body).backgroundColor"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1600])
def test_everything_is_there_and_can_be_read(
    visit: Callable[..., Visit], run: str, announce: Callable[..., str], width: int, scheme: str
) -> None:
    """On a phone and on a wall, light and dark: what is kept and why, the upload, the chart, the journal.

    Nothing is wider than the window, axe finds no barrier, and the console is silent.
    """
    name = announce(run, 6, size_bytes=1000, arrived=430)
    found = visit(run, width=width, scheme=scheme)
    tab = found.tab
    rows = rows_of(tab, "Checkpoints")
    expect(rows).to_have_count(6)
    expect(rows.nth(0)).to_contain_text("uploading 43 %")
    expect(rows.nth(3)).to_contain_text("pinned")
    expect(rows.nth(4)).to_contain_text("best #1")
    expect(rows.nth(4)).to_contain_text("tag:release")
    expect(tab.get_by_role("progressbar", name=f"upload of {name}")).to_have_attribute("value", "430")
    expect(tab.get_by_role("heading", name="loss over steps")).to_be_visible()
    expect(tab.locator("#chart-area .mark")).to_have_count(6)
    expect(tab.locator("#facts")).to_contain_text("step 2: 0.1000 (min)")
    expect(tab.locator("#journal li").first).to_contain_text("announce")
    expect(rows_of(tab, "What if?")).to_have_count(5)
    expect(tab.get_by_role("alert")).to_be_hidden()
    assert ground(tab) == {"light": "rgb(255, 255, 255)", "dark": "rgb(21, 24, 28)"}[scheme]
    page = "document.documentElement"
    assert tab.evaluate(f"{page}.scrollWidth - {page}.clientWidth") <= 0
    assert found.trouble == []
    SHOTS.mkdir(parents=True, exist_ok=True)
    tab.screenshot(path=SHOTS / f"run-{width}-{scheme}.png", full_page=True, caret="initial")
    found.check_barriers()


def test_the_sliders_say_what_the_package_would_delete(visit: Callable[..., Visit], run: str) -> None:
    """Each setting shows at once the plan that the package's own prune makes with it; a button takes all back."""
    found = visit(run)
    tab = found.tab
    newest = tab.get_by_role("slider", name="Keep the newest")
    best = tab.get_by_role("slider", name="Keep the best")
    said = tab.locator("#preview-sum")
    expect(said).to_have_text("Nothing would be deleted: 5 kept.")
    expect(newest).to_have_attribute("aria-valuetext", "all")

    newest.focus()
    tab.keyboard.press("Home")
    expect(said).to_contain_text("2 checkpoints would be deleted")
    expect(tab.locator("#keep-last-is")).to_have_text("1")
    expect(tab.locator("#preview-command code")).to_have_text(
        f"cloudckpt gc {shlex.quote(run)} --keep-last 1 --dry-run"
    )
    store = open_store(run)
    manifest = store.read()
    assert manifest is not None
    plan = prune(store, policy=replace(manifest.policy, keep_last=1), dry_run=True)
    shown = [row.locator("th, td").all_inner_texts() for row in rows_of(tab, "What if?").all()]
    assert [(cells[0], cells[1], cells[3]) for cells in shown] == [
        (str(d.checkpoint.step), "kept" if d.keep else "deleted", ", ".join(d.reasons))
        for d in reversed(plan.decisions)
    ]

    best.focus()
    tab.keyboard.press("Home")
    expect(said).to_contain_text("3 checkpoints would be deleted")
    tab.get_by_label("Keep every … steps").fill("2")
    expect(said).to_contain_text("1 checkpoint would be deleted")
    tab.get_by_label("Keep … hours before the newest").fill("1000")
    expect(said).to_have_text("Nothing would be deleted: 5 kept.")

    tab.get_by_role("button", name="Back to the run").click()
    expect(newest).to_have_attribute("aria-valuetext", "all")
    expect(tab.get_by_label("Keep every … steps")).to_have_value("")
    box = newest.bounding_box()
    assert box is not None
    newest.click(position={"x": 1, "y": box["height"] / 2})
    expect(said).to_contain_text("2 checkpoints would be deleted")
    assert found.trouble == []


def test_a_setting_that_cannot_be_used_has_no_plan(visit: Callable[..., Visit], run: str) -> None:
    """A word that is no setting is said to be none, beside no plan of another one; one that is brings the plan back."""
    found = visit(run)
    tab = found.tab
    said, rows, steps = tab.locator("#preview-sum"), rows_of(tab, "What if?"), tab.get_by_label("Keep every … steps")
    tab.get_by_role("slider", name="Keep the newest").press("Home")
    expect(rows).to_have_count(5)
    steps.fill("0")
    expect(said).to_contain_text("write a whole number")
    expect(steps).to_have_attribute("aria-invalid", "true")
    expect(rows).to_have_count(0)
    expect(tab.locator("#preview-command")).to_be_hidden()
    found.check_barriers()
    steps.fill("2")
    expect(said).to_contain_text("1 checkpoint would be deleted")
    expect(steps).not_to_have_attribute("aria-invalid", "true")
    expect(tab.locator("#preview-command code")).to_contain_text("--keep-last 1 --keep-every 2 --dry-run")
    steps.fill("-1")
    expect(said).to_contain_text("write a whole number")
    tab.get_by_role("button", name="Back to the run").click()
    expect(said).to_have_text("Nothing would be deleted: 5 kept.")
    expect(steps).to_have_value("")
    assert found.trouble == []


def test_a_long_table_is_shortened_until_somebody_asks(visit: Callable[..., Visit], run: str) -> None:
    """Of two thousand checkpoints the newest 500 are rows, and it says so; a button shows the others as well."""
    manifest = Path(run) / "manifest.json"
    document = json.loads(manifest.read_text())
    like = document["entries"][0]
    entries = [{**like, "id": f"{n:08x}", "step": n, "seq": n} for n in range(1, 2001)]
    manifest.write_text(json.dumps({**document, "entries": entries, "next_seq": 2001, "best": [], "recent": []}))
    found = visit(run)
    tab = found.tab
    for title, button in [("Checkpoints", "Show all checkpoints"), ("What if?", "Show the whole preview")]:
        rows, more = rows_of(tab, title), tab.get_by_role("button", name=button)
        expect(rows).to_have_count(500)
        expect(rows.nth(0)).to_contain_text("2000")
        expect(more.locator("..")).to_contain_text("The newest 500 of 2000 are shown.")
        more.click()
        expect(rows).to_have_count(2000)
        expect(more).to_be_hidden()
        expect(tab.get_by_role("heading", name=title, exact=True)).to_be_focused()
    expect(tab.locator("#chart-area .mark")).to_have_count(2000)
    assert found.trouble == []


def test_a_refresh_changes_what_has_changed_and_nothing_else(visit: Callable[..., Visit], run: str) -> None:
    """A new save appears above the rows that were there, which stay the same nodes; a setting that was moved stays."""
    found = visit(run)
    tab = found.tab
    rows = rows_of(tab, "Checkpoints")
    expect(rows).to_have_count(5)
    tab.locator("#every").select_option("0")
    rows.nth(0).evaluate("row => { row.wasHere = true; }")
    newest = tab.get_by_role("slider", name="Keep the newest")
    newest.focus()
    tab.keyboard.press("Home")
    expect(tab.locator("#keep-last-is")).to_have_text("1")
    with CheckpointManager(run) as ckpts:
        ckpts.save(6, {"model": {"w": torch.zeros(9)}}, metrics={"loss": 0.05, "acc": 0.6}, block=True)
    found.refresh()
    expect(rows).to_have_count(6)
    expect(rows.nth(0)).to_contain_text("best #1")
    expect(rows.nth(4)).to_contain_text("0.1000")
    assert rows.nth(1).evaluate("row => row.wasHere === true")
    expect(tab.locator("#keep-last-is")).to_have_text("1")
    expect(tab.locator("#preview-sum")).to_contain_text("4 checkpoints would be deleted")
    assert found.trouble == []


def test_the_page_looks_again_by_itself(visit: Callable[..., Visit], run: str) -> None:
    """Without anybody touching it, a save that comes is shown."""
    found = visit(run)
    found.tab.locator("#every").select_option("2")
    rows = rows_of(found.tab, "Checkpoints")
    expect(rows).to_have_count(5)
    with CheckpointManager(run) as ckpts:
        ckpts.save(6, {"model": {"w": torch.zeros(9)}}, metrics={"loss": 0.7}, block=True)
    expect(rows).to_have_count(6, timeout=60_000)
    assert found.trouble == []


def test_names_from_the_store_are_text(visit: Callable[..., Visit], tmp_path: Path) -> None:
    """Markup in the root, a metric, a tag and a mark is shown as it was written, and nothing of it is run."""
    root = str(tmp_path / "<img src=x onerror=alert(1)>")
    metric, tag, mark = "<svg onload=alert(2)>", '"><script>alert(3)</script>', "</td><b>bold"
    with CheckpointManager(root, monitor=metric, mode="min") as ckpts:
        ckpts.save(1, {"w": torch.ones(1)}, metrics={metric: 1.0, "__proto__": 2.0}, tags=[tag], block=True)
        ckpts.save(2, {"w": torch.ones(1)}, metrics={metric: float("nan")}, block=True)
        ckpts.mark(2, mark)
    found = visit(root)
    tab = found.tab
    rows = rows_of(tab, "Checkpoints")
    expect(rows.nth(0)).to_contain_text(f"marked {mark}")
    expect(rows.nth(0)).to_contain_text("nan")
    expect(rows.nth(0)).not_to_contain_text("object")
    expect(rows.nth(1)).to_contain_text(f"tag:{tag}")
    expect(tab.get_by_role("heading", name=f"{metric} over steps")).to_be_visible()
    expect(tab.locator("#run-title")).to_have_text(root)
    expect(tab.locator("img, b, main script")).to_have_count(0)
    assert found.trouble == []


def test_what_goes_wrong_is_said_above_what_was_seen(visit: Callable[..., Visit], page_of: Serve, run: str) -> None:
    """A broken manifest, then a server that is gone: each in a sentence, beside the last picture; mended, it goes away."""
    page = page_of(run)
    found = visit(run, page=page)
    tab = found.tab
    rows, alert = rows_of(tab, "Checkpoints"), tab.get_by_role("alert")
    expect(rows).to_have_count(5)
    tab.locator("#every").select_option("0")
    manifest = Path(run) / "manifest.json"
    whole = manifest.read_bytes()
    manifest.write_text("{")
    found.refresh()
    expect(alert).to_contain_text("cloudckpt repair")
    expect(alert).to_contain_text("“Refresh now” tries again.")
    expect(rows).to_have_count(5)
    found.check_barriers()
    manifest.write_bytes(whole)
    found.refresh()
    expect(alert).to_be_hidden()
    page.stop()
    found.refresh()
    expect(alert).to_contain_text("it was stopped")
    expect(rows).to_have_count(5)


def test_the_chart_by_keyboard(visit: Callable[..., Visit], run: str) -> None:
    """The arrow keys go from checkpoint to checkpoint; each is told in words and marked in the table."""
    found = visit(run)
    tab = found.tab
    expect(tab.locator("#chart-area .mark")).to_have_count(5)
    tab.locator("#chart-area").focus()
    tab.keyboard.press("Home")
    picked = tab.locator("#picked")
    expect(picked).to_contain_text("step 1: loss 0.9000, saved")
    tab.keyboard.press("ArrowRight")
    expect(picked).to_contain_text("step 2: loss 0.1000, best (best #1")
    expect(tab.locator("tr[aria-current=true]")).to_contain_text("tag:release")
    found.check_barriers()
    tab.keyboard.press("End")
    expect(picked).to_contain_text("step 5")
    tab.keyboard.press("Escape")
    expect(picked).to_have_text("")
    tab.locator("#metric").select_option("acc")
    expect(tab.get_by_role("heading", name="acc over steps")).to_be_visible()
    assert found.trouble == []


def test_the_chart_of_values_that_are_hard_to_draw(visit: Callable[..., Visit], tmp_path: Path) -> None:
    """The largest numbers have places; a metric that was never a number has a sentence, and no other one's chart."""
    root = str(tmp_path / "run")
    with CheckpointManager(root, monitor="loss", mode="min", keep_last=None) as ckpts:
        for step, loss in [(12_345_650, 1.7e308), (12_345_700, -1.7e308)]:
            metrics = {"loss": loss, "spread": float("nan")}
            ckpts.save(step, {"w": torch.ones(1)}, metrics=metrics, block=True)
    found = visit(root)
    tab = found.tab
    marks, chosen = tab.locator("#chart-area .mark"), tab.locator("#metric")
    expect(marks).to_have_count(2)
    expect(tab.locator("#chart-area .tick").filter(has_text="12345650")).to_have_count(1)
    assert found.trouble == []
    chosen.select_option("spread")
    expect(tab.locator("#chart-none")).to_contain_text("finite 'spread'")
    expect(tab.get_by_role("heading", name="spread over steps")).to_be_visible()
    expect(marks).to_have_count(0)
    chosen.select_option("loss")
    expect(tab.get_by_role("heading", name="loss over steps")).to_be_visible()
    expect(marks).to_have_count(2)
    expect(tab.locator("#chart-none")).to_be_hidden()


def test_the_skip_link_leaves_the_address_alone(visit: Callable[..., Visit], run: str) -> None:
    """The first stop of the Tab key leads to the content; an address with a place in it still shows the run."""
    found = visit(run)
    tab = found.tab
    rows, address = rows_of(tab, "Checkpoints"), tab.url
    expect(rows).to_have_count(5)
    tab.keyboard.press("Tab")
    expect(tab.get_by_role("link", name="Skip to the content")).to_be_focused()
    tab.keyboard.press("Enter")
    expect(tab.locator("#main")).to_be_focused()
    assert tab.url == address
    tab.goto(f"{address}#main")
    tab.reload()
    expect(rows).to_have_count(5)
    assert found.trouble == []


def test_an_address_that_names_no_run(visit: Callable[..., Visit], made: Path, tmp_path: Path) -> None:
    """It is said, with the way back to the list, which is made anew by either button; so is half of an escape."""
    prefix = tmp_path / "runs"
    shutil.copytree(made, prefix / "a")
    found = visit(str(prefix))
    tab = found.tab
    rows, address = rows_of(tab, "Runs"), tab.url
    expect(rows).to_have_count(1)
    tab.goto(f"{address}#run=nobody")
    expect(tab.get_by_role("alert")).to_contain_text("there is no run 'nobody'")
    tab.get_by_role("link", name="All runs").click()
    expect(rows).to_have_count(1)
    expect(tab.locator("#main")).to_be_focused()
    expect(tab.get_by_role("alert")).to_be_hidden()
    shutil.copytree(made, prefix / "b")
    found.refresh()
    expect(rows).to_have_count(2)
    shutil.copytree(made, prefix / "c")
    tab.get_by_role("button", name="List again").click()
    expect(rows).to_have_count(3)
    tab.goto(f"{address}#run=%")
    tab.reload()
    expect(rows).to_have_count(3)


def test_runs_below_a_prefix(visit: Callable[..., Visit], made: Path, tmp_path: Path) -> None:
    """A prefix shows its runs, the broken one as such; a click shows one, and the way back is the browser's own."""
    prefix = tmp_path / "runs"
    shutil.copytree(made, prefix / "a b")
    shutil.copytree(made, prefix / "deep" / "c")
    (prefix / "broken").mkdir()
    (prefix / "broken" / "manifest.json").write_text("{")
    found = visit(str(prefix), width=400)
    tab = found.tab
    rows = rows_of(tab, "Runs")
    expect(rows).to_have_count(3)
    expect(rows.nth(0)).to_contain_text("step 2 (loss=0.1000)")
    expect(rows.nth(1)).to_contain_text("not valid JSON")
    assert found.trouble == []
    SHOTS.mkdir(parents=True, exist_ok=True)
    tab.screenshot(path=SHOTS / "runs-400.png", full_page=True, caret="initial")
    found.check_barriers()
    tab.get_by_role("link", name="deep/c").click()
    expect(rows_of(tab, "Checkpoints")).to_have_count(5)
    expect(tab.locator("#run-title")).to_have_text(str(prefix / "deep" / "c"))
    expect(tab).to_have_title("deep/c - cloudckpt")
    tab.reload()
    expect(rows_of(tab, "Checkpoints")).to_have_count(5)
    tab.get_by_role("link", name="All runs").click()
    expect(rows).to_have_count(3)
    tab.go_back()
    expect(rows_of(tab, "Checkpoints")).to_have_count(5)
    assert found.trouble == []


def test_the_colours_that_were_chosen_are_kept(visit: Callable[..., Visit], run: str) -> None:
    """The choice wins over the system, and is there after a reload."""
    found = visit(run, scheme="light")
    tab = found.tab
    tab.locator("#theme").select_option("dark")
    assert ground(tab) == "rgb(21, 24, 28)"
    tab.reload()
    expect(tab.locator("#theme")).to_have_value("dark")
    assert ground(tab) == "rgb(21, 24, 28)"
    assert found.trouble == []


def test_a_run_that_has_not_begun(visit: Callable[..., Visit], tmp_path: Path) -> None:
    """Opened before the training, the page says so, and shows the run when it is there."""
    root = str(tmp_path / "new")
    found = visit(root)
    alert = found.tab.get_by_role("alert")
    expect(alert).to_contain_text("nothing was ever saved there")
    with CheckpointManager(root) as ckpts:
        ckpts.save(1, {"w": torch.ones(1)}, block=True)
    found.refresh()
    expect(rows_of(found.tab, "Checkpoints")).to_have_count(1)
    expect(found.tab.locator("#chart-none")).to_contain_text("No checkpoint has a metric yet")
    expect(alert).to_be_hidden()
