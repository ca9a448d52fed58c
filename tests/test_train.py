"""The loop: identities, invariances, methods, clear refusals."""

import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHARED, metrics, relative, same_bits, tiny_model, tiny_tokenizer, weights_of, write_groups

from ddpo import train
from ddpo.config import GenerateConfig, PrepareConfig, TrainConfig, WeighConfig
from ddpo.data.groups import read_jsonl, write_jsonl
from ddpo.data.prepared import Prepared
from ddpo.generate import generate
from ddpo.prepare import prepare
from ddpo.schedule import lr_at
from ddpo.train import train as run_training
from ddpo.weigh import weigh

# --- identities -------------------------------------------------------------------------------------------


def test_loss_of_step_zero(config):
    """ln 2 times the mean weight over the step's pairs, zeros included."""
    cfg = config(max_steps=1, batch_size=1000)
    run_training(cfg)
    data = Prepared(cfg.data)
    assert (data.weight == 0).any()
    first = metrics(cfg)[0]
    assert first["loss"] == pytest.approx(math.log(2) * data.weight.mean(), abs=1e-6)
    assert first["num_pairs"] == len(data.pairs) > first["pairs_forwarded"]
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-9)


def test_weight_one_is_dpo_bit_for_bit(config, tmp_path):
    ones = tmp_path / "ones"
    shutil.copytree(config().data, ones)
    weigh(WeighConfig(source=str(ones), measures=("style",), min_deviation=1.0))
    assert (Prepared(ones).weight == 1).all()
    for weighted, plain in (("ddpo", "dpo"), ("dorpo", "orpo")):
        pair = [config(data=str(ones), method=m, epochs=2) for m in (weighted, plain)]
        for cfg in pair:
            run_training(cfg)
        assert same_bits(*map(weights_of, pair))


def test_four_micro_batches_of_two_equal_one_of_eight(config, tmp_path, model_folder):
    """float64: relative L2 of the gradient and of the final adapter at most 1e-9."""
    words = ("calm", "loud", "odd!", "grim")
    groups = [(f"Topic {g}", [(f"{word} story", score) for score, word in enumerate(words)]) for g in range(4)]
    source, folder = write_groups(tmp_path / "equal.jsonl", groups), str(tmp_path / "equal")
    prepare(PrepareConfig(source=str(source), out=folder, model=model_folder, gap=1.0, measures=("style",)))
    data = Prepared(folder)
    (length,) = set((data.num_prompt_tokens + data.num_tokens).tolist())
    grads, runs = [], []
    for micro_tokens in (100_000, 4 * length):
        cfg = config(data=folder, method="dpo", epochs=3, batch_size=8, micro_tokens=micro_tokens, max_grad_norm=0.0)
        state = train.setup(cfg, 0, 1, Path(cfg.out))
        assert [len(b.pairs) for b in state.schedule.batches(0)] == ([8] if micro_tokens == 100_000 else [2, 2, 2, 2])
        state.optimizer.zero_grad = lambda set_to_none: None  # keep the gradients to look at
        train.step(state)
        grads.append({n: p.grad for n, p in state.params.items()})
        run_training(cfg)
        runs.append(weights_of(cfg))
    assert relative(*grads) < 1e-9 and relative(*runs) < 1e-9


def test_methods_that_are_another_by_their_settings(config):
    """Weighted DPO is DDPO bit for bit, labels smoothed in both; SPL with alpha = beta is DPO."""
    ddpo, weighted, dpo, spl = (
        config(epochs=2, batch_size=4, **changes)
        for changes in (
            {"method": "ddpo", "label_smoothing": 0.1},
            {"method": "dpo", "label_smoothing": 0.1, "weighted": True},
            {"method": "dpo", "beta": 0.2},
            {"method": "spl", "beta": 0.2, "alpha": 0.2},
        )
    )
    for cfg in (ddpo, weighted, dpo, spl):
        run_training(cfg)
    assert same_bits(weights_of(ddpo), weights_of(weighted)) and not same_bits(weights_of(ddpo), weights_of(dpo))
    assert relative(weights_of(spl), weights_of(dpo)) < 1e-9


@pytest.mark.parametrize("method", ["ddpo", "dorpo", "simpo"])
def test_pairs_of_weight_zero_may_be_left_out(config, make_prepared, method):
    """Their forward changes metrics, never the adapter; a step with none but zeros is a step all the same."""
    data = make_prepared(pairs="gap")
    assert (data.weight == 0).any()
    shared = {"data": str(data.folder), "method": method, "weighted": True, "batch_size": 1}
    runs = [config(**shared, forward_zero_weight=f) for f in (False, True)]
    for cfg in runs:
        run_training(cfg)
    assert relative(*map(weights_of, runs)) < 1e-9
    assert min(m["pairs_forwarded"] for m in metrics(runs[0])) == 0
    assert min(m["pairs_forwarded"] for m in metrics(runs[1])) == 1


# --- methods ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "sft"},
        {"method": "dpo"},
        {"method": "ddpo", "lora_targets": ("all-linear",)},
        {"method": "orpo", "nll_mean": "tokens", "nll_tokens": "all"},
        {"method": "dorpo", "dorpo_weight": "inside"},
        {"method": "ddpo", "lora": False},
        {"method": "sft", "lora": False},
        {"method": "ddpo", "label_smoothing": 0.1},
        {"method": "spl", "alpha": 0.3},
        {"method": "ipo", "weighted": True},
        {"method": "ipo", "ipo_logp": "mean"},
        {"method": "simpo"},
        {"method": "gvpo", "gvpo_norm": "n-1"},
    ],
    ids=lambda c: "-".join(map(str, c.values())),
)
def test_methods_learn(config, changes):
    cfg = config(epochs=6, batch_size=20, lr=1e-2, **changes)
    run_training(cfg)
    losses = [m["loss"] for m in metrics(cfg)]
    steps = sum(m["epoch"] <= 1 for m in metrics(cfg))
    assert np.mean(losses[-steps:]) < np.mean(losses[:steps])
    assert not any(m["skipped"] for m in metrics(cfg))
    if changes["method"] not in ("sft", "gvpo"):
        assert {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen"} <= set(
            metrics(cfg)[0]
        )


def test_adapter_loads_in_peft(config, model_folder):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    cfg = config()
    run_training(cfg)
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64)
    ids = torch.arange(20)[None]
    before = base(ids).logits
    tuned = PeftModel.from_pretrained(base, f"{cfg.out}/adapter")
    after = tuned(ids).logits
    assert not torch.allclose(before, after)
    torch.testing.assert_close(tuned.merge_and_unload()(ids).logits, after, rtol=1e-9, atol=1e-9)


def test_from_an_sft_adapter(config):
    """An adapter given is merged first: the reference holds it, so the margin starts at 0."""
    sft = config(method="sft", epochs=3, lr=1e-2)
    run_training(sft)
    cfg = config(adapter=f"{sft.out}/adapter", max_steps=1)
    run_training(cfg)
    plain = config(max_steps=1)
    run_training(plain)
    assert metrics(cfg)[0]["rewards/margins"] == pytest.approx(0, abs=1e-9)
    assert metrics(cfg)[0]["logps/chosen"] > metrics(plain)[0]["logps/chosen"] + 1


def test_adapter_after_sft_stands_over_the_plain_model(config, model_folder):
    """The adapter that DDPO writes after SFT holds both: over the plain base it is the trained policy."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    sft = config(method="sft", lr=1e-2, lora_targets=("q_proj", "o_proj"))
    run_training(sft)
    cfg = config(adapter=f"{sft.out}/adapter", lr=1e-2)
    run_training(cfg)
    state = train.setup(replace(cfg, resume=True), 0, 1, Path(cfg.out))
    ids = torch.arange(20)[None]
    state.policy.causal.set_attn_implementation("sdpa")
    expected = state.policy.causal.eval()(ids).logits
    over_base = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), f"{cfg.out}/adapter")
    torch.testing.assert_close(over_base.eval()(ids).logits, expected, rtol=1e-9, atol=1e-9)


def test_full_model_is_a_model_folder(config, model_folder, tmp_path):
    """All weights trained: what is written generates by itself, with its tokenizer and chat template."""
    cfg = config(lora=False, max_steps=1)
    run_training(cfg)
    prompts = write_groups(tmp_path / "prompts.jsonl")
    out = str(tmp_path / "out.jsonl")
    generate(GenerateConfig(prompts=str(prompts), out=out, model=f"{cfg.out}/model", num_samples=1, max_new_tokens=4))
    assert len(list(read_jsonl(out))) == 4
    with pytest.raises(ValueError, match="loses most small updates"):
        run_training(config(lora=False, dtype="bfloat16"))


def test_not_finite_step_is_skipped(config, monkeypatch):
    cfg = config(max_steps=3)
    state = train.setup(cfg, 0, 1, Path(cfg.out))
    train.step(state)
    before = {n: p.detach().clone() for n, p in state.params.items()}
    real = train.objective
    monkeypatch.setattr(train, "objective", lambda *a: (real(*a)[0] * math.nan, real(*a)[1]))
    bad = train.step(state)
    assert not math.isfinite(bad["values"].read()[-1]) and same_bits(before, dict(state.params))
    monkeypatch.undo()
    assert math.isfinite(train.step(state)["values"].read()[-1]) and not same_bits(before, dict(state.params))


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"lr_schedule": "linear"}, [1.0, 0.75, 0.5, 0.25]),
        ({"lr_schedule": "linear", "warmup_steps": 2}, [0.5, 1.0, 1.0, 0.5]),
        (
            {"lr_schedule": "cosine", "min_lr": 0.5},
            [1.0, 0.5 + 0.25 * (1 + 0.5**0.5), 0.75, 0.5 + 0.25 * (1 - 0.5**0.5)],
        ),
        ({"lr_schedule": "constant", "warmup_steps": 2}, [0.5, 1.0, 1.0, 1.0]),
    ],
)
def test_learning_rate(changes, expected):
    cfg = TrainConfig(data="", out="", lr=1.0, **changes)
    assert [lr_at(i, 4, cfg) for i in range(4)] == pytest.approx(expected)


# --- refusals ---------------------------------------------------------------------------------------------


def test_a_run_that_lies_there_is_kept(config):
    cfg = config()
    run_training(cfg)
    before = weights_of(cfg)
    with pytest.raises(FileExistsError, match="exists already; go on with --resume, or give another --out"):
        run_training(cfg)
    with pytest.raises(ValueError, match=r"started with other settings \(lr\)"):
        run_training(replace(cfg, lr=1.0, resume=True))
    run_training(replace(cfg, resume=True))  # finished: nothing left to do
    assert same_bits(before, weights_of(cfg))
    other = config(resume=True)
    Path(other.out).mkdir()
    (Path(other.out) / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds other files and no run to resume"):
        run_training(other)
    (Path(other.out) / "thesis.txt").rename(Path(other.out) / ".config.yaml.77")  # a draft, of a run killed at once
    run_training(other)
    assert same_bits(before, weights_of(other))


def test_bad_input_leaves_no_run_folder(config, tmp_path, model_folder):
    other = tmp_path / "other"
    tiny_model().save_pretrained(other)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["sea"])
    tokenizer.save_pretrained(other)
    bad = [
        (config(data=str(tmp_path / "none")), "is no prepared folder"),
        (config(model=str(other)), "which is not that of"),
        (config(lora_targets=("q",)), "no linear layer is called"),
        (config(adapter=model_folder), "holds no LoRA adapter"),
    ]
    for cfg, message in bad:
        with pytest.raises(ValueError, match=message):
            run_training(cfg)
        assert not Path(cfg.out).exists()


# --- real data --------------------------------------------------------------------------------------------


@pytest.mark.skipif(not SHARED.exists(), reason="real data is not here")
@pytest.mark.parametrize("name", ["aut_human", "hanna_llm_7way"])
def test_real_data(name, config, model_folder, tmp_path):
    """People's answers as they are; stories of which most are not rated, with seeded scores in place of theirs."""
    source = SHARED / f"{name}.jsonl"
    if name == "hanna_llm_7way":
        rng = np.random.default_rng(0)
        rows = [row for _, row in read_jsonl(source)][:12]
        for row in rows:
            for response in row["responses"]:
                response["score"] = float(rng.integers(1, 6))
        source = tmp_path / "seeded.jsonl"
        write_jsonl(source, rows)
    folder = str(tmp_path / "prepared")
    prepare(
        PrepareConfig(source=str(source), out=folder, model=model_folder, gap=1.0, measures=("style",), max_length=8000)
    )
    cfg = config(data=folder, max_steps=2, micro_tokens=8000, batch_size=2)
    run_training(cfg)
    assert all(math.isfinite(m["loss"]) for m in metrics(cfg))
