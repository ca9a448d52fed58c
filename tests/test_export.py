"""What a run exports loads in peft and in transformers, gives the run's log-probs, and says what it is."""

import json

import pytest
import torch
import yaml
from conftest import weights_of
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from ddpo.config import ExportConfig
from ddpo.export import card, export
from ddpo.train import train


@pytest.fixture(scope="module")
def run(tmp_path_factory, prepared_folder, model_folder):
    from conftest import SMALL

    from ddpo.config import TrainConfig

    out = tmp_path_factory.mktemp("export") / "run"
    cfg = TrainConfig(
        **{**SMALL, "data": prepared_folder, "model": model_folder, "out": str(out), "max_steps": 3, "lr": 0.05}
    )
    train(cfg)
    assert any(w.abs().max() > 0 for name, w in weights_of(cfg).items() if "lora_B" in name)
    return out


def front_matter(folder):
    return yaml.safe_load((folder / "README.md").read_text().split("---")[1])


def test_merged_is_the_adapter_over_the_base(run, tmp_path, model_folder):
    merged = export(ExportConfig(run=str(run), out=str(tmp_path / "merged"), merge=True, dtype="float32"))
    adapter = export(ExportConfig(run=str(run), out=str(tmp_path / "adapter")))
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    ids = tokenizer("Write of a sea.", return_tensors="pt").input_ids
    with torch.no_grad():
        before = base(ids).logits
        with_adapter = PeftModel.from_pretrained(base, adapter)(ids).logits
        alone = plain(ids).logits
    assert torch.allclose(alone, with_adapter, atol=1e-4) and not torch.allclose(alone, before, atol=1e-3)
    assert plain.generate(ids, max_new_tokens=4, do_sample=False).shape[1] > ids.shape[1]
    assert not list(merged.glob("adapter*")) and (merged / "config.json").is_file()
    assert front_matter(merged)["library_name"] == "transformers" and front_matter(adapter)["library_name"] == "peft"


def test_card(run, tmp_path):
    numbers = tmp_path / "numbers.json"
    numbers.write_text(json.dumps({"num_prompts": 3, "mean": {"after": {"quality": 0.25}}}))
    out = export(ExportConfig(run=str(run), out=str(tmp_path / "out"), evaluation=str(numbers)))
    text = (out / "README.md").read_text()
    for words in ("trained with DDPO", "content_hash", "zero_share", "quality: 0.25", "rewards/margins", "torch:"):
        assert words in text
    assert text.count("```") % 2 == 0


def test_hostile_names_stay_text(run):
    settings = yaml.safe_load((run / "config.yaml").read_text())
    text = card(run, {**settings, "model": "a\n---\n# <script>`x`"}, "adapter")
    assert yaml.safe_load(text.split("\n---\n")[0].removeprefix("---"))["base_model"] == "a\n---\n# <script>`x`"
    assert "\n# <script>" not in text.split("## Load it")[0].split("---", 2)[2]


@pytest.mark.parametrize("what", ["no run", "there already", "no numbers"])
def test_refused(run, tmp_path, what):
    (tmp_path / "there").mkdir()
    bad = tmp_path / "bad.json"
    bad.write_text("{}")
    changes = {
        "no run": ({"run": str(tmp_path)}, ValueError, "is no finished run"),
        "there already": ({"out": str(tmp_path / "there")}, FileExistsError, "exists already"),
        "no numbers": ({"evaluation": str(bad)}, ValueError, "holds no numbers"),
    }
    change, error, message = changes[what]
    with pytest.raises(error, match=message):
        export(ExportConfig(**{"run": str(run), "out": str(tmp_path / "new"), **change}))
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".new*"))
