"""`ddpo plan`: its parameters are the model's, its memory is what training takes, its FLOP are what was multiplied."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, need_cpp, tiny_model, tiny_tokenizer
from torch.utils.flop_counter import FlopCounterMode

from ddpo import footprint, loading
from ddpo.cli import main
from ddpo.config import PlanConfig, TrainConfig
from ddpo.data.batches import pack
from ddpo.data.prepared import Prepared
from ddpo.layers import speed_up
from ddpo.ops import cpp
from ddpo.plan import plan
from ddpo.schedule import Schedule
from ddpo.settings import to_yaml
from ddpo.state import adapt, build_policy, make_policy

sys.path.insert(0, str(ROOT))
CPU = torch.device("cpu")
LLAMA_8B = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}


# --- against what training takes --------------------------------------------------------------------------

LLAMA_CASES = [
    {"micro_tokens": 1536, "lora_targets": ("all-linear",)},
    {"micro_tokens": 1536, "activation_checkpointing": True},
    {"micro_tokens": 512, "lora": False},
]
if os.environ.get("DDPO_TEST_LONG"):  # the same settings, combined otherwise
    LLAMA_CASES += [{"micro_tokens": 512}, {"micro_tokens": 1536, "lora": False, "activation_checkpointing": True}]


@need_cpp
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_of_this_cpu(tmp_path):
    """Peak resident memory of loading and two training steps is as planned, within 15 %."""
    from benchmarks.memory import compare, prepared, random_llama

    llama = tmp_path / "llama"
    random_llama(llama)
    tiny_tokenizer().save_pretrained(llama)
    shared = {"out": "none", "method": "orpo", "batch_size": 3}
    of_llama = {"model": str(llama), "data": prepared(tmp_path, str(llama)), **shared}
    configs = [TrainConfig(**of_llama, **case) for case in LLAMA_CASES]
    if loading._packaged():
        (tmp_path / "small").mkdir()
        data = prepared(tmp_path / "small", loading.PACKAGED)
        configs.append(TrainConfig(model=loading.PACKAGED, data=data, **{**shared, "batch_size": 2}, micro_tokens=512))
    for cfg, row in zip(configs, compare(configs, tmp_path), strict=True):
        assert abs(row["error"]) <= 0.15, (cfg, row)


@need_cpp
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_used_again():
    """Half of the tensors freed, smaller ones made, as many of the old size made again: memory grows by little more
    than the smaller ones take, 0.08 of all. (Under PyTorch's own allocator and a glibc before 2.38 mostly by half.)"""
    code = """
import torch
from benchmarks.measure import resident
from ddpo.ops import cpp
cpp.allocate_tightly()
kept = [torch.ones(200_000) for _ in range(400)]  # under malloc's threshold for pages of their own
before = resident("VmRSS")
for _ in range(4):
    kept[::2] = [None] * 200
    smaller = [torch.ones(66_666) for _ in range(100)]
    kept[::2] = [torch.ones(200_000) for _ in range(200)]
    del smaller
print((resident("VmRSS") - before) / 320e6)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.2


@need_cpp
def test_tensors_of_both_allocators():
    """Tensors are aligned, and freed by the allocator that made them, whichever is on then."""
    default = torch.ones(1000)
    cpp.allocate_tightly()
    try:
        ours = [torch.full((n,), 7.0) for n in (1, 1000, 1_000_000)]
        assert all(tensor.data_ptr() % 64 == 0 for tensor in ours)
        del default
        assert torch.empty(0).sum() == 0 and ours[0].clone().resize_(5000).shape == (5000,)
    finally:
        cpp.allocate_tightly(False)
    assert all(float(tensor.mean()) == 7 for tensor in ours)
    del ours
    assert torch.ones(10).sum() == 10


# --- parameters, bytes and FLOP of a pass -----------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"lora_targets": ("all-linear",), "lora_r": 3}, {"lora": False}])
def test_parameters(config, changes):
    cfg = config(**changes)
    policy = build_policy(cfg, CPU)
    size = footprint.size_of(cfg, loading.read_config(cfg.model), torch.float64)
    params = list(policy.parameters())
    trained = [p for p in params if p.requires_grad]
    assert (size.num_total, size.num_trained) == (sum(p.numel() for p in params), sum(p.numel() for p in trained))
    assert size.whole.all == sum(p.nbytes for p in params) and size.whole.trained == sum(p.nbytes for p in trained)
    layer = sum(p.nbytes for p in policy.layers()[0].parameters())
    assert size.layer.all == layer and size.outside.all == size.whole.all - layer * len(policy.layers())
    assert size.head == (258, 16) and size.head_trained == (not cfg.lora)


def test_llama_8b_without_its_weights(tmp_path):
    from transformers import AutoConfig

    AutoConfig.for_model("llama", **LLAMA_8B).save_pretrained(tmp_path)
    cfg = PlanConfig(model=str(tmp_path))
    size = footprint.size_of(cfg, loading.read_config(cfg.model), torch.bfloat16)
    adapter = 32 * 16 * (2 * 4096 + 4096 + 1024)  # r 16 on q_proj (4096 to 4096) and v_proj (4096 to 1024)
    assert (size.num_total, size.num_trained) == (8_030_261_248 + adapter, adapter)
    assert size.whole.frozen == 2 * 8_030_261_248 and size.whole.trained == 4 * adapter


@pytest.mark.parametrize("for_cpu", [True, False])
@pytest.mark.parametrize("changes", [{}, {"lora": False}, {"activation_checkpointing": True}])
def test_a_pass_is_linear_in_layers_and_tokens(config, changes, for_cpu):
    """Copies of one and two layers tell bytes and FLOP of a model of four, at other lengths."""
    cfg = config(**changes)
    four = tiny_model(num_hidden_layers=4, vocab_size=footprint.VOCABULARY).config
    found = footprint.measure(cfg, four, torch.float64, row_share=0.5, for_cpu=for_cpu)(9 * footprint.SEQUENCE)
    model = adapt(cfg, loading.random_model(four, torch.float64))
    if for_cpu:
        speed_up(model)
    policy = make_policy(cfg, model, CPU).train()
    footprint._pass(policy, 1, 0.5)()
    saved, extra, flop = footprint._counted(policy, 9, 0.5)
    assert found.saved == pytest.approx(saved, rel=1e-3) and found.flop == pytest.approx(flop, rel=1e-9)
    if not cfg.activation_checkpointing:  # there the counting itself keeps some of each layer until the end
        assert found.extra == pytest.approx(extra, rel=0.02)


def test_flop(config, tmp_path):
    """Those of the products, counted by PyTorch over the whole step; attention's and the head's, by hand."""
    cfg = PlanConfig(**{**vars(config(batch_size=2)), "data": None}, tokens_per_prompt=5, tokens_per_response=20)
    found = plan(replace(cfg, flops=1e9, efficiency=0.5))
    policy = build_policy(cfg, CPU).train()
    source = SimpleNamespace(prompt_ids=lambda r: np.arange(5), response_ids=lambda r: np.arange(20))
    with FlopCounterMode(display=False) as counter:
        policy(pack(source, range(4))).sum().backward()
    products = [n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op)]
    flop, heads = found["flop"], 4 * 4
    assert flop["layers"] == pytest.approx(sum(products), rel=0.01)
    assert flop["attention"] == pytest.approx(2 * 4 * 24**2 * heads * 2 * 3.5)  # 4 sequences, 2 layers
    assert flop["head"] == pytest.approx(2 * 80 * 258 * 16 * 2)  # 80 rows, frozen: two products
    assert found["seconds"] == pytest.approx(sum(list(flop.values())[:3]) / 0.5e9)


def test_flop_by_hand(config):
    """All weights trained: each product of a layer once forward and twice backward, 6 FLOP a parameter and token."""
    cfg = PlanConfig(**{**vars(config(batch_size=2, lora=False)), "data": None}, tokens_per_prompt=5)
    layers = 2 * (16 * 16 * 2 + 2 * 16 * 8 + 2 * 16 * 24)  # q, o; k, v; c_fc, c_proj
    tokens = 4 * (5 + 512 - 1)
    assert plan(replace(cfg, flops=1e9))["flop"]["layers"] == pytest.approx(6 * layers * tokens)


# --- the plan ---------------------------------------------------------------------------------------------


def test_of_a_folder(config, prepared_folder):
    """A step's tokens are the schedule's; no pack is planned larger than any step fills."""
    cfg = PlanConfig(**vars(config(micro_tokens=10_000, forward_zero_weight=True)), flops=1e9)
    schedule = Schedule(Prepared(prepared_folder), cfg)
    tokens = [sum(b.num_inputs for b in schedule.batches(step)) for step in range(schedule.num_steps)]
    found = plan(cfg)
    assert found["step"]["tokens"] == pytest.approx(sum(tokens) / len(tokens)) and found["pack_tokens"] == max(tokens)
    assert found["step"]["again"] == 0 and plan(replace(cfg, micro_tokens=50))["step"]["again"] > 0


def test_of_a_group_loss(config, prepared_folder):
    """Items are groups: of the folder's, or as many responses as assumed."""
    cfg = PlanConfig(**vars(config(method="gvpo", batch_size=2)), flops=1e9)
    schedule = Schedule(Prepared(prepared_folder), cfg)
    tokens = [sum(b.num_inputs for b in schedule.batches(step)) for step in range(schedule.num_steps)]
    assert len(tokens) == 2 and plan(cfg)["step"]["tokens"] == pytest.approx(sum(tokens) / len(tokens))
    assumed = plan(replace(cfg, data=None, tokens_per_prompt=5, tokens_per_response=20, responses_per_group=3))["step"]
    assert assumed["tokens"] == 2 * 3 * 24 and assumed["rows"] == 2 * 3 * 20


def test_most_tokens(config, monkeypatch):
    """The pack it calls the largest fits, one token more does not."""
    cfg = PlanConfig(**{**vars(config(batch_size=10_000)), "data": None}, gpus=2, gpu_memory=2.0)
    most = plan(cfg)["most_micro_tokens"]
    at, above = (plan(replace(cfg, micro_tokens=n)) for n in (most, most + 1))
    assert most > 1000 and at["peak_mib"] <= 2048 < above["peak_mib"]
    assert plan(replace(cfg, gpu_memory=0.5))["most_micro_tokens"] == 0


def test_shares_of_several_gpus(config):
    """FSDP: weights, gradients and moments are divided, and some layers stand whole; DDP: buckets."""
    cfg = PlanConfig(**{**vars(config(lora=False)), "data": None})
    one, four = (plan(replace(cfg, gpus=n))["memory_mib"] for n in (1, 4))
    assert all(four[name] == pytest.approx(one[name] / 4) for name in ("weights", "optimiser"))
    assert one["exchange"] == 0 < four["exchange"]
    lora = plan(replace(cfg, lora=True, gpus=4))["memory_mib"]
    assert lora["weights"] == pytest.approx(one["weights"]) and lora["exchange"] == lora["adapter"] > 0


def test_command_line(config, tmp_path, capsys):
    """A training's config serves, machine keys beside it; a folder that is not there is said."""
    path = tmp_path / "train.yaml"
    path.write_text(to_yaml(replace(config(), data="not/yet")))
    main(["plan", "--config", str(path), "--gpus", "8", "--gpu-memory", "80", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["machine"] == {"gpus": 8, "memory_mib": 80 * 1024} and found["seconds"] is None
    assert "there is no folder not/yet" in found["step"]["source"]
    main(["plan", "--config", str(path), "--flops", "1e12"])
    out = capsys.readouterr().out
    assert "AdamW's moments" in out and "while the model is loaded" in out and "at 40% of 1e+12 FLOP/s, given" in out
    with pytest.raises(SystemExit):
        main(["plan", "--config", str(path), "--no-lora", "--dtype", "bfloat16"])
    assert "--no-lora in bfloat16 loses most small updates" in capsys.readouterr().err


@pytest.mark.parametrize("dtype, item", [(torch.float32, 4), (torch.bfloat16, 6)], ids=str)
def test_a_file_of_another_dtype_stands_beside_the_weights(config, tmp_path, dtype, item):
    tiny_model().to(dtype).save_pretrained(tmp_path)
    found = plan(PlanConfig(**{**vars(config()), "data": None, "model": str(tmp_path), "dtype": "float32"}, flops=1e9))
    base, loading = found["memory_mib"]["base"], found["loading_mib"]
    assert (loading - base) * 2**20 == pytest.approx(item * found["parameters"]["total"], abs=1)


def test_all_weights_on_gpus_load_whole_and_compute_in_bfloat16(config):
    """Every process loads the model before it is shared out; autocast keeps half copies of the weights for backward."""
    cfg = PlanConfig(**{**vars(config(lora=False, dtype="auto")), "data": None}, gpus=8)
    auto, off = plan(cfg), plan(replace(cfg, autocast="off"))
    weights = 4 * auto["parameters"]["total"]
    assert auto["dtype"] == "float32" and auto["loading_mib"] * 2**20 == pytest.approx(2**30 + weights)
    copies = auto["memory_mib"]["activations"] - off["memory_mib"]["activations"]
    assert auto["memory_mib"]["head"] > off["memory_mib"]["head"] and copies != 0


def test_refusals(config, tmp_path):
    model = tiny_model()
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    model.config.save_pretrained(tmp_path)
    cfg = PlanConfig(**{**vars(config()), "data": None, "model": str(tmp_path)})
    with pytest.raises(ValueError, match="is quantised, which is not planned"):
        plan(cfg)
    with pytest.raises(ValueError, match="gpus must be at least 0, got -1"):
        replace(cfg, gpus=-1)
