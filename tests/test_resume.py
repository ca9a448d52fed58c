"""Stopping and going on to the same bits, and several processes."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import SMALL, metrics, relative, same_bits, weights_of
from safetensors.torch import load_file

from ddpo import checkpoint
from ddpo.config import WeighConfig, to_yaml
from ddpo.prepare import weigh
from ddpo.run import Stop
from ddpo.train import train as run_training


class StopAfter(Stop):
    """Asks to stop after some steps, as a signal would."""

    def __init__(self, num_steps):
        super().__init__()
        self._left = num_steps

    @property
    def requested(self):
        self._left -= 1
        return self._left < 0

    @requested.setter
    def requested(self, value):
        pass


# --- resume -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"lora_dropout": 0.3}, {"lora": False, "method": "dorpo"}], ids=str)
def test_stopped_after_any_step_and_resumed(config, changes):
    """The final weights are the same bits, and metrics.jsonl holds each step once."""
    straight = config(batch_size=12, epochs=2, **changes)
    run_training(straight)
    num_steps = len(metrics(straight))
    assert num_steps >= 4
    for at in range(1, num_steps):
        cfg = config(batch_size=12, epochs=2, **changes)
        with pytest.raises(SystemExit) as stopped:
            run_training(cfg, StopAfter(at - 1))
        assert stopped.value.code == 130 and len(metrics(cfg)) == at
        run_training(replace(cfg, resume=True))
        assert same_bits(weights_of(straight), weights_of(cfg)), f"stopped after step {at}"
        kept = [{k: v for k, v in m.items() if k != "tokens_per_s"} for m in metrics(cfg)]
        assert kept == [{k: v for k, v in m.items() if k != "tokens_per_s"} for m in metrics(straight)]


def test_resume_refuses_changed_data(config, tmp_path):
    folder = tmp_path / "mine"
    shutil.copytree(config().data, folder)
    cfg = config(data=str(folder), batch_size=12)
    with pytest.raises(SystemExit):
        run_training(cfg, StopAfter(0))
    weigh(WeighConfig(folder=str(folder), measures=("style",), min_deviation=1.0))
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


def test_checkpoints_kept_and_damaged(config):
    cfg = config(batch_size=2, save_every=1, keep_checkpoints=2)
    run_training(cfg)
    kept = checkpoint.steps(Path(cfg.out))
    assert len(kept) == 2
    with open(kept[-1] / "optimizer.safetensors", "r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"xyz")
    with pytest.raises(ValueError, match=r"is damaged \(optimizer.safetensors\)"):
        run_training(replace(cfg, resume=True))


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


# --- several processes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [7, 1], ids=["shared", "a rank without pairs"])
def test_two_ranks_equal_one(config, batch_size):
    one, two = (config(batch_size=batch_size, max_steps=4) for _ in range(2))
    run_training(one)
    process = _launch(two)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out[-2000:]
    assert relative(weights_of(one), weights_of(two)) < 1e-9
    assert [m["loss"] for m in metrics(two)] == pytest.approx([m["loss"] for m in metrics(one)], rel=1e-9)


def test_stop_of_one_rank_stops_all_and_resumes(config):
    """SIGTERM to one process alone: both end after the same step; with dropout, resumed is straight, bit for bit."""
    values = {"batch_size": 6, "epochs": 20, "lora_dropout": 0.2}
    straight, cfg = (config(**values) for _ in range(2))
    _launch(straight).communicate(timeout=120)
    process = _launch(cfg)
    while not (journal := Path(cfg.out) / "metrics.jsonl").exists() or journal.read_text().count("\n") < 2:
        assert process.poll() is None
        time.sleep(0.02)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGTERM)
    process.communicate(timeout=120)
    assert 2 <= len(metrics(cfg)) < len(metrics(straight))
    assert _launch(cfg, "--resume").wait(timeout=120) == 0
    assert same_bits(weights_of(straight), weights_of(cfg))


def _launch(cfg, *more):
    path = Path(cfg.out).with_suffix(".yaml")
    path.write_text(to_yaml(cfg))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "ddpo.train", "--config", str(path), *more]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
