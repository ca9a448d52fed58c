"""Sources of groups: a JSONL file, a saved data set or one by name, in any of three row formats.

groups           the file contract of ddpo.data.groups
preference       TRL's rows prompt, chosen, rejected (text or messages); their pairs are taken as given
writing_prompts  r/WritingPrompts posts: post_title, post_text, comment_texts[], comment_scores[]
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ddpo.data.groups import (
    Group,
    Prompt,
    Response,
    check_prompt,
    check_score,
    check_text,
    parse_group,
    prompt_key,
    read_jsonl,
)
from ddpo.files import hash_of_all
from ddpo.mishaps import named

KEYS = {  # format -> the keys that tell it
    "groups": ("prompt", "responses"),
    "preference": ("chosen", "rejected"),
    "writing_prompts": ("post_title", "comment_texts", "comment_scores"),
}
FILES = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".gz", ".zst", ".zip")  # no data set's name ends so
NOT_STORIES = ("**Welcome to the Prompt!**", "this submission has been removed", "**Off-Topic Discussion**")


def read_groups(source: str, format: str = "auto", split: str = "train") -> tuple[list[Group], Counter]:
    """All groups of a source, and what was dropped, by reason. See each_group.

    format: 'auto' (told by the first row's keys) or a key of KEYS.
    Raises: ValueError for rows that break the format, with file and line, and where no group is left.
    """
    dropped: Counter = Counter()
    format = tell_format(source, split) if format == "auto" else format
    groups = list(each_group(source, format, split, dropped))
    if not groups:
        raise ValueError(f"{source}: no group is left; dropped: {dict(dropped) or 'nothing'}")
    return groups, dropped


def tell_format(source, split: str = "train") -> str:
    """The format of a source, by its first row's keys. Raises ValueError."""
    first = next(rows_of(source, split), None)
    if first is None:
        raise ValueError(f"{source}: holds no row")
    where, row = first
    for format, keys in KEYS.items():
        if all(key in row for key in keys):
            return format
    wanted = "; ".join(f"{format}: {', '.join(keys)}" for format, keys in KEYS.items())
    raise ValueError(f"{where}: cannot tell the format from the keys {sorted(row)}; wanted {wanted}")


def each_group(source, format: str, split: str, dropped: Counter) -> Iterator[Group]:
    """A source's groups, one at a time; preference rows, of which those of one prompt make one group, are all read
    first.

    Args:
        source: a .jsonl file, a folder of datasets.save_to_disk, a data set's name, or a datasets.Dataset.
        format: a key of KEYS.
        split: of a named data set.
        dropped: takes up what is dropped, by reason.
    Raises: ValueError for rows that break the format, with file and line.
    """
    rows = rows_of(source, split)
    if format == "preference":
        yield from _merge_preferences(rows)
    elif format == "groups":
        yield from (parse_group(row, where) for where, row in rows)
    else:
        found = (_writing_prompt(row, where, dropped) for where, row in rows)
        yield from (group for group in found if group)


def rows_of(source, split: str) -> Iterator[tuple[str, dict]]:
    """(where, row) of each row of a source."""
    if not isinstance(source, str | Path):  # a datasets.Dataset
        yield from ((f"row {i}", row) for i, row in enumerate(source))
        return
    path = Path(source)
    if path.is_file():
        yield from read_jsonl(path)
        return
    check_source(path)
    import datasets

    if path.is_dir():
        with named("data set", str(source)):
            data = datasets.load_from_disk(source)
        if isinstance(data, datasets.DatasetDict):
            if split not in data:
                raise ValueError(f"{source}: has no split {split!r}; it has {sorted(data)}")
            data = data[split]
    else:
        with named("data set", str(source)):
            data = datasets.load_dataset(source, split=split, streaming=True)
    for i, row in enumerate(data):
        yield f"{path.name}[{i}]", row


def check_source(path: Path) -> None:
    """Raises FileNotFoundError for what looks like a path and is not there, ValueError for a prepared folder."""
    looks_like_one = path.suffix in FILES or path.is_absolute() or len(path.parts) > 2
    if looks_like_one and not path.is_dir():
        raise FileNotFoundError(f"{path}: there is no such file or folder; check the path")
    if (path / "manifest.json").is_file():
        raise ValueError(
            f"{path}: is a prepared folder; wanted what one is made of, a .jsonl file or a data set (`ddpo train` and "
            "`ddpo weigh` take prepared folders)"
        )


def identity(source: str, split: str) -> str:
    """What changes when a source's content does: the hash of its files; of a named data set its repository's commit."""
    path = Path(source)
    if path.exists():
        return hash_of_all(path) if path.is_file() else f"{split} {hash_of_all(path)}"
    check_source(path)
    import datasets

    with named("data set", source):
        builder = datasets.load_dataset_builder(source)
    files = (builder.config.data_files or {}).get(split)
    return f"{source} {split} {files.origin_metadata if files else builder.hash}"


def windows(items: Iterable, size: Callable, most: int) -> Iterator[list]:
    """The items in lists, each closed by the item that brings its total size to `most`."""
    window, total = [], 0
    for item in items:
        window.append(item)
        total += size(item)
        if total >= most:
            yield window
            window, total = [], 0
    if window:
        yield window


# --- preference rows --------------------------------------------------------------------------------------


def _merge_preferences(rows: Iterator[tuple[str, dict]]) -> list[Group]:
    """Rows of one prompt become one group; the same text under the same prompt is the same response."""
    merged: dict[str, tuple] = {}  # prompt -> prompt, where, {text: index}, pairs
    for where, row in rows:
        prompt, chosen, rejected = preference_of(row, where)
        key = prompt_key(prompt)
        _, _, index, pairs = merged.setdefault(key, (prompt, where, {}, []))
        pairs.append(tuple(index.setdefault(text, len(index)) for text in (chosen, rejected)))
    return [
        Group(prompt, [Response(text) for text in index], where, pairs=pairs)
        for prompt, where, index, pairs in merged.values()
    ]


def preference_of(row: dict, where: str) -> tuple[Prompt, str, str]:
    """Prompt, chosen and rejected text of a preference row. Raises ValueError."""
    for key in KEYS["preference"]:
        if key not in row:
            raise ValueError(f"{where}: has no {key!r}; its keys are {sorted(row)}")
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    if prompt is None:  # implicit prompt: the messages that both share
        if not isinstance(chosen, list) or not isinstance(rejected, list):
            raise ValueError(f"{where}: has no 'prompt', and 'chosen' and 'rejected' are not messages that hold it")
        shared = 0
        while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
            shared += 1
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    prompt = check_prompt(prompt, where)
    return prompt, *(
        _completion(row, prompt, where, name) for name, row in (("chosen", chosen), ("rejected", rejected))
    )


def _completion(value, prompt, where, name):
    """The response's text: given as text, as the assistant's message, or at the end of the whole conversation."""
    if value is None:
        raise ValueError(f"{where}: {name!r} is null")
    if isinstance(value, list):
        *before, last = value or [None]
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if not isinstance(last, dict) or last.get("role") != "assistant" or before not in ([], asked):
            raise ValueError(
                f"{where}: {name!r} must be text or end with one message of the assistant after the prompt"
            )
        value = last.get("content")
    return check_text(value, where, repr(name))


# --- r/WritingPrompts -------------------------------------------------------------------------------------


def _writing_prompt(row: dict, where: str, dropped: Counter) -> Group | None:
    for key in KEYS["writing_prompts"]:
        if key not in row:
            raise ValueError(f"{where}: has no {key!r}; its keys are {sorted(row)}")
    title, body = row["post_title"], row.get("post_text")
    texts, scores = row["comment_texts"], row["comment_scores"]
    if not isinstance(title, str) or not isinstance(body, str | None):
        raise ValueError(f"{where}: 'post_title' and 'post_text' must be text, got {title!r:.40} and {body!r:.40}")
    if not isinstance(texts, list) or not isinstance(scores, list):
        got = f"{type(texts).__name__} and {type(scores).__name__}"
        raise ValueError(f"{where}: 'comment_texts' and 'comment_scores' must be lists, got {got}")
    if len(texts) != len(scores):
        raise ValueError(f"{where}: {len(texts)} comment_texts but {len(scores)} comment_scores")
    title = re.sub(r"^\s*\[[^\]]*\]\s*", "", title)
    prompt = f"{title}\n{body or ''}".strip()
    if not prompt:  # a title that was its tag alone, as in [deleted by user]
        dropped["post without a prompt"] += 1
        return None
    responses = []
    for i, (text, score) in enumerate(zip(texts, scores, strict=True)):
        if not isinstance(text, str | None):
            raise ValueError(f"{where}: comment {i} must be text, got {type(text).__name__}")
        if not text or not text.strip():
            dropped["empty comment"] += 1
        elif any(mark in text for mark in NOT_STORIES):
            dropped["comment is no story"] += 1
        else:
            responses.append(Response(text, check_score(score, where, f"comment {i}")))
    if not responses:
        dropped["post without a story"] += 1
        return None
    return Group(prompt, responses, where)
