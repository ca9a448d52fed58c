"""What goes wrong the first time: each is one line that says where, what, wanted, got and the way out, and its exit
code; and nothing is written."""

import errno
import gzip
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer, write_groups

from ddpo import files, mishaps
from ddpo.cli import EXIT_CODES, main
from ddpo.loading import add_lora

ROW = json.dumps({"prompt": "p", "responses": [{"text": "a", "score": 1}, {"text": "b", "score": 2}]}) + "\n"


def error_of(capsys, *arguments, code=2):
    """The one line on stderr."""
    with pytest.raises(SystemExit) as stopped:
        main(list(map(str, arguments)))
    err = capsys.readouterr().err
    assert stopped.value.code == code, err
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err
    return err.strip().removeprefix("error: ")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


BYTES = {  # name -> content, what the line says
    "empty.jsonl": (b"", "the file is empty; wanted one JSON object a line"),
    "table.csv": (b"prompt,chosen,rejected\na,b,c\n", "table.csv:1: .*looks like CSV; .*from_csv"),
    "wide.jsonl": (ROW.encode("utf-16"), "wide.jsonl:1: .*UTF-16; save it as UTF-8: iconv"),
    "packed.jsonl.gz": (gzip.compress(ROW.encode()), "packed.jsonl.gz:1: .*is compressed; unpack it: gunzip"),
    "list.json": (f"[{ROW.strip()}]".encode(), "list.json:1: wanted a JSON object, got list; .*jq -c '.\\[\\]'"),
    "pretty.json": (json.dumps(json.loads(ROW), indent=1).encode(), "pretty.json:1: .*several lines; .*jq -c \\."),
    "rows.parquet": (b"PAR1\x15\x04\n", "rows.parquet:1: .*is Parquet"),
    "keys.jsonl": (b'{"question": "p", "answers": ["a"]}\n', "keys.jsonl:1: cannot tell the format .*'question'"),
    "strings.jsonl": (b'{"prompt": "p", "responses": ["a"]}\n', "strings.jsonl:1: response 0 must be an object"),
    "torn.jsonl": (ROW.encode() + b'{"prompt": "p", "resp', "torn.jsonl:2: not a line of JSON"),
    "score.jsonl": (ROW.replace("2", '"2"').encode(), "score.jsonl:1: 'score' of response 1 must be a finite number"),
}


@pytest.mark.parametrize("name", BYTES)
def test_wrong_file(name, capsys, tmp_path, model_folder):
    content, said = BYTES[name]
    (tmp_path / name).write_bytes(content)
    out = tmp_path / "out"
    line = error_of(capsys, "prepare", tmp_path / name, "--out", out, "--model", model_folder, "--measures", "style")
    assert re.search(said, line), line
    assert sorted(p.name for p in tmp_path.iterdir()) == [name]


def test_byte_order_mark_is_fine(capsys, tmp_path, model_folder):
    source = write_groups(tmp_path / "groups.jsonl")
    source.write_bytes(b"\xef\xbb\xbf" + source.read_bytes())
    main(["prepare", str(source), "--out", str(tmp_path / "out"), "--model", model_folder, "--dry-run"])
    assert "first 4 groups: 16 responses stay" in capsys.readouterr().out


CASES = {  # name -> command, part of its line, exit code where it is not 2
    "no such file": ("prepare {here}/no/a.jsonl --out {out} {tiny}", "a.jsonl: there is no such file"),
    "no such data set": ("prepare someone/nothing --out {out} {tiny}", "data set 'someone/nothing': "),
    "folder for a file": ("generate {here}/folder --out {out} {tiny}", "is a folder; wanted a file"),
    "folder of nothing": ("prepare {here}/folder --out {out} {tiny}", "folder': cannot be loaded: Directory"),
    "prepared folder": ("prepare {prepared} --out {out} {tiny}", "is a prepared folder; wanted"),
    "file for a folder": ("train {groups} --out {out} {tiny}", "no manifest.json); make one with `ddpo prepare`"),
    "no such prompts": ("generate {here}/no --out {out} {tiny}", "no: there is no such file or folder"),
    "no such model": ("train {prepared} --out {out} --model {here}/no", "there is no such folder"),
    "hub model offline": ("generate {groups} --out {out} --model some/one", "hub cannot be reached"),
    "no config": ("generate {groups} --out {out} --model {here}/no-config", "(no config.json)"),
    "damaged weights": ("generate {groups} --out {out} --model {here}/damaged", "is damaged"),
    "model of own code": ("generate {groups} --out {out} --model {here}/own-code", "run code of its own"),
    "model is a file": ("generate {groups} --out {out} --model {groups}", "is a file; wanted a model's folder"),
    "adapter as model": ("generate {groups} --out {out} --model {here}/adapter", "give it as --adapter"),
    "no adapter": ("generate {groups} --out {out} {tiny} --adapter {here}/folder", "no LoRA adapter"),
    "adapter of another": ("generate {groups} --out {out} {tiny} --adapter {here}/adapter", "it was made for 'wide'"),
    "adapter offline": ("generate {groups} --out {out} {tiny} --adapter some/one", "adapter 'some/one': "),
    "no template": ("generate {groups} --out {out} {tiny} --chat-template {here}/no", "there is no such file"),
    "out is a file": ("prepare {groups} --out {here}/file {tiny}", "is not overwritten; give another name"),
    "out under a file": (
        "generate {groups} --out {here}/file/x {tiny} --max-new-tokens 2",
        "is a file where a folder is wanted",
    ),
    "out not writable": ("generate {groups} --out /proc/none/x {tiny} --max-new-tokens 2", "/proc/none: there is no"),
    "one response": ("train {here}/of-one --out {out} {tiny}", "no pair"),
    "liger, no GPU": ("train {prepared} --out {out} {tiny} --liger on", "GPU", 1),
    "tune, no GPU": ("tune {model}", "wanted a GPU, found none"),
    "no reward model": ("score {groups} --reward {model} --out {out}", "ddpo reward"),
    "no key": ("winrate {groups} --key {here}/no", "no: there is no such file"),
    "no encoder": ("weigh {groups} --out {out} --measures style --style some/one", "style encoder 'some/one': "),
    "unknown option": ("train {prepared} --outt x", "unknown option 'outt'; did you mean 'out'?"),
}


@pytest.fixture(scope="module")
def here(tmp_path_factory, model_folder):
    """Folders and files that are not what is wanted."""
    here = tmp_path_factory.mktemp("mistakes")
    (here / "folder").mkdir()
    (here / "file").touch()
    for name in ("no-config", "damaged", "own-code"):
        shutil.copytree(model_folder, here / name)
    (here / "no-config" / "config.json").unlink()
    (here / "damaged" / "model.safetensors").write_bytes(b"torn")
    config = json.loads((here / "own-code" / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Mine"}}
    (here / "own-code" / "config.json").write_text(json.dumps(config))
    (here / "own-code" / "mine.py").write_text("raise SystemExit('this ran')\n")
    wide = add_lora(tiny_model(hidden_size=32, head_dim=8), 2, 4, 0.0, ("q_proj",), 0)
    wide.peft_config["default"].base_model_name_or_path = "wide"
    wide.save_pretrained(here / "adapter")
    tiny_tokenizer().save_pretrained(here / "adapter")
    one = write_groups(here / "one.jsonl", [("p", [("a", 1)]), ("q", [("b", 2)])])
    main(["prepare", str(one), "--out", str(here / "of-one"), "--model", model_folder, "--measures", "style"])
    return here


@pytest.mark.parametrize("name", CASES)
def test_wrong_command(name, capsys, tmp_path, here, model_folder, prepared_folder, groups_file):
    command, said, *code = CASES[name]
    before = sorted(here.rglob("*"))
    paths = {"here": here, "out": tmp_path / "out", "model": model_folder, "tiny": f"--model {model_folder}"}
    words = command.format(**paths, prepared=prepared_folder, groups=groups_file).split()
    line = error_of(capsys, *words, code=code[0] if code else 2)
    assert said in line, line
    assert not (tmp_path / "out").exists() and sorted(here.rglob("*")) == before


# --- the machine ------------------------------------------------------------------------------------------


def test_disk_full(capsys, tmp_path, monkeypatch, model_folder, groups_file):
    """The output is not there, nor is its draft."""

    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(files, "sync", full)
    out = tmp_path / "out.jsonl"
    line = error_of(capsys, "weigh", groups_file, "--out", out, "--measures", "style", code=1)
    assert "no space left on device; make room" in line and not list(tmp_path.iterdir())


MACHINE = {
    "torch's CPU": (
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        "--micro-tokens",
    ),
    "torch's GPU": (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "--micro-tokens"),
    "Python's": (MemoryError(), "out of memory"),
    "disk": (OSError(errno.EDQUOT, "Disk quota exceeded", "x"), "make room"),
    "package": (ModuleNotFoundError("No module named 'faiss'"), "ddpo doctor"),
    "bug": (TypeError("unsupported"), "unexpected TypeError: unsupported"),
}


@pytest.mark.parametrize("name", MACHINE)
def test_machine(name, capsys, monkeypatch, tmp_path, groups_file):
    error, said = MACHINE[name]

    def fails(cfg):
        raise error

    monkeypatch.setattr("ddpo.weigh.weigh", fails)
    assert said in error_of(capsys, "weigh", groups_file, "--out", tmp_path / "out", code=1)


def test_too_old_a_package(capsys, monkeypatch, tmp_path, groups_file):
    """What fails under a package older than the floor names it."""

    def fails(cfg):
        raise AttributeError("module 'torch' has no attribute 'new_thing'")

    monkeypatch.setattr("ddpo.weigh.weigh", fails)
    monkeypatch.setattr(mishaps.metadata, "requires", lambda name: ["torch>=99", "numpy>=1"])
    line = error_of(capsys, "weigh", groups_file, "--out", tmp_path / "out", code=1)
    assert f"torch {mishaps.metadata.version('torch')} is installed, wanted >=99" in line and "numpy" not in line


def test_gated_model():
    """As transformers and the hub's client tell it."""

    class GatedRepoError(OSError):
        pass

    said = r"model 'a/b': is gated on the hub; accept its terms at https://huggingface.co/a/b and log in"
    with pytest.raises(ValueError, match=said), mishaps.named("model", "a/b"):
        try:
            raise GatedRepoError("401")
        except GatedRepoError as err:
            raise OSError("no files") from err


def test_exit_codes_are_told():
    done = subprocess.run([sys.executable, "-m", "ddpo", "--help"], capture_output=True, text=True, timeout=60)
    assert set(EXIT_CODES) == {0, 1, 2, 130}
    assert all(f"  {code:<10} {meaning}" in done.stdout for code, meaning in EXIT_CODES.items())


def test_traceback_on_request(tmp_path):
    command = [sys.executable, "-m", "ddpo", "train", "--config", str(tmp_path / "no.yaml")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, env={**os.environ, "DDPO_TRACEBACK": "1"}
    )
    assert "Traceback" in done.stderr and done.returncode == 1
