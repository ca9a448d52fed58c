"""What goes to stdout: one JSON object under --json, plain lines in a pipe, no colours under NO_COLOR."""

import json
import os
import pty
import subprocess
import sys
from dataclasses import fields

import pytest
from conftest import write_groups

from ddpo import log
from ddpo.cli import VERBS, main
from ddpo.files import read_json

WITHOUT_JSON: dict[str, str] = {}  # verb -> why it prints nothing that a program would read
SMALL = "--lora-r 2 --lora-alpha 4".split()


def test_every_verb_has_json():
    for verb, (_, cls, _) in VERBS.items():
        has = {f.name: f.default for f in fields(cls)}
        assert verb in WITHOUT_JSON or has.get("json") is False, f"{verb} has no `json: bool = False`"
        assert verb not in WITHOUT_JSON or "json" not in has


def answer(capsys, *command):
    """The one JSON object on stdout; nothing but warnings of libraries on stderr."""
    capsys.readouterr()
    main([*map(str, command), "--json"])
    out = capsys.readouterr().out
    assert out.count("\n") == 1, out
    return json.loads(out)


def test_json_of_the_chain(capsys, tmp_path, model_folder):
    """From groups to win rates, every verb but those that want a GPU or the packaged models."""
    groups, model = write_groups(tmp_path / "groups.jsonl"), ("--model", model_folder)
    style = ("--measures", "style")
    found = answer(capsys, "prepare", groups, "--out", tmp_path / "prepared", "--gap", 1, *model, *style)
    assert found["prompts"] == 4 and found["out"] == str(tmp_path / "prepared") and found["weights"]
    again = answer(capsys, "prepare", groups, "--out", tmp_path / "prepared", "--gap", 1, *model, *style, "--resume")
    assert again == found
    found = answer(capsys, "prepare", groups, "--out", tmp_path / "none", *model, *style, "--dry-run")
    assert found["dry_run"] and found["responses_kept"] == 16 and not (tmp_path / "none").exists()
    assert "weights" in answer(capsys, "weigh", tmp_path / "prepared", *style)
    assert "weights" in answer(capsys, "weigh", groups, "--out", tmp_path / "weighed.jsonl", *style)
    train = ("train", tmp_path / "prepared", "--out", tmp_path / "run", *model, *SMALL, "--dtype", "float64")
    assert answer(capsys, *train, "--dry-run")["parameters"]["trained"] > 0
    found = answer(capsys, *train)
    assert found["finished"] and found["trained"].endswith("adapter") and found["metrics"]["step"] == 1
    assert answer(capsys, *train, "--resume") == found
    assert answer(capsys, "plan", tmp_path / "prepared", *model, "--flops", 1e12)["peak_mib"] > 0
    generate = ("generate", groups, "--out", tmp_path / "samples.jsonl", *model, "--max-new-tokens", 4)
    found = answer(capsys, *generate)
    assert found["files"][0]["num_responses"] == 16 and 0 <= found["files"][0]["cut_share"] <= 1
    assert answer(capsys, *generate, "--resume") == found
    found = answer(capsys, "reward", groups, "--out", tmp_path / "rm", *model, *SMALL, "--epochs", 1, "--holdout", 0.5)
    assert found["num_prompts"] == 2
    score = ("score", groups, "--reward", tmp_path / "rm", "--out", tmp_path / "scored.jsonl")
    found = answer(capsys, *score)
    assert found["num_responses"] == 16 and answer(capsys, *score, "--resume") == found
    found = answer(capsys, "evaluate", tmp_path / "scored.jsonl", *style, "--no-text-measures")
    assert found["quality"] == "reward" and found["settings"]["json"]
    found = answer(capsys, "annotate", groups, groups, "--out", tmp_path / "sets")
    assert found["num_prompts"] == 4
    found = answer(capsys, "winrate", found["sets"], "--key", found["key"])
    assert found["questions"]["more_diverse"]["unanswered"] == 4


def test_json_is_no_setting(tmp_path, model_folder, prepared_folder, capsys):
    """A run that was begun without --json goes on with it, and a folder's manifest does not hold it."""
    assert "json" not in read_json(f"{prepared_folder}/manifest.json")["settings"]
    train = ("train", prepared_folder, "--out", tmp_path / "run", "--model", model_folder, *SMALL, "--dtype", "float64")
    main([*map(str, train), "--max-steps", "1"])
    assert answer(capsys, *train, "--max-steps", 1, "--resume")["finished"]


def test_no_answer_where_it_went_wrong(capsys, tmp_path):
    with pytest.raises(SystemExit):
        main(["winrate", "a.csv", "--key", str(tmp_path / "no"), "--json"])
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ")


# --- pipes and terminals ----------------------------------------------------------------------------------


def test_a_pipe_gets_lines(tmp_path, capfd):
    """No bar, no escape code; a data set is saved without the libraries' bars too."""
    rows = [{"prompt": "p", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(4)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    log.console.print("said before")  # the console takes up what stdout is now
    main(["weigh", str(tmp_path / "pairs.jsonl"), "--out", str(tmp_path / "out"), "--measures", "style"])
    out, err = capfd.readouterr()
    assert "wrote " in out and "\x1b" not in out + err and "\r" not in out + err
    assert "━" not in out and "%|" not in err and "it/s" not in err, err


def in_terminal(command, **environment):
    """What a program writes to a terminal of 80 columns."""
    ours, theirs = pty.openpty()
    env = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    env |= {"TERM": "xterm-256color", **environment}
    done = subprocess.Popen(command, stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    written = b""
    try:
        while part := os.read(ours, 4096):
            written += part
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    assert done.wait(timeout=60) == 0, written
    return written.decode()


@pytest.mark.parametrize("no_color", [False, True])
def test_no_color(no_color):
    code = (
        "from ddpo import log; log.console.print('a warning', style='yellow'); log.console.print('plain')\n"
        "for _ in log.track(range(2), 'bar', 2): pass"
    )
    written = in_terminal([sys.executable, "-c", code], **({"NO_COLOR": "1"} if no_color else {}))
    assert "a warning" in written and "bar" in written
    coloured = any(f"\x1b[{n}" in written for n in ("3", "4", "9", "1;3", "38"))
    assert coloured is not no_color, repr(written)
