"""What a run is made of: built by `setup`, saved and restored by checkpoints, exported at the end."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ddpo import checkpoint, distributed
from ddpo.config import TrainConfig
from ddpo.config.checked import DType
from ddpo.data.batches import filler
from ddpo.data.prepared import Prepared
from ddpo.data.tokens import ChatTokens
from ddpo.layers import apply_liger, speed_up
from ddpo.loading import add_lora, find_model, load_model, pick_autocast, save_model
from ddpo.model import Policy, pick_drop_below
from ddpo.objective import method_of
from ddpo.ops import cpp
from ddpo.refcache import identity, reference_logp
from ddpo.schedule import MOST_TOKENS, Schedule

LEAST_TOKENS_CPU = 1024  # of a pack: more gain no time there, less do not keep the products busy


@dataclass
class State:
    cfg: TrainConfig
    rank: int
    world: int
    device: torch.device
    policy: nn.Module  # Policy, or what distributed.wrap makes of it
    tokenizer: object
    params: dict[str, nn.Parameter]  # those that are trained
    optimizer: torch.optim.AdamW
    schedule: Schedule
    ref_logp: torch.Tensor | None  # (R,)
    held_out: "HeldOut | None"
    step: int  # done
    num_skipped: int


@dataclass
class HeldOut:
    """Items whose loss is measured and not trained on: a schedule of one step."""

    schedule: Schedule
    ref_logp: torch.Tensor | None  # (R,)


def setup(cfg: TrainConfig, rank: int, world: int, run: Path) -> State:
    """Data, policy, reference log-probs, optimiser; the last checkpoint where the run has one."""
    device = distributed.device()
    if device.type == "cpu":
        cpp.allocate_tightly()
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    data = Prepared(cfg.data)
    tokens = check_tokenizer(cfg, data)
    least_tokens = LEAST_TOKENS_CPU if device.type == "cpu" else MOST_TOKENS
    schedule = Schedule(data, cfg, least_tokens)
    held_out = None
    if cfg.eval_data:
        held_out = Schedule.of_all(check_held_out(cfg.eval_data, cfg, data), cfg, least_tokens)
    bare = build_policy(cfg, device)
    parts = identity(bare, cfg.adapter) if method_of(cfg).needs_reference else None
    policy = distributed.wrap(bare, pick_parallel(cfg))
    params = {n: p for n, p in distributed.unwrap(policy).named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(params.values(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)

    def reference(of: Schedule) -> torch.Tensor | None:
        if parts is None:
            return None
        return reference_logp(policy, of.data, of.forwarded_responses(), of.micro_tokens, device, parts)

    ref_logp = reference(schedule)  # before the checkpoint's weights come in
    measured = None if held_out is None else HeldOut(held_out, reference(held_out))
    warm_up(policy.train(), optimizer, device)
    last = checkpoint.load_last(run, params, optimizer, data.manifest["content_hash"])
    return State(
        cfg=cfg,
        rank=rank,
        world=world,
        device=device,
        policy=policy,
        tokenizer=tokens.tokenizer,
        params=params,
        optimizer=optimizer,
        schedule=schedule,
        ref_logp=ref_logp,
        held_out=measured,
        step=last["step"],
        num_skipped=last.get("num_skipped", 0),
    )


def warm_up(policy: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """One backward of nothing. DDP sums gradients in another order after its first than in it, so that three processes
    would not resume to the same bits if their first were a step."""
    if isinstance(policy, DistributedDataParallel):
        (0 * policy(filler().to(device))).sum().backward()
        optimizer.zero_grad(set_to_none=True)


def build_policy(cfg: TrainConfig, device: torch.device) -> Policy:
    """Raises ValueError for a model, adapter or setting that cannot be trained."""
    model = build_model(cfg, device)
    if not apply_liger(model, cfg.liger):
        speed_up(model)
    return make_policy(cfg, model, device)


def build_model(cfg: TrainConfig, device: torch.device) -> Any:  # of transformers, or peft's
    return adapt(cfg, load_model(cfg.model, cfg.adapter, check_dtype(cfg), device))


def adapt(cfg: TrainConfig, model: Any) -> Any:  # of transformers, or peft's
    """The model with what is trained: a fresh adapter, or all its weights."""
    if cfg.lora:
        return add_lora(model, cfg.lora_r, cfg.lora_alpha, cfg.lora_dropout, cfg.lora_targets, cfg.seed)
    return model.requires_grad_(True)


def make_policy(cfg: TrainConfig, model: Any, device: torch.device, check_packing: bool = True) -> Policy:
    """The policy over a model that is there."""
    drop_below = pick_drop_below(cfg.drop_below, device, model.dtype)
    policy = Policy(model, drop_below, pick_autocast(cfg.autocast, cfg.dtype, device), check_packing)
    if cfg.activation_checkpointing:
        policy.causal.activation_checkpointing_enable({"use_reentrant": False})
    if cfg.compile:
        for layer in policy.layers():
            layer.compile(dynamic=True)
    return policy


def pick_parallel(cfg: TrainConfig) -> str:
    """'ddp' or 'fsdp'."""
    return ("ddp" if cfg.lora else "fsdp") if cfg.parallel == "auto" else cfg.parallel


def save(state: State, run: Path) -> None:
    extra = {"data": state.schedule.data.manifest["content_hash"], "num_skipped": state.num_skipped}
    checkpoint.save(run, state.step, state.params, state.optimizer, extra, state.cfg.keep_checkpoints)


def export(state: State, run: Path) -> Path | None:
    """Writes the adapter or the model; says where, in the first process. Shares of weights are put together there, in
    a model built anew on the CPU."""
    cfg, policy = state.cfg, distributed.unwrap(state.policy)
    whole = {}
    for name, param in state.params.items():
        full = distributed.whole(param.detach())  # one at a time: all of them may not fit
        if state.rank == 0:
            whole[name] = full.cpu()
    if state.rank:
        return None
    model = policy.model
    if distributed.is_sharded(policy):
        model = build_model(cfg, torch.device("cpu"))
        with torch.no_grad():
            for name, param in model.named_parameters(prefix="model"):  # the policy's name for it
                if name in whole:
                    param.copy_(whole[name])
    return save_model(model, run, state.tokenizer, cfg.adapter)


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


def check_held_out(folder: str, cfg: TrainConfig, data: Prepared) -> Prepared:
    """The folder eval_data, whose token ids must be those of the training data. Raises ValueError."""
    held_out = Prepared(folder)
    if held_out.manifest["tokenizer"]["fingerprint"] != data.manifest["tokenizer"]["fingerprint"]:
        raise ValueError(
            f"{held_out.folder} was prepared with another tokenizer or chat template than {data.folder}; prepare both "
            f"with --model {cfg.model}"
        )
    return held_out


def check_dtype(cfg: TrainConfig) -> DType:
    """All weights are trained in float32 or float64, and an adapter is merged into such: bfloat16 rounds away steps
    under 1/256 of a weight. Matrix products are another matter, see --autocast."""
    if (cfg.lora and not cfg.adapter) or cfg.dtype in ("float32", "float64"):
        return cfg.dtype
    if cfg.dtype == "bfloat16":
        what = "--adapter in" if cfg.lora else "--no-lora in"
        raise ValueError(
            f"train: {what} bfloat16 loses most small updates; leave --dtype, or give float32 (products "
            "are bfloat16 by --autocast all the same)"
        )
    return "float32"
