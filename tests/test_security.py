"""What hostile files, models and texts cannot do."""

import ast
import io
import json

import pytest
from conftest import ROOT, STORIES, write_groups

from ddpo import checkpoint, log
from ddpo.cli import main
from ddpo.data.prepared import Prepared
from ddpo.files import inside, read_json, write_json

FILES = [p for folder in ("ddpo", "kernels") for p in sorted((ROOT / folder).rglob("*.py"))]
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "telnetlib"}
HOSTILE = "\x1b]0;owned\x07\x1b[2J[red]not red[/red] [link=http://x]x[/link] :smile: \u202egnirts \x9b31m \ud800"


def calls():
    """(file:line, dotted name, call) of every call in the package."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                yield f"{path.relative_to(ROOT)}:{node.lineno}", ast.unparse(node.func), node


def keyword(call, name):
    return next((ast.unparse(k.value) for k in call.keywords if k.arg == name), None)


def test_nothing_that_runs_what_it_reads():
    for where, name, call in calls():
        last = name.split(".")[-1]
        if where.startswith("ddpo/own_loss.py"):  # runs the file that --method FILE.py:NAME names, and says so
            continue
        assert name not in ("eval", "exec", "compile", "__import__", "os.system", "os.popen"), where
        assert name != "torch.load" or keyword(call, "weights_only") == "True", where
        assert name != "np.load" or keyword(call, "allow_pickle") in (None, "False"), where
        assert keyword(call, "shell") in (None, "False"), where
        assert not name.startswith("yaml.") or last in ("safe_load", "safe_dump"), where
        assert last not in ("extractall", "unpack_archive", "extract", "mktemp"), where
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert UNSAFE_MODULES.isdisjoint(n.split(".")[0] for n in names), path


def test_code_of_models_runs_only_where_asked():
    """Each from_pretrained says it, and none says yes by itself."""
    found = [(where, call) for where, name, call in calls() if name.endswith("from_pretrained")]
    found = [(w, c) for w, c in found if not ast.unparse(c.func).startswith("PeftModel")]  # it runs none
    assert found and all(keyword(call, "trust_remote_code") == "False" for _, call in found), found
    others = [keyword(call, "trust_remote_code") for _, _, call in calls()]
    assert set(others) <= {None, "False", "trust_remote_code", "cfg.trust_remote_code"}


def test_yaml_makes_no_objects(capsys, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(f"data: !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']\n")
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--config", str(path)])
    assert stopped.value.code == 2 and "is not YAML" in capsys.readouterr().err and not (tmp_path / "made").exists()


# --- names that files give other files --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "..", "", "a/b", "a/../../b", "..\\x", 7])
def test_a_name_stays_in_its_folder(name, tmp_path):
    with pytest.raises(ValueError, match="wanted the plain name of a file in that folder"):
        inside(tmp_path, name)


def test_a_link_stays_in_its_folder(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "secret").write_text("s")
    (folder / "file").write_text("f")
    (folder / "out").symlink_to(tmp_path / "secret")
    (folder / "near").symlink_to("file")
    assert inside(folder, "file") == folder / "file" and inside(folder, "near") == folder / "near"
    with pytest.raises(ValueError, match=r"is a link to .*secret; wanted a file in"):
        inside(folder, "out")


def test_manifest_and_checkpoint_name_no_other_files(make_prepared, tmp_path):
    data = make_prepared()
    path = data.folder / "manifest.json"
    manifest = read_json(path)
    elsewhere = tmp_path / "elsewhere.arrow"
    (data.folder / manifest["files"]["groups"]["path"]).rename(elsewhere)
    manifest["files"]["groups"]["path"] = "../elsewhere.arrow"
    write_json(path, manifest)
    with pytest.raises(ValueError, match="wanted the plain name of a file in that folder"):
        Prepared(data.folder)
    step = tmp_path / "step"
    step.mkdir()
    state = {"step": 1, "sha256": {"../elsewhere.arrow": "0"}}
    write_json(step / "state.json", {**state, "seal": checkpoint._seal(state)})
    assert "wanted the plain name" in checkpoint._damage(step)


# --- texts on a terminal ----------------------------------------------------------------------------------


def test_texts_steer_no_terminal(monkeypatch):
    """As text, in a table, beside a bar: no control character reaches the terminal, and brackets are brackets."""
    from rich.table import Table

    out = io.StringIO()
    monkeypatch.setattr(log.console, "_file", out)
    table = Table("a")
    table.add_row(HOSTILE)
    log.console.print(HOSTILE)
    log.console.print(table)
    list(log.track([1], HOSTILE, 1))
    shown = out.getvalue()
    shown.encode()
    assert not set("\x1b\x07\x9b\u202e") & set(shown)
    for text in ("\\x1b]0;owned\\x07", "[red]not red[/red]", ":smile:", "\\u202egnirts", "\\x9b31m", "\\ud800"):
        assert text in shown.replace("\n", ""), text
    assert log.visible("two\nlines\tand é, 中, 🙂") == "two\nlines\tand é, 中, 🙂"


def test_hostile_file_through_a_command(tmp_path, model_folder, capsys):
    """Its texts and its name are shown by `prepare --dry-run` and in the error of a bad line."""
    text = HOSTILE.replace("\ud800", "")
    source = tmp_path / "a\x1b[31m[red]b.jsonl"
    write_groups(source, [(text, [(text, 1), ("b", 2)]), *STORIES])
    options = ("--out", str(tmp_path / "out"), "--model", model_folder, "--measures", "style", "--dry-run")
    main(["prepare", str(source), *options])
    out = capsys.readouterr().out
    assert "a\\x1b[31m[red]b.jsonl" in out and not set("\x1b\x07\x9b\u202e") & set(out)
    source.write_text('{"prompt": "p", "responses": 1}\n')
    with pytest.raises(SystemExit):
        main(["prepare", str(source), *options])
    err = capsys.readouterr().err
    assert err.startswith("error: a\\x1b[31m[red]b.jsonl:1: ") and "\x1b" not in err


def test_json_is_plain(capsys):
    """Control characters are escaped, numbers that are none are null: any reader takes it."""
    import numpy as np

    class Config:
        json = True

    log.answer(Config, {"a": HOSTILE, "b": float("nan"), "c": [np.float32(1.5), np.int64(2), ROOT], 3: np.inf})
    out = capsys.readouterr().out
    assert out.isascii() and out.count("\n") == 1 and not set("\x1b\x07") & set(out)
    assert json.loads(out) == {"a": HOSTILE, "b": None, "c": [1.5, 2, str(ROOT)], "3": None}
