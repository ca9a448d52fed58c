"""Several processes on the CPU: the same numbers as one, with copies of the weights (DDP) and with shares (FSDP2)."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import SMALL, metrics, relative, same_bits, tiny_model, tiny_tokenizer, weights_of
from safetensors.torch import load_file

from ddpo import checkpoint
from ddpo.config import GenerateConfig, ScoreConfig, TrainConfig, WeighConfig
from ddpo.data.prepared import Prepared
from ddpo.generate import generate
from ddpo.score import score
from ddpo.settings import to_yaml
from ddpo.train import train as run_training
from ddpo.weigh import weigh


def torchrun(*arguments, ranks=2, module=True):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *["-m"] * module, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
    )


def launch(cfg, *more, ranks=2):
    path = Path(cfg.out).with_suffix(".yaml")
    path.write_text(to_yaml(cfg))
    return torchrun("ddpo.train", "--config", str(path), *more, ranks=ranks)


def finished(process):
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out[-3000:]
    return out


def agree(one, two):
    assert relative(weights_of(one), weights_of(two)) < 1e-9
    counts = ("step", "num_pairs", "pairs_forwarded", "num_groups", "groups_forwarded")
    kept = [[{k: v for k, v in m.items() if k in counts} for m in metrics(c)] for c in (one, two)]
    assert kept[0] == kept[1]
    of_items = "rewards/score_covariance" if one.method == "gvpo" else "rewards/margins"
    for name in ("loss", "grad_norm", of_items):
        assert [m.get(name) for m in metrics(two)] == pytest.approx(
            [m.get(name) for m in metrics(one)], rel=1e-8, abs=1e-12
        )


@pytest.fixture(scope="module")
def untied_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("untied-model")
    tiny_model(tie_word_embeddings=False).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


CASES = {
    "frozen head": {"batch_size": 20},  # groups in both ranks
    "no group for a rank": {"batch_size": 1, "micro_tokens": 60},  # and groups in two passes
    "tied head": {"batch_size": 20, "lora": False},
    "untied head": {"batch_size": 20, "lora": False, "untied": True, "method": "dorpo"},
    "activation checkpointing": {"batch_size": 20, "activation_checkpointing": True},
    "group loss": {"batch_size": 1, "micro_tokens": 60, "method": "gvpo"},
}
SEVERAL = """
import sys
from ddpo import distributed
from ddpo.config import TrainConfig
from ddpo.settings import parse
from ddpo.train import train

for path in sys.argv[1:]:
    train(parse(TrainConfig, ["--config", path], "several"))
distributed.finish()
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory, prepared_folder, model_folder, untied_folder):
    """(case, kind) -> settings of a run that two processes made; "one" is the kind of a run by this process. One launch
    for all: starting processes is what takes the time."""
    root, found = tmp_path_factory.mktemp("several"), {}
    for case, changes in CASES.items():
        changes = {"data": prepared_folder, "model": model_folder, "max_steps": 4, **changes}
        if changes.pop("untied", False):
            changes["model"] = untied_folder
        for kind in ("one", "ddp", "fsdp"):
            parallel = {} if kind == "one" else {"parallel": kind}
            out = str(root / f"{case} {kind}".replace(" ", "-"))
            found[case, kind] = TrainConfig(**{**SMALL, **changes, **parallel, "out": out})
    paths = []
    for (_, kind), cfg in found.items():
        if kind == "one":
            run_training(cfg)
        else:
            paths.append(Path(cfg.out).with_suffix(".yaml"))
            paths[-1].write_text(to_yaml(cfg))
    script = root / "several.py"
    script.write_text(SEVERAL)
    finished(torchrun(str(script), *map(str, paths), module=False))
    return found


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one(trained, parallel, case):
    """Relative L2 of the final adapter (or model) at most 1e-9, in float64."""
    agree(trained[case, "one"], trained[case, parallel])


def test_three_ranks_evaluate_and_split_by_tokens(config, make_prepared):
    """More ranks than some steps have components; held-out pairs over all of them."""
    data = make_prepared(pairs="gap")
    changes = {"batch_size": 4, "epochs": 2, "eval_data": str(data.folder), "eval_every": 1}
    one, three = (config(**changes) for _ in range(2))
    run_training(one)
    finished(launch(three, ranks=3))
    agree(one, three)
    evals = [[json.loads(line) for line in (Path(c.out) / "eval.jsonl").read_text().splitlines()] for c in (one, three)]
    assert [e["step"] for e in evals[0]] == list(range(len(metrics(one)) + 1)) == [e["step"] for e in evals[1]]
    for name in ("eval_loss", "eval_rewards/margins"):
        assert [e[name] for e in evals[1]] == pytest.approx([e[name] for e in evals[0]], rel=1e-8, abs=1e-12)


def test_adapter_over_an_sft_adapter_under_fsdp(config):
    """The export stacks both adapters, from shares of the weights."""
    sft = config(method="sft", lr=1e-2)
    run_training(sft)
    one, two = (config(adapter=f"{sft.out}/adapter", max_steps=2, batch_size=20) for _ in range(2))
    run_training(one)
    finished(launch(two, "--parallel", "fsdp"))
    agree(one, two)


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_dropout": 0.2},
        pytest.param({"lora_dropout": 0.2, "parallel": "fsdp"}, marks=pytest.mark.long),
        {"lora": False, "parallel": "fsdp"},
    ],
    ids=["ddp", "fsdp lora", "fsdp all weights"],
)
def test_stop_of_one_rank_stops_all_and_resumes(config, changes):
    """SIGTERM to one process alone: both end after the same step; with dropout, resumed is straight, bit for bit."""
    straight, cfg = (config(batch_size=12, epochs=20, **changes) for _ in range(2))
    finished(launch(straight))
    process = launch(cfg)
    while not (journal := Path(cfg.out) / "metrics.jsonl").exists() or journal.read_text().count("\n") < 2:
        assert process.poll() is None
        time.sleep(0.02)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGTERM)
    process.communicate(timeout=120)
    assert 2 <= len(metrics(cfg)) < len(metrics(straight))
    finished(launch(cfg, "--resume"))
    assert same_bits(weights_of(straight), weights_of(cfg))
    assert [m["step"] for m in metrics(cfg)] == list(range(1, len(metrics(straight)) + 1))


def test_three_ranks_resume_to_the_same_bits(config, make_prepared):
    """Sums of three do not commute: the order in which gradients are summed must survive a restart."""
    data = make_prepared(pairs="gap")
    many = {"data": str(data.folder), "forward_zero_weight": True, "lora_dropout": 0.2, "lora_targets": ("all-linear",)}
    straight, cfg = (config(batch_size=6, epochs=4, save_every=1, keep_checkpoints=9, **many) for _ in range(2))
    finished(launch(straight, ranks=3))
    assert metrics(straight)[0]["pairs_forwarded"] == 6, "two pairs a rank"
    finished(launch(cfg, ranks=3))
    (Path(cfg.out) / "adapter").rename(Path(cfg.out) / "first")
    for newest in checkpoint.steps(Path(cfg.out))[2:]:
        (newest / "state.json").unlink()
    assert "is damaged" in finished(launch(cfg, "--resume", ranks=3))
    assert same_bits(weights_of(straight), weights_of(cfg))


def test_another_kind_of_checkpoint_is_refused(config):
    """Of one process, whose weights are whole, in two that hold shares."""
    cfg = config(batch_size=6, max_steps=2, lora=False)
    run_training(cfg)
    (Path(cfg.out) / "model").rename(Path(cfg.out) / "first")  # else the run is finished
    out, _ = (process := launch(cfg, "--resume")).communicate(timeout=120)
    assert process.returncode != 0 and "holds copies of the weights, this run trains shares of the weights" in out


def test_all_weights_train_after_the_reference_was_computed(config, make_prepared):
    """FSDP2, no cache yet: the forwards without gradient leave no weights behind that nobody trains."""
    data = make_prepared()
    two = config(data=str(data.folder), batch_size=20, max_steps=3, lora=False)
    finished(launch(two))
    one = config(data=str(data.folder), batch_size=20, max_steps=3, lora=False)
    run_training(one)
    agree(one, two)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_reference_log_probs_are_shared_out(config, make_prepared, parallel):
    """Three processes, more than some rounds of packs, fill the cache that one would."""
    data = make_prepared()
    cfg = config(data=str(data.folder), max_steps=1, micro_tokens=60)
    run_training(cfg)
    (path,) = data.folder.glob("reference-*.safetensors")
    alone = load_file(path)["logp"]
    path.unlink()
    finished(launch(replace(cfg, out=f"{cfg.out}-three"), "--parallel", parallel, ranks=3))
    together = load_file(path)["logp"]
    assert torch.equal(alone.isnan(), together.isnan()) and relative(alone.nan_to_num(), together.nan_to_num()) < 1e-12


BOTH = """
import json, sys
from ddpo import distributed
from ddpo.config import PrepareConfig, WeighConfig
from ddpo.data import parts
from ddpo.prepare import prepare
from ddpo.weigh import weigh

parts.PART = 5
cfg, weighing = map(json.loads, sys.argv[1:])
prepare(PrepareConfig(**cfg))
weigh(WeighConfig(source=cfg["out"], **weighing))
distributed.finish()
"""


def test_prepare_and_weigh_share_out_parts_and_embeddings(make_prepared, tmp_path):
    """What one process makes of one part."""
    alone, kept, script = make_prepared(max_responses=3), tmp_path / "kept", tmp_path / "both.py"
    script.write_text(BOTH)
    more = {"measures": ["style"], "embeddings": str(kept)}
    settings = {name: alone.manifest["settings"][name] for name in ("source", "model", "pairs", "gap", "max_responses")}
    cfg, weighing = {**settings, **more, "out": str(tmp_path / "two")}, {**more, "min_deviation": 0.5}
    finished(torchrun(str(script), json.dumps(cfg), json.dumps(weighing), module=False))
    assert len(list(kept.rglob("*.arrow"))) == 4 and list(tmp_path.glob(".*")) == []
    weigh(WeighConfig(source=str(alone.folder), measures=("style",), min_deviation=0.5))
    together, alone = Prepared(cfg["out"]), Prepared(alone.folder)
    assert together.responses["ids"].num_chunks == 2 and together.manifest["summary"] == alone.manifest["summary"]
    assert together.groups.equals(alone.groups) and together.responses.equals(alone.responses)
    assert together.pairs.tolist() == alone.pairs.tolist() and together.weight.tolist() == alone.weight.tolist()


def test_weigh_shares_out_the_embeddings(groups_file, tmp_path):
    """The same file as one process writes; a share of the texts from each."""
    options = {"source": str(groups_file), "measures": ("style",)}
    weigh(WeighConfig(out=str(tmp_path / "alone.jsonl"), **options))
    arguments = ["--measures", "style", "--embeddings", str(tmp_path / "kept"), "--out", str(tmp_path / "two.jsonl")]
    out = finished(torchrun("ddpo", "weigh", str(groups_file), *arguments))
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "alone.jsonl").read_bytes()
    assert len(list((tmp_path / "kept").rglob("*.arrow"))) == 2 and out.count("wrote") == 1


SAMPLED = """
import json, sys
from ddpo import distributed
from ddpo.config import GenerateConfig, RewardConfig, ScoreConfig
from ddpo.generate import generate
from ddpo.reward import reward
from ddpo.score import score

for make, cls in ((generate, GenerateConfig), (reward, RewardConfig), (score, ScoreConfig)):
    make(cls(**json.loads(sys.argv.pop(1))))
distributed.finish()
"""


def test_samples_and_scores_are_shared_out(model_folder, groups_file, tmp_path):
    """What one process writes; a reward model trained by two scores in one."""
    script, usual = tmp_path / "sampled.py", {"dtype": "float64", "out": str(tmp_path / "two.jsonl")}
    script.write_text(SAMPLED)
    sampling = {**usual, "prompts": str(groups_file), "model": model_folder, "max_new_tokens": 6, "batch_size": 3}
    learning = {"source": str(groups_file), "model": model_folder, "out": str(tmp_path / "reward"), "epochs": 1}
    scoring = {**usual, "responses": str(groups_file), "reward": learning["out"], "out": str(tmp_path / "scored.jsonl")}
    finished(torchrun(str(script), *map(json.dumps, (sampling, learning, scoring)), module=False))
    generate(GenerateConfig(**{**sampling, "out": str(tmp_path / "one.jsonl")}))
    score(ScoreConfig(**{**scoring, "out": str(tmp_path / "scored-by-one.jsonl")}))
    for two, one in (("two", "one"), ("scored", "scored-by-one")):
        assert (tmp_path / f"{two}.jsonl").read_bytes() == (tmp_path / f"{one}.jsonl").read_bytes()
    assert not list(tmp_path.glob(".*.part"))
