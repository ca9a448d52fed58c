"""What a model's training takes, found without its weights.

Parameters are counted on a model without memory (torch's meta device). What a step holds and computes is measured, not
derived: copies of one and of two layers, with random weights and a small vocabulary, pass forward and backward on a few
tokens while every tensor alive is counted. Both are linear in tokens and in layers, so any architecture, adapter,
checkpointing or patched layer is counted as it is; layers are taken to be alike. What the head does with the vocabulary
is not in it.
"""

import copy
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ddpo.config import TrainConfig
from ddpo.data.batches import pack
from ddpo.layers import speed_up
from ddpo.loading import random_model
from ddpo.model import Policy
from ddpo.state import adapt, make_policy

VOCABULARY = 512  # of the copies
SEQUENCE, NUM_SEQUENCES = 61, (3, 5)  # tokens; all odd, so that no activation has a weight's shape


# --- parameters -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """Bytes of some of the parameters."""

    frozen: int
    trained: int

    @property
    def all(self) -> int:
        return self.frozen + self.trained


@dataclass(frozen=True)
class Size:
    num_total: int  # parameters, an adapter's included
    num_trained: int
    whole: Share
    layer: Share  # the largest one
    outside: Share  # embedding, final norm, head
    head: tuple[int, int]  # (V, D)
    head_trained: bool


def size_of(cfg: TrainConfig, config, dtype: torch.dtype) -> Size:
    with torch.device("meta"):
        model = adapt(cfg, random_model(config, dtype))
    causal = model.get_base_model() if cfg.lora else model
    kinds = set(causal._no_split_modules or ())
    layers = [_share(m.parameters(), dtype) for m in causal.modules() if type(m).__name__ in kinds]
    whole, head = _share(model.parameters(), dtype), causal.get_output_embeddings().weight
    return Size(
        num_total=sum(p.numel() for p in model.parameters()),
        num_trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        whole=whole,
        layer=max(layers, key=lambda share: share.all, default=Share(0, 0)),
        outside=Share(whole.frozen - sum(s.frozen for s in layers), whole.trained - sum(s.trained for s in layers)),
        head=tuple(head.shape),
        head_trained=head.requires_grad,
    )


def _share(params, dtype: torch.dtype) -> Share:
    of = {True: 0, False: 0}
    for p in params:  # on the meta device peft leaves an adapter float32, elsewhere it is float64 over float64 weights
        of[p.requires_grad] += p.numel() * (max(p.itemsize, dtype.itemsize) if p.requires_grad else p.itemsize)
    return Share(frozen=of[False], trained=of[True])


# --- what a pass holds and computes -----------------------------------------------------------------------


@dataclass(frozen=True)
class Pass:
    """One forward and backward over a pack, of the whole model but for attention's FLOP and the head's work over the
    vocabulary. Parameters and their gradients are not counted."""

    saved: float  # bytes that forward keeps for backward
    extra: float  # most bytes that backward holds beside those
    flop: float  # of matrix products


def measure(cfg: TrainConfig, config, dtype: torch.dtype, row_share: float, for_cpu: bool) -> Callable[[int], Pass]:
    """-> what a pack of so many tokens takes.

    row_share: completion rows a token, 0 to 1. for_cpu: with the faster layers that training has on CPUs.
    """
    num_layers = config.get_text_config().num_hidden_layers
    few, many = (num * SEQUENCE for num in NUM_SEQUENCES)
    seen = {}
    for layers in (1, 2):
        model = adapt(cfg, random_model(_shrunk(config, layers), dtype))
        if for_cpu:
            speed_up(model)
        policy = make_policy(cfg, model, torch.device("cpu"), check_packing=False).train()
        _pass(policy, 1, row_share)()  # now gradients are there, as in all but a step's first backward
        for num in NUM_SEQUENCES:
            seen[layers, num * SEQUENCE] = _counted(policy, num, row_share)

    def at(tokens: int) -> Pass:
        one, two = (
            seen[n, few] + (seen[n, many] - seen[n, few]) * (tokens - few) / (many - few) for n in (1, 2)
        )  # (3,) each
        saved, _, flop = np.maximum(0, one + (two - one) * (num_layers - 1))
        return Pass(saved, max(0.0, one[1]), flop)  # backward goes through one layer at a time

    return at


def _shrunk(config, num_layers: int):
    """The config with fewer layers and a small vocabulary."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers, text.vocab_size, text.pad_token_id = num_layers, VOCABULARY, None
    if getattr(text, "num_kv_shared_layers", None):
        text.num_kv_shared_layers = 0
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:num_layers]
    return config


def _pass(policy: Policy, num_sequences: int, row_share: float) -> Callable[[], None]:
    """Forward, then what takes it back."""
    num_rows = min(SEQUENCE, round(SEQUENCE * row_share) | 1)
    ids = np.arange(SEQUENCE + 1) % VOCABULARY
    first = SEQUENCE + 1 - num_rows
    source = SimpleNamespace(prompt_ids=lambda r: ids[:first], response_ids=lambda r: ids[first:])
    return policy(pack(source, range(num_sequences))).sum().backward


def _counted(policy: Policy, num_sequences: int, row_share: float) -> np.ndarray:
    """(3,) as the fields of Pass."""
    with FlopCounterMode(display=False) as flop, Alive(policy) as alive:
        backward = _pass(policy, num_sequences, row_share)
        saved = alive.bytes
        backward()
    products = [n for op, n in flop.get_flop_counts()["Global"].items() if "attention" not in str(op)]
    return np.array([saved, alive.peak - saved, sum(products)], float)


class Alive(TorchDispatchMode):
    """Bytes of the tensors made inside that are alive, and the most there were. Not counted: parameters, gradients and
    buffers of the module, which views and sums in place give out again; new gradients, told by shape and dtype; scratch
    inside an op."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.bytes = self.peak = 0
        params = [*module.parameters(), *(p.grad for p in module.parameters() if p.grad is not None), *module.buffers()]
        self._known = {tensor.untyped_storage()._cdata for tensor in params}
        self._new = {(shape, p.dtype) for p in module.parameters() for shape in (p.shape, p.shape[::-1])}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor) and (value.shape, value.dtype) not in self._new:
                self._add(value.untyped_storage())
        return out

    def _add(self, storage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.bytes -= size
