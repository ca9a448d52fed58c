"""Writes README's generated blocks from the committed results.

python benchmarks/readme.py            # rewrite README.md
"""

import re
from pathlib import Path

from ddpo.evaluate import MEASURES
from ddpo.files import read_json

ROOT = Path(__file__).parent.parent


def demo_table() -> str:
    """A row a measure; before and after of seed 0, then each seed's difference with its interval."""
    result = read_json(ROOT / "benchmarks" / "results" / "demo.json")
    first, *others = result["runs"]
    seeds = [str(run["seed"]) for run in result["runs"]]
    lines = [
        f"| seed {first['seed']}, {first['num_prompts']} prompts x 4 | before | after | difference [95 % interval] "
        + "".join(f"| seed {run['seed']}: difference " for run in others)
        + "|",
        "| --- |" + " --- |" * (3 + len(others)),
    ]
    for measure in first["mean"]["before"]:
        label, decimals = MEASURES[measure]
        means = [f"{first['mean'][when][measure]:.{decimals}f}" for when in ("before", "after")]
        differences = [_difference(run["difference"][measure], decimals) for run in result["runs"]]
        lines.append("| " + " | ".join([label, *means, *differences]) + " |")
    minutes, peak = max(r["seconds"] for r in result["runs"]) / 60, max(r["peak_mib"] for r in result["runs"])
    zero = ", ".join(f"{run['zero_share']:.0%}" for run in result["runs"])
    notes = [
        "Bold: the interval leaves out 0.",
        "Log-prob at start: of the responses under the starting model, nats per token.",
        f"Pairs of weight zero: {zero} (seeds {', '.join(seeds)}).",
        f"Slowest run {minutes:.1f} minutes, install not counted; peak memory {peak / 1024:.1f} GiB.",
        f"Two CPU cores, torch {result['versions']['torch']}, commit {result['commit']}:",
        "`benchmarks/results/demo.json`.",
    ]
    lines += ["", " ".join(notes)]
    return "\n".join(lines)


def _difference(d: dict, decimals: int) -> str:
    text = f"{d['mean']:+.{decimals}f} [{d['low']:+.{decimals}f}, {d['high']:+.{decimals}f}]"
    return f"**{text}**" if d["low"] > 0 or d["high"] < 0 else text


BLOCKS = {"demo": demo_table}


def render(text: str) -> str:
    """README with every block between `<!-- name -->` and `<!-- /name -->` made anew."""
    for name, make in BLOCKS.items():
        block = f"<!-- {name} -->\n{make()}\n<!-- /{name} -->"
        text, found = re.subn(rf"<!-- {name} -->.*?<!-- /{name} -->", lambda _, b=block: b, text, flags=re.S)
        if found != 1:
            raise ValueError(f"README.md: wanted one block {name!r}, found {found}")
    return text


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(render(readme.read_text()))
