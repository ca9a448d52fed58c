"""From texts to weights, as `ddpo prepare` and `ddpo weigh` make them."""

import dataclasses

import numpy as np
import torch

from ddpo import deviation, distributed
from ddpo.config import Encoding, Weighing
from ddpo.embedded import Embedded
from ddpo.encoders import load_encoder


def load_measures(cfg: Encoding) -> dict[str, Embedded]:
    """Each measure's embeddings. Raises ValueError for measures or encoders that are none."""
    if not cfg.measures or len(set(cfg.measures)) != len(cfg.measures):
        raise ValueError(f"measures must name each of semantic and style at most once, got {list(cfg.measures)}")
    options = {"trust_remote_code": cfg.trust_remote_code}
    of = {"semantic": {"prompt": cfg.semantic_prompt, "task": cfg.semantic_task}, "style": {}}
    encoders = {m: load_encoder(getattr(cfg, m), m, **options, **of[m]) for m in cfg.measures}
    return {m: Embedded(encoder, cfg.embeddings) for m, encoder in encoders.items()}


def embed(texts: list[str], cfg: Encoding) -> dict[str, torch.Tensor]:
    """Each measure's embeddings of all texts, (R, D) float32; under torchrun each process encodes a share."""
    distributed.start()
    return {m: embedded.rows(texts) for m, embedded in load_measures(cfg).items()}


def deviations(embeddings: dict[str, torch.Tensor], cfg: Weighing, groups=None) -> dict[str, torch.Tensor]:
    """distance_<measure>, deviation and weight of each response, (n,) each.

    embeddings: (n, D) of each measure; groups: (R+1,) row offsets, None: one group.
    """
    distances = {m: deviation.mean_distance(e, cfg.metric, groups) for m, e in embeddings.items()}
    options = {"combine": cfg.combine, "min_deviation": cfg.min_deviation, "release_floor": cfg.release_floor}
    result = deviation.weights(distances, groups, **options)
    found = {f"distance_{m}": d for m, d in distances.items()}
    return {**found, "deviation": result.deviation, "weight": result.weight}


def weigh_pairs(offsets: np.ndarray, pairs: np.ndarray, embeddings: dict, cfg: Weighing) -> tuple[dict, dict]:
    """Columns for prepared.write / prepared.weigh, and the report over the pairs' weights.

    pairs (P, 3): group, chosen, rejected. Under normalise_over 'pairs' the other responses have no deviation (nan).
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
    return {"pair_weight": pair_weight, "deviation": columns}, deviation.report(torch.from_numpy(pair_weight))


def settings_of(cfg: Weighing) -> dict:
    """What decides the weights, for a manifest."""
    return {f.name: getattr(cfg, f.name) for f in dataclasses.fields(Weighing) if f.name != "embeddings"}


def tell_weights(report: dict) -> str:
    """A report for people, in two lines."""
    edges, counts = report["histogram"].values()
    return (
        f"mean {report['mean']:.3f}, zero {report['zero_share']:.0%}, "
        f"effective sample size {report['effective_sample_size']:,.1f} of {report['count']:,}\n"
        f"  from 0 to {edges[-1]:.2f}, in tenths of it: " + " ".join(f"{count:,}" for count in counts)
    )
