"""The report in a real browser: charts are drawn, nothing overlaps or is cut, hostile text stays text."""

import json
import time

import pytest
from browser import browser, need_browser
from test_report import HOSTILE, finished  # noqa: F401

from ddpo.config import ReportConfig
from ddpo.report import report
from ddpo.report.page import page

pytestmark = need_browser
CHARTS = ("style", "curve-loss", "curve-margin", "curve-accuracy", "curve-tokens_per_s", "weights", "deviations", "map")
DRAWN = "[...document.querySelectorAll('.chart')].map(c => [c.id, c.querySelectorAll('.point, .js-line').length])"
BOXES = """[...document.querySelectorAll('section, .chart, .reading, .column')].map(e => {
    const b = e.getBoundingClientRect(); return [e.tagName, e.id, b.left, b.top, b.right, b.bottom] })"""
CUT = """[...document.querySelectorAll('h1, h2, h3, h4, p, label, button, summary, th, svg text')]
    .filter(e => e.getClientRects().length).filter(e => {
        const box = e.closest('.chart, .scroll, .column, section, header'), inside = e.tagName === 'text';
        const b = e.getBoundingClientRect(), c = box.getBoundingClientRect();
        if (['scroll', 'column'].includes(box.className)) return false;  // scrolls within itself
        return b.left < c.left - 1 || b.right > c.right + 1 || b.top < c.top - 1 || b.bottom > c.bottom + 1
            || !inside && e.scrollWidth > e.clientWidth + 1;
    }).map(e => e.textContent)"""


CROSSING = """[...document.querySelectorAll('.chart')].flatMap(chart => {
    const texts = [...chart.querySelectorAll('svg text')].filter(e => e.textContent && e.getClientRects().length);
    const boxes = texts.map(e => [e.textContent, e.getBoundingClientRect()]);
    const meet = (a, b) => a.left < b.right - 2 && b.left < a.right - 2 && a.top < b.bottom - 2 && b.top < a.bottom - 2;
    return boxes.flatMap(([s, a], i) =>
        boxes.slice(i + 1).filter(([, b]) => meet(a, b)).map(([t]) => [chart.id, s, t])) })"""


@pytest.fixture(scope="module")
def opened():
    with browser() as open_page:
        yield open_page


@pytest.fixture(scope="module")
def written(finished):  # noqa: F811
    return report(ReportConfig(runs=(str(finished),), out=str(finished / "page.html")))


@pytest.mark.parametrize(("width", "scheme"), [(1400, "light"), (1400, "dark"), (390, "light")])
def test_looks(opened, written, width, scheme):
    watched = opened(written, width, scheme)
    paper = watched.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (scheme == "light")
    look(watched, CHARTS)


@pytest.mark.parametrize("width", [1400, 390])
def test_looks_of_several(opened, tmp_path, width):
    """Four runs with long names, before and after each: a colour a run, the baseline hollow, a legend of its own."""
    names = [f"a-run-of-a-long-name-with-its-seed-{i}" for i in range(4)]
    found = [everything(name, many(3)) for name in names]
    for i, part in enumerate(found):
        (numbers,) = part["evaluations"].values()
        mean = {"quality": 0.5, "semantic_diversity": 0.4 + i / 20, "style_diversity": 0.5}
        numbers["mean"], numbers["baseline"] = {"before": mean, "after": {**mean, "quality": 0.7}}, "before"
        numbers["interval"] = {name: {m: [v - 0.1, v + 0.1] for m, v in mean.items()} for name in ("before", "after")}
    written = tmp_path / "several.html"
    written.write_text(page({kind: {k: v for part in found for k, v in part[kind].items()} for kind in found[0]}, "4"))
    watched = opened(written, width)
    keys = watched.page.locator("#points .key").all_inner_texts()
    assert [key.split()[-1] for key in keys] == names
    assert watched.page.locator("#semantic .point").count() == 8
    assert "batch_size" in watched.page.locator("#differing").inner_text()
    look(watched, ("semantic", "style", "curve-loss", "curve-margin", "weights", "deviations", "map"))


def look(watched, charts):
    drawn = dict(watched.page.evaluate(DRAWN))
    assert set(drawn) == set(charts) and all(drawn.values()), drawn
    assert watched.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    boxes = watched.page.evaluate(BOXES)
    for kind in (["SECTION"], ["DIV"]):
        of_kind = [b for b in boxes if b[0] in kind and b[4] > b[2]]
        for i, a in enumerate(of_kind):
            for b in of_kind[i + 1 :]:
                apart = a[4] <= b[2] + 1 or b[4] <= a[2] + 1 or a[5] <= b[3] + 1 or b[5] <= a[3] + 1
                assert apart, (a, b)
    assert watched.page.evaluate(CUT) == [] and watched.page.evaluate(CROSSING) == []
    assert watched.complaints == []
    watched.page.close()


def test_controls(opened, written):
    """Theme, prompt picker, search, a click on a point, and samples with hostile text."""
    from playwright.sync_api import expect

    watched = opened(written)
    tab = watched.page
    of_map = "document.querySelector('#map .main-svg').style.background"
    paper = f"[getComputedStyle(document.body).backgroundColor, {of_map}]"
    white, black = ["rgb(255, 255, 255)"] * 2, ["rgb(20, 24, 31)"] * 2
    assert tab.evaluate(paper) == white
    drawn = {"selector": "html[data-ready=yes]", "state": "attached"}
    tab.click("#theme")
    tab.wait_for_selector(**drawn)
    assert tab.evaluate(paper) == black
    tab.emulate_media(color_scheme="dark")
    tab.click("#theme")
    tab.wait_for_selector(**drawn)
    assert tab.evaluate(paper) == white
    tab.select_option("#prompt", index=1)
    assert "Write of a hill." in tab.inner_text("#asked")
    tab.fill("#search", "PLAN")
    expect(tab.locator("#hits")).to_have_text("1 prompt")
    assert "Write of a bird." in tab.inner_text("#asked") and "plan" in tab.inner_text("#reading")
    tab.fill("#search", "nowhere at all")
    expect(tab.locator("#hits")).to_have_text("0 prompts")
    tab.fill("#search", "")
    expect(tab.locator("#prompt option")).to_have_count(4)
    for j, text in enumerate(json.loads(tab.text_content("#group-2"))["texts"]):
        point = tab.locator("#map .points > .point").nth(j)
        point.hover(force=True)
        expect(tab.locator("#map .hovertext")).to_contain_text(text)
        point.click(force=True)
        expect(tab.locator("#response")).to_have_value(str(j))
        expect(tab.locator("#reading")).to_have_text(text)
    tab.select_option("#response", index=0)
    expect(tab.locator("#reading")).to_have_text("It sang.")
    assert HOSTILE.split("\u2028")[0] in tab.inner_text("#samples")
    assert watched.complaints == []
    tab.close()


def test_hostile_text_everywhere(opened, tmp_path):
    """As prompt, response, name of a run and setting: shown, and nothing of it runs, on hover neither."""
    group = {"prompt": HOSTILE, "texts": [HOSTILE] * 3, "scores": [1, 2, 3], "deviations": [0.1, 0.2, 0.3]}
    group |= {"x": [0, 1, 2], "y": [0, 2, 1], "pairs": [[2, 0, 1.0]]}
    written = tmp_path / "hostile.html"
    written.write_text(page(everything(HOSTILE, [group]), HOSTILE))
    watched = opened(written)
    watched.page.locator("#map .point").last.hover(force=True)
    watched.page.wait_for_selector("#map .hovertext")
    assert "alert(1)" in watched.page.text_content("#map .hovertext")
    assert watched.page.title().startswith("</script><script>")
    assert watched.complaints == [] and watched.page.locator("img").count() == 0
    watched.page.close()


def test_ten_thousand_responses(opened, tmp_path):
    """`python -m benchmarks.report` measures it; here a bound that other tests beside it do not break."""
    written = tmp_path / "many.html"
    written.write_text(page(everything("many", many()), "many"))
    start = time.perf_counter()
    watched = opened(written)
    watched.page.wait_for_selector("#map .point")
    assert time.perf_counter() - start < 12
    assert watched.complaints == []
    watched.page.close()


def everything(name, groups):
    """What collect would find, in small."""
    counted = {"edges": [0.0, 1.0, 2.0], "counts": [3, 4]}
    summary = {"prompts": len(groups), "responses": 8 * len(groups), "pairs": 4, "duplicate_texts": 0}
    data = {"summary": summary, "settings": {name: name}, "weights": counted, "deviations": counted}
    curves = {"loss": [0.7, 0.6], "margin": [0.0, 0.1]}
    run = {"config": {name: name}, "card": {"machine": {name: name}}, "steps": [1, 2], "curves": curves}
    run["config"]["batch_size"] = len(name) + sum(map(ord, name))
    mean = {"quality": 0.5, "semantic_diversity": 0.6, "style_diversity": 0.5}
    interval = {measure: [x - 0.1, x + 0.1] for measure, x in mean.items()}
    return {
        "runs": {name: {**run, "eval_steps": [], "eval_curves": {}}},
        "prepared": {name: {**data, "zero_share": 0.1, "map_of": name, "groups": groups}},
        "responses": {name: [{"prompt": g["prompt"], "texts": g["texts"], "scores": g["scores"]} for g in groups[:20]]},
        "evaluations": {name: {"mean": {name: mean}, "interval": {name: interval}}},
    }


def many(num_prompts=1250, words=300):
    """10,000 responses of 300 words."""
    text = "the sea was calm and nobody came to the door " * (words // 10)
    places = {"x": [i % 3 for i in range(8)], "y": [i % 5 for i in range(8)], "pairs": [[0, 1, 1.0]]}
    numbers = {"scores": [float(i) for i in range(8)], "deviations": [i / 8 for i in range(8)]}
    return [
        {"prompt": f"{i} of a sea", "texts": [f"{j} {text}" for j in range(8)], **numbers, **places}
        for i in range(num_prompts)
    ]
