"""`ddpo train --dry-run`: what a run would do, from its data, the tokenizer and the model's config."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddpo import distributed, log
from ddpo.config import PlanConfig, TrainConfig
from ddpo.data.prepared import Prepared
from ddpo.data.tokens import ChatTokens
from ddpo.loading import check_adapter
from ddpo.objective import is_weighted, method_of
from ddpo.plan import plan
from ddpo.schedule import MOST_TOKENS, Schedule, lr_at
from ddpo.settings import to_yaml
from ddpo.state import LEAST_TOKENS_CPU, check_held_out, check_tokenizer

HEAD, TAIL = 24, 12  # tokens of a text that are shown


def dry_run(cfg: TrainConfig, world: int) -> None:
    """Prints the settings, the steps, one tokenised item and the plan for this machine, for a run of `world` processes.
    Loads no weights and makes no run folder.

    Raises: ValueError where training would, for settings, data, tokenizer and the model's config.
    """
    on_cpu = distributed.device().type == "cpu"
    data = Prepared(cfg.data)
    tokens = check_tokenizer(cfg, data)
    least_tokens = LEAST_TOKENS_CPU if on_cpu else MOST_TOKENS
    schedule = Schedule(data, cfg, least_tokens)
    if cfg.eval_data:
        Schedule.of_all(check_held_out(cfg.eval_data, cfg, data), cfg, least_tokens)
    if cfg.adapter:
        check_adapter(cfg.adapter)
    _say(to_yaml(replace(cfg, dry_run=False)))
    _say(*_steps(cfg, schedule), *_sample(cfg, schedule, tokens))
    if cfg.adapter and not Path(cfg.adapter).exists():
        _say(f"there is no folder {cfg.adapter} yet (adapter); else it must be a hub name", "")
    gpu = {} if on_cpu else {"gpus": world, "gpu_memory": torch.cuda.get_device_properties(0).total_memory / 2**30}
    settings: dict[str, Any] = vars(cfg) | gpu
    plan(PlanConfig(**settings))
    _say("", f"nothing was written to {cfg.out}; `ddpo plan` with these settings and --gpus plans for another machine")


def _say(*lines: str) -> None:
    log.console.print("\n".join(lines), markup=False)


def _steps(cfg: TrainConfig, schedule: Schedule) -> list[str]:
    num, pool = schedule.num_steps, schedule.pool
    zero = f", {np.mean(pool.weight == 0):.0%} of them of weight 0" if is_weighted(cfg) else ""
    lrs = [lr_at(step, num, cfg) for step in range(num)]
    return [
        f"steps          {num:,}, {schedule.epoch(num):.3g} epochs of {len(pool):,} {method_of(cfg).item}s{zero}",
        f"learning rate  {lrs[0]:.3g} in the first, {max(lrs):.3g} at the peak, {lrs[-1]:.3g} in the last",
        "",
    ]


def _sample(cfg: TrainConfig, schedule: Schedule, tokens: ChatTokens) -> list[str]:
    """The first item of the first step, one that has a weight if it can be."""
    data, pool, items = schedule.data, schedule.pool, schedule.items(0)
    item = items[np.argmax(pool.weight[items] > 0)]
    responses = pool.responses(np.array([item]))
    decode = tokens.tokenizer.decode

    def row(name: str, ids: np.ndarray, note: str = "") -> str:
        whole = len(ids) <= HEAD + TAIL
        shown = [ids] if whole else [ids[:HEAD], ids[-TAIL:]]
        return f"{name:<14} {len(ids):,} tokens{note}: " + " ... ".join(repr(decode(part.tolist())) for part in shown)

    names = ["chosen", "rejected"] if method_of(cfg).item == "pair" else ["response"] * len(responses)
    rows = [row("prompt", data.prompt_ids(responses[0]))]
    for name, r in zip(names, responses, strict=True):
        note = "" if np.isnan(data.scores[r]) else f", score {data.scores[r]:g}"
        note += f", weight {pool.weight[item]:.3f}" if name == "chosen" and is_weighted(cfg) else ""
        rows.append(row(name, data.response_ids(r), note))
    return [*rows, ""]
