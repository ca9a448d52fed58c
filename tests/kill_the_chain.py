"""The whole chain of commands from nothing, each killed (-9) once half way and given again: prepare, train (SFT, then
DDPO), generate, reward, score, evaluate.

python tests/kill_the_chain.py --data groups.jsonl   # SmolLM2-135M; about an hour for 21 prompts, 5,800 responses

Checked: each command was killed before its end; given again it ends well; given a third time it says that there is
nothing to do (evaluate keeps embeddings alone). What the killed chain wrote is what one wrote that was not killed.
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
score after.jsonl --reward reward --out after-scored.jsonl --resume
evaluate after-scored.jsonl --out numbers.json --embeddings kept
"""
NOTHING_TO_DO = ("nothing to do", "is finished already", "is there, made from the same")
WRITTEN = ("after.jsonl", "after-scored.jsonl")  # of both chains the same


def launch(command: list[str], folder: Path) -> subprocess.Popen:
    with open(folder / "output.txt", "a") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "ddpo", *command], cwd=folder, stdout=output, stderr=subprocess.STDOUT
        )


def finish(command: list[str], folder: Path) -> float:
    """Seconds that the command took. Raises AssertionError where it failed."""
    start = time.monotonic()
    assert launch(command, folder).wait() == 0, (folder / "output.txt").read_text()[-3000:]
    return time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--more", default="", help="options of every command that loads a model, e.g. --model FOLDER")
    parser.add_argument("--at", type=float, default=0.6, help="share of a command's time after which it is killed")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        straight, killed = Path(temporary) / "straight", Path(temporary) / "killed"
        for folder in (straight, killed):
            folder.mkdir()
        for line in CHAIN.strip().splitlines():
            command = shlex.split(line.replace("DATA", str(args.data.resolve())))
            if command[0] not in ("score", "evaluate"):
                command += shlex.split(args.more)
            seconds = finish(command, straight)
            process = launch(command, killed)
            time.sleep(args.at * seconds)
            assert process.poll() is None, f"{command[0]} ended before it was killed; give a smaller --at"
            process.send_signal(signal.SIGKILL)
            process.wait()
            again, told = finish(command, killed), (killed / "output.txt").stat().st_size
            nothing = finish(command, killed)
            last = (killed / "output.txt").read_bytes()[told:].decode(errors="replace")
            assert command[0] == "evaluate" or any(words in last for words in NOTHING_TO_DO), last
            print(
                f"{command[0]:<9} {seconds:6.1f} s; killed at {args.at:.0%}, again {again:6.1f} s, "
                f"once more {nothing:6.1f} s",
                flush=True,
            )
        for name in WRITTEN:
            assert (straight / name).read_bytes() == (killed / name).read_bytes(), f"{name} is not the same"
        for line in re.findall(r".*taken up.*", (killed / "output.txt").read_text()):
            print(line)


if __name__ == "__main__":
    main()
