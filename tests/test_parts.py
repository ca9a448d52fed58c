"""`ddpo prepare` in parts: the same folder however it is cut; taken up after a kill; finished ones left alone."""

import shutil
from collections import Counter

import numpy as np
import pytest
from conftest import STORIES, write_groups

from ddpo.config import PrepareConfig, WeighConfig
from ddpo.data.importers import identity, windows
from ddpo.data.parts import Parts
from ddpo.data.prepared import Prepared
from ddpo.data.tokens import ChatTokens
from ddpo.files import sha256
from ddpo.prepare import prepare
from ddpo.weigh import weigh

GROUPS = [*STORIES, ("Alone", [("one", 1)]), ("Long", [("x" * 300, 2), ("short", 1)]), ("All long", [("y" * 300, 2)])]
CUT = {"max_length": 200, "holdout": 0.3, "pairs": "gap", "max_responses": 3}


def content(data):
    """All that a folder holds, by name."""
    tables = {"groups": data.groups, "responses": data.responses, "deviation": data.deviation}
    columns = {f"{t} {c}": table[c].to_pylist() for t, table in tables.items() for c in table.column_names}
    pairs = {"pairs": data.pairs.tolist(), "pair_group": data.pair_group.tolist(), "weight": data.weight.tolist()}
    rows = [data.response_ids(r).tolist() for r in range(len(data.responses))]
    return {**columns, **pairs, "rows": rows, "lengths": data.num_tokens.tolist()}


@pytest.fixture
def tokenised(monkeypatch):
    """The places of the groups that are tokenised; one that is in `killed` raises instead."""
    places, group_ids = [], ChatTokens.group_ids

    def counted(self, prompt, texts, where):
        if where in places.killed:
            raise KeyboardInterrupt
        places.append(where)
        return group_ids(self, prompt, texts, where)

    class Places(list):
        killed: tuple = ()

    places = Places()
    monkeypatch.setattr(ChatTokens, "group_ids", counted)
    return places


def parts_of(size, monkeypatch):
    monkeypatch.setattr("ddpo.data.parts.PART", size)


# --- cut and put together ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 5, 9])
def test_any_cut_gives_the_same_folder(make_prepared, monkeypatch, size):
    """A record batch a part, responses dropped and held out, groups cut; reading, weighing and the summary agree."""
    whole = make_prepared(GROUPS, **CUT)
    one, before, heldout = content(whole), whole.manifest["summary"], sha256(whole.folder / "heldout.jsonl")
    parts_of(size, monkeypatch)
    monkeypatch.setattr("ddpo.weigh.WINDOW", size)
    cut = make_prepared(GROUPS, **CUT, overwrite=True)
    assert cut.responses["ids"].num_chunks > 1
    assert content(cut) == one and cut.manifest["summary"] == before
    assert sha256(cut.folder / "heldout.jsonl") == heldout
    weigh(WeighConfig(source=str(cut.folder), measures=("style",), normalise_over="pairs", min_deviation=0.2))
    again = content(Prepared(cut.folder))
    wanted = make_prepared(GROUPS, **CUT, overwrite=True, normalise_over="pairs", min_deviation=0.2)
    np.testing.assert_equal(again, content(wanted))


def test_weighing_in_windows_is_weighing_at_once(make_prepared, monkeypatch):
    data = make_prepared(STORIES)
    weigh(WeighConfig(source=str(data.folder), measures=("style",), metric="euclidean", normalise_over="pairs"))
    once = content(Prepared(data.folder))
    monkeypatch.setattr("ddpo.weigh.WINDOW", 5)
    weigh(WeighConfig(source=str(data.folder), measures=("style",), metric="euclidean", normalise_over="pairs"))
    np.testing.assert_equal(content(Prepared(data.folder)), once)


def test_a_window_is_closed_by_the_item_that_fills_it():
    assert list(windows([3, 1, 5, 1, 1], lambda n: n, 4)) == [[3, 1], [5], [1, 1]]
    assert list(windows([], lambda n: n, 4)) == []


# --- after a kill -----------------------------------------------------------------------------------------


def test_a_killed_prepare_is_taken_up(make_prepared, monkeypatch, tokenised, tmp_path, capsys):
    straight = content(make_prepared(GROUPS, **CUT))
    shutil.rmtree(tmp_path / "out")
    parts_of(5, monkeypatch)
    tokenised.clear()
    tokenised.killed = ("source.jsonl:4",)
    with pytest.raises(KeyboardInterrupt):
        make_prepared(GROUPS, **CUT)
    assert tokenised == [f"source.jsonl:{i}" for i in (1, 2, 3)]
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.parts" / "00000").is_dir()
    (tmp_path / ".out.parts" / ".00001.77").mkdir()  # half of a part: the kill fell into its writing
    tokenised.clear()
    tokenised.killed = ()
    data = make_prepared(GROUPS, **CUT)
    assert tokenised == [f"source.jsonl:{i}" for i in (3, 4, 5, 6, 7)]  # of the second part, which was not sealed
    assert "parts tokenised already: 1, of about 5 responses" in capsys.readouterr().out
    assert content(data) == straight
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source.jsonl"]


def test_a_kill_while_the_folder_is_put_together(make_prepared, monkeypatch, tokenised, tmp_path):
    """Other pairs and weights take the same parts; the draft that lies there is made anew."""
    parts_of(5, monkeypatch)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("ddpo.data.prepared.Writer.finish", killed)
        make_prepared(GROUPS, **CUT)
    assert (tmp_path / ".out.parts" / "folder" / "heldout.jsonl").is_file() and not (tmp_path / "out").exists()
    tokenised.clear()
    taken_up = content(make_prepared(GROUPS, **{**CUT, "seed": 3, "pairs": "all"}))
    assert not tokenised
    assert taken_up == content(make_prepared(GROUPS, **{**CUT, "seed": 3, "pairs": "all"}, overwrite=True))


@pytest.mark.parametrize("changed", ["setting", "source"])
def test_parts_of_other_tokens_are_made_anew(make_prepared, tokenised, monkeypatch, tmp_path, changed):
    parts_of(1, monkeypatch)
    tokenised.killed = ("source.jsonl:3",)
    with pytest.raises(KeyboardInterrupt):
        make_prepared(STORIES)
    tokenised.clear()
    tokenised.killed = ()
    if changed == "setting":
        data = make_prepared(STORIES, max_length=100)
    else:
        data = make_prepared([*STORIES[1:], ("Another", [("a", 1), ("b", 2)])])
    assert len(tokenised) == len(data.groups) == 4


def test_parts_are_whole(make_prepared, monkeypatch, tokenised, tmp_path):
    """What lies in the hidden folder: counts of what was dropped, by part; all of it is in the summary."""
    parts_of(5, monkeypatch)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("ddpo.prepare.assemble", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        make_prepared(GROUPS, **CUT)
    parts = Parts(tmp_path / ".out.parts")
    dropped = {"response longer than 200 tokens with its prompt": 2, "prompt left without a response": 1}
    assert parts.num_groups == 6 and parts.dropped == Counter(dropped)
    assert [part.num_groups for part in parts] == [2, 2, 2]
    assert make_prepared(GROUPS, **CUT).manifest["summary"]["dropped"].items() >= dropped.items()


# --- a folder that is there -------------------------------------------------------------------------------


def test_resume_of_a_finished_folder(make_prepared, tokenised, capsys):
    data = make_prepared(STORIES)
    before = {p.name: (sha256(p), p.stat().st_mtime_ns) for p in data.folder.iterdir()}
    tokenised.clear()
    (data.folder.parent / ".out.parts").mkdir()  # killed before it could delete them
    make_prepared(STORIES, resume=True)
    assert not (data.folder.parent / ".out.parts").exists()
    assert "was made of the same data by the same settings; nothing to do" in capsys.readouterr().out and not tokenised
    with pytest.raises(ValueError, match=r"made otherwise: gap was 1.0 and is 2.0 now; max_length was 2048 and is 9"):
        make_prepared(STORIES, resume=True, gap=2.0, max_length=90)
    with pytest.raises(ValueError, match="made otherwise: the source holds other data; give another name or --overw"):
        make_prepared(STORIES[1:], resume=True)
    assert {p.name: (sha256(p), p.stat().st_mtime_ns) for p in data.folder.iterdir()} == before
    assert len(make_prepared(STORIES[1:], resume=True, overwrite=True).groups) == 3


def test_resume_begins_what_has_not_begun(make_prepared):
    assert len(make_prepared(resume=True).groups) == 4


def test_dry_run_writes_nothing_and_loads_no_encoder(model_folder, tmp_path, monkeypatch, capsys):
    def refused(*_, **__):
        raise AssertionError("an encoder was loaded")

    monkeypatch.setattr("ddpo.weighing.load_encoder", refused)
    source = write_groups(tmp_path / "rows.jsonl", GROUPS)
    prepare(PrepareConfig(source=str(source), out=str(tmp_path / "out"), model=model_folder, dry_run=True, gap=1.5))
    out = capsys.readouterr().out
    assert "gap: 1.5" in out and "first 5 groups: 17 responses stay" in out
    assert "rows.jsonl:1: prompt of 34 tokens, response of 18" in out
    assert r"assistant\n'" in out and "'The sea was calm.<|im_end|>'" in out
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]
    source.write_text('{"prompt": "Write of a sea.", "chosen": "It was calm.", "rejected": "No!"}\n')
    prepare(PrepareConfig(source=str(source), out=str(tmp_path / "out"), model=model_folder, dry_run=True))
    assert "2 responses stay; dropped: {}" in capsys.readouterr().out


# --- sources ----------------------------------------------------------------------------------------------


def test_identity_is_of_the_content(tmp_path):
    datasets = pytest.importorskip("datasets")
    a, b = (write_groups(tmp_path / name) for name in ("a.jsonl", "b.jsonl"))
    assert identity(str(a), "train") == identity(str(b), "train")
    write_groups(b, STORIES[1:])
    assert identity(str(a), "train") != identity(str(b), "train")
    datasets.disable_progress_bars()
    rows = [{"prompt": "p", "responses": [{"text": text, "score": 1.0}]} for text in "ab"]
    for name, kept in (("one", rows), ("same", rows), ("other", rows[:1])):
        datasets.Dataset.from_list(kept).save_to_disk(tmp_path / name)
    one, other = (identity(str(tmp_path / name), "train") for name in ("one", "other"))
    assert one == identity(str(tmp_path / "one"), "train") != other
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl: there is no such file"):
        identity(str(tmp_path / "nowhere.jsonl"), "train")


def test_a_data_set_by_name_is_read_as_a_stream(model_folder, tmp_path, monkeypatch, capsys):
    """A stand-in of the hub's data set: asked for as a stream, its posts become groups; what changes its identity is
    the commit of its repository."""
    datasets = pytest.importorskip("datasets")
    name, commit = "euclaise/WritingPrompts_preferences", ["1"]
    post = {"post_title": "[WP] A cat", "post_text": "It purrs."}
    posts = [
        {
            **post,
            "comment_texts": ["One.", "Two, 3!", "this submission has been removed"],
            "comment_scores": [9, 2, 7],
        },
        {**post, "comment_texts": ["four", "FIVE"], "comment_scores": [1, 30]},
    ]

    def load_dataset(source, split, streaming):
        assert (source, split, streaming) == (name, "train", True)
        return datasets.Dataset.from_list(posts).to_iterable_dataset()

    class Files:
        origin_metadata = property(lambda self: [(name, commit[0])])

    class Builder:
        config = type("Config", (), {"data_files": {"train": Files()}})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda source: Builder)
    cfg = {"source": name, "out": str(tmp_path / "out"), "model": model_folder, "measures": ("style",)}
    data = Prepared(prepare(PrepareConfig(**cfg)))
    assert data.prompt(0) == "A cat\nIt purrs." and data.texts() == ["One.", "Two, 3!", "four", "FIVE"]
    assert sorted(map(tuple, data.pairs.tolist())) == [(0, 1), (3, 2)]
    assert data.manifest["summary"]["dropped"] == {"comment is no story": 1}
    prepare(PrepareConfig(**cfg, resume=True))
    assert "nothing to do" in capsys.readouterr().out
    commit[0] = "2"
    with pytest.raises(ValueError, match="the source holds other data"):
        prepare(PrepareConfig(**cfg, resume=True))
