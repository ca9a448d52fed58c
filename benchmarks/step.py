"""One training step beside TRL's DPOTrainer and the released algorithm: SmolLM2-135M, LoRA, float32, CPU.

python -m benchmarks.step                      # three cases; writes nothing
python -m benchmarks.step --write              # and results/step.json
python -m benchmarks.step --quick              # a tiny model of random weights

First all sides must give the same losses over a few optimiser steps, and gradients that float64 bears out; one that is
wrong makes the exit status 1. Then they run interleaved in one process on the same token ids.
"""

import argparse
import contextlib
import gc
import shutil
import statistics
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from benchmarks import floor, measure, states, tables
from benchmarks.floor import Traits
from benchmarks.peers import CPU, Ours, Packed, Released, Row, Side, Trl, Work
from ddpo.config import PrepareConfig, TrainConfig
from ddpo.data import prepared
from ddpo.data.groups import write_jsonl
from ddpo.data.prepared import Prepared
from ddpo.data.tokens import ChatTokens
from ddpo.loading import PACKAGED, find_model
from ddpo.ops import cpp
from ddpo.prepare import prepare

LOSS = 1e-4  # nats
GRADIENT = {"exact": 1e-3, "drop_below": 5e-2}  # relative L2 distance to float64
LR, LORA_R = 5e-5, 16
TRL, RELEASED, OURS = "TRL DPOTrainer", "released algorithm", "ddpo"
ZEROS_TOO, FIRST = "ddpo, pairs of weight 0 forwarded", "ddpo, first epoch"
ALONE = ("linear_logp alone", "cached reference alone", "unique responses alone")  # on the released algorithm
ROWS = {  # on the released algorithm, each with those above it
    "packed, C++ attention": Row(),
    "+ linear_logp": Row("exact"),
    "+ drop_below": Row("drop_below"),
    "+ cached reference": Row("drop_below", cached=True),
    "+ unique responses": Row("drop_below", cached=True, unique=True),
}
PADDED = Traits(padded=True, scored_only=False, reference=True, unique=False)
TRAITS = {
    TRL: PADDED._replace(logits=2),
    RELEASED: PADDED,
    "linear_logp alone": PADDED._replace(scored_only=True),
    "cached reference alone": PADDED._replace(reference=False),
    "unique responses alone": PADDED._replace(unique=True),
    "packed, C++ attention": Traits(scored_only=False, reference=True, unique=False),
    "+ linear_logp": Traits(reference=True, unique=False),
    "+ drop_below": Traits(gradients=0, reference=True, unique=False),
    "+ cached reference": Traits(gradients=0, unique=False),
    "+ unique responses": Traits(gradients=0),
    ZEROS_TOO: Traits(gradients=0),
    FIRST: Traits(gradients=0, reference=True, skips_zeros=True),
    OURS: Traits(gradients=0, skips_zeros=True),
}


class Case(NamedTuple):
    name: str
    folder: Path
    batch_size: int
    rounds: int
    check: tuple[Path, int, int]  # another folder and batch size, where the check would be long; and steps
    rows: tuple[str, ...] = ()  # of ALONE, ROWS, FIRST and ZEROS_TOO
    whole: bool = False  # a step is all pairs of a prompt; TRL and the release take two of them


# --- data -------------------------------------------------------------------------------------------------


def write_groups(path: Path, source: Path, num_groups: int, most: int) -> str:
    """Prompts with their stories and seeded random scores, no two alike -> where the stories come from."""
    name, groups = states.stories(source)
    rng = np.random.default_rng(0)
    if len(groups) < num_groups:
        raise ValueError(f"{name}: wanted {num_groups} prompts, got {len(groups)}")
    rows = []
    for prompt, texts in ((prompt, texts[:most]) for prompt, texts in groups[:num_groups]):
        scores = rng.permutation(len(texts)).tolist()
        rows.append(
            {"prompt": prompt, "responses": [{"text": t, "score": s} for t, s in zip(texts, scores, strict=True)]}
        )
    write_jsonl(path, rows)
    return name


def make_folders(
    root: Path, source: Path, model: str, sizes: dict[str, tuple[int, int]], max_length: int
) -> tuple[str, dict]:
    """Prepared folders, each with a number of prompts and of stories each: 'both' (disjoint pairs, real weights),
    'ones' (the same pairs, weights 1), 'all' and 'few' (all pairs, weights 1) -> where the stories come from, folders.
    """
    found = {}
    for key, size in sizes.items():
        groups, out = root / f"{key}.jsonl", root / key
        name = write_groups(groups, source, *size)
        rule = {"gap": 1.0} if key == "both" else {"pairs": "all", "measures": ("style",)}
        with contextlib.redirect_stdout(sys.stderr):
            length = {"max_length": max_length, "too_long": "truncate"}
            found[key] = prepare(PrepareConfig(source=str(groups), out=str(out), model=model, **rule, **length))
    found["ones"] = Path(shutil.copytree(found["both"], root / "ones"))
    for key in found.keys() - {"both"}:
        data = Prepared(found[key])
        columns = {c: data.deviation[c].to_numpy() for c in data.deviation.column_names}
        prepared.weigh(found[key], {"pair_weight": np.ones(len(data.pairs)), "deviation": columns}, {})
    return name, found


# --- right ------------------------------------------------------------------------------------------------


def build(case: Case, folder: Path, batch_size: int, model: str, root: Path) -> tuple[Ours, dict[str, Side]]:
    """All sides of a case, with one adapter."""
    cfg = TrainConfig(
        data=str(folder),
        out=str(root / "no-run"),
        model=model,
        batch_size=batch_size,
        lr=LR,
        lora_r=LORA_R,
        lr_schedule="constant",
        dtype="float32",
    )
    with contextlib.redirect_stdout(sys.stderr):
        ours = Ours(cfg, root / "no-run")
    tokenizer = ChatTokens.load(model).tokenizer
    trl = Trl(model, tokenizer, cfg, str(root / "trl"))
    released = Released(cfg, trl.collated)
    packed = Packed(cfg, ours)
    switches = ({"fused": True}, {"ref_logp": ours.ref_logp}, {"unique": True})
    rows = {name: released.alone(**switch) for name, switch in zip(ALONE, switches, strict=True)}
    rows |= {name: packed.with_row(row) for name, row in ROWS.items()}
    rows[FIRST] = ours.first_epoch()
    if ZEROS_TOO in case.rows:
        rows[ZEROS_TOO] = Ours(replace(cfg, forward_zero_weight=True), root / "no-run")
    sides = {TRL: trl, RELEASED: released, **{name: rows[name] for name in case.rows}, OURS: ours}
    start = {name: p.detach().clone() for name, p in ours.params.items()}
    for side in sides.values():
        if side.params.keys() != start.keys():
            raise RuntimeError(f"{case.name}: the sides train other parameters: {side.params.keys() ^ start.keys()}")
        side.load(start)
    return ours, sides


def check(ours: Ours, sides: dict[str, Side], steps: int) -> dict:
    """Losses of the first steps, each side training itself; then every side's gradient at one place of parameters."""
    default, ours.drop_below = ours.drop_below, 0.0
    train_alone = {name: sides[name] for name in (TRL, RELEASED, OURS)}
    works = [ours.work(step) for step in range(steps)]
    losses = {name: [side.step(work) for work in works] for name, side in train_alone.items()}
    apart = {name: max(abs(a - b) for a, b in zip(own, losses[OURS], strict=True)) for name, own in losses.items()}
    broken = [f"{name}: losses {losses[name]}, ours {losses[OURS]}" for name, d in apart.items() if not d <= LOSS]
    place = {name: p.detach().clone() for name, p in ours.params.items()}
    for side in sides.values():
        side.load(place)
    last = (ours.work(step) for step in range(steps, ours.state.schedule.num_steps))
    work = next(work for work in last if work.weight.any())
    truth = sides[RELEASED].truth(work)
    errors = {}
    for name, side in sides.items():
        approximates = name in (ZEROS_TOO, FIRST) or (isinstance(side, Packed) and side.row.head == "drop_below")
        errors[name] = distance(side.gradient(work), truth)
        if not errors[name] <= GRADIENT["drop_below" if approximates else "exact"]:
            broken.append(f"{name}: gradient {errors[name]:.2g} off float64's")
    ours.drop_below = default
    errors[f"{OURS}, drop_below {default:g}"] = off = distance(ours.gradient(work), truth)
    if not off <= GRADIENT["drop_below"]:
        broken.append(f"{OURS}, default drop_below: gradient {off:.2g} off float64's")
    tidy = {name: measure.short(e) for name, e in errors.items()}
    return {"losses": losses, "losses_apart": measure.short(max(apart.values())), "gradient": tidy, "broken": broken}


def distance(found: dict, truth: dict) -> float:
    a, b = (torch.cat([x[key].double().reshape(-1) for key in sorted(x)]) for x in (found, truth))
    return float((a - b).norm() / b.norm())


# --- fast, small ------------------------------------------------------------------------------------------


def step(side: Side, work: Work) -> float:
    """With the memory allocator that its users have."""
    cpp.allocate_tightly(isinstance(side, Ours))
    return side.step(work)


def clock(case: Case, ours: Ours, sides: dict[str, Side], lora_r: int) -> dict:
    """Every round a step of its own, every side on it. In 'all pairs' a step of TRL and of the release is two of the
    pairs, of the other sides all of them: figures are per pair there. Ratios are of medians, and of means where pairs
    of weight 0 make the steps unequal."""
    config = ours.state.policy.causal.config
    works = [ours.work(i) for i in range(case.rounds)]
    tasks = {}  # side -> the work of each round
    for name, side in sides.items():
        whole = isinstance(side, Ours) or getattr(side, "unique", False)
        tasks[name] = [w if whole or not case.whole else w.parts()[i % 10] for i, w in enumerate(works)]
    exact = {} if ours.drop_below else {"gradients": 1}  # without the C++ kernels there is no other head
    traits = {name: TRAITS[name]._replace(**exact) for name in sides}
    products = {name: [floor.of_row(config, w, lora_r, traits[name]) for w in tasks[name]] for name in sides}
    rates = floor.Rates([p for per_round in products.values() for each in per_round for p in each])
    rates.measure(2)
    for name, side in sides.items():  # optimiser state, thread pools
        for work in tasks[name]:
            side.collate(work)
        step(side, tasks[name][0])
    rounds = {name: iter(own) for name, own in tasks.items()}
    runs = {name: (lambda side=side, own=rounds[name]: step(side, next(own))) for name, side in sides.items()}
    taken = measure.interleaved(runs, case.rounds, CPU)
    rates.measure(2)
    weights = np.concatenate([w.weight for w in works])
    middle = np.mean if (weights == 0).any() else np.median
    report, num_pairs = {}, {name: np.array([len(w.pairs) for w in tasks[name]]) for name in sides}
    for name in sides:
        floors = [rates.floor(each) for each in products[name]]
        least = np.array([sum(f.values()) for f in floors])
        own = taken[name]
        entry = {"seconds": measure.spread(own), "mean_seconds": measure.short(own.mean())}
        entry["pairs_per_s"] = measure.short(middle(num_pairs[name]) / middle(own))
        entry["tokens_per_s"] = measure.short(middle([w.num_tokens for w in tasks[name]]) / middle(own))
        entry["floor_seconds"] = {k: measure.short(np.mean([f[k] for f in floors])) for k in floors[0]}
        entry["of_floor"] = measure.short(middle(own) / middle(least))
        for key, other in (("of_trl", TRL), ("of_released", RELEASED)):
            per_pair = (middle(taken[side]) / middle(num_pairs[side]) for side in (name, other))
            entry[key] = measure.short(next(per_pair) / next(per_pair))
        largest = max(tasks[name], key=lambda w: w.num_tokens)
        entry["extra_mib"] = measure.peak_extra_mib(partial(step, sides[name], largest), lambda: None, CPU)
        report[name] = entry
    return {
        "rounds": case.rounds,
        "pairs_a_step": case.batch_size,
        "tokens_a_step": round(statistics.mean(w.num_tokens for w in works)),
        "zero_share": measure.short((weights == 0).mean()),
        "zero_share_of_all": measure.short((works[0].data.weight == 0).mean()),
        "mm_gflops": {
            k: measure.short(2e-9 * np.prod(s) / np.median(rates.seconds[k])) for k, s in rates.shape.items()
        },
        "sides": report,
    }


# --- command ----------------------------------------------------------------------------------------------


def summary(result: dict) -> dict:
    ones, both, every = (result["cases"][i]["sides"] for i in range(3))
    found = {
        "speedup_vs_trl": 1 / ones[OURS]["of_trl"],
        "speedup_vs_release": 1 / ones[OURS]["of_released"],
        "first_epoch_speedup_vs_trl": 1 / ones[FIRST]["of_trl"],
        "first_epoch_speedup_vs_release": 1 / ones[FIRST]["of_released"],
        "of_gemm_floor": ones[OURS]["of_floor"],
        "weighted_speedup_vs_trl": 1 / both[OURS]["of_trl"],
        "weighted_speedup_vs_release": 1 / both[OURS]["of_released"],
        "all_pairs_speedup_vs_trl": 1 / every[OURS]["of_trl"],
        "all_pairs_speedup_vs_release": 1 / every[OURS]["of_released"],
        "peak_memory_vs_trl": ratio(ones[OURS], ones[TRL]),
        "peak_memory_vs_release": ratio(ones[OURS], ones[RELEASED]),
    }
    return {key: None if value is None else measure.short(value) for key, value in found.items()}


def ratio(a: dict, b: dict) -> float | None:
    return None if a["extra_mib"] is None or b["extra_mib"] is None else a["extra_mib"] / b["extra_mib"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="steps timed; twice as many with real weights")
    parser.add_argument("--data", type=Path, default=states.STORIES, help="groups with seven responses each")
    parser.add_argument("--quick", action="store_true", help="a tiny model of random weights, two rounds")
    parser.add_argument("--write", action="store_true", help="results/step.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        model = states.tiny_model(root / "tiny") if args.quick else find_model(PACKAGED)
        rounds = (2, 2, 2) if args.quick else (args.rounds, 2 * args.rounds, args.rounds)
        prompts = -(-2 * max(*rounds, 6) // 3) + 1  # three disjoint pairs of seven stories, two a step
        sizes = {"both": (prompts, 7), "all": (rounds[2] + 1, 7), "few": (4, 4)}
        name, folder = make_folders(root, args.data, model, sizes, 320 if args.quick else 512)
        rows, n = (*ALONE, *ROWS), int(np.bincount(Prepared(folder["all"]).response_group).max())
        ones, both, few = (folder["ones"], 2, 3), (folder["both"], 2, 3), (folder["few"], 6, 1)
        name_all = f"all pairs of {n}, weights 1"
        cases = [
            Case("disjoint pairs, weights 1", *ones[:2], rounds[0], ones, (*rows[:2], *rows[3:7], FIRST)),
            Case("disjoint pairs, real weights", *both[:2], rounds[1], both, (FIRST, ZEROS_TOO)),
            Case(name_all, folder["all"], n * (n - 1) // 2, rounds[2], few, (rows[2], *rows[6:], FIRST), whole=True),
        ]
        result = {**measure.setting(), "model": "tiny, random" if args.quick else "SmolLM2-135M-Instruct", "data": name}
        result["cases"], status = [], 0
        for case in cases:
            checked = check(*build(case, *case.check[:2], model, root), case.check[2])
            for line in checked["broken"]:
                status = 1
                print(f"WRONG: {case.name}: {line}", file=sys.stderr)
            gc.collect()  # a trainer holds itself in circles, and four models
            timed = clock(case, *build(case, case.folder, case.batch_size, model, root), LORA_R)
            result["cases"].append({"name": case.name, "check": checked, **timed})
    result |= summary(result)
    measure.tell(result, tables.step(result), "step", args.write and not status)
    return status


if __name__ == "__main__":
    sys.exit(main())
