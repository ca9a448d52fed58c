"""Files and folders appear whole or not at all."""

import hashlib

import pytest

from ddpo.files import new_file, new_folder, read_json, sha256, write_json


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def tree(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def fill(draft, text):
    (draft / "deep").mkdir()
    (draft / "deep" / "file.txt").write_text(text)


def test_new_folder_appears_at_the_end(tmp_path):
    out = tmp_path / "parent" / "out"
    with new_folder(out) as draft:
        fill(draft, "new")
        assert not out.exists()
        assert draft.parent == out.parent  # the same file system, so that the rename is one step
    assert tree(out) == {"deep/file.txt": "new"}
    assert names(out.parent) == ["out"]


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_no_trace(tmp_path, error, older):
    out = tmp_path / "out"
    if older:
        with new_folder(out) as draft:
            fill(draft, "old")
    with pytest.raises(error), new_folder(out, overwrite=True) as draft:
        fill(draft, "new")
        raise error
    assert names(tmp_path) == (["out"] if older else [])
    assert not older or tree(out) == {"deep/file.txt": "old"}


def test_an_existing_folder_stays_without_overwrite(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(FileExistsError, match="out exists already; give another name or --overwrite"), new_folder(out):
        raise AssertionError("the block must not run")
    assert names(tmp_path) == ["out"]


def test_overwrite_replaces_the_whole_folder(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "older.txt").write_text("old")
    with new_folder(out, overwrite=True) as draft:
        fill(draft, "new")
        assert tree(out) == {"older.txt": "old"}
    assert tree(out) == {"deep/file.txt": "new"}
    assert names(tmp_path) == ["out"]


def test_a_file_is_never_replaced_by_a_folder(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(FileExistsError, match="out is a file"), new_folder(tmp_path / "out", overwrite=True):
        raise AssertionError("the block must not run")
    assert tree(tmp_path) == {"out": "mine"}


def test_new_file(tmp_path):
    path = tmp_path / "parent" / "file.txt"
    for text in ("first", "second"):
        before = path.read_text() if path.exists() else None
        with new_file(path) as draft:
            draft.write_text(text)
            assert (path.read_text() if path.exists() else None) == before
        assert path.read_text() == text
    with pytest.raises(RuntimeError), new_file(path) as draft:
        draft.write_text("half")
        raise RuntimeError
    assert tree(tmp_path) == {"parent/file.txt": "second"}


def test_json_round_trip(tmp_path):
    value = {"text": "ünï\u2028 ✓", "list": [1, 2.5, None, True], "tuple": []}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    assert "✓" in (tmp_path / "a.json").read_text(encoding="utf-8")
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"bad": {1, 2}})
    assert read_json(tmp_path / "a.json") == value and names(tmp_path) == ["a.json"]


def test_sha256(tmp_path):
    (tmp_path / "x").write_bytes(b"abc" * 100_000)
    assert sha256(tmp_path / "x") == hashlib.sha256(b"abc" * 100_000).hexdigest()
