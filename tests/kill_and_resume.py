"""Kills (-9) a training run at random moments and resumes it each time; at the end it must be the straight run.

python tests/kill_and_resume.py --kills 20        # SmolLM2-135M, 30 steps; a few minutes

Three kills in ten fall into the start of the process, the others within the time of a step and a half behind a new
step: into steps, the writing of checkpoints, the removal of old ones. Checked: after each kill no more is lost than
the steps since the last checkpoint due; at the end the adapter has the same bits, and metrics.jsonl each step once,
with the same numbers.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from conftest import SMALL, same_bits, write_groups
from safetensors.torch import load_file

from ddpo.checkpoint import steps as checkpoints
from ddpo.config import PrepareConfig
from ddpo.loading import PACKAGED
from ddpo.prepare import prepare

SAVE_EVERY = 2
CLOCKS = ("tokens_per_s", "peak_memory_gib")


def kill_and_resume(folder: Path, model: str, num_kills: int, num_steps: int, seed: int = 0) -> list[int]:
    """Returns the step that each kill fell behind. Raises AssertionError where anything is not as it was."""
    draw = random.Random(seed)
    data = str(folder / "data")
    groups = write_groups(folder / "groups.jsonl")
    prepare(PrepareConfig(source=str(groups), out=data, model=model, gap=1.0, measures=("style",), min_deviation=0.5))
    small = SMALL if Path(model).is_dir() else {"lr": 1e-3}
    values = {**small, "data": data, "model": model, "batch_size": 1, "epochs": 1000, "max_steps": num_steps}
    values |= {"lora_dropout": 0.1, "save_every": SAVE_EVERY}

    def launch(name):
        command = [sys.executable, "-m", "ddpo", "train", f"--out={folder / name}", "--resume"]
        command += [f"--{key}={value}" for key, value in values.items()]
        with open(folder / "output.txt", "a") as output:
            return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)

    def end_of_output():
        return (folder / "output.txt").read_text()[-3000:]

    begin = time.monotonic()
    assert launch("straight").wait() == 0, end_of_output()
    lifetime = time.monotonic() - begin
    step_time = time_of_steps(folder / "straight") / num_steps
    startup = lifetime - step_time * num_steps
    run, fell = folder / "killed", []
    while len(fell) < num_kills:
        before = last_step(run)
        process = launch("killed")
        if before > num_steps - 3 or draw.random() < 0.3:  # the last steps are for the last kills
            time.sleep(draw.uniform(0, 0.8 * startup))
        else:
            while process.poll() is None and last_step(run) <= before:
                time.sleep(0.001)
            time.sleep(draw.uniform(0, 1.5 * step_time))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, f"ended before kill {len(fell) + 1}: {end_of_output()}"
        fell.append(last_step(run))
        due = fell[-1] // SAVE_EVERY * SAVE_EVERY  # the checkpoint of the step under way need not be whole yet
        saved = max((int(path.name[-8:]) for path in checkpoints(run)), default=0)
        assert saved >= due - SAVE_EVERY, f"killed behind step {fell[-1]}, the last checkpoint is of step {saved}"
    assert launch("killed").wait() == 0, end_of_output()
    ends = [load_file(folder / name / "adapter" / "adapter_model.safetensors") for name in ("straight", "killed")]
    assert same_bits(*ends), "the adapters differ"
    lines = [(folder / name / "metrics.jsonl").read_text().splitlines() for name in ("straight", "killed")]
    told = [[{k: v for k, v in json.loads(line).items() if k not in CLOCKS} for line in of_run] for of_run in lines]
    assert told[0] == told[1] and [m["step"] for m in told[0]] == list(range(1, num_steps + 1))
    return fell


def last_step(run: Path) -> int:
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
        return json.loads(lines[-1])["step"]
    except (OSError, ValueError, IndexError):
        return 0


def time_of_steps(run: Path) -> float:
    """Seconds between config.yaml, written before the first step, and the last line of metrics.jsonl."""
    return (run / "metrics.jsonl").stat().st_mtime - (run / "config.yaml").stat().st_mtime


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default=PACKAGED)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        fell = kill_and_resume(Path(name), args.model, args.kills, args.steps, args.seed)
    print(f"{len(fell)} kills behind steps {fell}: the same bits as the straight run of {args.steps} steps")
