"""Settings of the policy's arithmetic: autocast, activation checkpointing, torch.compile, deterministic."""

import os
from pathlib import Path

import pytest
import torch
from conftest import metrics, need_cpp, relative, same_bits, weights_of

from ddpo import loading, train
from ddpo.data.batches import pack
from ddpo.train import train as run_training


def gradients(cfg):
    state = train.setup(cfg, 0, 1, Path(cfg.out))
    for _name, param in state.params.items():  # away from B = 0, where half of the gradient vanishes
        param.data += 0.1 * torch.sin(torch.arange(param.numel(), dtype=param.dtype)).view_as(param)
    state.optimizer.zero_grad = lambda set_to_none: None
    train.step(state)
    return {n: p.grad for n, p in state.params.items()}


@pytest.mark.parametrize("changes", [{}, {"lora_dropout": 0.3}, {"lora": False}], ids=str)
def test_activation_checkpointing_changes_nothing(config, changes):
    plain, checkpointed = (
        config(max_steps=2, batch_size=6, activation_checkpointing=c, **changes) for c in (False, True)
    )
    assert relative(gradients(checkpointed), gradients(plain)) < 1e-12
    run_training(checkpointed)
    run_training(plain)
    assert relative(weights_of(checkpointed), weights_of(plain)) < 1e-9


def test_activation_checkpointing_holds_less(config):
    """Bytes that autograd saves, the head's left out of the count."""
    held = []
    for checkpointing in (False, True):
        cfg = config(activation_checkpointing=checkpointing)
        state = train.setup(cfg, 0, 1, Path(cfg.out))
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            state.policy(pack(state.schedule.data, range(8)))
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
        held.append(sum(storages.values()))
    assert held[1] < 0.5 * held[0]


def test_autocast(config):
    """bfloat16 products over float32 weights: near the float32 gradient, not equal to it; trains; its reference
    log-probs are its own."""
    plain, cast = (config(dtype="float32", autocast=a, batch_size=6, max_steps=2) for a in ("off", "bfloat16"))
    error = relative(gradients(cast), gradients(plain))
    assert 1e-4 < error < 0.1
    assert all(g.dtype == torch.float32 for g in gradients(cast).values())
    run_training(cast)
    assert metrics(cast)[0]["rewards/margins"] == pytest.approx(0, abs=0.02)
    run_training(plain)
    assert abs(metrics(plain)[0]["rewards/margins"]) < 1e-4


def test_pick_autocast(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert (
        loading.pick_autocast("auto", "auto", gpu) is torch.bfloat16 is loading.pick_autocast("bfloat16", "auto", cpu)
    )
    assert loading.pick_autocast("auto", "auto", cpu) is None is loading.pick_autocast("off", "auto", gpu)
    assert loading.pick_autocast("auto", "float32", gpu) is None


def test_compile(config, monkeypatch):
    """Every layer is compiled; what is traced is right (inductor's own code, minutes of compiling, is not tested)."""
    real, compiled_layers = torch.nn.Module.compile, []

    def compile(layer, **options):
        compiled_layers.append(layer)
        real(layer, backend="aot_eager", **options)

    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    plain, compiled = (config(max_steps=2, batch_size=6, compile=c) for c in (False, True))
    run_training(plain)
    assert compiled_layers == []
    run_training(compiled)
    assert len(compiled_layers) == 2
    assert relative(weights_of(compiled), weights_of(plain)) < 1e-9
    assert weights_of(compiled).keys() == weights_of(plain).keys()


def test_deterministic(config, monkeypatch):
    """Sets what a GPU needs for it; on a CPU the bits are the same either way."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    asked = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    plain, deterministic = (config(max_steps=2, deterministic=d) for d in (False, True))
    run_training(plain)
    assert asked == [] and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    run_training(deterministic)
    assert asked == [True] and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert same_bits(weights_of(plain), weights_of(deterministic))


@need_cpp
def test_the_trainer_takes_the_faster_layers(config):
    """Starcoder2 has no RMSNorm and no gated MLP: its rotary embedding and the adapter's layers."""
    policy = train.setup(config(), 0, 1, Path(config().out)).policy
    changed = [name for name, module in policy.named_modules() if "forward" in vars(module)]
    assert sum(name.endswith("self_attn") for name in changed) == 2
    assert sum(name.endswith(("q_proj", "v_proj")) for name in changed) == 4


def test_liger_is_asked_for(config):
    with pytest.raises(RuntimeError, match="liger 'on' wants the model on a GPU"):
        train.setup(config(liger="on"), 0, 1, Path(config().out))
