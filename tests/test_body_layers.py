"""Kernels for a transformer layer's elementwise parts and LoRA, and the models that are given them."""

import copy
import inspect
from collections import Counter
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import close_to_truth, need_cpp, relative, tiny_model
from torch.utils.checkpoint import checkpoint

from ddpo import layers, reference
from ddpo.loading import add_lora
from ddpo.ops import cpp
from ddpo.ops import layers as ops

SHAPES = [(64, 32), (37, 22), (1, 2), (0, 16), (300, 96)]  # rows, width: aligned, ragged, one, empty, for two threads


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def norm_case(T, D):
    return (randn(D, T, seed=0).T, 1 + randn(D, seed=1)), ()  # x's rows are not contiguous


def gated_case(T, D):
    return randn(T, 2 * D, seed=0).mul(4).chunk(2, dim=1), ()


def rotary_case(T, D):
    """q and k as attention has them: slices of one (B, T, heads, d) tensor, heads in front."""
    q, k = randn(2, T, 5, D, seed=0).transpose(1, 2).split((3, 2), dim=1)
    return (q, k), (randn(1, T, D, seed=1), randn(1, T, D, seed=2))


def lora_case(T, D):
    return (randn(1, T, D, seed=0), randn(3, D, seed=1), randn(7, 3, seed=2)), (randn(7, D, seed=3), randn(7, seed=4))


OPS = {  # ours, its specification, the tensors that want a gradient and those that want none
    "rms_norm": (lambda x, w: ops.rms_norm(x, w, 1e-5), lambda x, w: reference.rms_norm(x, w, 1e-5), norm_case),
    "gemma_norm": (
        lambda x, w: ops.rms_norm(x, w, 0.1, 1.0),
        lambda x, w: reference.rms_norm(x, w, 0.1, 1.0),
        norm_case,
    ),
    "silu_mul": (ops.silu_mul, reference.silu_mul, gated_case),
    "rotary": (ops.rotary, reference.rotary, rotary_case),
    "lora_linear": (
        lambda x, a, b, w, bias: ops.lora_linear(x, w, bias, a, b, 1.7),
        lambda x, a, b, w, bias: reference.lora_linear(x, w, bias, a, b, 1.7),
        lora_case,
    ),
    "lora_linear without a bias": (
        lambda x, a, b, w, _: ops.lora_linear(x, w, None, a, b, 0.5),
        lambda x, a, b, w, _: reference.lora_linear(x, w, None, a, b, 0.5),
        lora_case,
    ),
}


def both_passes(f, trained, fixed, dtype):
    """Outputs and gradients, under upstream gradients that are not uniform."""
    inputs = [x.to(dtype).requires_grad_() for x in trained]
    out = f(*inputs, *(x.to(dtype) for x in fixed))
    out = out if isinstance(out, tuple) else (out,)
    upstream = [randn(*y.shape, seed=5 + i).to(dtype) for i, y in enumerate(out)]
    return [*(y.detach() for y in out), *torch.autograd.grad(out, inputs, upstream)]


@need_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("T, D", SHAPES)
@pytest.mark.parametrize("name", OPS)
def test_against_reference(name, T, D, dtype):
    ours, spec, case = OPS[name]
    trained, fixed = case(T, D)
    trained, fixed = ([x.to(dtype) for x in xs] for xs in (trained, fixed))
    found = both_passes(ours, trained, fixed, dtype)
    eager = both_passes(spec, trained, fixed, dtype)
    truth = both_passes(spec, trained, fixed, torch.float64)
    for a, b, c in zip(found, eager, truth, strict=True):
        assert a.shape == c.shape and a.dtype == dtype
        if a.numel():
            close_to_truth(a, b, c)


@need_cpp
@pytest.mark.parametrize("name", OPS)
def test_bitwise_reruns_and_threads(name):
    ours, _, case = OPS[name]
    trained, fixed = case(300, 96)
    first, before = both_passes(ours, trained, fixed, torch.float32), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = both_passes(ours, trained, fixed, torch.float32)
        torch.set_num_threads(2)
        two = both_passes(ours, trained, fixed, torch.float32)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(alone, two, strict=True))
    assert before != 2 or all(torch.equal(a, b) for a, b in zip(first, two, strict=True))


@need_cpp
def test_opcheck_and_refusals():
    x, w = (t.requires_grad_() for t in norm_case(9, 6)[0])
    op = torch.ops.ddpo
    torch.library.opcheck(op.rms_norm.default, (x, w, 1e-5, 1.0))
    rstd = op.rms_norm(x, w, 1e-5, 1.0)[1].detach()
    for want in (True, False):
        torch.library.opcheck(op.rms_norm_bwd.default, (x.detach(), x.detach(), w.detach(), rstd, 1.0, want))
    gate, up = (t.requires_grad_() for t in gated_case(5, 6)[0])
    torch.library.opcheck(op.silu_mul.default, (gate, up))
    torch.library.opcheck(op.silu_mul_bwd.default, (up.detach(), gate.detach(), up.detach()))
    (q, k), angles = rotary_case(5, 6)
    torch.library.opcheck(op.rotary.default, (q.requires_grad_(), k.requires_grad_(), *angles, False))
    for call, message in (
        (lambda: ops.rms_norm(x, w[1:], 1e-5), r"rms_norm: wanted x \(\.\.\., D\)"),
        (lambda: ops.silu_mul(gate, up[1:]), "silu_mul: wanted gate and up alike"),
        (lambda: ops.rotary(q, k[:, :, 1:], *angles), "rotary: wanted q and k"),
        (lambda: ops.rotary(q, k, angles[0], angles[1][..., 1:]), "rotary: wanted cos and sin"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@need_cpp
def test_frozen_weights_cost_nothing():
    """No gradient of a frozen norm weight, and LoRA keeps nothing of its result's size."""
    x, w = norm_case(9, 6)[0]
    y = ops.rms_norm(x.requires_grad_(), w, 1e-5)
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape and y.grad_fn.next_functions[1][0] is None
    (x, a, b), (weight, bias) = lora_case(50, 4)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape), lambda t: t):
        ops.lora_linear(x, weight, bias, a.requires_grad_(), b.requires_grad_(), 1.0)
    assert Counter(map(tuple, kept)) == Counter([(50, 4), (50, 3), (7, 4), (3, 4), (7, 3)])


def test_without_the_extension(monkeypatch):
    monkeypatch.setattr(cpp, "is_built", False)
    with pytest.raises(RuntimeError, match=r"silu_mul wants the extension ddpo\._C.*DDPO_BUILD_CPP=1"):
        ops.silu_mul(torch.ones(2), torch.ones(2))
    model = add_lora(tiny_model("llama").float(), 2, 4, 0.0, ("q_proj",), 0)
    assert layers.speed_up(model) == {"lora_linear": 2}


# --- models -------------------------------------------------------------------------------------------------

IDS = torch.tensor([[5, 9, 200, 31, 7, 7, 90, 11, 3]])
FAMILIES = {  # what two layers with LoRA on q_proj and v_proj have of each
    "llama": {"rms_norm": 5, "silu_mul": 2, "rotary": 2, "lora_linear": 4},
    "qwen2": {"rms_norm": 5, "silu_mul": 2, "rotary": 2, "lora_linear": 4},
    "qwen3": {"rms_norm": 9, "silu_mul": 2, "rotary": 2, "lora_linear": 4},
    "mistral": {"rms_norm": 5, "silu_mul": 2, "rotary": 2, "lora_linear": 4},
    "gemma2": {"rms_norm": 9, "rotary": 2, "lora_linear": 4},
    "gemma3_text": {"rms_norm": 13, "rotary": 2, "lora_linear": 4},
    "starcoder2": {"rotary": 2, "lora_linear": 4},
    "cohere": {"silu_mul": 2, "lora_linear": 4},  # interleaved rotary, LayerNorm
}


def with_adapter(family="llama", dropout=0.0, dtype=torch.float32, targets=("q_proj", "v_proj")):
    model = add_lora(tiny_model(family).to(dtype), 3, 6, dropout, targets, 0)
    for i, (name, p) in enumerate(model.named_parameters()):
        if "lora_B" in name or "norm" in name:  # B starts at 0, norms all alike
            p.data.add_(0.3 * torch.sin(torch.arange(p.numel()) + i).view_as(p))
    return model


def logits_and_gradients(model, call=None):
    model.zero_grad()
    logits = (call or model)(IDS).logits
    (logits.log_softmax(-1)[0, :, 7] * torch.sin(torch.arange(IDS.shape[1]))).sum().backward()
    return {"logits": logits.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same_to_rounding(a, b, limit=1e-5):
    assert a.keys() == b.keys()
    for name in a:
        assert relative(a[name], b[name]) < limit, name


@need_cpp
@pytest.mark.parametrize("family", FAMILIES)
def test_speed_up_changes_nothing_else(family):
    own, ours = with_adapter(family), with_adapter(family)
    assert layers.speed_up(ours) == FAMILIES[family]
    assert layers.speed_up(ours) == {}, "they are patched"
    assert list(own.state_dict()) == list(ours.state_dict())
    same_to_rounding(logits_and_gradients(ours), logits_and_gradients(own))
    for model in (own, ours):  # all weights
        model.requires_grad_(True)
    same_to_rounding(logits_and_gradients(ours), logits_and_gradients(own))


@need_cpp
def test_the_new_forwards_run(monkeypatch):
    calls = Counter()
    for name in ("rms_norm", "silu_mul", "rotary", "lora_linear"):
        f = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *args, _f=f, _name=name: calls.update([_name]) or _f(*args))
    model = with_adapter()
    found = layers.speed_up(model)
    calls.clear()
    model(IDS)
    assert calls == found == FAMILIES["llama"]


@need_cpp
@pytest.mark.parametrize("state", ["off", "merged", "two adapters", "dropout", "autocast", "float64", "mixed"])
def test_what_is_not_plain_runs_its_own(state):
    """Each state in which a layer must take its own forward, beside the model that was never touched."""
    dropout = 0.5 if state == "dropout" else 0.0
    own, ours = (with_adapter(dropout=dropout) for _ in range(2))
    assert layers.speed_up(ours) == FAMILIES["llama"]
    results = []
    for model in (own, ours):
        torch.manual_seed(0)
        context = nullcontext()
        if state == "off":
            context = model.disable_adapter()
        elif state == "autocast":
            context = torch.autocast("cpu", torch.bfloat16)
        elif state == "merged":
            model.merge_adapter()
        elif state == "two adapters":
            model.add_adapter("other", model.peft_config["default"])
            for i, (name, p) in enumerate(model.named_parameters()):
                p.data.copy_(torch.cos(torch.arange(p.numel()) + i).view_as(p) if "other" in name else p.data)
            model.base_model.set_adapter(["default", "other"])
        elif state == "dropout":
            model.train()
        elif state == "float64":
            model.double()
        elif state == "mixed":  # adapters in float32 over a base in bfloat16
            model.bfloat16()
            for name, p in model.named_parameters():
                p.data = p.data.float() if "lora_" in name else p.data
        with context:
            results.append(model(IDS).logits.detach())
    exact = {"off": 1e-6, "float64": 1e-6, "autocast": 2e-2, "mixed": 0}.get(state, 1e-6)
    assert relative(results[1], results[0]) <= exact
    if state == "off":
        assert relative(results[1], tiny_model("llama").float()(IDS).logits) > 1e-3, "norms were changed"
        assert relative(results[1], ours(IDS).logits) > 1e-3, "the adapter does something"


@need_cpp
def test_dropout_while_training_and_not():
    model = with_adapter(dropout=0.5)
    model.train()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert layers.speed_up(model) == FAMILIES["llama"] and torch.equal(before, torch.get_rng_state())
    assert all(m.training for m in model.modules())
    assert not torch.equal(model(IDS).logits, model(IDS).logits)
    model.eval()
    assert torch.equal(model(IDS).logits, model(IDS).logits)


@need_cpp
def test_copied_checkpointed_and_merged():
    model = with_adapter(targets=("q_proj", "gate_proj", "down_proj"))
    layers.speed_up(model)
    straight = logits_and_gradients(model)
    twin = copy.deepcopy(model)
    for p in twin.parameters():
        p.data.mul_(0.5)  # a copy reads its own weights
    assert relative(twin(IDS).logits, straight["logits"]) > 0.1
    same_to_rounding(logits_and_gradients(model), straight, 1e-7)
    recomputed = partial(checkpoint, lambda ids: SimpleNamespace(logits=model(ids).logits), use_reentrant=False)
    same_to_rounding(logits_and_gradients(model, recomputed), straight, 1e-7)
    assert relative(model.merge_and_unload()(IDS).logits, straight["logits"]) < 1e-5


@need_cpp
def test_look_alikes_stay_as_they_are():
    """What has the names but not the arithmetic."""

    class OddRMSNorm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = torch.nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x):
            return 2 * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight

    class OddMLP(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = (torch.nn.Linear(8, 8) for _ in range(3))
            self.act_fn = torch.nn.GELU()

        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    assert layers.speed_up(torch.nn.ModuleList([OddRMSNorm(), OddMLP()])) == {}


# --- Liger --------------------------------------------------------------------------------------------------


def test_liger_where_it_cannot_be_had():
    model = tiny_model("llama")
    assert not layers.apply_liger(model, "auto") and not layers.apply_liger(model, "off")
    with pytest.raises(RuntimeError, match="liger 'on' wants the model on a GPU, it is on cpu"):
        layers.apply_liger(model, "on")
    with pytest.raises(ValueError, match="liger must be 'auto', 'on' or 'off', got 'yes'"):
        layers.apply_liger(model, "yes")


def on_gpu(kind="llama"):
    weight = SimpleNamespace(device=torch.device("cuda"))
    return SimpleNamespace(parameters=lambda: iter([weight]), config=SimpleNamespace(model_type=kind))


def test_liger_without_the_package(monkeypatch):
    monkeypatch.setattr(layers.importlib.util, "find_spec", lambda name: None)
    assert not layers.apply_liger(on_gpu(), "auto")
    with pytest.raises(RuntimeError, match="wants liger-kernel, which is not installed"):
        layers.apply_liger(on_gpu(), "on")


def test_liger_is_asked_for_layers_and_no_loss(monkeypatch):
    """Our keyword arguments are Liger's, and turn off each loss that any of its families has."""
    liger = pytest.importorskip("liger_kernel.transformers")
    families = pytest.importorskip("liger_kernel.transformers.monkey_patch").MODEL_TYPE_TO_APPLY_LIGER_FN
    calls = []
    monkeypatch.setattr(liger, "_apply_liger_kernel_to_instance", lambda **kwargs: calls.append(kwargs), raising=False)
    model = on_gpu()
    assert layers.apply_liger(model, "auto") and layers.apply_liger(model, "on")
    assert not layers.apply_liger(model, "off") and not layers.apply_liger(on_gpu("starcoder2"), "auto")
    with pytest.raises(RuntimeError, match="wants a model that liger-kernel has kernels for, not 'starcoder2'"):
        layers.apply_liger(on_gpu("starcoder2"), "on")
    assert len(calls) == 2 and calls[0].pop("model") is model
    assert set(calls[0]) <= set(inspect.signature(families["llama"]).parameters)
    losses = {p for f in families.values() for p in inspect.signature(f).parameters if "cross_entropy" in p}
    assert calls[0] == dict.fromkeys(losses, False)


def test_liger_patches_the_instance(monkeypatch):
    """The real function on a real model: norms and MLPs are Liger's, the loss is not."""
    pytest.importorskip("liger_kernel.transformers")
    from transformers.models.llama import modeling_llama

    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):  # put back what Liger replaces there
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    monkeypatch.setattr(layers, "_liger_lacks", lambda causal: None)
    model = add_lora(tiny_model("llama"), 2, 4, 0.0, ("q_proj",), 0)
    assert layers.apply_liger(model, "on")
    decoder = model.get_base_model().get_decoder()
    assert all("Liger" in repr(vars(m)["forward"]) for m in (decoder.norm, decoder.layers[0].mlp))
    assert "forward" not in vars(model.get_base_model()) and layers.speed_up(model)["rms_norm"] == 0
