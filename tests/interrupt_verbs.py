"""Interrupts every verb that writes, at several moments: what is there is whole, what is not finished is not there, and
the same command goes on. A command runs in a fork of a process that has imported everything, so that it is quick.
"""

import contextlib
import importlib
import os
import re
import signal
import sys
import time
from pathlib import Path

import torch

from ddpo import files
from ddpo.cli import VERBS, main

LIMIT_S = 60  # of a command
MANY_FILES = ("prepare", "train", "annotate")
GOES_ON = re.compile(r"^(interrupted; .*|stopped at step \d+ of \d+; go on with --resume)$", re.M)


def commands(here: Path) -> dict[str, tuple[str, list[str]]]:
    """verb -> command, what it writes under its folder; {0} is that folder."""
    model, groups = f"--model {here / 'model'}", here / "groups.jsonl"
    style = f"--measures style --embeddings {here / 'embeddings'}"
    small = "--dtype float64 --lora-r 2 --lora-alpha 4"
    reward = "--lora-r 2 --lora-alpha 4 --epochs 1 --holdout 0.5"
    return {
        "prepare": (f"prepare {groups} --out {{0}}/out --gap 1 {model} {style}", ["out"]),
        "weigh": (f"weigh {groups} --out {{0}}/out.jsonl {style}", ["out.jsonl"]),
        "train": (f"train {here / 'prepared'} --out {{0}}/out {model} {small} --save-every 1 --batch-size 1", ["out"]),
        "generate": (
            f"generate {groups} --out {{0}}/out.jsonl {model} --max-new-tokens 20 --batch-size 4",
            ["out.jsonl"],
        ),
        "reward": (f"reward {groups} --out {{0}}/out {model} {reward}", ["out"]),
        "score": (f"score {groups} --out {{0}}/out.jsonl --reward {here / 'reward'}", ["out.jsonl"]),
        "evaluate": (f"evaluate {groups} --out {{0}}/out.json {style} --no-text-measures", ["out.json"]),
        "annotate": (f"annotate {groups} {groups} --out {{0}}/out", ["out"]),
        "winrate": (f"winrate {here / 'sets.csv'} --key {here / 'key.json'} --out {{0}}/out.json", ["out.json"]),
    }


def child(command: list[str], said: Path, at: str | None) -> None:
    """Runs the command in this process, which then ends. at: where it interrupts itself, or nothing."""
    torch.set_num_threads(1)  # the threads that others had are not in a fork
    with said.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if at:  # in the middle of the first or the last file that is put in its place
        before, left = files.sync, iter(range(int(at)))

        def sync(path):
            before(path)
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGINT)

        files.sync = sync
    code = 0
    try:
        main(command)
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else 1
    except BaseException as err:
        print(f"Traceback: {err!r}")
        code = 99
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def run(command: str, folder: Path, at: str | None = None, after_s: float | None = None, with_=signal.SIGINT):
    """(exit code, what it said, seconds, pid)."""
    said = folder.parent / f"{folder.name}.said"
    start = time.monotonic()
    pid = os.fork()
    if pid == 0:
        child(command.format(folder).split(), said, at)
    if after_s is not None:
        time.sleep(after_s)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, with_)
    while time.monotonic() - start < LIMIT_S:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), said.read_text(), time.monotonic() - start, pid
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None, said.read_text(), LIMIT_S, pid


def listing(folder: Path) -> dict[str, bytes]:
    """The files that a user sees: contents of those that are the same each time."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if not any(part.startswith(".") for part in Path(name).parts):
            found[name] = path.read_bytes() if path.suffix in (".jsonl", ".csv", ".safetensors", ".arrow") else b""
    return found


def wrong(verb: str, here: Path, command: str, outputs: list[str]) -> list[str]:
    importlib.import_module(VERBS[verb][0])
    whole, found = here / f"{verb}-whole", []
    whole.mkdir()
    code, said, seconds, _ = run(command, whole)
    if code:
        return [f"uninterrupted: exit code {code}: {said}"]
    reference = {name: content for name, content in listing(whole).items() if not is_a_runs(name)}
    timed = signal.SIGINT if len(verb) % 2 else signal.SIGTERM
    moments = [{"at": "0"}, {"after_s": seconds * 0.6, "with_": timed}, *[{"at": "3"}] * (verb in MANY_FILES)]
    for i, moment in enumerate(moments):
        folder = here / f"{verb}-{i}"
        folder.mkdir()
        code, said, _, pid = run(command, folder, **moment)
        drafts = [p.name for p in folder.rglob(f".*.{pid}*")]
        if drafts:
            found.append(f"{moment}: drafts left: {drafts}")
        if code not in (0, 130)[i == 0 :] or (code == 130) != bool(GOES_ON.search(said)) or "Traceback" in said:
            found.append(f"{moment}: exit code {code}: {said}")
        for name in outputs:  # a file, or a folder that comes whole: a run's is there from its first step
            path = folder / name
            if verb not in ("train", "reward") and path.exists() and not same(folder, reference):
                found.append(f"{moment}: {name} is there and not whole: {sorted(listing(folder))}")
        if code == 130 and "at" in moment and (i > 0) == (verb in MANY_FILES) and verb != "reward":
            whole_already = all((folder / name).exists() for name in outputs) and "--resume" not in said
            again = command + " --resume" * ("--resume" in said)
            code, said, *_ = (0, "") if whole_already else run(again, folder)
            if code or not same(folder, reference):
                found.append(f"{moment}: going on: exit code {code}: {said} {sorted(listing(folder))}")
    return found


def is_a_runs(name: str) -> bool:
    """Files of a run that need not be alike: journals with times, checkpoints."""
    return "checkpoints/" in name or name.endswith(("metrics.jsonl", "eval.jsonl"))


def same(folder: Path, reference: dict[str, bytes]) -> bool:
    return {name: content for name, content in listing(folder).items() if not is_a_runs(name)} == reference
