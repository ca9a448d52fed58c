"""Kills (-9) a training run at random moments and resumes it each time; at the end it must be the straight run.

python tests/kill_and_resume.py --kills 20                          # a tiny model; about two minutes
python tests/kill_and_resume.py --kills 20 --model smollm2-135m-instruct

Three kills in ten fall into the start of the process, the others behind a step more than before: into steps, the
writing of checkpoints, the removal of old ones. Checked: after each kill no more is lost than the steps since the last
checkpoint due; at the end the adapter has the same bits, and metrics.jsonl each step once, with the same numbers.
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

from conftest import SMALL, same_bits, tiny_model, tiny_tokenizer, write_groups
from safetensors.torch import load_file

from ddpo.checkpoint import steps as checkpoints
from ddpo.config import PrepareConfig
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
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)

    begin = time.monotonic()
    assert launch("straight").wait() == 0
    lifetime = time.monotonic() - begin
    run, fell = folder / "killed", []
    while len(fell) < num_kills:
        before = last_step(run)
        process = launch("killed")
        if draw.random() < 0.3:
            time.sleep(draw.uniform(0, 0.8 * lifetime))
        else:
            while process.poll() is None and last_step(run) <= before:
                time.sleep(0.001)
            time.sleep(draw.uniform(0, 0.03 if small is SMALL else lifetime / num_steps))
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            raise AssertionError(f"the run ended before kill {len(fell) + 1}")
        fell.append(last_step(run))
        due = fell[-1] // SAVE_EVERY * SAVE_EVERY  # the checkpoint of the step under way need not be whole yet
        saved = max((int(path.name[-8:]) for path in checkpoints(run)), default=0)
        assert saved >= due - SAVE_EVERY, f"killed behind step {fell[-1]}, the last checkpoint is of step {saved}"
    assert launch("killed").wait() == 0
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


def tiny_folder(folder: Path) -> str:
    tiny_model().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    return str(folder / "model")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default=None, help="default: a tiny random one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        model = args.model or tiny_folder(Path(name))
        fell = kill_and_resume(Path(name), model, args.kills, args.steps, args.seed)
    print(f"{len(fell)} kills behind steps {fell}: the same bits as the straight run of {args.steps} steps")
