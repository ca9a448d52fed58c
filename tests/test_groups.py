"""The file contract: what is read, and what each bad line is told."""

import json

import pytest

from ddpo.data.groups import group_row, parse_group, read_jsonl, read_prompts, write_jsonl
from ddpo.data.importers import read_groups

GOOD = {"prompt": "Hi", "responses": [{"text": "a", "score": 1}]}
USER = {"role": "user", "content": "Hi"}


def with_response(**response):
    return {"prompt": "Hi", "responses": [{"text": "fine", "score": 2.5}, response]}


BAD_LINES = {
    "not JSON": (b'{"prompt": ', r"not a line of JSON in UTF-8 \(Expecting value"),
    "not UTF-8": (b'{"prompt": "caf\xe9", "responses": []}', r"not a line of JSON in UTF-8 \('utf-8' codec"),
    "half a surrogate pair": (rb'{"prompt": "a\ud83d", "responses": []}', r"not a line of JSON in UTF-8 .*surrogates"),
    "a list": (b"[1, 2]", "wanted a JSON object, got list"),
    "null": (b"null", "wanted a JSON object, got NoneType"),
}
BAD_ROWS = {
    "no prompt": ({"responses": [], "title": 1}, r"has no 'prompt'; its keys are \['responses', 'title'\]"),
    "empty prompt": ({**GOOD, "prompt": " \n"}, "'prompt' is empty"),
    "prompt is a number": ({**GOOD, "prompt": 7}, "'prompt' must be text or a list of messages, got 7"),
    "no message": ({**GOOD, "prompt": []}, r"'prompt' must be text or a list of messages, got \[\]"),
    "message without role": ({**GOOD, "prompt": [USER, {"content": "x"}]}, "message 1 of 'prompt' must have 'role'"),
    "content is null": ({**GOOD, "prompt": [{**USER, "content": None}]}, "message 0 of 'prompt' must have 'role'"),
    "assistant last": (
        {**GOOD, "prompt": [USER, {"role": "assistant", "content": "x"}]},
        "the last message of 'prompt' must be the user's, got 'assistant'",
    ),
    "empty message": ({**GOOD, "prompt": [{**USER, "content": " "}]}, "the last message of 'prompt' is empty"),
    "no responses": ({"prompt": "Hi"}, "'responses' must be a list of at least one response, got NoneType"),
    "empty responses": ({"prompt": "Hi", "responses": []}, "'responses' must be a list .* got an empty list"),
    "responses are an object": ({"prompt": "Hi", "responses": {"text": "a"}}, "'responses' must be .* got dict"),
    "response is text": ({"prompt": "Hi", "responses": ["a"]}, "response 0 must be an object with 'text', got str"),
    "no text": (with_response(score=3), "response 1 has no 'text'"),
    "empty text": (with_response(text=""), "'text' of response 1 is empty"),
    "blank text": (with_response(text=" \t\n"), "'text' of response 1 is empty"),
    "text is a number": (with_response(text=5), "'text' of response 1 must be text, got int"),
}
BAD_SCORES = {"true": "True", '"5"': "'5'", "NaN": "nan", "-Infinity": "-inf", "1e999": "inf", "1" + "0" * 400: "1000"}
BAD_LINES |= {name: (json.dumps(row).encode(), message) for name, (row, message) in BAD_ROWS.items()}
BAD_LINES |= {
    f"score {score:.9}": (
        b'{"prompt": "Hi", "responses": [{"text": "a", "score": %s}]}' % score.encode(),
        f"'score' of response 0 must be a finite number or null, got {got}",
    )
    for score, got in BAD_SCORES.items()
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(ValueError, match=rf"^bad\.jsonl:3: {message}"):
        read_groups(str(path))


@pytest.mark.parametrize("content", ["", "\n \n"], ids=["no byte", "blank lines"])
def test_empty_file(tmp_path, content):
    path = tmp_path / "empty.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"empty\.jsonl: the file is empty; wanted one JSON object a line"):
        read_groups(str(path))


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl: there is no such file"):
        read_groups(str(tmp_path / "none.jsonl"))


def test_a_row_survives_with_its_extra_keys():
    messages = [{"role": "system", "content": ""}, USER, {"role": "assistant", "content": "x"}, USER]
    responses = [{"text": " ünï\u2028code ", "score": None, "votes": [1, 2]}, {"text": "b", "score": -2.5}]
    row = {"prompt": messages, "responses": responses, "author": {"name": "A"}}
    group = parse_group(row, "here")
    assert group_row(group) == row
    assert group.pairs is None and group.where == "here"
    assert group.responses[0].extra == {"votes": [1, 2]}


def test_scores_are_floats_or_none():
    row = {"prompt": "Hi", "responses": [{"text": "a", "score": 3}, {"text": "b"}, {"text": "c", "score": None}]}
    scores = [r.score for r in parse_group(row, "here").responses]
    assert scores == [3.0, None, None] and isinstance(scores[0], float)


def test_lines_are_counted_as_an_editor_counts_them(tmp_path):
    """A byte-order mark, CRLF and blank lines are fine; U+2028 inside a text ends no line."""
    path = tmp_path / "mixed.jsonl"
    path.write_bytes('\ufeff{"a": 1}\r\n\r\n{"a": "x\u2028y"}\r\n{"a": 3}'.encode())
    wanted = [("mixed.jsonl:1", {"a": 1}), ("mixed.jsonl:3", {"a": "x\u2028y"}), ("mixed.jsonl:4", {"a": 3})]
    assert list(read_jsonl(path)) == wanted


def test_written_lines_are_read_again(tmp_path):
    rows = [{"prompt": "ä\u2028\n"}, {"prompt": [USER], "other": 1}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert [row for _, row in read_jsonl(tmp_path / "rows.jsonl")] == rows
    assert read_prompts(tmp_path / "rows.jsonl") == ["ä\u2028\n", [USER]]


def test_prompts_without_a_prompt(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a"}, {"text": "b"}])
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: has no 'prompt'; its keys are \['text'\]"):
        read_prompts(tmp_path / "rows.jsonl")
