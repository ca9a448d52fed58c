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
MODELS = {  # of a folder: the base, and the one whose tokenizer renders the texts
    "llama-3.1-8b": ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct"),
    "mistral-7b-v0.3": ("mistralai/Mistral-7B-v0.3", "mistralai/Mistral-7B-Instruct-v0.3"),
}
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


def test_dry_run_tells_no_weight_and_no_peak_that_there_are_not(config, no_weights, capsys):
    run_training(config(method="dpo", dry_run=True, max_steps=2, lr=1e-3, warmup_steps=4))
    out = capsys.readouterr().out
    assert "\nchosen         " in out and ", weight " not in out
    assert "0.00025 in the first, 0.0005 at the peak, 0.0005 in the last" in out


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
    unpaired = str(make_prepared([("A.", [("B c.", 1), ("D e.", None)])], out=str(tmp_path / "unpaired")).folder)
    for changes, message in (
        ({"model": str(tmp_path / "other")}, "which is not that of"),
        ({"data": str(tmp_path)}, "is no prepared folder"),
        ({"lora_targets": ("q",)}, "no linear layer is called"),
        ({"track": ("tensorbored",)}, "unknown tracker"),
        ({"adapter": str(tmp_path / "other")}, "holds no LoRA adapter"),
        ({"eval_data": unpaired}, "has no pairs to learn from"),
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
    for model in MODELS:
        assert {path.stem for path in TRAIN if path.parent.name == model} == RUNS
        found = {path.stem for path in PREPARE if path.parent.name == model}
        assert found == {f"prepare-{k}" for k in ("semantic", "style", "both", "divpo")}


@pytest.mark.parametrize("path", PREPARE, ids=name_of)
def test_prepare_recipes_load(path):
    cfg = parse(PrepareConfig, ["--config", str(path)], "ddpo prepare", "source")
    folder, kind = path.parent.name, path.stem.removeprefix("prepare-")
    measures = {"semantic": ("semantic",), "style": ("style",)}.get(kind, ("semantic", "style"))
    encoders = {}
    if "semantic" in measures:
        encoders |= {"semantic": "jinaai/jina-embeddings-v3", "semantic_task": "text-matching"}
        encoders |= {"trust_remote_code": True}
    if "style" in measures:
        encoders |= {"style": "AnnaWegmann/Style-Embedding"}
    assert cfg == PrepareConfig(
        source="euclaise/WritingPrompts_preferences",
        out=f"prepared/{folder}/{kind}",
        model=MODELS[folder][1],
        pairs="divpo" if kind == "divpo" else "gap",
        gap=5.0,
        max_length=2048,
        holdout=0.1,
        measures=measures,
        seed=0,
        **encoders,
    )
    assert launched(path) == ["-m", "ddpo", "prepare", "--config", name_of(path)]


@pytest.mark.parametrize("path", TRAIN, ids=name_of)
def test_train_recipes_dry_run(path, prepared_folder, base_folder, no_weights, capsys, tmp_path):
    """With the paper's settings, as folder and name say; data and adapter are what another recipe makes."""
    cfg = parse(TrainConfig, ["--config", str(path)], "ddpo train", "data")
    folder, (method, _, kind) = path.parent.name, path.stem.partition("-")
    if method == "divpo":
        method, kind = "dpo", "divpo"
    if method == "sft":
        paper = {"epochs": 1, "lr": 3e-5, "lr_schedule": "cosine", "min_lr": 0.5, "warmup_steps": 500}
    else:
        paper = {"epochs": 3, "lr": 5e-6, "beta": 0.1, "adapter": f"runs/{folder}/sft/adapter"}
    if method in ("orpo", "dorpo"):
        paper |= {"epochs": 4, "beta": 0.25, "adapter": None}
    assert cfg == TrainConfig(
        data=f"prepared/{folder}/{kind or 'both'}",
        out=f"runs/{folder}/{path.stem}",
        model=MODELS[folder][0],
        method=method,
        batch_size=12,
        lora_r=128,
        lora_alpha=256,
        lora_targets=("q_proj", "v_proj"),
        lora_dropout=0.0,
        dtype="auto",
        seed=0,
        **paper,
    )
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
