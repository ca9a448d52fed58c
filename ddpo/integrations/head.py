"""A causal model whose forward hands its last hidden states and its head to a function.

What is computed of the head happens inside the model's own forward, where DDP, FSDP and accelerate expect it.
"""

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ddpo.fused import head_of
from ddpo.model import logit_scale
from ddpo.ops import linear_logp


def add_inside(model: Any) -> None:
    """From now on model(..., inside=f) returns f(hidden (B, S, D), head, options) in place of logits; without `inside`
    nothing changes. model: transformers' causal model, or what peft or DDP made of one. options: scale and softcap of
    `linear_logp`."""
    model = getattr(model, "module", model)  # what DDP wraps
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(model, "has_inside", False):
        return
    theirs, config = model.forward, model.config.get_text_config()
    options = {"scale": logit_scale(config), "softcap": getattr(config, "final_logit_softcapping", None)}

    def forward(self, *args, inside: Callable | None = None, **kwargs):
        if inside is None:
            return theirs(*args, **kwargs)
        hidden = self.base_model(*args, **{**kwargs, "use_cache": False}).last_hidden_state
        return inside(hidden, self.get_output_embeddings(), options)

    model.forward, model.has_inside = types.MethodType(forward, model), True


def takes_head(head: nn.Module) -> bool:
    """Whether linear_logp takes this head now: it gets no gradient and has no adapter that is on."""
    if torch.is_grad_enabled() and any(p.requires_grad for p in head.parameters()):
        return False
    try:
        head_of(head)
    except ValueError:
        return False
    return True


def token_logp(hidden: Tensor, head: nn.Module, targets: Tensor, **options) -> Tensor:
    """Log-probs of the targets, (B, S) nats, 0 where the target is -100. hidden (B, S, D), targets (B, S) int64."""
    mask = targets != -100
    matrix, bias = head_of(head)
    logp = linear_logp(hidden[mask], matrix, targets[mask], bias=bias, **options)  # (N,)
    return logp.new_zeros(mask.shape).masked_scatter(mask, logp)  # keeps a batch without targets in the graph


@torch.no_grad()
def logit_metrics(hidden: Tensor, head: nn.Module, targets: Tensor, rows: int = 256, **options) -> dict[str, Tensor]:
    """entropy, mean_logits and is_top1 of each position, (B, S), 0 where the target is -100; a few rows at a time.
    One more pass through the head, for trainers that log them."""
    mask = targets != -100
    matrix, bias = head_of(head)
    scale, softcap = options["scale"], options["softcap"]
    entropy, mean, top = (hidden.new_zeros(mask.shape, dtype=t) for t in (torch.float32, torch.float32, torch.bool))
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for part, wanted in zip(hidden[mask].split(rows), targets[mask].split(rows), strict=True):
        logits = scale * nn.functional.linear(part, matrix, bias).float()
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        logp = logits.log_softmax(1)
        found.append((-(logp.exp() * logp).sum(1), logits.mean(1), logits.argmax(1) == wanted))
    if found:
        for out, parts in zip((entropy, mean, top), zip(*found, strict=True), strict=True):
            out[mask] = torch.cat(parts)
    return {"entropy": entropy, "mean_logits": mean, "is_top1": top}
