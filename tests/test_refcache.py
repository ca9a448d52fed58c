"""The reference cache: the right policy, computed once, and why again."""

import numpy as np
import pytest
import torch
from conftest import metrics
from test_model import logp_of_logits

from ddpo import loading, refcache
from ddpo.data.batches import pack
from ddpo.data.prepared import Prepared
from ddpo.loading import add_lora
from ddpo.model import Policy
from ddpo.train import train as run_training

CPU = torch.device("cpu")


def reference(policy, data, needed, adapter=None):
    parts = refcache.identity(policy, adapter)
    return refcache.reference_logp(policy, data, np.array(needed), 100, CPU, parts)


def trained_policy(base):
    """With an adapter that changes the log-probs."""
    policy = Policy(add_lora(base, 2, 4, 0.0, ("q_proj",), 0))
    for name, p in policy.named_parameters():
        if "lora_B" in name:
            p.data.fill_(0.5)
    return policy


def test_reference_is_the_model_without_the_adapter(make_prepared, model_folder, capsys):
    """The cache holds the base model's log-probs though the adapter has been trained; only what is missing is
    computed; other base weights make another cache and say so."""
    data = make_prepared()
    base = loading.load_model(model_folder, None, "float64", CPU)
    expected = {r: logp_of_logits(base, data.prompt_ids(r), data.response_ids(r)) for r in (0, 3, 5)}
    policy = trained_policy(base)
    trained = policy(pack(data, [0]))[0]
    assert not torch.isclose(trained[0], expected[0])
    first = reference(policy, data, [0, 3])
    assert first.isnan().sum() == len(first) - 2
    for r in (0, 3):
        assert first[r].item() == pytest.approx(expected[r].item(), rel=1e-12)
    (path,) = data.folder.glob("reference-*.safetensors")
    again = reference(policy, Prepared(data.folder), [0, 3, 5])
    assert again[5].item() == pytest.approx(expected[5].item(), rel=1e-12) and torch.equal(again[[0, 3]], first[[0, 3]])
    assert list(data.folder.glob("reference-*.safetensors")) == [path]
    assert "anew" not in capsys.readouterr().out
    next(p for n, p in policy.named_parameters() if "c_fc" in n).data.add_(0.01)
    changed = reference(policy, data, [0])
    assert len(list(data.folder.glob("reference-*.safetensors"))) == 2
    assert changed[0] != first[0]
    assert f"computed anew: weights changed since {path.name}" in capsys.readouterr().out


def test_reference_holds_the_sft_adapter(config, make_prepared, model_folder, capsys):
    """The SFT adapter is on while caching: the reference is the SFT model, and its cache another than the base's."""
    data = make_prepared()
    sft = config(data=str(data.folder), method="sft", epochs=3, lr=1e-2)
    run_training(sft)
    adapter = f"{sft.out}/adapter"
    plain = config(data=str(data.folder), max_steps=1)
    over_sft = config(data=str(data.folder), adapter=adapter, max_steps=1)
    run_training(plain)
    capsys.readouterr()
    run_training(over_sft)
    assert "computed anew: weights and adapter changed since reference-" in capsys.readouterr().out
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    causal = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64)
    causal = PeftModel.from_pretrained(causal, adapter).eval()
    policy = Policy(loading.load_model(model_folder, adapter, "float64", CPU))
    cached = reference(policy, data, [2], adapter)
    expected = logp_of_logits(causal, data.prompt_ids(2), data.response_ids(2))
    assert cached[2].item() == pytest.approx(expected.item(), rel=1e-9)
    assert "reference log-probs" not in capsys.readouterr().out, "the run had cached it"


def test_cache_serves_epochs_weightings_and_runs(config, make_prepared, monkeypatch):
    """Computed by the first run alone; a killed computation keeps what it had."""
    from ddpo.config import WeighConfig
    from ddpo.weigh import weigh

    data = make_prepared()
    calls = []
    real = refcache.each_logp

    def counted(policy, source, responses, *rest):
        calls.append(len(responses))
        return real(policy, source, responses, *rest)

    monkeypatch.setattr(refcache, "each_logp", counted)
    run = {"data": str(data.folder), "epochs": 2, "forward_zero_weight": True}
    first = config(**run)
    run_training(first)
    weigh(WeighConfig(source=str(data.folder), measures=("style",), min_deviation=0.5))
    run_training(config(**run))
    run_training(config(**{**run, "method": "dpo"}))
    assert len(calls) == 1 and metrics(first)[0]["rewards/margins"] == pytest.approx(0, abs=1e-9)


def test_what_was_computed_before_a_kill_is_kept(make_prepared, model_folder, monkeypatch):
    data = make_prepared()
    policy = Policy(loading.load_model(model_folder, None, "float64", CPU))
    whole = reference(policy, data, range(16))
    (path,) = data.folder.glob("reference-*")
    path.unlink()
    monkeypatch.setattr(refcache, "SAVE_EVERY_S", 0.0)
    real = refcache.each_logp

    def killed(*arguments):
        for i, found in enumerate(real(*arguments)):
            if i == 2:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(refcache, "each_logp", killed)
    with pytest.raises(KeyboardInterrupt):
        reference(policy, data, range(16))
    monkeypatch.setattr(refcache, "each_logp", real)
    from safetensors.numpy import load_file

    kept = load_file(path)["logp"]
    done = ~np.isnan(kept)
    assert 0 < done.sum() < 16 and np.array_equal(kept[done], whole.numpy()[done])
    assert torch.allclose(reference(policy, data, range(16)), whole, rtol=1e-12, atol=0)
