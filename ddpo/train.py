"""The training loop: `ddpo train`, or `torchrun --nproc-per-node N -m ddpo.train --config FILE`."""

import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpo import distributed, log, passes
from ddpo.config import TrainConfig
from ddpo.dryrun import dry_run
from ddpo.loading import find_model
from ddpo.objective import method_of, objective
from ddpo.run import OnTheWay, Stop, begin_run, check_run, graceful
from ddpo.schedule import lr_at
from ddpo.settings import run_command
from ddpo.state import State, export, save, setup
from ddpo.watch import Watch, check_trackers, last_record, peak_memory_gib


def train(cfg: TrainConfig, stop: Stop | None = None) -> Path:
    """Trains as the config says and returns the run folder; resumes where cfg.resume; under cfg.dry_run says what it
    would do. See TrainConfig.

    A request to stop (Ctrl-C, SIGTERM) ends after the step under way, with a checkpoint; then SystemExit(130).
    Raises: ValueError for input that cannot be trained on, or where more than cfg.max_skips steps were not finite;
    FileExistsError where a run already lies in cfg.out.
    """
    rank, world = distributed.start()
    run = check_run(cfg)
    if rank == 0:
        find_model(cfg.model)  # one process unpacks the packaged model
        check_trackers(cfg.track)
    if cfg.dry_run:
        if rank == 0:
            dry_run(cfg, world)
        return run
    if cfg.resume and distributed.from_first((run / ("adapter" if cfg.lora else "model")).is_dir()):
        log.console.print(f"{run} is finished already")
        log.answer(cfg, ended(run, True))
        return run
    distributed.barrier()  # all have looked before one writes
    state = setup(cfg, rank, world, run)
    if rank == 0:
        begin_run(cfg, run)
    watch = Watch(cfg, run, state.step, state.schedule.num_steps, rank == 0)
    with graceful(stop or Stop()) as stop, watch:
        if is_due(cfg.eval_every, state) and distributed.any_of_us(not watch.has("eval", state.step)):
            evaluate(state, watch)
        pending = None  # metrics are read one step late: no device sync between a step's launch and the next
        while state.step < state.schedule.num_steps:
            latest = step(state)
            report(state, pending, watch, latest["start"])
            pending = latest
            stops = distributed.any_of_us(stop.requested)  # asked once, by all
            saves = stops or is_due(cfg.save_every, state)
            evaluates = state.held_out and is_due(cfg.eval_every, state) and not stops  # then time may be short
            if saves or evaluates:
                report(state, pending, watch)
                pending = None
            if saves:
                save(state, run)
            if evaluates:
                evaluate(state, watch)
            if stops:
                break
    if state.step < state.schedule.num_steps:
        watch.say(f"stopped at step {state.step} of {state.schedule.num_steps}; go on with --resume")
        log.answer(cfg, ended(run, False))
        raise SystemExit(130)
    watch.say(f"trained {state.step} steps; wrote {export(state, run)}")
    distributed.barrier()
    log.answer(cfg, ended(run, True))
    return run


def ended(run: Path, finished: bool) -> dict:
    """How a run ended: its folder, what was trained, the last records of its journals."""
    last = {name: last_record(run / f"{name}.jsonl") for name in ("metrics", "eval")}
    trained = next((run / name for name in ("adapter", "model") if (run / name).is_dir()), None)
    return {"run": run, "finished": finished, "trained": trained, **last}


def is_due(every: int, state: State) -> bool:
    """Whether what happens every so many steps (0: at the end alone) and at the end happens now."""
    return state.step == state.schedule.num_steps or (every > 0 and state.step % every == 0)


def step(state: State) -> dict:
    """One optimiser step over all batches of all processes. Its metrics stay on the device."""
    start = time.perf_counter()
    torch.manual_seed(int(np.random.SeedSequence([state.cfg.seed, state.step, state.rank]).generate_state(1)[0]))
    sums, num_items = run_batches(state, state.schedule, state.step, state.ref_logp, learns=True)
    lr = lr_at(state.step, state.schedule.num_steps, state.cfg)
    norm = update(state, lr, sums["loss"])
    state.step += 1
    return {
        "step": state.step,
        "epoch": state.schedule.epoch(state.step),
        "learning_rate": lr,
        f"num_{item_name(state.cfg)}": num_items,
        "start": start,
        "names": tuple(sums),
        "values": OnTheWay(torch.stack(list(sums.values())), norm),
    }


def run_batches(state: State, schedule, at: int, ref_logp: Tensor | None, learns: bool) -> tuple[dict, int]:
    """A schedule's step through the policy, backward where it learns: sums over all processes of loss, forwarded items,
    metrics and tokens, each a float64 scalar on the device; and the number of its items."""
    totals = schedule.totals(at)
    batches = schedule.batches(at, state.rank, state.world)
    sums: dict[str, Any] = dict.fromkeys(("loss", "items", "tokens"), 0.0)  # and metrics, of one order in all processes
    for i, batch in enumerate(batches):
        batch = batch.to(state.device)
        logp, backward = passes.forward(state.policy, batch, last=i == len(batches) - 1)
        reference = None if ref_logp is None else ref_logp[batch.responses]
        share, metrics = objective(state.cfg, logp, batch, reference, totals)
        if learns:
            backward(share * state.world)  # gradients are averaged over the processes
        found = {"loss": share.detach(), "items": torch.ones_like(batch.weight), **metrics}
        for name, values in found.items():
            sums[name] = sums.get(name, 0.0) + values.sum(dtype=torch.float64)
        sums["tokens"] += batch.num_inputs
    own = torch.zeros(len(sums), dtype=torch.float64, device=state.device)
    for value, place in zip(sums.values(), own, strict=True):
        place += value
    return dict(zip(sums, distributed.all_reduce(own), strict=True)), totals.num_items


def update(state: State, lr: float, loss: Tensor) -> Tensor:
    """Clips and takes AdamW's step, unless loss or gradient is not finite; returns the gradient's norm, then nan."""
    for param in state.params.values():  # a weight that this step did not use keeps its place in the optimiser
        param.grad = torch.zeros_like(param) if param.grad is None else param.grad
    norm = torch.nn.utils.clip_grad_norm_(state.params.values(), state.cfg.max_grad_norm or math.inf)
    norm = distributed.whole(norm)
    finite = torch.isfinite(norm) & torch.isfinite(loss)
    state.optimizer.param_groups[0]["lr"] = lr
    # the fused kernel skips the step on the device
    state.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    return torch.where(finite, norm, math.nan)


@torch.no_grad()
def evaluate(state: State, watch: Watch) -> None:
    """Loss and metrics of the held-out items, if the run has any."""
    if state.held_out is None:
        return
    state.policy.eval()
    sums, num_items = run_batches(state, state.held_out.schedule, 0, state.held_out.ref_logp, learns=False)
    state.policy.train()
    distributed.reshard(state.policy)
    mean, _ = means({name: float(value) for name, value in sums.items()}, state.cfg)
    mean = {f"num_{item_name(state.cfg)}": num_items, **mean}
    watch.write("eval", {"step": state.step, **{f"eval_{k}": v for k, v in mean.items()}})


def item_name(cfg: TrainConfig) -> str:
    """What the numbers of a step's items are called in metrics: pairs, responses (SFT) or groups (GVPO)."""
    return f"{method_of(cfg).item}s"


def means(sums: dict[str, float], cfg: TrainConfig) -> tuple[dict[str, float], float]:
    """Loss, forwarded items and metrics over the forwarded items; and the number of tokens."""
    sums = dict(sums)
    loss, items, tokens = (sums.pop(name) for name in ("loss", "items", "tokens"))
    metrics = {name: total / items for name, total in sums.items() if items}
    return {"loss": loss, f"{item_name(cfg)}_forwarded": int(items), **metrics}, tokens


def report(state: State, metrics: dict | None, watch: Watch, until: float | None = None) -> None:
    """Writes a finished step's metrics. until: when the next step began, else now.

    Raises: ValueError where too many steps were skipped; the last checkpoint stays.
    """
    if metrics is None:
        return
    *sums, norm = metrics["values"].read()
    seconds = (until or time.perf_counter()) - metrics["start"]
    mean, tokens = means(dict(zip(metrics["names"], sums, strict=True)), state.cfg)
    record = {key: metrics[key] for key in ("step", "epoch", "learning_rate", f"num_{item_name(state.cfg)}")}
    record |= {**mean, "grad_norm": norm, "skipped": not math.isfinite(norm), "tokens_per_s": tokens / seconds}
    record["peak_memory_gib"] = peak_memory_gib()
    watch.write("metrics", record)
    if record["skipped"]:
        state.num_skipped += 1
        watch.write("skipped", {"step": metrics["step"], **state.schedule.describe(metrics["step"] - 1)})
        if state.num_skipped > state.cfg.max_skips:
            raise ValueError(
                f"train: loss or gradient of step {metrics['step']} is not finite, like {state.num_skipped - 1} before "
                f"it (max_skips {state.cfg.max_skips}); {state.cfg.out}/skipped.jsonl names what they held. Look at "
                "those texts; start anew with a lower --lr, or go on with --resume and a higher --max-skips"
            )


if __name__ == "__main__":
    run_command(train, TrainConfig, "ddpo train", "data", sys.argv[1:])
