"""`ddpo demo`: the whole method once, on data and models that come with it."""

import shutil
import time
from importlib import resources
from pathlib import Path
from typing import Any

from ddpo import log
from ddpo.config import DemoConfig, EvaluateConfig, GenerateConfig, PrepareConfig, ReportConfig, TrainConfig
from ddpo.data.groups import parse_group, read_jsonl
from ddpo.data.prepared import Prepared
from ddpo.evaluate import evaluate
from ddpo.generate import generate
from ddpo.loading import PACKAGED
from ddpo.prepare import prepare
from ddpo.report import report
from ddpo.report.page import NO_PLOTLY, has_plotly
from ddpo.train import train

SAMPLES = 4
NEW_TOKENS = 160


def demo(cfg: DemoConfig) -> dict:
    """Prepare, train, generate and evaluate before and after; returns the evaluation's numbers."""
    start, say = time.perf_counter(), log.console.print
    out = Path(cfg.out)
    clear(out)
    here = resources.files("ddpo.demo")
    say("1 prepare: 24 prompts x 6 stories, pairs by score, weights by deviation", style="bold")
    prepare(PrepareConfig(source=str(here / "stories.jsonl"), out=str(out / "prepared"), gap=1.0, seed=cfg.seed))
    say("2 generate before: 12 held-out prompts x 4 samples", style="bold")
    sampling: dict[str, Any] = {
        "prompts": str(here / "heldout.jsonl"),
        "num_samples": SAMPLES,
        "max_new_tokens": NEW_TOKENS,
        "seed": cfg.seed,
    }
    generate(GenerateConfig(**sampling, out=str(out / "before.jsonl")))
    say("3 train: DDPO, measures semantic and style", style="bold")
    train(
        TrainConfig(
            data=str(out / "prepared"),
            out=str(out / "run"),
            method="ddpo",
            lr=cfg.lr,
            epochs=cfg.epochs,
            seed=cfg.seed,
        )
    )
    say("4 generate after", style="bold")
    generate(GenerateConfig(**sampling, out=str(out / "after.jsonl"), adapter=str(out / "run" / "adapter")))
    say("5 evaluate", style="bold")
    result = evaluate(
        EvaluateConfig(
            responses=(str(out / "after.jsonl"),),
            before=str(out / "before.jsonl"),
            out=str(out / "evaluation.json"),
            model=PACKAGED,
            seed=cfg.seed,
        )
    )
    summary = Prepared(out / "prepared").manifest["summary"]["weights"]
    say(f"share of pairs with weight zero: {summary['zero_share']:.0%}")
    show_samples(out)
    if has_plotly():
        report(ReportConfig(runs=(str(out),)))
    else:
        say(NO_PLOTLY, markup=False)
    say(f"\neverything lies in {out}: prepared, run (metrics.jsonl, adapter), before, after and evaluation")
    minutes = (time.perf_counter() - start) / 60
    say(f"done in {minutes:.1f} minutes")
    log.answer(cfg, {"out": out, "minutes": minutes, "zero_share": summary["zero_share"], **result})
    return result


def clear(out: Path) -> None:
    """Makes room for a new demo: an older demo's folder goes, anything else stays and is an error."""
    if out.exists() and any(out.iterdir()):
        known = {"prepared", "run", "evaluation.json", "report.html"}
        known |= {f"{name}.{ending}" for name in ("before", "after") for ending in ("jsonl", "card.json")}
        strange = sorted(p.name for p in out.iterdir() if p.name not in known and not p.name.startswith("."))
        if strange:
            raise FileExistsError(f"{out} holds {', '.join(strange)}, which no demo wrote; give another --out")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)


def show_samples(out: Path) -> None:
    """Three stories of the first prompt, before and after."""
    say = log.console.print
    groups = {
        name: parse_group(row, where)
        for name in ("before", "after")
        for where, row in [next(iter(read_jsonl(out / f"{name}.jsonl")))]
    }
    say(f"\n{groups['before'].prompt}", style="bold")
    for name, group in groups.items():
        for i, response in enumerate(group.responses[:3], 1):
            say(f"\n{name} {i}: {' '.join(response.text.split())}")
