"""`ddpo annotate`: blinded side-by-side sets of two files' responses, for people to compare."""

import csv
import hashlib
from pathlib import Path

import numpy as np

from ddpo import log
from ddpo.config import AnnotateConfig
from ddpo.data.groups import Group, Prompt, check_same_prompts, labels, read_groups_file
from ddpo.files import new_folder, sha256, write_json

SIDES = ("A", "B")
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
    sides = [read_groups_file(path) for path in cfg.responses]
    names = labels(cfg.responses)
    check_same_prompts(*sides, " and ".join(names))
    for group in (g for groups in sides for g in groups):
        if len(group.responses) < cfg.num_responses:
            raise ValueError(
                f"{group.where}: has {len(group.responses)} responses, a set wants {cfg.num_responses}; "
                f"give --num-responses {len(group.responses)} or fewer"
            )
    rng, total = np.random.default_rng(cfg.seed), len(sides[0])
    num = total if cfg.num_prompts is None else cfg.num_prompts
    if num > total:
        raise ValueError(f"annotate: num_prompts is {num}, the files hold {total}")
    files = [
        {"label": name, "path": path, "sha256": sha256(path)} for name, path in zip(names, cfg.responses, strict=True)
    ]
    key = {"files": files, "questions": list(cfg.questions), "seed": cfg.seed, "num_responses": cfg.num_responses}
    tag = hashlib.sha256(repr((key, num)).encode()).hexdigest()[:6]  # answers to other sets are known as such
    first = rng.permutation(np.arange(num) % 2)  # which file is A: each as often as the other
    rows, key["rows"] = [], {}
    for at, prompt in enumerate(rng.permutation(total)[:num].tolist()):
        order = [first[at], 1 - first[at]]
        groups = [sides[side][prompt] for side in order]
        picked = [rng.permutation(len(g.responses))[: cfg.num_responses].tolist() for g in groups]
        texts = [g.responses[i].text for g, indices in zip(groups, picked, strict=True) for i in indices]
        name = f"s{tag}-{at + 1:04d}"
        rows.append([name, guarded(plain(groups[0].prompt)), *map(guarded, texts), *[""] * len(cfg.questions)])
        key["rows"][name] = {
            "prompt": prompt,
            **{side: names[which] for side, which in zip(SIDES, order, strict=True)},
            "responses": dict(zip(SIDES, picked, strict=True)),
        }
    out = Path(cfg.out)
    with new_folder(out, cfg.overwrite) as draft:
        columns = [f"{side} {i + 1}" for side in SIDES for i in range(cfg.num_responses)]
        with (draft / "sets.csv").open("w", encoding="utf-8-sig", newline="") as file:
            csv.writer(file).writerows([["id", "prompt", *columns, *cfg.questions], *rows])
        write_json(draft / "key.json", key)
    long = sum(len(cell) > EXCEL_CELL for row in rows for cell in row)
    if long:
        log.console.print(
            f"{long} cells have more than the {EXCEL_CELL:,} characters that Excel keeps; use another reader"
        )
    log.console.print(
        f"{num} x 2 sets of {cfg.num_responses}: {out / 'sets.csv'} is for the annotators (A, B or tie in "
        f"{', '.join(cfg.questions)}), {out / 'key.json'} is not; then `ddpo winrate ANSWERS.csv --key {out / 'key.json'}`"
    )
    return out


def plain(prompt: Prompt) -> str:
    """A prompt as one text."""
    return prompt if isinstance(prompt, str) else "\n\n".join(f"{m['role']}: {m['content']}" for m in prompt)


def guarded(text: str) -> str:
    """The text behind an apostrophe where a spreadsheet would run it as a formula, and where it begins with one, so that
    unguarded gives every text back."""
    return "'" + text if text.startswith((*FORMULA, "'")) else text


def unguarded(cell: str) -> str:
    return cell.removeprefix("'")
