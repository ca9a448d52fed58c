"""`ddpo train --dry-run`, and recipes/: each loads, and dry-runs with a tiny model in the large one's place."""

import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT, tiny_model, tiny_tokenizer

from ddpo import distributed
from ddpo.cli import VERBS, main
from ddpo.config import PrepareConfig, RewardConfig, TrainConfig
from ddpo.data.prepared import Prepared
from ddpo.schedule import Schedule
from ddpo.settings import parse
from ddpo.train import train as run_training

RECIPES = sorted((ROOT / "recipes").glob("*/*.yaml"))
PREPARE = [path for path in RECIPES if path.stem.startswith("prepare-")]
TRAIN = [path for path in RECIPES if path not in PREPARE]
RUNS = {"sft", "dpo", "divpo", "orpo"} | {f"{m}-{k}" for m in ("ddpo", "dorpo") for k in ("semantic", "style", "both")}


def name_of(path):
    return path.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    """As base models are: the vocabulary of the one prepared with, and no chat template."""
    folder = tmp_path_factory.mktemp("base")
    tiny_model().config.save_pretrained(folder)
    tiny_tokenizer(template=None).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def no_weights(monkeypatch):
    """Loading a model fails, and a product of 2,048 rows is not timed."""

    def refuse(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("ddpo.loading.AutoModelForCausalLM.from_pretrained", refuse)
    monkeypatch.setattr("ddpo.plan.gemm_rate", lambda dtype: 1e11)


# --- a dry run --------------------------------------------------------------------------------------------


def test_dry_run(config, make_prepared, no_weights, capsys, tmp_path):
    data = make_prepared(pairs="gap")
    cfg = config(data=str(data.folder), epochs=3, batch_size=4, lr=1e-3, dry_run=True)
    before = sorted(tmp_path.rglob("*"))
    assert run_training(cfg) == Path(cfg.out)
    assert sorted(tmp_path.rglob("*")) == before
    out = capsys.readouterr().out
    schedule = Schedule(data, cfg)
    assert "batch_size: 4\n" in out and "dry_run: false" in out, "settings"
    assert f"steps          {schedule.num_steps}, 3 epochs of {len(data.pairs)} pairs" in out
    assert f"{(data.weight == 0).mean():.0%} of them of weight 0" in out
    item = next(i for i in schedule.items(0) if data.weight[i] > 0)
    chosen, rejected = data.pairs[item]
    num, score = data.num_tokens[chosen], data.scores[chosen]
    assert f"chosen         {num} tokens, score {score:g}, weight {data.weight[item]:.3f}: " in out
    texts = data.texts([chosen, rejected])
    assert texts[0][:15] in out and texts[1][:15] in out and "<|im_end|>'" in out
    assert f"prompt         {data.num_prompt_tokens[chosen]} tokens: '<|im_start|>user" in out
    assert "AdamW's moments" in out and "FLOP a step" in out, "the plan"


@pytest.mark.parametrize("method, item", [("sft", "responses"), ("gvpo", "groups")])
def test_dry_run_of_other_items(config, no_weights, capsys, method, item):
    run_training(config(method=method, dry_run=True))
    out = capsys.readouterr().out
    assert f" epochs of {16 if method == 'sft' else 4} {item}\n" in out
    assert out.count("\nresponse       ") == (1 if method == "sft" else 4) and ", weight " not in out


def test_dry_run_refuses_what_training_would(config, no_weights, tmp_path, make_prepared, monkeypatch, capsys):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["sea"])
    tiny_model().config.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    cfg = config(dry_run=True)
    for changes, message in (
        ({"model": str(tmp_path / "other")}, "which is not that of"),
        ({"data": str(tmp_path)}, "is no prepared folder"),
        ({"lora_targets": ("q",)}, "no linear layer is called"),
        ({"track": ("tensorbored",)}, "unknown tracker"),
    ):
        with pytest.raises(ValueError, match=message):
            run_training(replace(cfg, **changes))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").touch()
    with pytest.raises(FileExistsError):
        run_training(replace(cfg, out=str(tmp_path / "taken")))
    capsys.readouterr()
    monkeypatch.setattr(distributed, "start", lambda: (1, 2))
    run_training(cfg)
    assert capsys.readouterr().out == "", "one process of several speaks"


# --- recipes ----------------------------------------------------------------------------------------------


def test_there_is_one_for_each_run():
    for model in ("llama-3.1-8b", "mistral-7b-v0.3"):
        assert {path.stem for path in TRAIN if path.parent.name == model} == RUNS
        found = {path.stem for path in PREPARE if path.parent.name == model}
        assert found == {f"prepare-{k}" for k in ("semantic", "style", "both", "divpo")}


@pytest.mark.parametrize("path", PREPARE, ids=name_of)
def test_prepare_recipes_load(path):
    cfg = parse(PrepareConfig, ["--config", str(path)], "ddpo prepare", "source")
    kind = path.stem.removeprefix("prepare-")
    assert cfg.out == f"prepared/{path.parent.name}/{kind}"
    assert cfg.measures == {"semantic": ("semantic",), "style": ("style",)}.get(kind, ("semantic", "style"))
    assert (cfg.pairs, cfg.gap) == ("divpo" if kind == "divpo" else "gap", 5.0)
    assert (cfg.max_length, cfg.holdout, cfg.source) == (2048, 0.1, "euclaise/WritingPrompts_preferences")
    if "semantic" in cfg.measures:
        found = (cfg.semantic, cfg.semantic_task, cfg.trust_remote_code)
        assert found == ("jinaai/jina-embeddings-v3", "text-matching", True)
    if "style" in cfg.measures:
        assert cfg.style == "AnnaWegmann/Style-Embedding"
    assert launched(path) == ["-m", "ddpo", "prepare", "--config", name_of(path)]


@pytest.mark.parametrize("path", TRAIN, ids=name_of)
def test_train_recipes_dry_run(path, prepared_folder, base_folder, no_weights, capsys, tmp_path):
    """With the paper's settings; data and adapter are what another recipe makes."""
    cfg = parse(TrainConfig, ["--config", str(path)], "ddpo train", "data")
    name = path.parent.name
    assert Path(cfg.data) in {Path(f"prepared/{name}/{k}") for k in ("semantic", "style", "both", "divpo")}
    assert cfg.out == f"runs/{name}/{path.stem}"
    odds = cfg.method in ("orpo", "dorpo")
    assert cfg.adapter == (None if odds or cfg.method == "sft" else f"runs/{name}/sft/adapter")
    assert (cfg.lora_r, cfg.lora_alpha, cfg.lora_targets, cfg.batch_size) == (128, 256, ("q_proj", "v_proj"), 12)
    if cfg.method == "sft":
        paper = (1, 3e-5, "cosine", 0.5, 500)
    else:
        paper = (4 if odds else 3, 5e-6, "linear", 0.0, 0)
    assert (cfg.epochs, cfg.lr, cfg.lr_schedule, cfg.min_lr, cfg.warmup_steps) == paper
    assert launched(path) == ["-m", "ddpo.train", "--config", name_of(path)]
    instead = ["--data", prepared_folder, "--model", base_folder, "--out", str(tmp_path / "run")]
    main(["train", "--config", str(path), *instead, "--dry-run"])
    out = capsys.readouterr().out
    assert "FLOP a step" in out and ("there is no folder runs/" in out) == bool(cfg.adapter)
    assert not (tmp_path / "run").exists()


def test_reward_recipe_loads():
    path = ROOT / "recipes/reward.yaml"
    cfg = parse(RewardConfig, ["--config", str(path)], "ddpo reward", "source")
    assert (cfg.model, cfg.source) == ("google/gemma-2-2b", "euclaise/WritingPrompts_preferences")
    paper = ("l1", "votes", 3e-5, 4, 3, 16, 32)
    assert (cfg.loss, cfg.target, cfg.lr, cfg.batch_size, cfg.epochs, cfg.lora_r, cfg.lora_alpha) == paper


def launched(path):
    """What the file's header starts under torchrun."""
    _, line, *_ = path.read_text().splitlines()
    words = shlex.split(line.removeprefix("#"))
    assert words[:3] == ["torchrun", "--nproc-per-node", "6"]
    return words[3:]


def test_commands_of_the_readme(monkeypatch):
    """Those of recipes/README.md parse, from the repository's root."""
    monkeypatch.chdir(ROOT)
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", (ROOT / "recipes/README.md").read_text(), re.S))
    lines = [line for line in blocks.replace("\\\n", " ").splitlines() if line and not line.startswith("head ")]
    assert len(lines) == 9
    for words in map(shlex.split, lines):
        if words[0] == "torchrun":
            words = words[words.index("-m") + 1 :]
            words = ["ddpo", "train", *words[1:]] if words[0] == "ddpo.train" else words
        _, cls, positional = VERBS[words[1]]
        assert isinstance(parse(cls, words[2:], "ddpo", positional), cls)


def test_an_adapter_brings_its_chat_template(config, base_folder, tmp_path):
    """Prepared with the instruction-tuned model's template, trained from a base model that has none."""
    model = tmp_path / "base"
    shutil.copytree(base_folder, model)
    tiny_model().save_pretrained(model)
    cfg = config(model=str(model), max_steps=1)
    run_training(cfg)
    template = Prepared(cfg.data).manifest["tokenizer"]["chat_template"]
    assert (Path(cfg.out) / "adapter" / "chat_template.jinja").read_text() == template
