"""Looks at the pages in headless Chromium: no complaint, no overflow, no small or overlapping text, all by keyboard.

The runs are written by `written_runs`: random numbers in the format of real runs, of 3, 20 and 100 clients.
"""

from __future__ import annotations

import pytest
from browser import Browser
from written_runs import inside_of, results_of, write_run

from pilot_jax.compare.page import comparison_page
from pilot_jax.report.page import runs_page
from pilot_jax.report.record import read_run
from pilot_jax.report.rendering import write_page

pytestmark = pytest.mark.long
WIDTHS, CLIENTS, MOST_BYTES = (400, 700, 1200), (3, 20, 100), 3_000_000

# Texts that are visible and smaller than 11 px, on the page or, as they are scaled, in figures.
SMALL = """[...document.querySelectorAll('main *')].filter(e => e.getClientRects().length && [...e.childNodes].some(
  n => n.nodeType == 3 && n.data.trim())).map(e => [e.textContent.slice(0, 40), parseFloat(getComputedStyle(e).fontSize)
  * (e.ownerSVGElement ? e.ownerSVGElement.getBoundingClientRect().width / e.ownerSVGElement.viewBox.baseVal.width : 1)]
  ).filter(pair => pair[1] < 11)"""
# Pairs of texts of one figure that overlap by more than a pixel, and texts outside of their card.
OVERLAPS = """[...document.querySelectorAll('.plot svg')].filter(s => s.getClientRects().length).flatMap(svg => {
  const card = svg.closest('.card').getBoundingClientRect();
  const texts = [...svg.querySelectorAll('text')].filter(t => t.textContent && t.getClientRects().length)
    .map(t => [t.textContent, t.getBoundingClientRect()]);
  const out = texts.filter(([, b]) => b.left < card.left || b.right > card.right).map(([t]) => [t, 'outside']);
  texts.forEach(([t, a], i) => texts.slice(i + 1).forEach(([u, b]) => {
    const pad = 2;  // a text's box is higher than its letters
    if (Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 &&
        Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1 + pad) out.push([t, u]);
  }));
  return out;
})"""
OVERFLOW = "document.documentElement.scrollWidth - innerWidth"


@pytest.fixture(scope="module")
def browser():
    with Browser() as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Writes the pages of one run, of three runs, and of a comparison, for each number of clients."""
    root, out = tmp_path_factory.mktemp("pages"), {}
    for count in CLIENTS:
        runs = [read_run(write_run(root / str(count) / name, count, strategy, ended=ended, seed=seed)) for
                name, strategy, ended, seed in (("federated", "pilot", True, 0), ("alone", "local", True, 1),
                                                ("a run with a long name that has not ended", "fedavg", False, 2))]
        variants = {3: 3, 20: 20, 100: 6}[count]
        for name, page in (("run", runs_page(runs[:1], inside_of)), ("runs", runs_page(runs)),
                           ("comparison", comparison_page(results_of(variants, count)))):
            out[name, count] = write_page(root / f"{name}{count}.html", page)[0]
    out["cohorts", 20] = write_page(root / "cohorts.html", runs_page(
        [read_run(write_run(root / "cohorts", 20, cohort=6))]))[0]
    return out


KINDS = [*((name, count) for name in ("run", "runs", "comparison") for count in CLIENTS), ("cohorts", 20)]


@pytest.mark.parametrize(("name", "count"), KINDS)
def test_layout(browser, pages, name, count):
    page = pages[name, count]
    assert page.stat().st_size < MOST_BYTES
    browser.complaints.clear()
    for width in WIDTHS:
        for scheme in ("light", "dark"):
            browser.open(page, width, scheme=scheme)
            assert browser.run(OVERFLOW) <= 0, (width, "overflows")
            assert browser.run(SMALL) == [], width
            assert browser.run(OVERLAPS) == [], width
    browser.open(page, 794, media="print")
    assert browser.run(OVERLAPS) == [] and browser.run("getComputedStyle(document.body).backgroundColor") == (
        "rgb(255, 255, 255)")
    assert browser.complaints == []


def test_the_first_screen_answers(browser, pages):
    """Without scrolling, at every width, one reads whom federating helped, and on a desktop one sees it as well."""
    for width in WIDTHS:
        browser.open(pages["run", 20], width, 800)
        text, bottom = browser.run("(e => [e.textContent, e.getBoundingClientRect().bottom])"
                                   "(document.querySelector('.verdict'))")
        assert "gained over training alone" in text and bottom < 500, width
    assert browser.run("document.querySelector('.first .plot').getBoundingClientRect().top") < 300


def test_by_keyboard(browser, pages):
    """Tab reaches every figure and every table; arrows read the marks aloud; the legend hides a series."""
    browser.open(pages["run", 3], 1200)
    reached = set()
    for _ in range(400):
        browser.press("Tab", 9)
        key = browser.run("(e => e.closest('.card') ? e.closest('.card').id + ' ' + (e.className || e.tagName) : '')"
                          "(document.activeElement)")
        reached.add(key)
    figures = browser.run("[...document.querySelectorAll('.plot')].map(plot => plot.closest('.card').id)")
    assert figures and {f"{name} plot" for name in figures} <= reached
    assert {f"{name} SUMMARY" for name in figures} <= reached  # the table of each
    browser.run("document.querySelector('#scores .plot').focus()")
    browser.press("ArrowRight", 39)
    first = browser.run("document.getElementById('said').textContent")
    browser.press("ArrowRight", 39)
    assert "base model" in first and browser.run("document.getElementById('said').textContent") not in ("", first)
    browser.run("document.querySelector('#scores .legend button').click()")
    assert browser.run("[...document.querySelectorAll('#scores [data-series=\"base model\"]')].every("
                       "e => e.getClientRects().length == 0)")


def test_slider_and_filters(browser, pages):
    """The slider shows another phase's matrix and rows, with the numbers of its file; filters hide answers."""
    browser.open(pages["run", 3], 1200)
    state = """(() => ({label: document.querySelector('.phase').textContent,
      rows: [...document.querySelectorAll('#mixing tbody tr')].filter(r => !r.hidden).map(r => r.textContent.trim()),
      cell: document.querySelector('#mixing svg.wide [data-cell="0,0"]').textContent,
      picture: document.querySelector('#mixing svg.wide image').getAttribute('href')}))()"""
    last = browser.run(state)
    browser.run("(i => {i.value = 0; i.dispatchEvent(new Event('input'))})(document.querySelector('.slider input'))")
    first, mixing = browser.run(state), read_run(pages["run", 3].parent / "3" / "federated").mixing
    for found, one in ((last, mixing[-1]), (first, mixing[0])):
        assert found["label"].startswith(one.name) and all(row.startswith(one.name) for row in found["rows"])
        assert found["cell"] == f"{one.weights[0, 0]:.2f}".removeprefix("0") and len(found["rows"]) == 3
    assert first["picture"] != last["picture"]
    shown = "[...document.querySelectorAll('.example')].filter(e => e.getClientRects().length).map(e => e.dataset.task)"
    assert len(browser.run(shown)) == 9
    browser.run("(s => {s.value = 'ocr'; s.dispatchEvent(new Event('change'))})"
                "(document.querySelector('select[data-filter=task]'))")
    assert browser.run(shown) == ["ocr"] * 3
    assert browser.run("document.querySelector('.count').textContent") == "3 answers"


def test_pointing_at_marks_and_cells(browser, pages):
    browser.open(pages["run", 20], 1200)
    for card, word in (("scores", ": "), ("mixing", "receives")):
        browser.run(f"document.querySelector('#{card} .plot').scrollIntoView({{block: 'center'}})")
        x, y = browser.run(f"""(b => [b.x + b.width / 2, b.y + b.height / 2])(
          [...document.querySelectorAll('#{card} [data-tip], #{card} image')].find(e => e.getClientRects().length)
          .getBoundingClientRect())""")
        browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        assert word in browser.run("document.getElementById('tip').textContent"), card
