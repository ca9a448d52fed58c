"""Draws results/scaling.json: results/scaling.svg. Wants matplotlib.

python -m benchmarks.plot
"""

import json
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
OURS, OTHER, INK = "#1b6ca8", "#c0562b", "#333333"


def main() -> None:
    result = json.loads((RESULTS / "scaling.json").read_text())
    matplotlib.use("svg")
    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none"}
    colours = dict.fromkeys(("axes.edgecolor", "text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    plt.rcParams.update({**style, **colours, "svg.hashsalt": "scaling", "axes.titlesize": 10.5})
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    time(left, result["time"])
    memory(right, result["memory"])
    figure.savefig(RESULTS / "scaling.svg", facecolor="white", metadata={"Date": None})


def time(axes, found: dict) -> None:
    tokens = [p["tokens"] / 1000 for p in found["points"]]
    middle, low, high = zip(*(p["seconds"] for p in found["points"]), strict=True)
    ends = [[m - a for m, a in zip(middle, low, strict=True)], [b - m for m, b in zip(middle, high, strict=True)]]
    fit = found["fit"]
    line = [fit["seconds_at_0"] + fit["seconds_per_1k_tokens"] * x for x in (0, tokens[-1])]
    axes.plot((0, tokens[-1]), line, color=OURS, linewidth=1, alpha=0.6)
    axes.errorbar(tokens, middle, ends, fmt="o", color=OURS, markersize=5, capsize=3)
    label = f"{fit['seconds_per_1k_tokens']:.2f} s per 1,000 tokens + {fit['seconds_at_0']:.2f} s"
    axes.annotate(label, (0.05, 0.9), xycoords="axes fraction")
    axes.set(xlabel="tokens in the batch, thousands", ylabel="seconds a step", xlim=(0, None), ylim=(0, None))
    axes.set_title("Step of ddpo train, sequences of 512 tokens", loc="left")


def memory(axes, found: dict) -> None:
    size = [p["V"] / 1024 for p in found["points"]]
    for name, colour in (("eager", OTHER), ("linear_logp", OURS)):
        mib = [p[name] for p in found["points"]]
        axes.plot(size, mib, "o-", color=colour, markersize=5)
        axes.annotate(name, (size[-1], mib[-1]), (0, 8), textcoords="offset points", ha="right", color=colour)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(size, [f"{v:.0f}k" for v in size])
    axes.minorticks_off()
    axes.set(xlabel="vocabulary", ylabel="peak extra memory, MiB")
    axes.margins(y=0.15)
    axes.set_title(f"Head, forward and backward, {found['rows']:,} rows", loc="left")


if __name__ == "__main__":
    main()
