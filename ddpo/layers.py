"""A loaded model's layers on faster kernels: ours on CPUs, Liger's on GPUs. Weights, names and state_dict stay."""

import copy
import functools
import importlib.util
import inspect
from collections import Counter
from contextlib import contextmanager, suppress
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from ddpo.ops import cpp, layers

DTYPES = (torch.float32, torch.float64)  # of the C++ kernels
ROTARY = "apply_rotary_pos_emb"


def speed_up(model: nn.Module) -> Counter:
    """Gives the layers that it recognises a faster forward, on the instance.

    On the CPU, RMSNorms, gated MLPs with SiLU and rotary embeddings take the kernels of csrc/layers.cpp where these
    agree with the layer's own forward on a small input. A frozen linear layer under one of peft's LoRA adapters of its
    own dtype (float32, float64; peft keeps adapters of a bfloat16 base in float32) takes lora_linear. A new forward
    reads the module's parameters when it is called, and leaves every other case to the layer's own: another dtype or
    device, autocast, dropout, adapters switched off or merged.

    Call it before the model is wrapped (DDP, FSDP). A layer that somebody else patched is left alone. The model can be
    copied, not pickled.
    Returns: how many layers were changed, by kernel.
    """
    done: Counter[str] = Counter()
    with _evaluating(model):
        for module in model.modules():
            if "forward" in vars(module):
                continue
            for name, find in FINDERS.items():
                forward = find(module)
                if forward is not None:
                    module.forward = MethodType(forward, module)
                    done[name] += 1
    return done


def apply_liger(model: Any, setting: str) -> bool:
    """Patches a model on a GPU with Liger's kernels for its layers, not with Liger's losses; says whether it did.

    Liger patches the instance, and replaces names in the transformers module of its family: models of that family
    that are made later in the process get Liger's layers too.

    Args:
        setting: 'auto': where they can be had; 'on': must; 'off'.
    Raises: RuntimeError for 'on' where they cannot be had; ValueError for another setting.
    """
    if setting not in ("auto", "on", "off"):
        raise ValueError(f"liger must be 'auto', 'on' or 'off', got {setting!r}")
    causal = model.get_base_model() if hasattr(model, "peft_config") else model
    lacks = _liger_lacks(causal)
    if setting == "on" and lacks:
        raise RuntimeError(f"liger 'on' wants {lacks}; use 'auto' or 'off'")
    if setting == "off" or lacks:
        return False
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(model=causal, cross_entropy=False, fused_linear_cross_entropy=False)
    return True


def _liger_lacks(causal) -> str | None:
    device = next(causal.parameters()).device
    if device.type != "cuda":
        return f"the model on a GPU, it is on {device}"
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel, which is not installed (pip install liger-kernel)"
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as known

    kind = causal.config.model_type
    return None if kind in known else f"a model that liger-kernel has kernels for, not {kind!r}"


# --- recognising a layer ----------------------------------------------------------------------------------


@contextmanager
def _evaluating(model):
    """Layers are compared without dropout."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _wave(*shape, dtype=torch.float32) -> Tensor:
    """An input to compare on that leaves the random state alone."""
    return 3 * torch.sin(torch.arange(torch.Size(shape).numel(), dtype=dtype)).view(shape)


@torch.no_grad()
def _agree(ours, own, *inputs) -> bool:
    with suppress(Exception):  # a layer that does not take such an input, or runs elsewhere, is not the one we know
        return all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(ours(*inputs), own(*inputs), strict=True))
    return False


def _takes_one(module) -> bool:
    return len(inspect.signature(module.forward).parameters) == 1


# --- RMSNorm ----------------------------------------------------------------------------------------------


def _find_norm(module):
    is_norm = type(module).__name__.endswith("RMSNorm") and [n for n, _ in module.named_parameters()] == ["weight"]
    if not is_norm or not cpp.is_built or not _takes_one(module):
        return None
    x = _wave(3, *module.weight.shape)
    if not _is_float32(module, x):
        return None
    twin = copy.deepcopy(module)  # under fresh weights, all 0 or 1, norms that differ agree
    twin.weight.data = _wave(*module.weight.shape)
    inputs = (x, 1e-3 * x)  # small enough for eps to be seen
    for ours in (_norm, _norm_plus_one):
        if all(_agree(MethodType(ours, twin), twin.forward, value) for value in inputs):
            return ours
    return None


def _is_float32(module, x) -> bool:
    """Then transformers' arithmetic is ours; other dtypes it computes in float32, rounding on the way."""
    return all(t.dtype == torch.float32 and t.device.type == "cpu" for t in (x, module.weight))


def _norm(self, x, offset=0.0):
    if not _is_float32(self, x):
        return type(self).forward(self, x)
    eps = self.variance_epsilon if hasattr(self, "variance_epsilon") else self.eps
    return layers.rms_norm(x, self.weight, eps, offset)


def _norm_plus_one(self, x):
    return _norm(self, x, 1.0)


# --- gated MLP --------------------------------------------------------------------------------------------


def _find_mlp(module):
    parts = {"gate_proj", "up_proj", "down_proj", "act_fn"}
    names = set(getattr(type(module).forward, "__code__", _find_mlp.__code__).co_names)
    if names != parts or not cpp.is_built or not _takes_one(module):  # no clamp, no dropout, nothing else
        return None
    weight = module.gate_proj.weight
    if weight.dtype not in DTYPES or weight.device.type != "cpu":
        return None
    x = _wave(3, module.gate_proj.in_features, dtype=weight.dtype)
    return _mlp if _agree(MethodType(_mlp, module), module.forward, x) else None


def _mlp(self, x):
    gate, up = self.gate_proj(x), self.up_proj(x)
    fits = gate.dtype == up.dtype and gate.dtype in DTYPES and gate.device.type == "cpu"
    return self.down_proj(layers.silu_mul(gate, up) if fits else self.act_fn(gate) * up)


# --- rotary embedding -------------------------------------------------------------------------------------


def _find_rotary(module):
    if any(p.device.type != "cpu" for p in module.parameters()):
        return None
    forward = type(module).forward
    inner = inspect.unwrap(forward)  # newer versions of transformers decorate it
    own = getattr(inner, "__globals__", {}).get(ROTARY)
    known = own is not None and ROTARY in inner.__code__.co_names and cpp.is_built
    return _with_our_rotary(forward, own) if known else None


@functools.cache  # one function for all layers, as a class has
def _with_our_rotary(forward, own):
    """The attention's forward with one of its global names bound to ours: transformers' module stays as it is."""

    def rotary(q, k, cos, sin, unsqueeze_dim=1):
        fits = q.dtype == k.dtype == cos.dtype and q.dtype in DTYPES and q.device.type == "cpu"
        if not fits or unsqueeze_dim != 1 or cos.dim() != 3 or cos.shape[-1] != q.shape[-1]:
            return own(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        return layers.rotary(q, k, cos, sin)

    if not _agree(rotary, own, _wave(1, 2, 3, 8), _wave(1, 1, 3, 8).cos(), _wave(1, 3, 8).cos(), _wave(1, 3, 8)):
        return None
    return _rebound(forward, rotary)


def _rebound(forward, rotary):
    """A copy of a function, and of its decorators, whose innermost global name ROTARY is `rotary`; None where one of
    them holds what it wraps in another way than a closure."""
    if not isinstance(forward, FunctionType):
        return None
    names, cells, inner = forward.__globals__, forward.__closure__, getattr(forward, "__wrapped__", None)
    if inner is None:
        names = {**names, ROTARY: rotary}
    else:
        ours, held = _rebound(inner, rotary), [c for c in cells or () if c.cell_contents is inner]
        if ours is None or len(held) != 1:
            return None
        cells = tuple(CellType(ours) if c is held[0] else c for c in cells)
    twin = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, cells)
    twin.__kwdefaults__ = forward.__kwdefaults__
    return twin


# --- LoRA -------------------------------------------------------------------------------------------------


def _find_lora(module):
    return _lora if type(module) is LoraLinear and type(module.base_layer) is nn.Linear else None


def _lora(self, x, *args, **kwargs):
    name = None if args or kwargs else _plain_adapter(self, x)
    if name is None:
        return type(self).forward(self, x, *args, **kwargs)
    a, b, base = self.lora_A[name].weight, self.lora_B[name].weight, self.base_layer
    return layers.lora_linear(x, base.weight, base.bias, a, b, self.scaling[name])


def _plain_adapter(self, x) -> str | None:
    """The one adapter that is on, if all it does here is add scaling * (x A^T) B^T in x's dtype."""
    if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
        return None
    (name,) = self.active_adapters
    if name not in self.lora_A or name in self.lora_variant or torch.is_autocast_enabled(x.device.type):
        return None
    dropout, base, a, b = self.lora_dropout[name], self.base_layer, self.lora_A[name], self.lora_B[name]
    if (dropout.training and not isinstance(dropout, nn.Identity)) or b.bias is not None:
        return None
    frozen = [t for t in (base.weight, base.bias) if t is not None]
    plain = all(type(t) is nn.Parameter and t.dtype == x.dtype for t in (*frozen, a.weight, b.weight))
    return name if plain and not any(t.requires_grad for t in frozen) else None


FINDERS = {"rms_norm": _find_norm, "silu_mul": _find_mlp, "rotary": _find_rotary, "lora_linear": _find_lora}
