"""`ddpo prepare`: from a source to a prepared folder, or to an error and nothing."""

import itertools
import json

import numpy as np
import pytest
from conftest import CHATML, SHARED, STORIES, tiny_tokenizer

from ddpo import reference
from ddpo.data.groups import write_jsonl
from ddpo.data.importers import read_groups
from ddpo.encoders import style_features
from ddpo.files import sha256

PROMPT = 34  # tokens of "Write of a sea." in the tiny tokenizer's template


def group(*responses, prompt="Write of a sea."):
    return [(prompt, responses)]


def summary(data):
    return data.manifest["summary"]


def decoded(data):
    return [tiny_tokenizer().decode(data.response_ids(r)) for r in range(len(data.responses))]


def text_pairs(data):
    return sorted(tuple(data.texts(pair)) for pair in data.pairs)


def files_of(folder):
    return {p.name: sha256(p) for p in folder.rglob("*") if p.is_file()}


# --- from groups to the folder ----------------------------------------------------------------------------


def test_round_trip(make_prepared, tmp_path):
    rows = [
        {"prompt": "Ünï", "responses": [{"text": " a\u2028", "score": 2, "by": "A"}, {"text": "b"}], "year": [1]},
        {"prompt": [{"role": "user", "content": "Hi"}], "responses": [{"text": "c", "score": 1.5}]},
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    data = make_prepared(source=str(tmp_path / "rows.jsonl"))
    assert [data.prompt(g) for g in range(2)] == [row["prompt"] for row in rows]
    assert data.texts() == [" a\u2028", "b", "c"] and data.texts([2, 0]) == ["c", " a\u2028"]
    assert data.responses["score"].to_pylist() == [2.0, None, 1.5]
    assert [json.loads(x) for x in data.groups["extra"].to_pylist()] == [{"year": [1]}, {}]
    assert [json.loads(x) for x in data.responses["extra"].to_pylist()] == [{"by": "A"}, {}, {}]
    assert decoded(data) == [text + "<|im_end|>" for text in data.texts()]
    assert data.group_offsets().tolist() == [0, 2, 3] and data.response_group.tolist() == [0, 0, 1]
    user = ["<|im_start|>user\nÜnï<|im_end|>\n<|im_start|>assistant\n"] * 2
    assert [tiny_tokenizer().decode(data.prompt_ids(r)) for r in range(2)] == user
    assert data.num_tokens.tolist() == [len(data.response_ids(r)) for r in range(3)]
    assert data.num_prompt_tokens.tolist() == [len(data.prompt_ids(r)) for r in range(3)]


@pytest.mark.parametrize(
    "groups",
    [group(("a b", 1)), group(("a", 2), ("b", 2)), group(("a", None), ("b", None))],
    ids=["one response", "equal scores", "no scores"],
)
@pytest.mark.parametrize("normalise_over", ["all", "pairs"])
@pytest.mark.parametrize("rule", ["gap", "all", "divpo"])
def test_no_pairs(make_prepared, groups, normalise_over, rule, capsys):
    data = make_prepared(groups, normalise_over=normalise_over, pairs=rule)
    assert summary(data)["pairs"] == 0 and summary(data)["prompts_without_pair"] == 1
    assert summary(data)["without_score"] == sum(score is None for _, score in groups[0][1])
    assert data.pairs.shape == (0, 2) and data.weight.shape == (0,)
    assert len(data.responses) == len(groups[0][1]) and "warning: no pairs" in capsys.readouterr().out


def test_prompts_without_a_pair_are_counted_among_others(make_prepared):
    data = make_prepared([*STORIES, ("Alone", [("one", 1)]), ("Ties", [("a", 1), ("b", 1)])])
    assert summary(data)["prompts"] == 6 and summary(data)["prompts_without_pair"] == 2
    assert set(data.pair_group.tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("rule", ["gap", "all"])
def test_duplicates_are_kept_and_counted_and_never_meet(make_prepared, rule):
    for seed in range(5):
        data = make_prepared(group(("same", 1), ("same", 9), ("same", 5)), pairs=rule, seed=seed, overwrite=True)
        assert data.texts() == ["same"] * 3 and summary(data)["duplicate_texts"] == 2 and not len(data.pairs)
    data = make_prepared(group(("same", 1), ("other", 3), ("same", 9)), overwrite=True)
    assert sorted(map(tuple, data.pairs)) == [(1, 0), (2, 1)]  # by row, not by text


def test_longer_responses_are_dropped(make_prepared):
    groups = group(("a" * 9, 1), ("b" * 10, 2), ("c" * 8, 3)) + group(("x", 1), prompt="Long prompt " * 5)
    data = make_prepared(groups, max_length=PROMPT + 10)
    assert data.texts() == ["a" * 9, "c" * 8] and text_pairs(data) == [("c" * 8, "a" * 9)]
    assert summary(data)["dropped"] == {
        f"response longer than {PROMPT + 10} tokens with its prompt": 2,
        "prompt left without a response": 1,
    }


def test_longer_responses_are_cut(make_prepared):
    data = make_prepared(group(("a" * 9, 1), ("bcdefghijklm", 2)), max_length=PROMPT + 10, too_long="truncate")
    assert decoded(data) == ["a" * 9 + "<|im_end|>", "bcdefghijk"]  # the start, and no end of turn
    assert len(data.prompt_ids(0)) == PROMPT
    assert data.texts() == ["a" * 9, "bcdefghijklm"] and len(data.pairs) == 1
    assert summary(data)["dropped"] == {"response truncated (kept)": 1}


def test_spelled_out_special_tokens_are_dropped(make_prepared):
    good = group(("fine", 1), ("ends<|im_end|> early", 2), ("good", 3))
    data = make_prepared(good + group(("x", 1), ("y", 2), prompt="<|im_start|>system"))
    assert text_pairs(data) == [("good", "fine")]
    assert summary(data)["dropped"] == {"response spells a special token": 1, "prompt spells a special token": 1}


def test_preference_pairs_are_as_given(make_prepared, tmp_path):
    """Whatever the rule; the pair of a response that is dropped goes with it, and no text meets itself."""
    texts = [("a", "x" * 90), ("a", "b"), ("b", "c"), ("c", "a"), ("a", "b"), ("c", "c")]
    write_jsonl(tmp_path / "rows.jsonl", ({"prompt": "p", "chosen": c, "rejected": r} for c, r in texts))
    data = make_prepared(source=str(tmp_path / "rows.jsonl"), pairs="gap", max_length=60)
    assert data.texts() == ["a", "b", "c"]
    assert data.pairs.tolist() == [[0, 1], [1, 2], [2, 0], [0, 1]]
    assert data.responses["score"].to_pylist() == [None] * 3
    assert "pairs_meeting_gap" not in summary(data)


def test_the_gap_is_reported(make_prepared, capsys):
    data = make_prepared(pairs="gap", gap=3.0)
    scores = np.array(data.responses["score"])[data.pairs]
    assert summary(data)["gap"] == 3.0 and len(data.pairs) == 8  # four responses a group, two pairs each
    assert summary(data)["pairs_meeting_gap"] == np.mean(scores[:, 0] - scores[:, 1] >= 3)
    assert 0 < summary(data)["pairs_meeting_gap"] < 1
    make_prepared(pairs="gap", gap=50.0, overwrite=True)
    assert "no pair's scores differ by 50" in capsys.readouterr().out


def test_the_summary_tells_lengths_and_gaps(make_prepared, capsys):
    data = make_prepared(pairs="all")
    scores = np.array(data.responses["score"])[data.pairs]
    for name, values in (
        ("score_gaps", scores[:, 0] - scores[:, 1]),
        ("response_tokens", data.num_tokens),
        ("prompt_tokens", data.num_prompt_tokens[data.group_offsets()[:-1]]),
    ):
        wanted = dict(
            zip(("min", "p10", "median", "p90", "max"), np.percentile(values, [0, 10, 50, 90, 100]), strict=True)
        )
        assert summary(data)[name] == {**wanted, "mean": values.mean()}
    out = capsys.readouterr().out
    assert "score gaps: min 1, p10 1, median 2, p90 3" in out and "tokens of a response: min 4, p10 " in out
    assert summary(make_prepared(group(("a", 1), ("b", 1)), overwrite=True))["score_gaps"] is None


@pytest.mark.parametrize("rule", ["gap", "all", "divpo"])
def test_groups_are_cut(make_prepared, rule, capsys):
    """Pairs are those of the whole group, as far as they fit; deviation and weights are over what is left."""
    texts = [" ".join(["So,", "we went?", "UP!", "the hill;", "and 9"][i % 5 : i % 3 + 3]) + "." * i for i in range(9)]
    groups = group(*zip(texts, [3, 1, 4, 1, 5, 9, 2, 6, None], strict=True)) + group(("x", 1), ("y", 2), prompt="Small")
    whole = text_pairs(make_prepared(groups, pairs=rule))
    data = make_prepared(groups, pairs=rule, max_responses=4, overwrite=True)
    assert data.group_offsets().tolist() == [0, 4, 6] and set(data.texts()) <= {*texts, "x", "y"}
    assert set(text_pairs(data)) <= set(whole) and ("y", "x") in text_pairs(data)
    dropped = {"response over 4 of its prompt": 5, "pair over 4 responses of its prompt": len(whole) - len(data.pairs)}
    assert summary(data)["dropped"] == {reason: count for reason, count in dropped.items() if count}
    assert "dropped: 5 x response over 4 of its prompt" in capsys.readouterr().out
    d = reference.mean_distance(style_features(data.texts(range(4))).double())
    np.testing.assert_allclose(data.deviation["weight"][:4], reference.weights(reference.deviation([d])), rtol=1e-5)
    assert make_prepared(groups, pairs=rule, max_responses=9, overwrite=True).texts() == [*texts, "x", "y"]


def test_groups_are_cut_to_the_best_scored(make_prepared):
    groups = group(*((f"text {s}", s) for s in (3, 1, 4, 0, 5, 9, 2, 6)))
    for seed in range(3):
        options = {"pairs": "all", "max_responses": 4, "top_scores": True, "seed": seed, "overwrite": True}
        data = make_prepared(groups, **options)
        assert data.texts() == ["text 4", "text 5", "text 9", "text 6"] and len(data.pairs) == 6


def test_given_pairs_are_cut_alike(make_prepared, tmp_path):
    rows = [{"prompt": "p", "chosen": c, "rejected": r} for c, r in ("ab", "cd", "ef", "ba")]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    seen = set()
    for seed in range(16):
        data = make_prepared(source=str(tmp_path / "rows.jsonl"), max_responses=3, seed=seed, overwrite=True)
        assert len(data.texts()) == 3 and summary(data)["dropped"]["response over 3 of its prompt"] == 3
        seen.add(tuple(text_pairs(data)))
    assert seen == {(("a", "b"), ("b", "a")), (("c", "d"),), (("e", "f"),)}


def test_divpo_measures_deviation_inside_its_pools(make_prepared):
    texts = [" ".join(["So,", "we went?", "UP!", "the hill;", "and 9"][i % 5 : i % 3 + 3]) + "." * i for i in range(13)]
    groups = group(("x", 1)) + group(*zip(texts, range(13), strict=True))
    data = make_prepared(groups, pairs="divpo", metric="euclidean")
    e = style_features(texts).double()
    low, high = (reference.mean_distance(e[part], "euclidean") for part in (slice(0, 3), slice(10, 13)))
    assert set(data.pairs[:, 0]) == set((11 + high.topk(2).indices).tolist())
    assert set(data.pairs[:, 1]) == set((1 + (-low).topk(2).indices).tolist())


def test_holdout(make_prepared):
    held = set()
    for seed in range(6):
        data = make_prepared(holdout=0.3, seed=seed, overwrite=True)
        out = [g.prompt for g in read_groups(str(data.folder / "heldout.jsonl"))[0]]
        kept = [data.prompt(g) for g in range(len(data.groups))]
        assert len(out) == 1 == summary(data)["heldout_prompts"] and sorted(out + kept) == sorted(p for p, _ in STORIES)
        held.add(out[0])
    assert len(held) > 1
    [group], _ = read_groups(str(data.folder / "heldout.jsonl"))
    assert [(r.text, r.score) for r in group.responses] == dict(STORIES)[group.prompt]
    assert not (make_prepared(overwrite=True).folder / "heldout.jsonl").exists()


def test_the_same_settings_make_the_same_folder(make_prepared, tmp_path):
    a, b, c = (make_prepared(out=str(tmp_path / f"out{i}"), pairs="gap", seed=seed) for i, seed in enumerate([3, 3, 4]))
    assert a.manifest["files"] == b.manifest["files"] and a.manifest["content_hash"] == b.manifest["content_hash"]
    assert a.manifest["files"]["pairs"] != c.manifest["files"]["pairs"]
    assert a.manifest["files"]["responses"] == c.manifest["files"]["responses"]


# --- failures leave nothing behind ------------------------------------------------------------------------

BAD = {
    "bad line": ('{"prompt": "p", "responses": [{"text": ""}]}', {}, r"source\.jsonl:1: 'text' of response 0 is empty"),
    "all dropped": (None, {"max_length": 10}, r"no response is left; dropped: \{'response longer than 10 tokens"),
    "holdout": (None, {"holdout": 1.0}, r"config: holdout must lie in \[0, 1\), got 1.0"),
    "no measure": (None, {"measures": ()}, "measures must name each of semantic and style at most once"),
    "a measure twice": (None, {"measures": ("style", "style")}, "at most once, got"),
    "unknown encoder": (None, {"measures": ("semantic",), "semantic": "builtin"}, "'builtin' is a style encoder"),
    "floor": (None, {"min_deviation": 2.0}, r"min_deviation must lie in \[0, 1\], got 2.0"),
    "few responses": (None, {"max_responses": 1}, "max_responses must be at least 2, got 1"),
    "scales": (
        None,
        {"weighting": "crpo", "crpo_scales": (0.5, 0.5)},
        "a number of at least 0 for each of the 1 measures",
    ),
}


@pytest.mark.parametrize(("content", "changes", "message"), BAD.values(), ids=BAD)
def test_a_failed_prepare_leaves_nothing(make_prepared, tmp_path, content, changes, message):
    if content:
        (tmp_path / "source.jsonl").write_text(content)
        changes = {"source": str(tmp_path / "source.jsonl")}
    before = files_of(tmp_path)
    with pytest.raises(ValueError, match=message):
        make_prepared(out=str(tmp_path / "deep" / "out"), **changes)
    assert files_of(tmp_path) == before


def test_a_failure_while_writing_leaves_no_folder(make_prepared, tmp_path, monkeypatch):
    """Nothing under the folder's name; the parts stay for the next time, which leaves nothing else behind."""

    def full(path, rows, append):
        path.write_text("half")
        raise OSError("no space left")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
        patch.setattr("ddpo.prepare.write_jsonl", full)
        make_prepared(holdout=0.5)
    assert [p.name for p in tmp_path.iterdir()] == [".out.parts"]
    assert len(make_prepared(holdout=0.5).groups) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_tokenizer_without_chat_template(make_prepared, tmp_path):
    tiny_tokenizer(None).save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="has no chat template; give one with --chat-template FILE"):
        make_prepared(model=str(tmp_path / "base"))
    assert not (tmp_path / "out").exists()
    (tmp_path / "chat.jinja").write_text(CHATML)
    given = make_prepared(model=str(tmp_path / "base"), chat_template=str(tmp_path / "chat.jinja"))
    own = make_prepared(out=str(tmp_path / "own"))
    assert given.manifest["tokenizer"]["chat_template"] == CHATML  # the folder holds the template, not its path
    assert given.manifest["tokenizer"]["fingerprint"] == own.manifest["tokenizer"]["fingerprint"]
    assert given.manifest["content_hash"] == own.manifest["content_hash"]


def test_an_existing_folder(make_prepared):
    old = make_prepared()
    before = files_of(old.folder)
    with pytest.raises(FileExistsError, match="out exists already; give another name or --overwrite"):
        make_prepared(group(("a", 1), ("b", 2)))
    assert files_of(old.folder) == before
    (old.folder / "older.txt").write_text("x")
    new = make_prepared(group(("a", 1), ("b", 2)), overwrite=True)
    assert new.texts() == ["a", "b"] and not before.keys() & files_of(new.folder).keys() - {"manifest.json"}
    assert len(files_of(new.folder)) == 5  # four tables and the manifest


# --- real data --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "pairs"), [("aut_human.jsonl", True), ("hanna_llm_7way.jsonl", False)])
def test_real_data(make_prepared, name, pairs):  # HANNA scores one response of each prompt
    if not (SHARED / name).is_file():
        pytest.skip(f"no {SHARED / name}")
    groups, _ = read_groups(str(SHARED / name))
    data = make_prepared(source=str(SHARED / name), pairs="gap", gap=1.0, max_length=100_000)
    assert data.texts() == [r.text for g in groups for r in g.responses] and not summary(data)["dropped"]
    assert all(data.response_ids(r)[-1] == tiny_tokenizer().eos_token_id for r in range(0, len(data.responses), 97))
    score, text = np.array(data.responses["score"]), np.array(data.texts(), dtype=object)
    chosen, rejected = data.pairs.T
    assert (len(chosen) > len(groups)) == pairs and (score[chosen] > score[rejected]).all()
    assert (text[chosen] != text[rejected]).all() and len(np.unique(data.pairs)) == data.pairs.size
    assert (data.response_group[data.pairs] == data.pair_group[:, None]).all()
    weight = np.array(data.deviation["weight"])
    means = [weight[a:b].mean() for a, b in itertools.pairwise(data.group_offsets())]
    np.testing.assert_allclose(means, 1, rtol=1e-12)
