"""Blinded sets for people, and win rates from their answers."""

import csv
import json

import numpy as np
import pytest
from conftest import STORIES, write_groups
from hypothesis import given
from hypothesis import strategies as st

from ddpo import cli
from ddpo.annotate import annotate, guarded, unguarded
from ddpo.config import AnnotateConfig, WinrateConfig
from ddpo.data.groups import read_jsonl
from ddpo.files import read_json
from ddpo.metrics import win_rate
from ddpo.winrate import winrate

ODD = ["=1+1", "@SUM(A1)", "'quoted'", 'a, "b";\n\nc\u2028d']


@pytest.fixture
def files(tmp_path):
    ours = [
        (p, [(f"ours {odd} {t}" if i else odd, s) for i, (t, s) in enumerate(r)])
        for (p, r), odd in zip(STORIES, ODD, strict=True)
    ]
    theirs = [(p, [(f"theirs {t}", s) for t, s in r]) for p, r in STORIES]
    return tuple(str(write_groups(tmp_path / f"{n}.jsonl", g)) for n, g in {"ours": ours, "theirs": theirs}.items())


@pytest.fixture
def make(files, tmp_path):
    def make(name="sets", **changes):
        folder = annotate(AnnotateConfig(responses=files, out=str(tmp_path / name), **changes))
        return rows_of(folder / "sets.csv"), read_json(folder / "key.json"), str(folder / "key.json")

    return make


def rows_of(path):
    with open(path, encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def answer(path, rows, key, how, delimiter=",", **more):
    """An annotator's file: how(label of A, label of B, row) -> answer to both questions."""
    columns = ["id", *more, *key["questions"]]
    with open(path, "w", encoding="utf-8", newline="") as file:
        out = csv.DictWriter(file, columns, delimiter=delimiter)
        out.writeheader()
        for row in rows:
            of = key["rows"][row["id"]]
            out.writerow({"id": row["id"], **more, **dict.fromkeys(key["questions"], how(of["A"], of["B"], row))})
    return str(path)


def test_sets_are_whole_and_blind(make, files):
    """Every prompt once, each side the texts that the key says, each file as often A as B; no label in the table."""
    rows, key, _ = make()
    groups = {n: [row for _, row in read_jsonl(path)] for n, path in zip(("ours", "theirs"), files, strict=True)}
    assert [row["id"] for row in rows] == list(key["rows"]) and len(rows) == 4
    assert sorted(of["prompt"] for of in key["rows"].values()) == [0, 1, 2, 3]
    assert sorted(of["A"] for of in key["rows"].values()) == ["ours", "ours", "theirs", "theirs"]
    for row in rows:
        of = key["rows"][row["id"]]
        for side in "AB":
            group = groups[of[side]][of["prompt"]]
            assert unguarded(row["prompt"]) == group["prompt"]
            texts = [unguarded(row[f"{side} {i + 1}"]) for i in range(4)]
            assert texts == [group["responses"][i]["text"] for i in of["responses"][side]]
        assert not any(cell.startswith(tuple("=+-@")) for cell in row.values())
        assert row["more_diverse"] == row["better_quality"] == ""
    words = {word for row in rows for word in (*row, row["id"])}
    assert not any(label in word for label in ("ours", "theirs") for word in words)


def test_draws(make):
    """The seed's; other seeds have other orders and ids; a share of prompts and responses."""
    rows, key, _ = make()
    assert make("again")[0] == rows
    other = make("other", seed=1)
    assert not set(other[1]["rows"]) & set(key["rows"])
    assert len({tuple(of["prompt"] for of in make(f"{s}", seed=s)[1]["rows"].values()) for s in range(6)}) > 1
    few, _, _ = make("few", num_prompts=2, num_responses=2, questions=("funnier",))
    assert len(few) == 2 and list(few[0]) == ["id", "prompt", "A 1", "A 2", "B 1", "B 2", "funnier"]
    with pytest.raises(FileExistsError, match="--overwrite"):
        make("few")
    assert len(make("few", overwrite=True)[0]) == 4


def test_too_little_for_the_sets(make, files, tmp_path):
    with pytest.raises(ValueError, match=r"ours.jsonl:1: has 4 responses, a set wants 5; give --num-responses 4"):
        make(num_responses=5)
    with pytest.raises(ValueError, match="num_prompts is 9, the files hold 4"):
        make(num_prompts=9)
    with pytest.raises(ValueError, match="wanted two files"):
        annotate(AnnotateConfig(responses=files[:1], out="o"))
    with pytest.raises(ValueError, match=r"none of annotator, id, prompt, got \['id'\]"):
        make(questions=("id",))
    assert not list(tmp_path.glob("sets*"))


@given(st.text())
def test_cells_give_the_text_back(text):
    assert unguarded(guarded(text)) == text
    assert not guarded(text).startswith(("=", "+", "-", "@", "\t", "\r"))


def test_win_rates_of_one_annotator(make, tmp_path, capsys):
    """Our sets win where the prompt is not the door's, which is a tie; the sides are unblinded by the key."""
    rows, key, path = make()

    def how(a, b, row):
        return "TIE" if "door" in row["prompt"] else " a" if a == "ours" else "b"

    answers = answer(tmp_path / "anna.csv", rows, key, how)
    found = winrate(WinrateConfig(answers=(answers,), key=path, out=str(tmp_path / "wins.json")))
    assert read_json(tmp_path / "wins.json") == json.loads(json.dumps(found))
    for question in key["questions"]:
        of = found["questions"][question]
        assert (of["wins"], of["ties"], of["num_answers"], of["unanswered"]) == ({"ours": 3, "theirs": 0}, 1, 4, 0)
        expected = win_rate(np.array([1, 1, 1]), np.zeros(3))
        assert (of["win_rate"]["mean"], of["win_rate"]["low"]) == (1, expected.low) and of["agreement"] is None
    shown = capsys.readouterr().out
    assert "75%" in shown and "25%" in shown and "100%" in shown
    cli.main(["winrate", answers, "--key", path, "--json"])
    assert json.loads(capsys.readouterr().out)["questions"] == json.loads(json.dumps(found["questions"]))


def test_several_annotators(make, tmp_path):
    """Files of one name in two folders, or one file with a column; semicolons; agreement; empty cells."""
    rows, key, path = make()
    (tmp_path / "ben").mkdir()
    anna = answer(tmp_path / "a.csv", rows, key, lambda a, b, row: "A" if a == "ours" else "B")
    ben = answer(tmp_path / "ben" / "a.csv", rows, key, lambda a, b, row: "" if "sea" in row["prompt"] else "tie", ";")
    found = winrate(WinrateConfig(answers=(anna, ben), key=path))["questions"]["more_diverse"]
    assert (found["num_answers"], found["unanswered"], found["ties"], found["agreement"]) == (7, 1, 3, 0)
    always_a = answer(tmp_path / "c.csv", rows, key, lambda a, b, row: "A", annotator="carl")
    again = answer(tmp_path / "d.csv", rows, key, lambda a, b, row: "A", annotator="dora")
    found = winrate(WinrateConfig(answers=(always_a, again), key=path))["questions"]["more_diverse"]
    assert found["win_rate"]["mean"] == 0.5 and found["share_a"] == found["agreement"] == 1
    assert found["win_rate"]["p"] == 1 and found["win_rate"]["low"] < 0.5 < found["win_rate"]["high"]
    silent = answer(tmp_path / "e.csv", rows, key, lambda a, b, row: "")
    found = winrate(WinrateConfig(answers=(silent,), key=path))["questions"]["more_diverse"]
    assert found["win_rate"] is None and found["unanswered"] == 4


def test_wrong_answers(make, tmp_path):
    rows, _, path = make()

    def error(text, match, encoding="utf-8", key=path):
        (tmp_path / "x.csv").write_bytes(text.encode(encoding))
        with pytest.raises(ValueError, match=match):
            winrate(WinrateConfig(answers=(str(tmp_path / "x.csv"),), key=key))

    head, name = "id,more_diverse,better_quality\n", rows[0]["id"]
    error(f"{head}{name},A,C\n", "x.csv: row 2: better_quality must be A, B, tie or empty, got 'C'")
    error(f"{head}\n{name[:-1]},A,B\n", f"x.csv: row 3: the key knows no id '{name[:-1]}'")
    error(f"{head}{name},A,B\n{name},A,B\n", rf"row 3: .*x.csv answers {name} twice")
    error("id,more_diverse\n", "wanted one column 'better_quality', its columns are id, more_diverse")
    error(f"{head}{name},A\n", "row 2: has 2 cells, the first row 3")
    error("", "wanted one column 'id', its columns are none")
    error(f"{head}é", "is not UTF-8", encoding="latin-1")
    (tmp_path / "key.json").write_text("{}")
    error(head, "wanted the key.json of `ddpo annotate`", key=str(tmp_path / "key.json"))
