"""`ddpo winrate`: who wins, by people's answers to the sets of `ddpo annotate`."""

import csv
import json
from collections import Counter, defaultdict
from dataclasses import asdict
from pathlib import Path

import numpy as np
from rich.table import Table

from ddpo import log, metrics
from ddpo.annotate import unguarded
from ddpo.config import WinrateConfig
from ddpo.files import read_json, write_json

TIE = "tie"
ANSWERS = ("A", "B", TIE)
Answers = dict[str, dict[tuple[str, str], str]]  # question -> (id, annotator) -> label of the winner, or tie


def winrate(cfg: WinrateConfig) -> dict:
    """Counts answers, prints a table and returns (and writes) the numbers.

    Returns: by question: num_prompts, num_answers, unanswered; wins of each label and ties; share of each, ties in the
        denominator; win_rate of the first label (mean, low, high; p: of one half), None where all are ties; agreement
        of annotators; how often A was the answer, of those that were no tie.
    Raises: ValueError for unknown ids, columns, answers, and for an annotator who answers a row twice.
    """
    key = read_key(cfg.key)
    answers, unanswered = read_answers(cfg.answers, key)
    labels = [file["label"] for file in key["files"]]
    of = {q: {**rates(answers[q], labels, key, cfg.seed), "unanswered": unanswered[q]} for q in key["questions"]}
    result = {"settings": asdict(cfg), "files": key["files"], "questions": of}
    if cfg.json:
        print(json.dumps(result, ensure_ascii=False))
    else:
        show(result)
    if cfg.out:
        write_json(cfg.out, result)
    return result


def read_key(path: str) -> dict:
    """Raises ValueError where it is no key of `ddpo annotate`."""
    try:
        key = read_json(path)
    except ValueError as err:
        raise ValueError(f"{path}: is not JSON ({err}); wanted the key.json of `ddpo annotate`") from None
    if not isinstance(key, dict) or not {"files", "questions", "rows"} <= key.keys():
        raise ValueError(f"{path}: has not the keys files, questions and rows; wanted the key.json of `ddpo annotate`")
    return key


def read_answers(paths: tuple[str, ...], key: dict) -> tuple[Answers, Counter]:
    """Every answer as the label that won, or tie; and how many were left empty, by question.

    An annotator is a file, or what stands in its column `annotator`.
    """
    found: Answers = {question: {} for question in key["questions"]}
    unanswered, seen = Counter(), set()
    for path in paths:
        for where, row in read_rows(path, ["id", *key["questions"]]):
            name, annotator = row["id"], row.get("annotator") or Path(path).name
            if name not in key["rows"]:
                raise ValueError(f"{where}: the key knows no id {name!r}; wanted the ids of the sets that came with it")
            if (name, annotator) in seen:
                raise ValueError(f"{where}: {annotator} answers {name} twice; several annotators want a file each")
            seen.add((name, annotator))
            for question in key["questions"]:
                if row[question] == "":
                    unanswered[question] += 1
                    continue
                answer = next((a for a in ANSWERS if a.lower() == row[question].lower()), None)
                if answer is None:
                    raise ValueError(f"{where}: {question} must be A, B, tie or empty, got {row[question]!r}")
                found[question][name, annotator] = TIE if answer == TIE else key["rows"][name][answer]
    return found, unanswered


def read_rows(path: str, wanted: list[str]):
    """(where, row) of each row of a CSV file that is not empty, with stripped cells; comma, semicolon or tab between.

    Raises: ValueError with file and row.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8-sig", newline="")
    except UnicodeDecodeError as err:
        raise ValueError(f"{file.name}: is not UTF-8 ({err}); save it as 'CSV UTF-8'") from None
    header = text.split("\n", 1)[0]
    lines = csv.reader(text.splitlines(keepends=True), delimiter=max(",;\t", key=header.count))
    columns = [c.strip() for c in next(lines, [])]
    for name in wanted:
        if columns.count(name) != 1:
            raise ValueError(f"{file.name}: wanted one column {name!r}, its columns are {', '.join(columns) or 'none'}")
    for number, cells in enumerate(lines, 2):
        if any(map(str.strip, cells)):
            where = f"{file.name}: row {number}"
            if len(cells) != len(columns):
                raise ValueError(f"{where}: has {len(cells)} cells, the first row {len(columns)}")
            yield where, {c: unguarded(cell.strip()) for c, cell in zip(columns, cells, strict=True)}


def rates(answers: dict[tuple[str, str], str], labels: list[str], key: dict, seed: int) -> dict:
    """The numbers of one question; see winrate."""
    of_row = defaultdict(Counter)  # id -> winner -> answers
    for (name, _), winner in answers.items():
        of_row[name][winner] += 1
    total = sum(of_row.values(), Counter())
    wins, losses = (np.array([count[label] for count in of_row.values()]) for label in labels)  # (R,)
    decided = int(sum(wins) + sum(losses))
    as_a = sum(winner == key["rows"][name]["A"] for (name, _), winner in answers.items())
    pairs = [
        (sum(c * (c - 1) for c in count.values()), n * (n - 1)) for count in of_row.values() if (n := count.total())
    ]
    agreeing, compared = (sum(column) for column in zip(*pairs, strict=True)) if pairs else (0, 0)
    return {
        "num_prompts": len(of_row),
        "num_answers": len(answers),
        "wins": {label: total[label] for label in labels},
        "ties": total[TIE],
        "share": {label: total[label] / len(answers) for label in (*labels, TIE)} if answers else None,
        "win_rate": asdict(metrics.win_rate(wins, losses, seed)) if decided else None,
        "agreement": agreeing / compared if compared else None,
        "share_a": as_a / decided if decided else None,
    }


def table(result: dict) -> Table:
    """A row a question."""
    first, second = (file["label"] for file in result["files"])
    table = Table(title="people's answers")
    for column in (
        "question",
        "prompts",
        "answers",
        first,
        second,
        "tie",
        f"win rate of {first} [95 %]",
        "p of one half",
    ):
        table.add_column(column, justify="left" if column == "question" else "right", overflow="fold")
    for question, found in result["questions"].items():
        share, rate = found["share"], found["win_rate"]
        shares = [f"{share[name]:.0%}" for name in (first, second, TIE)] if share else ["-"] * 3
        cells = (
            [f"{rate['mean']:.0%} [{rate['low']:.0%}, {rate['high']:.0%}]", f"{rate['p']:.3f}"] if rate else ["-", "-"]
        )
        table.add_row(question, str(found["num_prompts"]), str(found["num_answers"]), *shares, *cells)
    return table


def show(result: dict) -> None:
    log.console.print(table(result))
    log.console.print(
        "win rate: without ties; Wilson's interval, by a bootstrap over prompts where they have several answers"
    )
    for question, found in result["questions"].items():
        if found["agreement"] is not None:
            log.console.print(f"{question}: two annotators agree on {found['agreement']:.0%} of the rows both answered")
        if found["unanswered"]:
            log.console.print(f"{question}: {found['unanswered']} rows were left empty")
