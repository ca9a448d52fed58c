"""From texts to weights, as `ddpo prepare` and `ddpo weigh` make them."""

import dataclasses

import numpy as np
import torch

from ddpo import deviation
from ddpo.config import Encoding, Weighing
from ddpo.embedded import Embedded
from ddpo.encoders import load_encoder

WINDOW = 16_384  # responses embedded and weighed at a time
ALL_ONE = "as good as none; to differ they want prompts with three different responses or more"


def load_measures(cfg: Encoding) -> dict[str, Embedded]:
    """Each measure's embeddings. Raises ValueError for measures or encoders that are none."""
    if not cfg.measures or len(set(cfg.measures)) != len(cfg.measures):
        raise ValueError(f"measures must name each of semantic and style at most once, got {list(cfg.measures)}")
    of_semantic = {"prompt": cfg.semantic_prompt, "task": cfg.semantic_task}
    encoders = {}
    for m in cfg.measures:
        asked = of_semantic if m == "semantic" else {}
        encoders[m] = load_encoder(getattr(cfg, m), m, trust_remote_code=cfg.trust_remote_code, **asked)
    return {m: Embedded(encoder, cfg.embeddings) for m, encoder in encoders.items()}


def deviations(embeddings: dict[str, torch.Tensor], cfg: Weighing, groups=None) -> dict[str, torch.Tensor]:
    """distance_<measure>, deviation and weight of each response, (n,) each.

    embeddings: (n, D) of each measure; groups: (R+1,) row offsets, None: one group.
    """
    distances = {m: deviation.mean_distance(e, cfg.metric, groups) for m, e in embeddings.items()}
    result = deviation.weights(
        distances, groups, combine=cfg.combine, min_deviation=cfg.min_deviation, release_floor=cfg.release_floor
    )
    found = {f"distance_{m}": d for m, d in distances.items()}
    return {**found, "deviation": result.deviation, "weight": result.weight}


def weigh_pairs(offsets: np.ndarray, pairs: np.ndarray, embeddings: dict, cfg: Weighing) -> dict:
    """Columns for prepared.Writer / prepared.weigh: pair_weight (P,) and the deviation of each response (R,).

    offsets (groups + 1,) of the responses; pairs (P, 3): group, chosen, rejected. Under normalise_over 'pairs' the
    other responses have no deviation (nan).
    """
    num = int(offsets[-1])
    used = np.arange(num) if cfg.normalise_over == "all" else np.unique(pairs[:, 1:])
    counts = np.bincount(np.searchsorted(offsets, used, side="right") - 1, minlength=len(offsets) - 1)
    groups = torch.tensor(np.cumsum([0, *counts[counts > 0]]))
    found = deviations({m: e[used] for m, e in embeddings.items()}, cfg, groups)
    columns = {name: np.full(num, np.nan) for name in found}
    for name, values in found.items():
        columns[name][used] = values.numpy()
    pair_weight = columns["weight"][pairs[:, 1]]
    if cfg.weighting == "crpo":
        among_used = torch.from_numpy(np.searchsorted(used, pairs[:, 1:]))
        pair_weight = deviation.crpo_weights(
            relative_distances(found, cfg, groups), among_used, cfg.crpo_scales
        ).numpy()
    return {"pair_weight": pair_weight, "deviation": columns}


def relative_distances(found: dict[str, torch.Tensor], cfg: Weighing, groups=None) -> torch.Tensor:
    """(k, n) of what `deviations` found."""
    return deviation.relative_distances({m: found[f"distance_{m}"] for m in cfg.measures}, groups)


def join(weightings: list[dict]) -> dict:
    """One weighting of those of parts that follow each other."""
    columns = {name: np.concatenate([w["deviation"][name] for w in weightings]) for name in weightings[0]["deviation"]}
    return {"pair_weight": np.concatenate([w["pair_weight"] for w in weightings]), "deviation": columns}


def report_of(weighting: dict) -> dict:
    """See deviation.report: of the pairs' weights."""
    return deviation.report(torch.from_numpy(weighting["pair_weight"]))


def settings_of(cfg: Weighing) -> dict:
    """What decides the weights, for a manifest."""
    return {f.name: getattr(cfg, f.name) for f in dataclasses.fields(Weighing) if f.name != "embeddings"}


def tell_weights(report: dict) -> str:
    """A report for people."""
    edges, counts = report["histogram"].values()
    if report["mean"] == edges[-1] == 1:
        return f"all {report['count']:,} are 1, {ALL_ONE}"
    return (
        f"mean {report['mean']:.3f}, zero {report['zero_share']:.0%}, "
        f"effective sample size {report['effective_sample_size']:,.1f} of {report['count']:,}\n"
        f"  from 0 to {edges[-1]:.2f}, in tenths of it: " + " ".join(f"{count:,}" for count in counts)
    )
