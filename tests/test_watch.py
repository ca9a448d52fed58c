"""What is seen of a run: eval.jsonl, trackers, skipped steps, the bar."""

import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import pytest
import torch
from conftest import StopAfter, metrics, same_bits, weights_of

from ddpo import train
from ddpo.data.prepared import Prepared
from ddpo.train import train as run_training


def lines(cfg, name):
    path = Path(cfg.out) / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_held_out_loss(config, make_prepared, capsys):
    """Measured before training, every n steps and at the end; of the training data itself it is what training sees."""
    data = make_prepared()
    cfg = config(data=str(data.folder), batch_size=6, max_steps=3, eval_data=str(data.folder), eval_every=2, lr=1e-2)
    run_training(cfg)
    evals = lines(cfg, "eval")
    assert [e["step"] for e in evals] == [0, 2, 3]
    assert evals[0]["eval_loss"] == pytest.approx(math.log(2) * data.weight.mean(), rel=1e-7)
    assert evals[0]["eval_num_pairs"] == len(data.pairs) and evals[0]["eval_rewards/margins"] == pytest.approx(0)
    assert evals[2]["eval_loss"] < evals[0]["eval_loss"]
    assert [m["step"] for m in metrics(cfg)] == [1, 2, 3]
    assert "step 2: eval loss" in capsys.readouterr().out
    plain = config(data=str(data.folder), batch_size=6, max_steps=3, lr=1e-2)
    run_training(plain)
    assert same_bits(weights_of(plain), weights_of(cfg)), "measuring changes nothing"


def test_evaluations_are_written_once(config, make_prepared):
    """Stopped where one is due: it comes when the run goes on; a run that died before its first checkpoint, too."""
    data = make_prepared()
    run = {"data": str(data.folder), "batch_size": 6, "epochs": 2, "eval_data": str(data.folder), "eval_every": 2}
    straight, cfg = (config(**run) for _ in range(2))
    run_training(straight)

    with pytest.raises(SystemExit):
        run_training(cfg, StopAfter(1))
    assert [e["step"] for e in lines(cfg, "eval")] == [0]
    run_training(replace(cfg, resume=True))
    assert lines(cfg, "eval") == lines(straight, "eval")
    shutil.rmtree(Path(cfg.out) / "checkpoints")
    run_training(replace(cfg, resume=True))
    assert lines(cfg, "eval") == lines(straight, "eval")


def test_held_out_reference_is_of_the_start(config, make_prepared, tmp_path):
    """A run of all weights goes on with held-out data that it did not have: their reference is the model that it
    started from, not what the checkpoint made of it."""
    held_out = make_prepared(out=str(tmp_path / "held-out"))
    run = {"batch_size": 6, "epochs": 3, "lora": False, "lr": 1e-2, "save_every": 1}
    straight, cfg = config(**run, eval_data=str(held_out.folder)), config(**run)
    run_training(straight)

    with pytest.raises(SystemExit):
        run_training(cfg, StopAfter(2))
    for cached in held_out.folder.glob("reference-*"):
        cached.unlink()
    run_training(replace(cfg, resume=True, eval_data=str(held_out.folder)))
    assert lines(cfg, "eval")[-1] == lines(straight, "eval")[-1]


def test_held_out_of_another_tokenizer_is_refused(config, make_prepared, tmp_path):
    data = make_prepared()
    manifest = Path(data.folder) / "manifest.json"
    manifest.write_text(manifest.read_text().replace(data.manifest["tokenizer"]["fingerprint"], "0" * 16))
    with pytest.raises(ValueError, match="was prepared with another tokenizer or chat template than"):
        run_training(config(eval_data=str(data.folder)))


def make_infinite(monkeypatch, bad_steps):
    """The loss of these steps (counted from 0) is not finite, though their gradient is."""
    real = train.objective
    at = iter(range(1000))
    monkeypatch.setattr(
        train, "objective", lambda *a: (lambda s, m: (s + (math.inf if next(at) in bad_steps else 0), m))(*real(*a))
    )


def test_steps_that_are_not_finite_are_skipped_and_named(config, make_prepared, monkeypatch, capsys):
    data = make_prepared(pairs="gap")
    run = {"data": str(data.folder), "batch_size": 2, "forward_zero_weight": True, "epochs": 2}
    cfg = config(**run, max_skips=2)
    make_infinite(monkeypatch, {1, 3})
    run_training(cfg)
    skipped = lines(cfg, "skipped")
    assert [s["step"] for s in skipped] == [2, 4] == [m["step"] for m in metrics(cfg) if m["skipped"]]
    pairs = Prepared(data.folder).pairs.tolist()
    for record in skipped:
        assert len(record["responses"]) == 2 and all(pair in pairs for pair in record["responses"])
        assert record["groups"] == [int(data.response_group[pair[0]]) for pair in record["responses"]]
    assert metrics(cfg)[1]["loss"] is None and metrics(cfg)[1]["grad_norm"] is None
    assert all(torch.isfinite(w).all() for w in weights_of(cfg).values())


def test_too_many_skips_end_the_run_and_count_over_a_resume(config, make_prepared, monkeypatch):
    data = make_prepared(pairs="gap")
    cfg = config(data=str(data.folder), batch_size=2, forward_zero_weight=True, epochs=2, max_skips=1, save_every=2)
    make_infinite(monkeypatch, {1, 4})
    with pytest.raises(ValueError, match=r"of step 5 is not finite, like 1 before it \(max_skips 1\).*skipped.jsonl"):
        run_training(cfg)
    assert [s["step"] for s in lines(cfg, "skipped")] == [2, 5]
    monkeypatch.undo()
    make_infinite(monkeypatch, {0})  # the first step after the checkpoint of step 4
    with pytest.raises(ValueError, match="of step 5 is not finite, like 1 before it"):
        run_training(replace(cfg, resume=True))
    assert [s["step"] for s in lines(cfg, "skipped")] == [2, 5]


class Tracker:
    """Of accelerate's shape."""

    requires_logging_directory = False
    made: ClassVar[list] = []

    def __init__(self, run_name):
        self.run_name, self.logged, self.state = run_name, [], "new"
        self.made.append(self)

    def start(self):
        self.state = "started"

    def store_init_configuration(self, values):
        self.values = values

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.state = "finished"


def test_trackers(config, make_prepared, monkeypatch):
    """A tracker registered with accelerate gets config, metrics and eval numbers, and is finished."""
    from accelerate import tracking

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "mine", Tracker)
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["mine"])
    data = make_prepared()
    cfg = config(data=str(data.folder), track=("mine",), max_steps=2, batch_size=6, eval_data=str(data.folder))
    run_training(cfg)
    (tracker,) = Tracker.made
    assert tracker.state == "finished" and tracker.run_name == Path(cfg.out).name
    assert tracker.values["lr"] == cfg.lr and tracker.values["method"] == "ddpo"
    assert [step for step, _ in tracker.logged] == [0, 1, 2, 2]
    logged = dict(tracker.logged[1][1])
    assert logged["loss"] == pytest.approx(metrics(cfg)[0]["loss"], rel=1e-6) and "tokens_per_s" in logged
    assert "eval_loss" in tracker.logged[0][1]


def test_tensorboard(config):
    """The real one: its files lie in the run folder and hold the losses."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    cfg = config(track=("tensorboard",), max_steps=2, batch_size=6)
    run_training(cfg)
    events = EventAccumulator(cfg.out)
    events.Reload()
    losses = [event.value for event in events.Scalars("loss")]
    assert losses == pytest.approx([m["loss"] for m in metrics(cfg)], rel=1e-6)


def test_trackers_that_cannot_be_had(config, monkeypatch):
    with pytest.raises(ValueError, match=r"track: unknown tracker 'tensorbord'; known: .*tensorboard"):
        run_training(config(track=("tensorbord",)))
    from accelerate import tracking

    monkeypatch.setattr(tracking, "get_available_trackers", list)
    cfg = config(track=("wandb",))
    with pytest.raises(ValueError, match="track: wandb is not installed; `pip install wandb`"):
        run_training(cfg)
    assert not Path(cfg.out).exists()


def test_accelerate_and_trackers_load_only_when_wanted(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate.tracking", ModuleType("broken"))
    run_training(config(max_steps=1))
