"""`ddpo weigh`: weights for data that is there: a prepared folder's anew, or any source's, row by row."""

import itertools
import shutil
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from ddpo import deviation, distributed, log
from ddpo.config import WeighConfig, Weighing
from ddpo.data import prepared
from ddpo.data.groups import Group, group_row, prompt_key, read_jsonl, write_jsonl
from ddpo.data.importers import each_group, preference_of, rows_of, tell_format, windows
from ddpo.embedded import Embedded, hash_of
from ddpo.files import new_file, new_folder
from ddpo.weighing import (
    ALL_ONE,
    WINDOW,
    deviations,
    join,
    load_measures,
    relative_distances,
    report_of,
    settings_of,
    tell_weights,
    weigh_pairs,
)


def weigh(cfg: WeighConfig) -> Path:
    """See WeighConfig; returns what was written.

    Raises: ValueError for bad input (file, line, wanted, got), FileExistsError; then nothing is written, but what was
    encoded is kept for the next time.
    """
    distributed.start()
    is_folder = (Path(cfg.source) / "manifest.json").is_file()
    if is_folder and cfg.out:
        raise ValueError(f"weigh: {cfg.source} is a prepared folder, which is weighed in place; leave --out away")
    if is_folder:
        return weigh_folder(cfg)
    if cfg.out is None:
        raise ValueError(f"weigh: {cfg.source} is no prepared folder; name the file or folder to make with --out")
    out = Path(cfg.out)
    if distributed.from_first(out.exists()):
        raise FileExistsError(f"{out} exists already; give another name")
    weights: list[float] = []
    dropped: Counter[str] = Counter()
    rows = weighted_rows(cfg.source, cfg, cfg.format, cfg.split, weights, dropped)
    if not distributed.is_first():
        for _ in rows:  # its share of the encoding
            pass
    elif out.suffix == ".jsonl":
        with new_file(out) as draft:
            write_jsonl(draft, rows)
    else:
        with new_folder(out) as draft:
            save_dataset(rows, draft)
    for reason, count in dropped.items():
        log.console.print(f"  dropped: {count} x {reason}")
    report = deviation.report(torch.tensor(weights, dtype=torch.float64))
    tell(cfg, report)
    log.console.print(f"wrote {out}")
    log.answer(cfg, {"out": out, "weights": report, "dropped": dropped})
    distributed.barrier()
    return out


def weigh_folder(cfg: WeighConfig) -> Path:
    """Weighs a prepared folder anew, its pairs as they are; the old weights stay until the new are whole."""
    data, measures, weightings = prepared.Prepared(cfg.source), load_measures(cfg), []
    offsets = data.group_offsets()
    for groups in windows(range(len(offsets) - 1), lambda g: offsets[g + 1] - offsets[g], WINDOW):
        a, b = offsets[[groups[0], groups[-1] + 1]].tolist()
        texts = data.texts(range(a, b))
        embeddings = {m: embedded.rows(texts) for m, embedded in measures.items()}
        if distributed.is_first():
            here = (data.pair_group >= groups[0]) & (data.pair_group <= groups[-1])
            pairs = np.column_stack([data.pair_group[here] - groups[0], data.pairs[here] - a])
            weightings.append(weigh_pairs(offsets[groups[0] : groups[-1] + 2] - a, pairs, embeddings, cfg))
    if distributed.is_first():
        weighting, old = join(weightings), data.manifest
        report, settings = report_of(weighting), {**old["settings"], **settings_of(cfg)}
        prepared.weigh(data.folder, weighting, {"settings": settings, "summary": {**old["summary"], "weights": report}})
        tell(cfg, report)
        log.answer(cfg, {"out": data.folder, "weights": report})
    distributed.barrier()
    return data.folder


def tell(cfg: Weighing, report: dict) -> None:
    by = ", ".join(f"{m} ({getattr(cfg, m)})" for m in cfg.measures)
    how = "closed form" if deviation.pick_backend(cfg.metric) == "closed" else "all pairs"
    weights = "CrPO's weights" if cfg.weighting == "crpo" else "weights"
    log.console.print(f"weighed by {by}; {cfg.metric} distances, {how}\n{weights}: {tell_weights(report)}")


def weigh_dataset(data, **settings):
    """A datasets.Dataset with weights; see weighted_rows for what is added.

    Args:
        data: rows of groups (prompt, responses), of pairs (prompt, chosen, rejected) or of r/WritingPrompts.
        settings: fields of ddpo.config.Weighing: measures, semantic, style, metric, ...
    Returns: a datasets.Dataset; of pairs the same with a column `weight`, of others one in memory.
    Raises: ValueError for rows that do not fit, TypeError for a setting that is none.
    """
    import datasets

    if not isinstance(data, datasets.Dataset):
        raise ValueError(f"weigh_dataset: wanted a datasets.Dataset (one split), got {type(data).__name__}")
    weights: list[float] = []
    rows = weighted_rows(data, Weighing(**settings), weights=weights)
    of_pairs = tell_format(data) == "preference"
    kept = [row for row in rows if not of_pairs]
    if set(weights) == {1.0}:
        warnings.warn(f"weigh_dataset: all weights are 1, {ALL_ONE}", stacklevel=2)
    if of_pairs:
        return data.add_column("weight", weights)
    return datasets.Dataset(datasets.table.InMemoryTable(_table(kept)))


def weighted_rows(
    source,
    cfg: Weighing,
    format: str = "auto",
    split: str = "train",
    weights: list[float] | None = None,
    dropped: Counter | None = None,
) -> Iterator[dict]:
    """The rows of a source, weighed, a window at a time.

    Rows of groups: each response gets distance_<measure>, deviation and weight (mean one in its group). Preference
    rows get `weight`, that of their chosen response among all responses of the prompt, or CrPO's.
    source: as read_groups, or a datasets.Dataset. weights, dropped: take up each weight; what is dropped, by reason.
    """
    if cfg.normalise_over != "all":
        raise ValueError("weigh: normalise_over 'pairs' wants the pairs of a prepared folder")
    measures, weights = load_measures(cfg), [] if weights is None else weights
    format = tell_format(source, split) if format == "auto" else format
    if format == "preference":
        yield from _weighted_pairs(source, split, measures, cfg, weights)
    elif cfg.weighting == "crpo":
        raise ValueError("weigh: CrPO weighs pairs; wanted preference rows or a prepared folder, got groups")
    else:
        groups = each_group(source, format, split, Counter() if dropped is None else dropped)
        yield from _weighted_groups(groups, measures, cfg, weights)
    if not weights:
        raise ValueError(f"{source}: no group is left; dropped: {dict(dropped or {}) or 'nothing'}")


def _weighted_groups(groups: Iterable[Group], measures, cfg, weights) -> Iterator[dict]:
    for window in windows(groups, lambda group: len(group.responses), WINDOW):
        embeddings = {m: e.rows([r.text for g in window for r in g.responses]) for m, e in measures.items()}
        found = weighed(embeddings, [len(g.responses) for g in window], cfg)
        weights += found["weight"]
        at = 0
        for row in map(group_row, window):
            for response in row["responses"]:
                response |= {name: values[at] for name, values in found.items()}
                at += 1
            yield row


def _weighted_pairs(source, split, measures: dict[str, Embedded], cfg, weights) -> Iterator[dict]:
    """Twice over the rows: first each text is encoded, then each row gets its weight. Hashes are held, no text."""
    members: dict[bytes, dict[bytes, None]] = {}  # prompt -> its responses, in order
    for window in windows(rows_of(source, split), lambda row: 2, WINDOW):
        named = [preference_of(row, where) for where, row in window]
        for embedded in measures.values():
            embedded.rows([text for _, *texts in named for text in texts])
        for prompt, *texts in named:
            members.setdefault(_prompt_hash(prompt), {}).update((hash_of(text), None) for text in texts)
    of_response: dict[bytes, list[float]] = {}  # prompt and response -> its weight, or under CrPO k relative distances
    for window in windows(members.items(), lambda group: len(group[1]), WINDOW):
        hashes, sizes = [h for _, responses in window for h in responses], [len(r) for _, r in window]
        groups = torch.from_numpy(np.cumsum([0, *sizes]))
        found = deviations({m: e.find(hashes) for m, e in measures.items()}, cfg, groups)
        values = relative_distances(found, cfg, groups) if cfg.weighting == "crpo" else found["weight"][None]
        keys = (prompt + h for prompt, responses in window for h in responses)
        of_response.update(zip(keys, values.T.tolist(), strict=True))
    for where, row in rows_of(source, split):
        prompt, *texts = preference_of(row, where)
        chosen, rejected = (of_response[_prompt_hash(prompt) + hash_of(text)] for text in texts)
        if cfg.weighting == "crpo":
            relative = torch.tensor([chosen, rejected], dtype=torch.float64).T  # (k, 2)
            weights.append(float(deviation.crpo_weights(relative, torch.tensor([[0, 1]]), cfg.crpo_scales)))
        else:
            weights.append(chosen[0])
        yield {**row, "weight": weights[-1]}


def _prompt_hash(prompt) -> bytes:
    return hash_of(prompt_key(prompt))


def weighed(embeddings: dict[str, torch.Tensor], sizes: list[int], cfg: Weighing) -> dict[str, list[float]]:
    """distance_<measure>, deviation and weight of each response of groups of these sizes."""
    groups = torch.from_numpy(np.cumsum([0, *sizes]))
    return {name: values.tolist() for name, values in deviations(embeddings, cfg, groups).items()}


def save_dataset(rows: Iterator[dict], folder: Path) -> None:
    """Writes rows as a data set for datasets.load_from_disk, some at a time; their types are those of all rows."""
    import datasets

    lines, cache = folder / "rows.jsonl", folder / "cache"
    schemas: list[pa.Schema] = []

    def seen() -> Iterator[dict]:
        while part := list(itertools.islice(rows, 1000)):
            schemas[:] = [pa.unify_schemas([*schemas, _table(part).schema], promote_options="permissive")]
            yield from part

    write_jsonl(lines, seen())
    features = datasets.Features.from_arrow_schema(schemas[0])
    data = datasets.Dataset.from_generator(
        lambda: (row for _, row in read_jsonl(lines)), features=features, cache_dir=str(cache)
    )
    data.save_to_disk(folder)
    lines.unlink()
    shutil.rmtree(cache)


def _table(rows: list[dict]) -> pa.Table:
    keys = dict.fromkeys(key for row in rows for key in row)
    return pa.table({key: [row.get(key) for row in rows] for key in keys})
