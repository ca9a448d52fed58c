"""The command line as a person meets it, and the demo's data."""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import fields

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpo.cli import VERBS, main
from ddpo.config import TrainConfig
from ddpo.encoders import load_encoder, style_features
from ddpo.settings import parse, to_yaml


def run(*arguments):
    return subprocess.run([sys.executable, "-m", "ddpo", *arguments], capture_output=True, text=True, timeout=60)


def error_of(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    assert stopped.value.code == 2
    return capsys.readouterr().err.strip()


@pytest.mark.parametrize("verb", VERBS)
def test_help(verb, capsys):
    """Every option has a help text; the example parses."""
    _, cls, positional = VERBS[verb]
    with pytest.raises(SystemExit) as stopped:
        main([verb, "--help"])
    out = capsys.readouterr().out
    assert stopped.value.code == 0
    assert all("--" + f.name.replace("_", "-") in out for f in fields(cls))
    (example,) = re.findall(r"Example: ddpo (.*)", out)
    name, *rest = shlex.split(example)
    assert name == verb and isinstance(parse(cls, rest, "ddpo", positional), cls)


def test_usage():
    done = run()
    assert done.returncode == 0 and all(f"  {verb} " in done.stdout for verb in VERBS)
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", run("--version").stdout)


def test_unknown_names(capsys, tmp_path):
    assert error_of(capsys, "tain") == "error: unknown verb 'tain'; did you mean 'train'?"
    assert error_of(capsys, "train", "--betta", "1") == "error: config: unknown option 'betta'; did you mean 'beta'?"
    path = tmp_path / "c.yaml"
    path.write_text("betta: 1\n")
    assert "config: unknown key 'betta'; did you mean 'beta'?" in error_of(capsys, "train", "--config", str(path))
    path.write_text("- 1\n")
    assert "must hold 'key: value' lines, got list" in error_of(capsys, "train", "--config", str(path))
    path.write_text("a: [1\n")
    assert "is not YAML" in error_of(capsys, "train", "--config", str(path))
    assert "there is no file nowhere.yaml" in error_of(capsys, "train", "--config", "nowhere.yaml")


def test_wrong_type(capsys, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("data: d\nout: o\nbeta: high\n")
    with pytest.raises(SystemExit):
        main(["train", "--config", str(path)])
    err = capsys.readouterr().err
    assert "--beta" in err and "high" in err


def test_yaml_and_command_line(tmp_path):
    """The command line comes first; every setting survives the way to YAML and back."""
    path = tmp_path / "c.yaml"
    path.write_text("data: d\nout: o\nlr: 5e-6\nlora: false\nlora_targets: [k_proj, o_proj]\nmax_steps: null\n")
    cfg = parse(TrainConfig, ["--config", str(path), "--lr", "1e-4"], "ddpo train", "data")
    assert (cfg.lr, cfg.lora, cfg.lora_targets, cfg.max_steps) == (1e-4, False, ("k_proj", "o_proj"), None)
    path.write_text(to_yaml(cfg))
    assert parse(TrainConfig, ["--config", str(path)], "ddpo train", "data") == cfg


def test_errors_are_one_line(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    done = run("generate", str(tmp_path / "empty.jsonl"), "--out", str(tmp_path / "out.jsonl"))
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "the file is empty" in done.stderr and not (tmp_path / "out.jsonl").exists()


def test_demo_data():
    """24 prompts x 6 stories of 60 to 110 words with scores 1 to 5; 12 other prompts held out."""
    stories = [json.loads(line) for line in (ROOT / "ddpo/demo/stories.jsonl").open()]
    heldout = [json.loads(line) for line in (ROOT / "ddpo/demo/heldout.jsonl").open()]
    assert len(stories) == 24 and len(heldout) == 12
    assert len({g["prompt"] for g in stories + heldout}) == 36
    texts = [r["text"] for g in stories for r in g["responses"]]
    assert len(set(texts)) == 144 and all(60 <= len(t.split()) <= 110 for t in texts)
    assert all(len(g["responses"]) == 6 and len({r["score"] for r in g["responses"]}) > 1 for g in stories)
    assert {r["score"] for g in stories for r in g["responses"]} == {1, 2, 3, 4, 5}


def test_style_encoder_sees_style():
    """The same voice on other matters is nearer than another voice on the same matter; and it is deterministic."""
    plain = ["The dog ran to the gate. It was late. A man came.", "The boat went to the pier. It was cold. A girl sat."]
    loud = ["WHAT A DOG!!! Ran, ran, ran -- to the gate, no?! Unbelievable!!!"]
    e = style_features(plain + loud).double()
    similarity = torch_cosine(e)
    assert similarity[0, 1] > similarity[0, 2] + 0.2
    assert (style_features(plain + loud) == style_features(plain + loud)).all()
    with pytest.raises(ValueError, match="is a style encoder"):
        load_encoder("builtin", "semantic")


@settings(max_examples=40, deadline=None)
@given(st.text(min_size=1))
def test_style_encoder_takes_any_text(text):
    assert style_features([text]).isfinite().all()


def torch_cosine(e):
    unit = e / e.norm(dim=1, keepdim=True)
    return unit @ unit.T


def test_numbers_out_of_range(capsys):
    for name in ("batch-size", "lora-r", "micro-tokens", "epochs"):
        error = error_of(capsys, "train", "d", "--out", "o", f"--{name}", "0")
        assert f"config: {name.replace('-', '_')} must be greater than 0, got 0" in error
