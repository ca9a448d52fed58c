"""What the study found: a table, a figure, and the numbers behind both."""

from dataclasses import asdict
from pathlib import Path

import numpy as np

from benchmarks.fidelity import study
from ddpo import metrics
from ddpo.config import Measuring
from ddpo.data.groups import read_jsonl
from ddpo.evaluate import NUMBER_COUNTS, differences, median_words, summary
from ddpo.files import read_json
from ddpo.measuring import Measurer, quality_of

COMPARED = [  # a method and whom it is compared with
    ("SFT", "base"),
    ("DPO", "SFT"),
    ("DDPO-semantic", "DPO"),
    ("DDPO-style", "DPO"),
    ("DDPO-both", "DPO"),
    ("DivPO", "DPO"),
    (f"DPO, T {study.HOT}", "DPO"),
    ("DDPO-semantic", f"DPO, T {study.HOT}"),
    ("DDPO-semantic", "SFT"),
    ("ORPO", "base"),
    ("DORPO-both", "ORPO"),
]


def measure(out: Path, seed: int = 0) -> dict:
    """Every method's measures over all prompts, and its differences to its baseline, paired by prompt."""
    names = [*study.SAMPLED, study.PEOPLE]
    folds = [{name: study.fold_groups(out, name, fold) for name in names} for fold in range(study.FOLDS)]
    num_words = min(median_words([g for fold in folds for g in fold[name]]) for name in names)
    measurer, thresholds, parts = Measurer(Measuring()), [], []
    for fold in folds:  # a reward model each, on a scale of its own
        sampled = [group for name in study.SAMPLED for group in fold[name]]
        thresholds.append(float(np.median(np.concatenate(quality_of(sampled, "reward")))))
        parts.append({name: measurer(groups, "reward", thresholds[-1], num_words) for name, groups in fold.items()})
    measures = [m for m in parts[0]["base"] if m not in NUMBER_COUNTS]
    values = {name: {m: np.concatenate([part[name][m] for part in parts]) for m in measures} for name in names}
    rated = [np.mean([r.score for r in group.responses]) for fold in folds for group in fold[study.PEOPLE]]
    return {
        "num_prompts": len(rated),
        "quality_thresholds": thresholds,
        "cut_to_words": num_words,
        **summary(values, seed),
        "differences": {f"{n} - {b}": differences(values[b], values[n], seed) for n, b in COMPARED},
        "differences_by_fold": {f"{n} - {b}": by_fold(parts, b, n, measures) for n, b in COMPARED},
        "training": {name: _training(out, name) for name in study.METHODS},
        "trained_by": _trained_by(out),
        "people_rated": asdict(metrics.bootstrap(rated, seed)),
        "reward_model": [_reward(out / f"fold{fold}") for fold in range(study.FOLDS)],
        "held_out_pairs": _held_out_pairs(out, study.WATCHED),
    }


def _trained_by(out: Path) -> dict:
    """Commit and threads of the training, which may be another day's than the measuring."""
    card = read_json(out / "fold0" / "runs" / "SFT" / "card.json")
    return {"commit": card["commit"], "threads": card["machine"]["threads"]}


def _reward(fold: Path) -> dict:
    found = read_json(fold / "reward" / "evaluation.json")
    return {name: value for name, value in found.items() if name != "calibration"}


def by_fold(parts: list[dict], before: str, after: str, measures: list[str]) -> dict[str, list[float | None]]:
    """Mean differences of each fold: prompts of a fold share their models, so that these are the independent ones."""
    return {m: [_mean(part[after][m] - part[before][m]) for part in parts] for m in measures}


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
