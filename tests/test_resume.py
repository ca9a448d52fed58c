"""Stopping and going on to the same bits."""

import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from conftest import SMALL, StopAfter, metrics, same_bits, weights_of
from kill_and_resume import kill_and_resume
from safetensors.torch import load_file

from ddpo import checkpoint
from ddpo.config import WeighConfig
from ddpo.train import train as run_training
from ddpo.weigh import weigh


def without_clocks(cfg):
    return [{k: v for k, v in m.items() if k not in ("tokens_per_s", "peak_memory_gib")} for m in metrics(cfg)]


# --- resume -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"lora_dropout": 0.3}, {"lora": False, "method": "dorpo"}], ids=str)
def test_stopped_after_any_step_and_resumed(config, changes):
    """The final weights are the same bits, and metrics.jsonl holds each step once."""
    straight = config(batch_size=6, epochs=2, **changes)
    run_training(straight)
    num_steps = len(metrics(straight))
    assert num_steps >= 4
    for at in range(1, num_steps):
        cfg = config(batch_size=6, epochs=2, **changes)
        with pytest.raises(SystemExit) as stopped:
            run_training(cfg, StopAfter(at - 1))
        assert stopped.value.code == 130 and len(metrics(cfg)) == at
        run_training(replace(cfg, resume=True))
        assert same_bits(weights_of(straight), weights_of(cfg)), f"stopped after step {at}"
        assert without_clocks(cfg) == without_clocks(straight)


def test_resume_refuses_changed_data(config, tmp_path):
    folder = tmp_path / "mine"
    shutil.copytree(config().data, folder)
    cfg = config(data=str(folder), batch_size=12)
    with pytest.raises(SystemExit):
        run_training(cfg, StopAfter(0))
    weigh(WeighConfig(source=str(folder), measures=("style",), min_deviation=1.0))
    with pytest.raises(ValueError, match="the prepared folder has changed since"):
        run_training(replace(cfg, resume=True))


def test_metrics_after_the_checkpoint_are_written_once(config):
    """A run killed between two checkpoints has written lines that resuming writes again."""
    cfg = config(batch_size=4, save_every=2)
    run_training(cfg)
    (run := Path(cfg.out)).joinpath("adapter").rename(run / "first")
    newest = checkpoint.steps(run)[-1]
    shutil.rmtree(newest)
    with open(run / "metrics.jsonl", "a") as lines:
        lines.write('{"step": 99')  # torn
    run_training(replace(cfg, resume=True))
    assert [m["step"] for m in metrics(cfg)] == list(range(1, len(metrics(cfg)) + 1))
    assert same_bits(load_file(run / "first" / "adapter_model.safetensors"), weights_of(cfg))


def test_resume_of_a_run_from_before_an_option(config):
    """A key that its config.yaml lacks counts as the default, no less and no more."""
    cfg = config(batch_size=12)
    with pytest.raises(SystemExit):
        run_training(cfg, StopAfter(0))
    file = Path(cfg.out) / "config.yaml"
    settings = yaml.safe_load(file.read_text())
    for missing, message in ((("lora_targets", "gamma"), None), (("lr",), r"other settings \(lr\)")):
        file.write_text(yaml.safe_dump({k: v for k, v in settings.items() if k not in missing}))
        with pytest.raises(ValueError, match=message) if message else nullcontext():
            run_training(replace(cfg, resume=True))


@pytest.mark.parametrize("file", ["state.safetensors", "state.json"])
def test_checkpoints_kept_and_damaged(config, capsys, file):
    """A damaged checkpoint is known by its hash, said aloud, and the one before is used, to the same bits."""
    straight, cfg = (config(batch_size=2, epochs=2, save_every=1, keep_checkpoints=2) for _ in range(2))
    run_training(straight)
    with pytest.raises(SystemExit):
        run_training(cfg, StopAfter(3))
    kept = checkpoint.steps(Path(cfg.out))
    assert [path.name for path in kept] == ["step-00000003", "step-00000004"]
    content = (kept[-1] / file).read_bytes()
    (kept[-1] / file).write_bytes(
        content.replace(b'"step": 4', b'"step": 3') if file == "state.json" else content[:-1] + b"?"
    )
    capsys.readouterr()
    run_training(replace(cfg, resume=True))
    assert f"{kept[-1]} is damaged ({file}); going on from the one before" in capsys.readouterr().out.replace("\n", "")
    assert same_bits(weights_of(straight), weights_of(cfg))
    shutil.rmtree(Path(cfg.out) / "adapter")  # with it the run is finished, and checkpoints are not looked at
    for path in checkpoint.steps(Path(cfg.out)):
        (path / file).write_text("{")
    with pytest.raises(ValueError, match="every checkpoint is damaged"):
        run_training(replace(cfg, resume=True))


def test_a_damaged_checkpoint_evicts_none(config):
    """keep_checkpoints 1: a run gone on from before a damaged one keeps what it saves itself."""
    cfg = config(batch_size=6, epochs=4, save_every=1, keep_checkpoints=9)
    with pytest.raises(SystemExit):
        run_training(cfg, StopAfter(5))
    newest = checkpoint.steps(Path(cfg.out))[-1]
    (newest / "state.safetensors").write_bytes(b"")
    (newest.parent / ".step-00000007.99").mkdir()  # a save that was killed
    again = replace(cfg, resume=True, keep_checkpoints=1)
    with pytest.raises(SystemExit):
        run_training(again, StopAfter(1))
    assert [path.name for path in newest.parent.iterdir()] == ["step-00000007"]
    run_training(again)


def test_interrupt_saves_and_says_how_to_go_on(config):
    """SIGINT to the real process."""
    straight = config(epochs=15)
    run_training(straight)
    cfg = config(epochs=15)
    values = {"data": cfg.data, "model": cfg.model, "out": cfg.out, "epochs": 15, **SMALL}
    command = [sys.executable, "-m", "ddpo", "train", *(f"--{k}={v}" for k, v in values.items())]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    journal = Path(cfg.out) / "metrics.jsonl"
    while not (journal.exists() and journal.read_text().count("\n") > 2):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "go on with --resume" in out
    assert 2 < len(metrics(cfg)) < len(metrics(straight))
    subprocess.run([*command, "--resume"], check=True, capture_output=True, timeout=120)
    assert same_bits(weights_of(straight), weights_of(cfg))


def test_killed_at_random_moments(tmp_path, model_folder):
    """`python tests/kill_and_resume.py --kills 20` does more of it."""
    assert len(kill_and_resume(tmp_path, model_folder, num_kills=2, num_steps=20)) == 2
