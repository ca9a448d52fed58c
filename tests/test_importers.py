"""Preference rows, r/WritingPrompts rows and saved data sets become groups."""

import json
from datetime import date

import pytest

from ddpo.data.groups import Response
from ddpo.data.importers import read_groups


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.fixture
def source(tmp_path):
    """Rows -> path of a file that holds them."""

    def write(*rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def contents(groups):
    return [(g.prompt, [r.text for r in g.responses], g.pairs) for g in groups]


# --- preference rows --------------------------------------------------------------------------------------

TEXT_ROWS = [("p", "a", "b"), ("q", "a", "b"), ("p", "c", "a"), ("p", "b", "a")]
MERGED = [["a", "b", "c"], [(0, 1), (2, 0), (1, 0)]], [["a", "b"], [(0, 1)]]  # as given, the contradiction too


@pytest.mark.parametrize("format", ["auto", "preference"])
@pytest.mark.parametrize(
    ("prompts", "row"),
    [
        (["p", "q"], lambda p, c, r: {"prompt": p, "chosen": c, "rejected": r}),
        ([[user("p")], [user("q")]], lambda p, c, r: {"prompt": [user(p)], "chosen": [assistant(c)], "rejected": r}),
        (
            [[user("p")], [user("q")]],
            lambda p, c, r: {"chosen": [user(p), assistant(c)], "rejected": [user(p), assistant(r)]},
        ),
    ],
    ids=["text", "messages", "implicit prompt"],
)
def test_preference_rows_merge_by_prompt(source, format, prompts, row):
    groups, dropped = read_groups(source(*(row(*texts) for texts in TEXT_ROWS)), format)
    assert contents(groups) == [(p, *merged) for p, merged in zip(prompts, MERGED, strict=True)]
    assert all(r == Response(r.text) for g in groups for r in g.responses)  # they carry no scores
    assert [g.where for g in groups] == ["rows.jsonl:1", "rows.jsonl:2"]
    assert not dropped


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "chosen": "a"}, r"has no 'rejected'; its keys are \['chosen', 'prompt'\]"),
        ({"prompt": "p", "chosen": "a", "rejected": " "}, "'text' of 'rejected' is empty"),
        ({"prompt": "p", "chosen": None, "rejected": "b"}, "'chosen' is null"),
        ({"chosen": "a", "rejected": "b"}, "has no 'prompt', and 'chosen' and 'rejected' are not messages"),
        ({"chosen": [assistant("a")], "rejected": [assistant("b")]}, "'prompt' must be text or a list of messages"),
        (
            {"prompt": "p", "chosen": [user("q"), assistant("a")], "rejected": "b"},
            "'chosen' must be text or end with one message of the assistant",
        ),
        ({"prompt": "p", "chosen": "a", "rejected": [user("b")]}, "'rejected' must be text or end with one message"),
        ({"prompt": [assistant("p")], "chosen": "a", "rejected": "b"}, "the last message of 'prompt' must be"),
    ],
)
def test_bad_preference_row(source, row, message):
    with pytest.raises(ValueError, match=rf"^rows\.jsonl:2: {message}"):
        read_groups(source({"prompt": "p", "chosen": "a", "rejected": "b"}, row), "preference")


# --- r/WritingPrompts -------------------------------------------------------------------------------------


def post(title="[WP] A cat", text="It purrs.", comments=("One.", "Two."), scores=(3, -1)):
    return {"post_title": title, "post_text": text, "comment_texts": list(comments), "comment_scores": list(scores)}


@pytest.mark.parametrize(
    ("title", "text", "prompt"),
    [
        ("[WP] A cat", "It purrs.", "A cat\nIt purrs."),
        (" [ EU ]A [red] cat", None, "A [red] cat"),
        ("[WP][TT] A cat", "", "[TT] A cat"),
        ("A cat [WP]", "", "A cat [WP]"),
    ],
)
def test_one_leading_tag_is_dropped(source, title, text, prompt):
    [group], dropped = read_groups(source(post(title, text)))
    assert group.prompt == prompt
    assert group.responses == [Response("One.", 3.0), Response("Two.", -1.0)]
    assert group.pairs is None and not dropped


def test_comments_that_are_no_stories_are_dropped_and_counted(source):
    comments = [
        "Hi! **Welcome to the Prompt!** All top-level comments must be stories",
        "A story.",
        "Sorry, this submission has been removed.",
        "**Off-Topic Discussion**: reply here",
        " ",
        None,
    ]
    rows = (
        post(comments=comments, scores=[9, 2, 9, 9, 9, 9]),
        post(comments=[], scores=[]),
        post(title="[deleted]", text=""),
    )
    [group], dropped = read_groups(source(*rows))
    assert group.responses == [Response("A story.", 2.0)]
    assert dropped == {
        "comment is no story": 3,
        "empty comment": 2,
        "post without a story": 1,
        "post without a prompt": 1,
    }


def test_nothing_left(source):
    with pytest.raises(ValueError, match=r"rows\.jsonl: no group is left; dropped: \{'post without a story': 1\}"):
        read_groups(source(post(comments=[], scores=[])))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"comment_scores": [1]}, "2 comment_texts but 1 comment_scores"),
        ({"comment_scores": [1, True]}, "'score' of comment 1 must be a finite number or null, got True"),
        ({"comment_texts": "ab"}, "'comment_texts' and 'comment_scores' must be lists, got str and list"),
        ({"comment_texts": ["a", 2]}, "comment 1 must be text, got int"),
        ({"post_title": None}, "'post_title' and 'post_text' must be text, got None and 'It purrs.'"),
        ({"post_text": 3}, "'post_title' and 'post_text' must be text"),
    ],
)
def test_bad_post(source, changes, message):
    with pytest.raises(ValueError, match=rf"^rows\.jsonl:2: {message}"):
        read_groups(source(post(), {**post(), **changes}))


# --- telling formats, and data sets -----------------------------------------------------------------------


def test_unknown_keys_name_the_formats(source):
    got = r"rows\.jsonl:1: cannot tell the format from the keys \['answer', 'question'\]"
    wanted = "groups: prompt, responses; preference: chosen, rejected; writing_prompts: post_title, comment_texts"
    with pytest.raises(ValueError, match=f"^{got}; wanted {wanted}"):
        read_groups(source({"question": "p", "answer": "a"}))


@pytest.mark.parametrize("format", ["groups", "preference", "writing_prompts"])
def test_a_named_format_is_not_guessed(source, format):
    with pytest.raises(ValueError, match=r"^rows\.jsonl:1: has no '(prompt|chosen|post_title)'; its keys are"):
        read_groups(source({"question": "p", "answer": "a"}), format)


@pytest.fixture
def save(tmp_path, monkeypatch):
    """Rows -> folder of datasets.save_to_disk, as one data set or as splits."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def save(rows, split=None):
        data = datasets.Dataset.from_list(rows)
        (datasets.DatasetDict({split: data}) if split else data).save_to_disk(tmp_path / "saved")
        return str(tmp_path / "saved")

    datasets.disable_progress_bars()
    yield save
    datasets.enable_progress_bars()


def test_saved_data_set_of_groups(save):
    responses = [{"text": "a", "score": 1.5}, {"text": "b", "score": None}]
    [group], _ = read_groups(save([{"prompt": "p", "responses": responses, "day": date(2024, 2, 29)}]))
    assert group.responses == [Response("a", 1.5), Response("b", None)]
    assert group.extra == {"day": date(2024, 2, 29)} and group.where == "saved[0]"


@pytest.mark.parametrize("format", ["auto", "preference"])
def test_saved_splits_of_preference_rows(save, format):
    rows = [{"chosen": [user(p), assistant(c)], "rejected": [user(p), assistant(r)]} for p, c, r in TEXT_ROWS]
    folder = save(rows, "test")
    groups, _ = read_groups(folder, format, split="test")
    assert contents(groups) == [([user(p)], *merged) for p, merged in zip("pq", MERGED, strict=True)]
    with pytest.raises(ValueError, match=r"saved: has no split 'train'; it has \['test'\]"):
        read_groups(folder, format)


def test_bad_row_of_a_data_set(save):
    with pytest.raises(ValueError, match=r"^saved\[1\]: 'text' of response 0 is empty"):
        read_groups(save([{"prompt": "p", "responses": [{"text": t}]} for t in ("a", " ")]))


def test_whole_conversations_beside_the_prompt(tmp_path):
    """Rows that give the prompt and repeat it inside chosen and rejected, as UltraFeedback's do."""
    asked = {"role": "user", "content": "Why?"}
    row = {"prompt": "Why?"} | {k: [asked, {"role": "assistant", "content": k}] for k in ("chosen", "rejected")}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (group,), _ = read_groups(str(path))
    assert [r.text for r in group.responses] == ["chosen", "rejected"] and group.pairs == [(0, 1)]
    row["chosen"][0] = {"role": "user", "content": "Something else?"}
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=r"rows.jsonl:1: 'chosen' must be text or end with one message"):
        read_groups(str(path))
