"""The whole chain of commands from nothing, each killed (-9) as soon as it has finished a part of its work, and given
again: prepare, reward, train (SFT, then DDPO), generate, score, evaluate.

python tests/kill_the_chain.py --data groups.jsonl   # SmolLM2-135M; ten minutes for 8 prompts x 12 responses

Checked: embeddings, checkpoints and steps of training that were finished before the kill are there afterwards as they
were; of samples and rewards the command says how many it takes up, all that its ledger held. It ends well, and given a
third time it says that there is nothing to do (evaluate keeps embeddings alone). Responses and rewards of the killed
chain are those of one that was not killed.
"""

import argparse
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHAIN = """
prepare DATA --out prepared --gap 1 --holdout 0.3 --max-responses 16 --embeddings kept --resume
reward DATA --out reward --eval-data prepared/heldout.jsonl --target linear --lr 3e-4 --epochs 2 \
  --batch-size 16 --resume
train prepared --out runs/sft --method sft --lr 5e-4 --batch-size 16 --save-every 2 --resume
train prepared --out runs/ddpo --method ddpo --adapter runs/sft/adapter --lr 2e-4 --save-every 2 --max-steps 10 --resume
generate prepared/heldout.jsonl --out after.jsonl --adapter runs/ddpo/adapter --max-new-tokens 8 --batch-size 8 --resume
score after.jsonl --reward reward --out after-scored.jsonl --max-tokens 256 --resume
evaluate after-scored.jsonl --out numbers.json --embeddings kept
"""
NOTHING_TO_DO = ("nothing to do", "is finished already", "is there, made from the same")
RESULT = "result"
WRITTEN = ("after.jsonl", "after-scored.jsonl")  # of both chains the same


def launch(command: list[str], folder: Path) -> subprocess.Popen:
    with open(folder / "output.txt", "a") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "ddpo", *command], cwd=folder, stdout=output, stderr=subprocess.STDOUT
        )


def run(command: list[str], folder: Path) -> tuple[float, str]:
    """Seconds that the command took, and what it said. Raises AssertionError where it failed."""
    output, start = folder / "output.txt", time.monotonic()
    told = output.stat().st_size if output.exists() else 0
    code = launch(command, folder).wait()
    text = output.read_bytes()[told:].decode(errors="replace")
    assert code == 0, text[-3000:]
    return time.monotonic() - start, text


def finished(folder: Path) -> dict[str, object]:
    """Finished work that a kill must leave: embeddings and checkpoints (two, of two epochs) by the time they were
    written, lines of metrics (they hold the clock) up to a run's last checkpoint, results in ledgers."""
    files = [*folder.glob("kept/*/[!.]*.arrow"), *folder.glob("reward/checkpoints/*/trainer_state.json")]
    found: dict[str, object] = {str(file): file.stat().st_mtime_ns for file in files if file.stat().st_size}
    for place in folder.glob("runs/*"):
        saved = max((int(path.name.removeprefix("step-")) for path in place.glob("checkpoints/step-*")), default=0)
        lines = (place / "metrics.jsonl").read_text().splitlines() if saved else []
        found |= {f"{place} step {i}": line for i, line in enumerate(lines[:saved], 1)}
    for ledger in folder.glob(".*.part"):
        whole = ledger.read_text().split("\n")[1:-1]  # without its head, and a line that the kill tore
        found |= {f"{RESULT} {i} of {ledger.name}": line for i, line in enumerate(whole)}
    return found


def kill(command: list[str], folder: Path) -> dict[str, object]:
    """Starts the command and kills it when it has finished something; returns what is finished then."""
    before, process = len(finished(folder)), launch(command, folder)
    try:
        while len(finished(folder)) <= before:
            assert process.poll() is None, f"{command[0]} ended before it was killed"
            time.sleep(0.02)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL, f"{command[0]} ended before it was killed"
    return finished(folder)


def check_taken_up(work: dict[str, object], folder: Path, output: str) -> None:
    """Asserts that finished work is as it was; of results in ledgers, which are gone by now, that all were read."""
    results, now = sum(name.startswith(RESULT) for name in work), finished(folder)
    told = re.search(r"(\d+) results of a run that was stopped are taken up", output)
    assert int(told[1] if told else 0) == results, (results, output)
    lost = [name for name, value in work.items() if not name.startswith(RESULT) and now.get(name) != value]
    assert not lost, lost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--more", default="", help="options of every command that loads a model, e.g. --model FOLDER")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        straight, killed = Path(temporary) / "straight", Path(temporary) / "killed"
        for folder in (straight, killed):
            folder.mkdir()
        for line in CHAIN.strip().splitlines():
            command = shlex.split(line.replace("DATA", str(args.data.resolve())))
            if command[0] not in ("score", "evaluate"):
                command += shlex.split(args.more)
            (seconds, _), before = run(command, straight), finished(killed)
            work = kill(command, killed)
            again, output = run(command, killed)
            check_taken_up(work, killed, output)
            nothing, output = run(command, killed)
            assert command[0] == "evaluate" or any(words in output for words in NOTHING_TO_DO), output
            print(
                f"{command[0]:<9} {seconds:6.1f} s; killed with {len(work) - len(before)} parts of its work done, "
                f"again {again:6.1f} s, once more {nothing:6.1f} s",
                flush=True,
            )
        for name in WRITTEN:
            assert (straight / name).read_bytes() == (killed / name).read_bytes(), f"{name} is not the same"
    print("what was finished was not done again; both chains gave the same responses and rewards")


if __name__ == "__main__":
    main()
