"""`ddpo winrate`: who wins, by people's answers to the sets of `ddpo annotate`."""

import csv
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
from rich.table import Table

from ddpo import log, metrics
from ddpo.annotate import unguarded
from ddpo.config import WinrateConfig
from ddpo.files import read_json, write_json

ANSWERS = ("A", "B", "tie")
Answers = dict[str, dict[tuple[str, str], str | None]]  # question -> (id, annotator) -> label of the winner, None: tie


def winrate(cfg: WinrateConfig) -> dict:
    """Counts answers, prints a table and returns (and writes) the numbers.

    Returns: settings, files, and by question: num_prompts, num_answers, unanswered, wins of each label, ties; win_rate
        of the first label without ties (mean, low, high; p: of one half), None where all are ties; agreement: share of
        alike among the pairs of answers to one row, None where no row has two; share_a: how often the answer was A, of
        those that were no tie.
    Raises: ValueError for unknown ids, columns, answers, and for an annotator who answers a row twice.
    """
    key = read_key(cfg.key)
    answers, unanswered = read_answers(cfg.answers, key)
    labels = [file["label"] for file in key["files"]]
    of = {q: {**rates(answers[q], labels, key, cfg.seed), "unanswered": unanswered[q]} for q in key["questions"]}
    result = {"settings": asdict(cfg), "files": key["files"], "questions": of}
    if cfg.out:
        write_json(cfg.out, result)
    if not cfg.json:
        show(result)
    log.answer(cfg, result)
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
    """Every answer as the label that won; and how many were left empty, by question.

    An annotator is a file, or what stands in its column `annotator`.
    """
    found: Answers = {question: {} for question in key["questions"]}
    unanswered: Counter[str] = Counter()
    seen = set()
    for path in paths:
        for where, row in read_rows(path, ["id", *key["questions"]]):
            name, annotator = row["id"], row.get("annotator") or path
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
                found[question][name, annotator] = key["rows"][name].get(answer)
    return found, unanswered


def read_rows(path: str, wanted: list[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """(where, row) of each row of a CSV file that is not empty, cells stripped; comma, semicolon or tab between them.

    Raises: ValueError with file and row.
    """
    file = Path(path)
    try:
        with file.open(encoding="utf-8-sig", newline="") as source:
            delimiter = max(",;\t", key=source.readline().count)
            source.seek(0)
            header, *rows = list(csv.reader(source, delimiter=delimiter)) or [[]]
    except UnicodeDecodeError as err:
        raise ValueError(f"{file.name}: is not UTF-8 ({err}); save it as 'CSV UTF-8'") from None
    except csv.Error as err:
        raise ValueError(f"{file.name}: is not CSV ({err})") from None
    columns = [c.strip() for c in header]
    for name in wanted:
        if columns.count(name) != 1:
            raise ValueError(f"{file.name}: wanted one column {name!r}, its columns are {', '.join(columns) or 'none'}")
    for number, cells in enumerate(rows, 2):
        if any(map(str.strip, cells)):
            where = f"{file.name}: row {number}"
            if len(cells) != len(columns):
                raise ValueError(f"{where}: has {len(cells)} cells, the first row {len(columns)}")
            yield where, {c: unguarded(cell.strip()) for c, cell in zip(columns, cells, strict=True)}


def rates(answers: dict[tuple[str, str], str | None], labels: list[str], key: dict, seed: int) -> dict:
    """The numbers of one question; see winrate."""
    of_row: dict[str, Counter[str | None]] = defaultdict(Counter)  # id -> winner -> answers
    for (name, _), winner in answers.items():
        of_row[name][winner] += 1
    counts = list(of_row.values())
    wins, losses = (np.array([count[label] for count in counts], int) for label in labels)  # (R,)
    ties, decided = sum(count[None] for count in counts), int(wins.sum() + losses.sum())
    as_a = sum(winner == key["rows"][name]["A"] for (name, _), winner in answers.items())
    pairs = sum(count.total() * (count.total() - 1) for count in counts)  # of answers to one row, ordered
    agreeing = sum(n * (n - 1) for count in counts for n in count.values())
    return {
        "num_prompts": len(counts),
        "num_answers": len(answers),
        "wins": {label: int(of.sum()) for label, of in zip(labels, (wins, losses), strict=True)},
        "ties": ties,
        "win_rate": asdict(metrics.win_rate(wins, losses, seed)) if decided else None,
        "agreement": agreeing / pairs if pairs else None,
        "share_a": as_a / decided if decided else None,
    }


def table(result: dict) -> Table:
    """A row a question: shares of all answers, then the win rate without ties."""
    first, second = (file["label"] for file in result["files"])
    table = Table(title="people's answers")
    for column in ("question", "answers", first, second, "tie", "win rate [95 %]", "p"):
        in_words = column == "question"
        file = column in (first, second)
        table.add_column(column, justify="left" if in_words else "right", no_wrap=not file, overflow="fold")
    for question, found in result["questions"].items():
        wins, rate = found["wins"], found["win_rate"]
        shares = [f"{n / found['num_answers']:.0%}" for n in (*wins.values(), found["ties"]) if found["num_answers"]]
        cells = [str(found["num_answers"]), *(shares or ["-"] * 3)]
        if rate:
            cells += [f"{rate['mean']:.0%} [{rate['low']:.0%}, {rate['high']:.0%}]", metrics.p_value(rate["p"])]
        table.add_row(question, *cells)
    return table


def show(result: dict) -> None:
    say = log.console.print
    say(table(result))
    say(f"win rate: of {result['files'][0]['label']}, ties left out; p: of one half")
    say("interval: Wilson's, or where a prompt has several answers a bootstrap over prompts")
    for question, found in result["questions"].items():
        if found["agreement"] is not None:
            say(f"{question}: two answers to one row agree in {found['agreement']:.0%} of all cases")
        if found["unanswered"]:
            say(f"{question}: {found['unanswered']} rows without an answer")
