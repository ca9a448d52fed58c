"""What a report shows, read from folders: runs, prepared data, files of responses, evaluations."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import yaml

from ddpo import log
from ddpo.config import Encoding
from ddpo.data.groups import Prompt, labels, read_groups_file
from ddpo.data.prepared import Prepared
from ddpo.files import read_json
from ddpo.run import read_journal
from ddpo.weighing import load_measures

BINS = 40
CURVES = {"loss": "loss", "margin": "rewards/margins", "accuracy": "rewards/accuracies", "tokens_per_s": "tokens_per_s"}


def collect(folders: tuple[str, ...], **encoding) -> dict:
    """What lies in the folders and one level below. encoding: settings of the map's encoder that are the reader's own
    (config.Encoding: embeddings, trust_remote_code).

    Returns: runs, prepared, responses and evaluations, a dict by name each.
    Raises: ValueError for a folder that is none, or that holds nothing a report could show.
    """
    found: dict[str, dict[str, Path]] = {"runs": {}, "prepared": {}, "responses": {}, "evaluations": {}}
    names = labels(list(folders))
    for name, folder in zip(names, map(Path, folders), strict=True):
        if not folder.is_dir():
            raise ValueError(f"report: {folder} is no folder; name a run's folder, such as runs/demo")
        kinds = [(kind, path) for path in _places(folder) for kind in [_kind(path)] if kind]
        if not kinds:
            raise ValueError(
                f"report: {folder} holds nothing to show; wanted a run (config.yaml, metrics.jsonl), a prepared folder "
                "(manifest.json), responses (*.jsonl) or numbers of `ddpo evaluate --out`, there or one level below"
            )
        for kind, path in kinds:
            below = "" if path == folder else path.stem if path.is_file() else path.name
            found[kind]["/".join(part for part in (name if len(names) > 1 or not below else "", below) if part)] = path
    found = {kind: _shorter(paths) for kind, paths in found.items()}
    runs = {name: _run(path) for name, path in found["runs"].items()}
    for name, run in runs.items():  # the data a run names, where they still lie
        data = Path(run["config"].get("data") or "")
        if _kind(data) == "prepared" and data.resolve() not in [p.resolve() for p in found["prepared"].values()]:
            found["prepared"][f"{name}: data"] = data
    return {
        "runs": runs,
        "prepared": {name: _prepared(path, encoding) for name, path in found["prepared"].items()},
        "responses": {name: _responses(path) for name, path in sorted(found["responses"].items(), key=_before_first)},
        "evaluations": {name: _evaluation(path) for name, path in found["evaluations"].items()},
    }


def _shorter(paths: dict[str, Path]) -> dict[str, Path]:
    """Without the last part of their names where it is the same in several: a, b for a/run, b/run."""
    heads, _, last = zip(*(name.rpartition("/") for name in paths), strict=True) if paths else ((), (), ())
    return (
        dict(zip(heads, paths.values(), strict=True))
        if len(paths) > 1 and all(heads) and len(set(last)) == 1
        else paths
    )


def _places(folder: Path) -> Iterator[Path]:
    yield folder
    yield from sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _kind(path: Path) -> str | None:
    if path.is_dir():
        if (path / "config.yaml").is_file() and (path / "metrics.jsonl").is_file():
            return "runs"
        return "prepared" if _has(path / "manifest.json", "files", "summary") else None
    if path.suffix == ".json":
        return "evaluations" if _has(path, "per_prompt", "interval") else None
    if path.suffix == ".jsonl":
        with path.open("rb") as lines:
            return "responses" if _keys(lines.readline()) >= {"prompt", "responses"} else None
    return None


def _has(path: Path, *names: str) -> bool:
    return path.is_file() and _keys(path.read_bytes()) >= set(names)


def _keys(text: bytes) -> set[str]:
    try:
        value = json.loads(text)
    except ValueError:
        return set()
    return set(value) if isinstance(value, dict) else set()


def _before_first(item: tuple[str, Path]) -> tuple[bool, str]:
    return not item[1].stem.startswith("before"), item[0]


# --- runs -------------------------------------------------------------------------------------------------


def _run(folder: Path) -> dict:
    """Settings, card, and its curves: a column each, of steps and of evaluations."""
    journals = {name: read_journal(folder / f"{name}.jsonl") for name in ("metrics", "eval")}
    curves = {name: [row.get(key) for row in journals["metrics"]] for name, key in CURVES.items()}
    held_out = {name: [row.get(f"eval_{key}") for row in journals["eval"]] for name, key in CURVES.items()}
    return {
        "config": yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")) or {},
        "card": read_json(folder / "card.json") if (folder / "card.json").is_file() else {},
        "steps": [row["step"] for row in journals["metrics"]],
        "curves": {name: values for name, values in curves.items() if any(v is not None for v in values)},
        "eval_steps": [row["step"] for row in journals["eval"]],
        "eval_curves": {name: values for name, values in held_out.items() if any(v is not None for v in values)},
    }


def _loads(text: str):
    """JSON with null for NaN and infinities, which other writers leave in it and a browser does not read."""
    return json.loads(text, parse_constant=lambda _: None)


def _evaluation(path: Path) -> dict:
    """Of each file of responses its means and intervals, without the single prompts' numbers."""
    result = _loads(path.read_text(encoding="utf-8"))
    kept = ("num_prompts", "quality", "baseline", "mean", "interval", "card", "cut_to_words")
    return {name: result.get(name) for name in kept}


# --- responses --------------------------------------------------------------------------------------------


def text_of(prompt: Prompt) -> str:
    """What a reader sees of a prompt: the text, or its messages with their roles where there are several."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _responses(path: Path) -> list[dict]:
    groups = read_groups_file(path)
    return [
        {
            "prompt": text_of(group.prompt),
            "texts": [r.text for r in group.responses],
            "scores": _numbers([r.extra.get("reward", r.score) for r in group.responses]),
        }
        for group in groups
    ]


def _prepared(folder: Path, encoding: dict) -> dict:
    """Histograms of weights and deviations, and each prompt's responses with their places on a map."""
    data = Prepared(folder)
    settings = data.manifest["settings"]
    deviation = data.deviation["deviation"].to_numpy()  # (R,), nan where it has none
    rows, label = _map_rows(data, encoding)  # (R, D)
    offsets, groups = data.group_offsets(), []
    weighted = np.column_stack([data.pairs, data.weight])
    pairs = np.split(weighted, np.searchsorted(data.pair_group, range(1, len(offsets) - 1)))
    for g, (start, end) in enumerate(pairwise(offsets)):
        places = on_a_plane(rows[start:end]) if rows is not None else np.full((end - start, 2), np.nan)
        groups.append(
            {
                "prompt": text_of(data.prompt(g)),
                "texts": data.texts(range(start, end)),
                "scores": _numbers(data.scores[start:end]),
                "deviations": _numbers(deviation[start:end]),
                "x": _numbers(places[:, 0]),
                "y": _numbers(places[:, 1]),
                "pairs": [[int(c - start), int(r - start), round(w, 4)] for c, r, w in pairs[g].tolist()],
            }
        )
    summary = data.manifest["summary"]
    return {
        "summary": {name: summary.get(name) for name in ("prompts", "responses", "pairs", "duplicate_texts")},
        "settings": settings,
        "weights": histogram(data.weight),
        "deviations": histogram(deviation),
        "zero_share": float((data.weight == 0).mean()) if len(data.weight) else None,
        "map_of": label if rows is not None else None,
        "no_map": None if rows is not None else label,
        "groups": groups,
    }


def _map_rows(data: Prepared, encoding: dict) -> tuple[torch.Tensor | None, str]:
    """(R, D) of the first measure that the data were weighed by, and its encoder's name; None and why there are none:
    a page without its map is still worth having."""
    settings = data.manifest["settings"]
    if not settings.get("measures"):
        return None, "the weights were given with the data, so that there are no embeddings to place responses by"
    first = settings["measures"][0]
    known = {f.name: settings[f.name] for f in fields(Encoding) if f.name in settings}
    try:
        measure = load_measures(Encoding(**{**known, "measures": (first,), **encoding}))[first]
        return measure.rows(data.texts()), measure.encoder.label
    except (ValueError, OSError, RuntimeError, ImportError) as err:
        log.console.print(f"report: no map of the responses: {err}", markup=False)
        return None, f"its encoder was not to be had: {err}"


def on_a_plane(rows: torch.Tensor) -> np.ndarray:
    """(n, 2) of (n, D): unit vectors on their two principal components, so that near is alike."""
    unit = torch.nn.functional.normalize(rows.double(), dim=1)
    centred = unit - unit.mean(0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    places = torch.zeros(len(rows), 2, dtype=torch.float64)
    places[:, : s[:2].numel()] = (u * s)[:, :2]
    return places.numpy()


def histogram(values: np.ndarray) -> dict | None:
    """edges (BINS + 1,) and counts (BINS,) of the finite values; None where there is none."""
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    counts, edges = np.histogram(values, BINS)
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def _numbers(values: Iterable[float | None]) -> list[float | None]:
    return [round(float(v), 5) if v is not None and np.isfinite(v) else None for v in values]
