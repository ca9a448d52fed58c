"""How long a report of many responses takes to open in Chromium, to draw its last chart, and to search all of them.

python -m benchmarks.report --write      # 10,000 responses of about 300 words; and results/report.json

The words are drawn from the stories the other benchmarks use. Each try is a browser of its own, with nothing kept.
Three pages in turn: a few responses (what plotly and the charts cost), all of them as prepared data, and these with as
many in a file of samples. Seconds are of the clock, and of the processor in the page's own process, which others' work
lengthens little.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks import states
from ddpo.files import write_json
from ddpo.log import card
from ddpo.report.collect import histogram
from ddpo.report.page import page

RESULTS = Path(__file__).parent / "results" / "report.json"
PER_PROMPT = 8


def found(responses: int, words: int, samples: bool) -> dict:
    """What ddpo.report.collect would find: prepared data, and with samples as many responses in a file of their own."""
    known, draw = " ".join(text for _, texts in states.stories()[1] for text in texts).split(), random.Random(0)
    numbers = np.random.default_rng(0).random((responses // PER_PROMPT, 4, PER_PROMPT)).round(5)

    def text(about):
        return " ".join(draw.choices(known, k=draw.randint(about * 4 // 5, about * 6 // 5)))

    groups = [
        {
            "prompt": text(20),
            "texts": [text(words) for _ in range(PER_PROMPT)],
            **dict(zip(("scores", "deviations", "x", "y"), columns.tolist(), strict=True)),
            "pairs": [[i, i + 1, 1.0] for i in range(0, PER_PROMPT, 2)],
        }
        for columns in numbers
    ]
    counts = {"prompts": len(groups), "responses": responses, "pairs": responses // 2}
    data = {"summary": counts, "settings": {}, "weights": None, "zero_share": 0.0, "map_of": "encoder", "no_map": None}
    data |= {"deviations": histogram(numbers[:, 1]), "groups": groups}
    texts = [{name: group[name] for name in ("prompt", "texts", "scores")} for group in groups]
    return {"runs": {}, "prepared": {"data": data}, "responses": {"after": texts} if samples else {}, "evaluations": {}}


def opened(html: Path, word: str) -> dict[str, float]:
    """Seconds (clock, processor) until the page can be read and its first chart is drawn, until its last, the map,
    is, and of a search through all texts."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        tab = browser.new_page(viewport={"width": 1400, "height": 900})
        tab.goto("about:blank")
        protocol = tab.context.new_cdp_session(tab)
        protocol.send("Performance.enable")

        def processor() -> float:
            return {m["name"]: m["value"] for m in protocol.send("Performance.getMetrics")["metrics"]}["ProcessTime"]

        start = time.perf_counter()
        tab.goto(f"file://{html}")
        tab.wait_for_selector(".chart .point")
        opened, cpu = time.perf_counter(), processor()
        tab.wait_for_selector("#map .point")
        drawn, cpu_drawn = time.perf_counter(), processor()
        tab.fill("#search", word)
        tab.wait_for_selector("#hits:not(:empty)")
        searched = time.perf_counter()
        browser.close()
    return {
        "open_s": round(opened - start, 2),
        "open_cpu_s": round(cpu, 2),
        "drawn_s": round(drawn - start, 2),
        "drawn_cpu_s": round(cpu_drawn, 2),
        "search_s": round(searched - drawn, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, default=10_000)
    parser.add_argument("--words", type=int, default=300, help="of a response, about")
    parser.add_argument("--tries", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="results/report.json")
    args = parser.parse_args()
    sides = {
        "few": (10 * PER_PROMPT, False),
        "prepared": (args.responses, False),
        "prepared_and_samples": (args.responses, True),
    }
    tries, mib = {side: [] for side in sides}, {}
    with tempfile.TemporaryDirectory() as folder:
        for side, (responses, samples) in sides.items():
            html = Path(folder) / f"{side}.html"
            html.write_text(page(found(responses, args.words, samples), side), encoding="utf-8")
            mib[side] = round(html.stat().st_size / 2**20, 1)
        for _ in range(args.tries):
            for side in sides:
                tries[side].append(opened(Path(folder) / f"{side}.html", "nowhere at all"))
    load = round(os.getloadavg()[0], 1)  # above the number of cores, others took their share of the clock's seconds
    result = {**card(), "load": load, "cores": os.cpu_count(), "responses": args.responses, "words": args.words}
    for side, found_of in tries.items():
        medians = {name: statistics.median(t[name] for t in found_of) for name in found_of[0]}
        result[side] = {"page_mib": mib[side], **medians, "tries": found_of}
    if args.write:
        write_json(RESULTS, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
