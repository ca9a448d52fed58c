"""Writes the generated blocks of README.md and docs/speed.md from the committed results.

python -m benchmarks.readme            # rewrite both
"""

import io
import re
from pathlib import Path

from rich.console import Console

from benchmarks import short, tables
from ddpo.evaluate import MEASURES, table
from ddpo.files import read_json

ROOT = Path(__file__).parent.parent


def demo(result: dict) -> str:
    """The table that the demo of the first seed prints, then the differences of the other seeds."""
    first, *others = result["runs"]
    console = Console(width=90, file=io.StringIO())
    console.print(table({**first, "differences": {"after": first["difference"]}}))
    printed = "\n".join(line.rstrip() for line in console.file.getvalue().rstrip().splitlines())
    rows = [
        "| after - before [95 % interval] | " + " | ".join(f"seed {run['seed']}" for run in others) + " |",
        "| --- |" + " --- |" * len(others),
    ]
    for measure in first["difference"]:
        label, decimals = MEASURES[measure]
        rows.append(
            f"| {label} | " + " | ".join(_difference(r["difference"][measure], decimals) for r in others) + " |"
        )
    minutes, peak = max(r["seconds"] for r in result["runs"]) / 60, max(r["peak_mib"] for r in result["runs"])
    shares = sorted(round(100 * run["zero_share"]) for run in result["runs"])
    zero = f"{shares[0]} %" if shares[0] == shares[-1] else f"{shares[0]} to {shares[-1]} %"
    notes = [
        f"Bold: the interval leaves out 0. Pairs of weight zero: {zero}.",
        f"Slowest of the four runs {minutes:.1f} minutes, install not counted; peak memory {peak / 1024:.1f} GiB.",
        f"Two CPU cores, torch {result['versions']['torch']}, commit {result['commit']}:",
        "`benchmarks/results/demo.json`.",
    ]
    return "\n".join(["```text", printed, "```", "", *rows, "", " ".join(notes)])


def _difference(d: dict, decimals: int) -> str:
    text = f"{d['mean']:+.{decimals}f} [{d['low']:+.{decimals}f}, {d['high']:+.{decimals}f}]"
    return f"**{text}**" if d["low"] > 0 or d["high"] < 0 else text


PLACES = {  # file -> its blocks: what makes each, of which file of results
    "README.md": {
        "headline": (short.headline, "step"),
        "demo": (demo, "demo"),
        "op_short": (short.op_short, "ops"),
        "step_short": (short.step_short, "step"),
        "deviation_short": (short.deviation_short, "deviation"),
        "fidelity": (tables.fidelity_readme, "fidelity"),
    },
    "docs/speed.md": {
        "ops": (tables.ops_readme, "ops"),
        "gpu": (tables.gpu_readme, "gpu_model"),
        "step": (tables.step_readme, "step"),
        "scaling": (tables.scaling_readme, "scaling"),
        "memory": (tables.memory_readme, "memory"),
        "deviation": (tables.deviation_readme, "deviation"),
    },
}


def render(place: str, text: str) -> str:
    """The file's text with every block between `<!-- name -->` and `<!-- /name -->` made anew. Raises ValueError."""
    for name, (make, results) in PLACES[place].items():
        made = make(read_json(ROOT / "benchmarks" / "results" / f"{results}.json"))
        block = f"<!-- {name} -->\n{made}\n<!-- /{name} -->"
        text, found = re.subn(rf"<!-- {name} -->.*?<!-- /{name} -->", lambda _, b=block: b, text, flags=re.S)
        if found != 1:
            raise ValueError(f"{place}: wanted one block {name!r}, found {found}")
    return text


if __name__ == "__main__":
    for name in PLACES:
        (ROOT / name).write_text(render(name, (ROOT / name).read_text()))
