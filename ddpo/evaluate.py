"""`ddpo evaluate`: quality, diversity, length and likelihood of files of responses, by prompt and averaged, and what
changed from a baseline."""

from dataclasses import asdict

import numpy as np
from rich.table import Table

from ddpo import distributed, log, metrics
from ddpo.annotate import annotate
from ddpo.config import AnnotateConfig, EvaluateConfig
from ddpo.data.groups import Group, check_same_prompts, labels, read_groups_file
from ddpo.files import write_json
from ddpo.measuring import DEFINITIONS, Measurer, has_everywhere, quality_of

MEASURES = {  # name -> (label, decimals)
    "quality": ("quality", 3),
    "good_share": ("share of good ones", 2),
    "semantic_diversity": ("semantic diversity", 3),
    "semantic_diversity_good": ("  among good ones", 3),
    "semantic_diversity_cut": ("  cut to one length", 3),
    "style_diversity": ("style diversity", 3),
    "style_diversity_good": ("  among good ones", 3),
    "style_diversity_cut": ("  cut to one length", 3),
    "vendi_score": ("Vendi score", 2),
    "distinct_k": ("distinct_k", 2),
    "compression_ratio": ("compression ratio *", 2),
    "homogenisation": ("homogenisation *", 3),
    "ngram_diversity": ("n-gram diversity", 2),
    "self_repetition": ("self-repetition *", 2),
    "num_words": ("mean length, words", 1),
    "num_tokens": ("mean length, tokens", 1),
    "logp_per_token": ("log-prob at start", 3),
    "cut_share": ("share cut off", 2),
}
NUMBER_COUNTS = ("vendi_score", "distinct_k", "compression_ratio", "ngram_diversity", "self_repetition")
WIDE = 3  # files whose intervals still fit into a table


def evaluate(cfg: EvaluateConfig) -> dict:
    """Measures files of responses to the same prompts; prints a table and returns (and writes) the numbers.

    Length-controlled diversity (<measure>_diversity_cut) cuts each response to its first L words, L the smallest of the
    files' median lengths, and encodes it anew; shorter responses stay as they are. An encoder that reads less than
    that (MiniLM 256 tokens) gives the same as without.
    Returns: settings, card, definitions (their version); per_prompt, mean, interval and num_defined by file and
        measure; with a baseline also differences by file and measure (mean, low, high, p, num_prompts). None stands
        where a measure is not defined.
    Raises: ValueError where the files hold bad rows, other prompts than each other, or no number for a quality.
    """
    distributed.start()
    with log.quiet(cfg.json):
        if cfg.export_annotation and distributed.is_first():  # first: what it refuses is refused at once
            annotate(AnnotateConfig(responses=cfg.files, out=cfg.export_annotation, seed=cfg.seed))
        result = _evaluate(cfg)
    if distributed.is_first() and cfg.out:
        write_json(cfg.out, result)
    log.answer(cfg, result)
    if not cfg.json:
        show(result)
        if cfg.out:
            log.console.print(f"numbers: {cfg.out}")
    return result


def _evaluate(cfg: EvaluateConfig) -> dict:
    sets = dict(zip(labels(cfg.files), map(read_groups_file, cfg.files), strict=True))
    names, groups = list(sets), [g for part in sets.values() for g in part]
    for other in names[1:]:
        check_same_prompts(sets[names[0]], sets[other], f"{names[0]} and {other}")
    key = cfg.quality or ("reward" if has_everywhere(groups, "reward") else None)
    threshold = cfg.quality_threshold
    if key and threshold is None:
        threshold = float(np.median(np.concatenate(quality_of(groups, key))))
    num_words = min(median_words(part) for part in sets.values())
    measurer = Measurer(cfg)
    values = {name: measurer(part, key, threshold, num_words) for name, part in sets.items()}
    result = {
        "settings": asdict(cfg),
        "card": log.card(),
        "definitions": DEFINITIONS,
        "num_prompts": len(sets[names[0]]),
        "num_responses": {name: sum(len(g.responses) for g in part) for name, part in sets.items()},
        "quality": key,
        "quality_threshold": threshold,
        "cut_to_words": num_words,
        "baseline": names[0] if cfg.before else None,
        **summary(values, cfg.seed),
    }
    if cfg.before:
        before = values[names[0]]
        result["differences"] = {name: differences(before, values[name], cfg.seed) for name in names[1:]}
    return result


def median_words(groups: list[Group]) -> int:
    """Median length of all responses in words, rounded down, at least 1."""
    return max(1, int(np.median([len(r.text.split()) for g in groups for r in g.responses])))


def summary(values: dict[str, dict[str, np.ndarray]], seed: int) -> dict:
    """per_prompt, mean, interval and num_defined of values[file][measure] (R,)."""
    found: dict[str, dict[str, dict]] = {"per_prompt": {}, "mean": {}, "interval": {}, "num_defined": {}}
    for name, per in values.items():
        defined = {m: v[~np.isnan(v)] for m, v in per.items()}
        estimates = {m: metrics.bootstrap(v, seed) if len(v) else None for m, v in defined.items()}
        found["per_prompt"][name] = {m: [None if np.isnan(x) else float(x) for x in v] for m, v in per.items()}
        found["mean"][name] = {m: e and e.mean for m, e in estimates.items()}
        found["interval"][name] = {m: e and [e.low, e.high] for m, e in estimates.items()}
        found["num_defined"][name] = {m: len(v) for m, v in defined.items()}
    return found


def differences(before: dict[str, np.ndarray], after: dict[str, np.ndarray], seed: int) -> dict:
    """Of each measure the paired difference over the prompts where both are defined: mean, low, high, p, num_prompts;
    None where there is none."""
    found: dict[str, dict | None] = {}
    for measure in before:
        both = ~np.isnan(before[measure]) & ~np.isnan(after[measure])
        if both.any():
            estimate = metrics.paired_bootstrap(before[measure][both], after[measure][both], seed)
            found[measure] = {**asdict(estimate), "num_prompts": int(both.sum())}
        else:
            found[measure] = None
    return found


# --- for people -------------------------------------------------------------------------------------------


def table(result: dict) -> Table:
    """A row a measure, a column a file. Of one file beside a baseline also the difference with its 95 % interval and p;
    of several each difference, marked where p < 0.05; without a baseline the intervals of up to three files."""
    means, differences = result["mean"], result.get("differences", {})
    table = Table(title=f"{result['num_prompts']} prompts, means over prompts")
    table.add_column("measure", no_wrap=True)
    for name in means:
        table.add_column(name, justify="right", overflow="fold")
    one = next(iter(differences.values())) if len(differences) == 1 else None
    if one:
        table.add_column("difference [95 %]")
        table.add_column("clear?" if any(d and "p" not in d for d in one.values()) else "p")
    measured = next(iter(means.values()))
    for measure, (label, decimals) in MEASURES.items():
        if measure not in measured:
            continue
        row = [label]
        for name in means:
            cell = _cell(means[name][measure], decimals)
            if len(differences) > 1 and differences.get(name, {}).get(measure):
                d = differences[name][measure]
                cell += f" {d['mean']:+.{decimals}f}" + ("!" if d["p"] < 0.05 else " ")
            elif not differences and len(means) <= WIDE and (interval := result["interval"][name][measure]):
                cell += " [" + ", ".join(_cell(x, decimals) for x in interval) + "]"
            row.append(cell)
        if one:
            row += _difference(one[measure], decimals)
        table.add_row(*row)
    return table


def _cell(x: float | None, decimals: int) -> str:
    return "-" if x is None else f"{x:.{decimals}f}"


def _difference(d: dict | None, decimals: int) -> list[str]:
    """Cells: the difference with its interval, and p (older results have none: whether the interval leaves out 0)."""
    if d is None:
        return ["-", "-"]
    clear = "yes" if d["low"] > 0 or d["high"] < 0 else "no"
    interval = f"[{d['low']:+.{decimals}f}, {d['high']:+.{decimals}f}]"
    return [f"{d['mean']:+.{decimals}f} {interval}", metrics.p_value(d["p"]) if "p" in d else clear]


def show(result: dict) -> None:
    log.console.print(table(result))
    for note in notes(result):
        log.console.print(note)


def notes(result: dict) -> list[str]:
    """What a reader of the table needs to know, a line each."""
    measured = next(iter(result["mean"].values()))
    found = []
    if len(result.get("differences", {})) == 1:
        found.append("p: sign-flip test over prompts; an interval that holds 0 may be chance")
    elif "differences" in result:
        found.append(
            f"+-: difference to {result['baseline']}, !: p < 0.05 (sign-flip test); intervals are in --out's file"
        )
    if "homogenisation" in measured:
        found.append("*: lower is more diverse")
    if result["quality"]:
        found.append(f"quality: {result['quality']}; good ones have at least {result['quality_threshold']:g}")
        for name, num in result["num_defined"].items():
            missing = [result["num_prompts"] - num[m] for m in num if m.endswith("_diversity_good")]
            if any(missing):
                found.append(f"  {name}: {missing[0]} prompts with fewer than two good ones are left out among them")
    if any(measure.endswith("_cut") for measure in measured):
        found.append(f"cut to one length: to each response's first {result['cut_to_words']} words")
    if len(set(result["num_responses"].values())) > 1:
        unequal = [MEASURES[m][0].removesuffix(" *") for m in NUMBER_COUNTS if m in measured]
        found.append(f"files of different numbers of responses do not compare in {', '.join(unequal)}")
    if "logp_per_token" in measured:
        found.append("log-prob at start: of the responses under the starting model, nats per token")
    return found
