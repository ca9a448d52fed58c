"""`ddpo annotate`: blinded side-by-side sets of two files' responses, for people to compare."""

import csv
import hashlib
from dataclasses import asdict
from pathlib import Path

import numpy as np

from ddpo import log
from ddpo.config import AnnotateConfig
from ddpo.data.groups import Group, Prompt, check_same_prompts, labels, read_groups_file
from ddpo.files import new_folder, sha256, write_json

SIDES = ("A", "B")
RESERVED = frozenset(("id", "prompt", "annotator"))  # columns of their own
FORMULA = tuple("=+-@\t\r\n＝＋－＠")  # a spreadsheet runs a cell that begins with one of these
EXCEL_CELL = 32_767  # characters; Excel cuts what is longer


def annotate(cfg: AnnotateConfig) -> Path:
    """Writes the folder out with sets.csv for the annotators and key.json for `ddpo winrate`; returns the folder.

    sets.csv: UTF-8 with a byte-order mark; columns id, prompt, A 1 to A n, B 1 to B n, and the questions, empty. A text
    that a spreadsheet would take for a formula stands behind an apostrophe (see guarded).
    key.json: files (label, path, hash), questions, settings, and of each id which label is A, which is B, the prompt's
    number in the files, and the numbers of the responses.
    Raises: ValueError where the files are not of the same prompts or hold fewer responses than a set needs,
        FileExistsError.
    """
    check_settings(cfg)
    out, names = Path(cfg.out), labels(cfg.responses)
    files = [
        {"label": name, "path": path, "sha256": sha256(path)} for name, path in zip(names, cfg.responses, strict=True)
    ]
    settings = {name: value for name, value in asdict(cfg).items() if name != "json"}
    key = {"files": files, "questions": list(cfg.questions), "settings": settings}
    rows, key["rows"] = draw_sets([read_groups_file(path) for path in cfg.responses], files, cfg)
    with new_folder(out, cfg.overwrite) as draft:
        columns = [f"{side} {i + 1}" for side in SIDES for i in range(cfg.num_responses)]
        with (draft / "sets.csv").open("w", encoding="utf-8-sig", newline="") as file:
            csv.writer(file).writerows([["id", "prompt", *columns, *cfg.questions], *rows])
        write_json(draft / "key.json", key)
    say = log.console.print
    say(f"{len(rows)} prompts, 2 sets of {cfg.num_responses} each")
    say(f"for the annotators (A, B or tie in {', '.join(cfg.questions)}): {out / 'sets.csv'}")
    say(f"not for them: {out / 'key.json'}, which `ddpo winrate` wants as --key")
    long = sum(len(cell) > EXCEL_CELL for row in rows for cell in row)
    if long:
        say(f"{long} cells have more than the {EXCEL_CELL:,} characters that Excel keeps; use another program")
    log.answer(
        cfg,
        {
            "num_prompts": len(rows),
            "num_responses": cfg.num_responses,
            "sets": out / "sets.csv",
            "key": out / "key.json",
        },
    )
    return out


def check_settings(cfg: AnnotateConfig) -> None:
    if isinstance(cfg.responses, str) or len(cfg.responses) != 2:
        raise ValueError(f"annotate: wanted two files of responses, got {cfg.responses}")
    questions = cfg.questions
    if not questions or len(set(questions)) != len(questions) or not RESERVED.isdisjoint(questions):
        taken = ", ".join(sorted(RESERVED))
        raise ValueError(f"annotate: questions must be different names and none of {taken}, got {list(questions)}")


def draw_sets(sides: list[list[Group]], files: list[dict], cfg: AnnotateConfig) -> tuple[list[list[str]], dict]:
    """The rows of sets.csv, in random order, and of key.json by their ids."""
    names = [file["label"] for file in files]
    first, second = sides
    check_same_prompts(first, second, " and ".join(names))
    for group in (g for groups in sides for g in groups):
        if len(group.responses) < cfg.num_responses:
            raise ValueError(
                f"{group.where}: has {len(group.responses)} responses, a set wants {cfg.num_responses}; "
                f"give --num-responses {len(group.responses)} or fewer"
            )
    total = len(sides[0])
    num = cfg.num_prompts or total
    if num > total:
        raise ValueError(f"annotate: num_prompts is {num}, the files hold {total}")
    # answers to other sets must not count for these: their ids differ
    tag = hashlib.sha256(repr((files, cfg.seed, num, cfg.num_responses)).encode()).hexdigest()[:6]
    rng = np.random.default_rng(cfg.seed)
    first = rng.permutation(np.arange(num) % 2).tolist()  # which file is A: each as often as the other
    rows, of_id = [], {}
    for at, prompt in enumerate(rng.permutation(total)[:num].tolist()):
        order = dict(zip(SIDES, (first[at], 1 - first[at]), strict=True))
        groups = {side: sides[file][prompt] for side, file in order.items()}
        picked = {s: rng.permutation(len(g.responses))[: cfg.num_responses].tolist() for s, g in groups.items()}
        texts = [groups[side].responses[i].text for side in SIDES for i in picked[side]]
        name = f"s{tag}-{at + 1:04d}"
        rows.append([name, *map(guarded, [plain(groups["A"].prompt), *texts]), *[""] * len(cfg.questions)])
        of_id[name] = {**{side: names[file] for side, file in order.items()}, "prompt": prompt, "responses": picked}
    return rows, of_id


def plain(prompt: Prompt) -> str:
    """A prompt as one text."""
    return prompt if isinstance(prompt, str) else "\n\n".join(f"{m['role']}: {m['content']}" for m in prompt)


def guarded(text: str) -> str:
    """The text behind an apostrophe where a spreadsheet would run it as a formula; and where it begins with an
    apostrophe, so that unguarded gives every text back."""
    return "'" + text if text.startswith((*FORMULA, "'")) else text


def unguarded(cell: str) -> str:
    return cell.removeprefix("'")
