"""Ctrl-C and SIGTERM: every verb ends in good order; parts that must not be cut in two are not."""

import os
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import write_groups
from interrupt_verbs import commands, wrong

from ddpo import files, interrupts
from ddpo.cli import main

VERBS = ("prepare", "weigh", "train", "generate", "reward", "score", "evaluate", "annotate", "winrate")


@pytest.fixture(autouse=True)
def interruptible():
    """Python's own handler, which a process started in the background with SIGINT ignored has not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def here(tmp_path_factory, model_folder, prepared_folder):
    """What the commands read."""
    here = tmp_path_factory.mktemp("interrupted")
    groups = write_groups(here / "groups.jsonl")
    (here / "model").symlink_to(model_folder)
    shutil.copytree(prepared_folder, here / "prepared")
    options = "--lora-r 2 --lora-alpha 4 --epochs 1 --holdout 0.5".split()
    main(["reward", str(groups), "--out", str(here / "reward"), "--model", model_folder, *options])
    main(["annotate", str(groups), str(groups), "--out", str(here / "sets")])
    for name in ("sets.csv", "key.json"):
        (here / "sets" / name).rename(here / name)
    return here


@pytest.mark.parametrize("verb", VERBS)
def test_verb_ends_in_good_order(verb, here):
    assert wrong(verb, here, *commands(here)[verb]) == []


def test_first_moment_of_a_command():
    """Before anything is loaded too: no traceback."""
    code = (
        "import os, signal, sys, ddpo.settings as s; from ddpo.cli import main; from ddpo.config import PlanConfig\n"
        "s.parse = lambda *a: os.kill(os.getpid(), signal.SIGINT)\n"
        "main(['evaluate'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 130
    assert done.stderr == "interrupted; what was not finished was not written; give the command again\n"


def test_an_interrupt_that_a_library_turned_into_an_error(capsys, monkeypatch, tmp_path):
    def broken(cfg):
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("numpy._core failed to import") from None

    monkeypatch.setattr("ddpo.winrate.winrate", broken)
    with pytest.raises(SystemExit) as stopped:
        main(["winrate", "a", "--key", "b"])
    assert stopped.value.code == 130 and capsys.readouterr().err.startswith("interrupted; ")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_undisturbed():
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts.undisturbed():
        os.kill(os.getpid(), signal.SIGINT)
        done.append("went on")
    assert done == ["went on"]


def test_a_folder_is_replaced_whole(tmp_path, monkeypatch):
    """A Ctrl-C between the two renames waits until the new one is in its place."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()
    rename = files.Path.rename

    def and_interrupt(self, target):
        os.kill(os.getpid(), signal.SIGINT)
        return rename(self, target)

    monkeypatch.setattr(files.Path, "rename", and_interrupt)
    with pytest.raises(KeyboardInterrupt), files.new_folder(out, overwrite=True) as draft:
        (draft / "new").touch()
    assert [p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path.rglob("*"))] == ["out", "out/new"]
