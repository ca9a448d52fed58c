"""What the study found: a table, a figure, and the numbers behind both."""

from dataclasses import asdict
from pathlib import Path

import numpy as np

from benchmarks.fidelity import study
from ddpo import metrics
from ddpo.config import Measuring
from ddpo.data.groups import read_jsonl
from ddpo.evaluate import differences, median_words, summary
from ddpo.files import read_json
from ddpo.measuring import Measurer, quality_of

BASELINES = {  # whom each method is compared with
    "SFT": "base",
    "DPO": "SFT",
    "DDPO-semantic": "DPO",
    "DDPO-style": "DPO",
    "DDPO-both": "DPO",
    "DivPO": "DPO",
    f"DPO, T {study.HOT}": "DPO",
    "ORPO": "base",
    "DORPO-both": "ORPO",
}
COLUMNS = {  # measure -> heading, decimals
    "quality": ("quality", 3),
    "semantic_diversity": ("semantic", 3),
    "style_diversity": ("style", 3),
    "semantic_diversity_cut": ("semantic, cut", 3),
    "semantic_diversity_good": ("semantic, good ones", 3),
    "num_words": ("words", 1),
}


def measure(out: Path, seed: int = 0) -> dict:
    """Every method's measures over all prompts, and its differences to its baseline, paired by prompt."""
    names = [*study.SAMPLED, study.PEOPLE]
    sets = {name: study.scored_groups(out, name) for name in names}
    every = [group for name in study.SAMPLED for group in sets[name]]
    threshold = float(np.median(np.concatenate(quality_of(every, "reward"))))
    num_words = min(median_words(groups) for groups in sets.values())
    measurer = Measurer(Measuring(text_measures=False))
    values = {name: measurer(groups, "reward", threshold, num_words) for name, groups in sets.items()}
    for per in values.values():
        del per["vendi_score"], per["distinct_k"]  # counts, of sets of different sizes
    ends = np.cumsum([len(study.fold_groups(out, study.PEOPLE, fold)) for fold in range(study.FOLDS)])[:-1]
    rated = [np.mean([r.score for r in group.responses]) for group in sets[study.PEOPLE]]
    return {
        "num_prompts": len(sets["base"]),
        "quality_threshold": threshold,
        "cut_to_words": num_words,
        **summary(values, seed),
        "baselines": BASELINES,
        "differences": {n: differences(values[b], values[n], seed) for n, b in BASELINES.items()},
        "differences_by_fold": {n: by_fold(values[b], values[n], ends) for n, b in BASELINES.items()},
        "training": {name: _training(out, name) for name in study.METHODS},
        "people_rated": asdict(metrics.bootstrap(rated, seed)),
        "reward_model": [_reward(out / f"fold{fold}") for fold in range(study.FOLDS)],
        "held_out_pairs": _held_out_pairs(out, study.WATCHED),
    }


def _reward(fold: Path) -> dict:
    found = read_json(fold / "reward" / "evaluation.json")
    return {name: value for name, value in found.items() if name != "calibration"}


def by_fold(before: dict, after: dict, ends: np.ndarray) -> dict[str, list[float | None]]:
    """Mean differences of each fold: prompts of a fold share their models, so that these are the independent ones.
    ends: of the folds' prompts, but the last."""
    return {measure: [_mean(part) for part in np.split(after[measure] - before[measure], ends)] for measure in COLUMNS}


def _mean(values: np.ndarray) -> float | None:
    """Over the prompts where it is defined; None where it is in none."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else None


def _training(out: Path, name: str) -> dict:
    """Pairs (SFT: responses) that a method's runs have, summed over folds, and their passes."""
    folds = [out / f"fold{fold}" for fold in range(study.FOLDS)]
    summaries = [read_json(fold / study.METHODS[name].data / "manifest.json")["summary"] for fold in folds]
    rows = [[row for _, row in read_jsonl(fold / "runs" / name / "metrics.jsonl")] for fold in folds]
    kind = "responses" if name == "SFT" else "pairs"
    return {
        kind: sum(s[kind] for s in summaries),
        "steps": [of[-1]["step"] for of in rows],
        "passes": round(float(np.mean([of[-1]["epoch"] for of in rows])), 2),
        "zero_share": [s["weights"]["zero_share"] for s in summaries],
    }


def _held_out_pairs(out: Path, run: str) -> dict:
    """Margin and accuracy on held-out pairs, before and after training, means over folds."""
    runs = [out / f"fold{fold}" / "runs" / run for fold in range(study.FOLDS)]
    lines = [[row for _, row in read_jsonl(run / "eval.jsonl")] for run in runs]
    return {
        name: [float(np.mean([fold[at][f"eval_rewards/{name}"] for fold in lines])) for at in (0, -1)]
        for name in ("margins", "accuracies")
    }


def markdown(result: dict) -> str:
    """The table: a row a method, means with 95 % intervals; then differences to each method's baseline."""
    heads = [head for head, _ in COLUMNS.values()]
    rows = ["| | " + " | ".join(heads) + " |", "| --- |" + " --- |" * len(heads)]
    for name, means in result["mean"].items():
        cells = [_cell(means[m], result["interval"][name][m], decimals) for m, (_, decimals) in COLUMNS.items()]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    rows += ["", "| difference | " + " | ".join(heads) + " |", "| --- |" + " --- |" * len(heads)]
    for name, found in result["differences"].items():
        cells = [_difference(found[m], decimals) for m, (_, decimals) in COLUMNS.items()]
        rows.append(f"| {name} - {result['baselines'][name]} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _cell(mean, interval, decimals) -> str:
    return f"{mean:.{decimals}f} ± {(interval[1] - interval[0]) / 2:.{decimals}f}"


def _difference(d: dict, decimals: int) -> str:
    text = f"{d['mean']:+.{decimals}f} (p {d['p']:.2g})"
    return f"**{text}**" if d["p"] < 0.05 else text


def figure(result: dict, path: Path) -> None:
    """Quality against semantic and style diversity, a point a method with its intervals, people's answers as gold."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "fidelity"})
    drawn, axes = plt.subplots(1, 2, figsize=(9.5, 4.2), layout="constrained", sharey=True)
    for axis, measure in zip(axes, ("semantic_diversity", "style_diversity"), strict=True):
        for i, (name, means) in enumerate(result["mean"].items()):
            x, y = means[measure], means["quality"]
            (x0, x1), (y0, y1) = (result["interval"][name][m] for m in (measure, "quality"))
            colour = "#c9a227" if name == study.PEOPLE else f"C{i % 10}"
            marker = "*" if name == study.PEOPLE else "o"
            axis.errorbar(
                x,
                y,
                [[y - y0], [y1 - y]],
                [[x - x0], [x1 - x]],
                fmt=marker,
                color=colour,
                label=name,
                elinewidth=0.6,
                markersize=11 if name == study.PEOPLE else 5,
            )
        axis.set_xlabel(f"{measure.split('_')[0]} diversity")
    axes[0].set_ylabel("quality (reward model)")
    handles, names = axes[0].get_legend_handles_labels()
    drawn.legend(handles, names, loc="outside right center", frameon=False)
    drawn.savefig(path, facecolor="white", metadata={"Date": None})
    plt.close(drawn)
