"""The file contract: one prompt a line, with all its responses.

    {"prompt": str | [{"role", "content"}, ...], "responses": [{"text": str, "score": number | null}, ...]}

Other keys are kept. A response without a score counts for deviation and SFT, never in pairs.
"""

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

Prompt = str | list[dict]


@dataclass(frozen=True, slots=True)
class Response:
    text: str
    score: float | None = None
    extra: dict = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Group:
    """where: file and line, for messages. pairs: (chosen, rejected) indices where the source gave them."""

    prompt: Prompt
    responses: list[Response]
    where: str
    extra: dict = field(default_factory=dict)
    pairs: list[tuple[int, int]] | None = None


def read_jsonl(path: str | Path) -> Iterator[tuple[str, dict]]:
    """(file:line, row) of each line that is not blank. Raises ValueError for a line that is no JSON object and for
    an empty file, FileNotFoundError for none."""
    path, empty = Path(path), True
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; wanted a file of one JSON object a line")
    with path.open("rb") as lines:  # bytes: a line that is not UTF-8 gets its number too
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where, empty = f"{path.name}:{number}", False
            try:
                row = json.loads(line)
                json.dumps(row, ensure_ascii=False).encode()  # half of a surrogate pair, escaped, is no text
            except ValueError as err:
                hint = _other_format(line, path) if number == 1 else ""
                raise ValueError(f"{where}: not a line of JSON in UTF-8 ({err}){hint}") from None
            if not isinstance(row, dict):
                hint = _other_format(line, path) if number == 1 else ""
                raise ValueError(f"{where}: wanted a JSON object, got {type(row).__name__}{hint}")
            yield where, row
    if empty:
        raise ValueError(f"{path}: the file is empty; wanted one JSON object a line")


OTHER_FORMATS = {  # how a file begins -> what it is, and the way out
    b"\x1f\x8b": "is compressed; unpack it: gunzip {path}",
    b"(\xb5/\xfd": "is compressed; unpack it: unzstd {path}",
    b"PK\x03\x04": "is a zip archive; unpack it: unzip {path}",
    b"PAR1": "is Parquet; wanted JSON lines: datasets.Dataset.from_parquet('{path}').to_json('groups.jsonl')",
    b"\xff\xfe": "is UTF-16; save it as UTF-8: iconv -f UTF-16 -t UTF-8 {path}",
    b"\xfe\xff": "is UTF-16; save it as UTF-8: iconv -f UTF-16 -t UTF-8 {path}",
    b"[": "is one JSON list; wanted an object a line: jq -c '.[]' {path}",
    b"{": "is an object over several lines; wanted an object a line: jq -c . {path}",
}


def _other_format(line: bytes, path: Path) -> str:
    """What the file seems to be instead, by its first line, and the way out."""
    found = next((text for start, text in OTHER_FORMATS.items() if line.startswith(start)), None)
    if found is None and any(mark in line for mark in b",;\t"):
        found = "looks like CSV; wanted JSON lines: datasets.Dataset.from_csv('{path}').to_json('groups.jsonl')"
    return f"; it {found.format(path=path)}" if found else ""


def write_jsonl(path: Path, rows: Iterable[dict], append: bool = False) -> None:
    with path.open("a" if append else "w", encoding="utf-8") as out:
        out.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)


def check_prompt(prompt, where: str) -> Prompt:
    """A prompt is text or chat messages, the last of them the user's. Raises ValueError."""
    if isinstance(prompt, str):
        if prompt.strip():
            return prompt
        raise ValueError(f"{where}: 'prompt' is empty")
    if not isinstance(prompt, list) or not prompt:
        raise ValueError(f"{where}: 'prompt' must be text or a list of messages, got {json.dumps(prompt)[:60]}")
    for i, message in enumerate(prompt):
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise ValueError(f"{where}: message {i} of 'prompt' must have 'role' and 'content' as text")
    if prompt[-1]["role"] != "user":
        raise ValueError(f"{where}: the last message of 'prompt' must be the user's, got {prompt[-1]['role']!r}")
    if not prompt[-1]["content"].strip():
        raise ValueError(f"{where}: the last message of 'prompt' is empty")
    return prompt


def check_text(text, where: str, name: str) -> str:
    if text is None:
        raise ValueError(f"{where}: {name} has no 'text'")
    if not isinstance(text, str):
        raise ValueError(f"{where}: 'text' of {name} must be text, got {type(text).__name__}")
    if not text.strip():
        raise ValueError(f"{where}: 'text' of {name} is empty")
    return text


def check_score(score, where: str, name: str) -> float | None:
    if score is None:
        return None
    if isinstance(score, bool) or not isinstance(score, int | float) or not abs(score) <= sys.float_info.max:
        raise ValueError(f"{where}: 'score' of {name} must be a finite number or null, got {score!r}")
    return float(score)


def parse_group(row: dict, where: str) -> Group:
    """A row of the contract as a Group. Raises ValueError with where, which key, wanted and got."""
    if "prompt" not in row:
        raise ValueError(f"{where}: has no 'prompt'; its keys are {sorted(row)}")
    prompt = check_prompt(row["prompt"], where)
    listed = row.get("responses")
    if not isinstance(listed, list) or not listed:
        got = "an empty list" if listed == [] else type(listed).__name__
        raise ValueError(f"{where}: 'responses' must be a list of at least one response, got {got}")
    responses = []
    for i, response in enumerate(listed):
        name = f"response {i}"
        if not isinstance(response, dict):
            raise ValueError(f"{where}: {name} must be an object with 'text', got {type(response).__name__}")
        text = check_text(response.get("text"), where, name)
        score = check_score(response.get("score"), where, name)
        responses.append(Response(text, score, {k: v for k, v in response.items() if k not in ("text", "score")}))
    return Group(prompt, responses, where, {k: v for k, v in row.items() if k not in ("prompt", "responses")})


def read_prompts(path: str | Path) -> list[Prompt]:
    """The prompts of a groups file; responses are not needed."""
    prompts = []
    for where, row in read_jsonl(path):
        if "prompt" not in row:
            raise ValueError(f"{where}: has no 'prompt'; its keys are {sorted(row)}")
        prompts.append(check_prompt(row["prompt"], where))
    return prompts


def read_groups_file(path: str | Path) -> list[Group]:
    """The groups of a file in the contract."""
    return [parse_group(row, where) for where, row in read_jsonl(path)]


def labels(paths: Sequence[str]) -> list[str]:
    """A name for each file: its own without ending, the whole path where two are alike, numbered where that is too."""
    stems = [Path(p).stem for p in paths]
    names = [stem if stems.count(stem) == 1 else str(p) for stem, p in zip(stems, paths, strict=True)]
    return [f"{n} ({names[:i].count(n) + 1})" if names.count(n) > 1 else n for i, n in enumerate(names)]


def check_same_prompts(a: list[Group], b: list[Group], files: str) -> None:
    """Raises ValueError where two files hold other prompts, or in another order."""
    for x, y in zip(a, b, strict=False):
        if x.prompt != y.prompt:
            raise ValueError(
                f"{files} hold other prompts or another order: {x.where} has {str(x.prompt)[:60]!r}, {y.where} has "
                f"{str(y.prompt)[:60]!r}; wanted the same prompts in the same order"
            )
    if len(a) != len(b):
        raise ValueError(
            f"{files} hold other prompts: {len(a)} and {len(b)} of them; wanted the same in the same order"
        )


def prompt_key(prompt: Prompt) -> str:
    """The same for equal prompts."""
    return json.dumps(prompt, sort_keys=True)


def held_out(num_groups: int, share: float, seed: int, least: int = 0) -> set[int]:
    """The groups to hold out, at least so many, never all; seeded."""
    num = min(max(least, round(num_groups * share)), num_groups - 1)
    return set(np.random.default_rng([seed, 1]).permutation(num_groups)[:num].tolist())


def group_row(group: Group) -> dict:
    """The group as a row of the contract."""
    responses = [{"text": r.text, "score": r.score, **r.extra} for r in group.responses]
    return {"prompt": group.prompt, "responses": responses, **group.extra}
