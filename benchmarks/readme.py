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


def demo() -> str:
    """The table that the demo of the first seed prints, then the differences of the other seeds."""
    result = read_json(ROOT / "benchmarks" / "results" / "demo.json")
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


def ops() -> str:
    """The op beside other ways: time, memory, error."""
    return tables.ops_readme(read_json(ROOT / "benchmarks" / "results" / "ops.json"))


def step() -> str:
    """A training step beside TRL's and the release's."""
    return tables.step_readme(read_json(ROOT / "benchmarks" / "results" / "step.json"))


def scaling() -> str:
    """A step's time by its tokens, the head's memory by the vocabulary."""
    return tables.scaling_readme(read_json(ROOT / "benchmarks" / "results" / "scaling.json"))


def memory() -> str:
    """What `ddpo plan` says of a CPU's memory beside what was measured."""
    return tables.memory_readme(read_json(ROOT / "benchmarks" / "results" / "memory.json"))


def deviation() -> str:
    """Mean distances beside the release's algorithm, torch.cdist and FAISS."""
    return tables.deviation_readme(read_json(ROOT / "benchmarks" / "results" / "deviation.json"))


def gpu() -> str:
    """Lower bounds of one training step's head on an H100, ours and the peers'."""
    return tables.gpu_readme(read_json(ROOT / "benchmarks" / "results" / "gpu_model.json"))


def fidelity() -> str:
    """The method at a small scale: every run's measures, and differences between them."""
    return tables.fidelity_readme(read_json(ROOT / "benchmarks" / "results" / "fidelity.json"))


def headline() -> str:
    """What a step costs less than."""
    return short.headline(read_json(ROOT / "benchmarks" / "results" / "step.json"))


def op_short() -> str:
    """The op, a row a way."""
    return short.op_short(read_json(ROOT / "benchmarks" / "results" / "ops.json"))


def step_short() -> str:
    """A training step, four rows."""
    return short.step_short(read_json(ROOT / "benchmarks" / "results" / "step.json"))


def deviation_short() -> str:
    """Mean distances, a few sizes."""
    return short.deviation_short(read_json(ROOT / "benchmarks" / "results" / "deviation.json"))


PLACES = {  # file -> its blocks
    "README.md": (headline, demo, op_short, step_short, deviation_short, fidelity),
    "docs/speed.md": (ops, gpu, step, scaling, memory, deviation),
}


def render(place: str, text: str) -> str:
    """The file's text with every block between `<!-- name -->` and `<!-- /name -->` made anew. Raises ValueError."""
    for make in PLACES[place]:
        name = make.__name__
        block = f"<!-- {name} -->\n{make()}\n<!-- /{name} -->"
        text, found = re.subn(rf"<!-- {name} -->.*?<!-- /{name} -->", lambda _, b=block: b, text, flags=re.S)
        if found != 1:
            raise ValueError(f"{place}: wanted one block {name!r}, found {found}")
    return text


if __name__ == "__main__":
    for name in PLACES:
        (ROOT / name).write_text(render(name, (ROOT / name).read_text()))
