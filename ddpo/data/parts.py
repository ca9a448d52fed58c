"""A source tokenised in parts, each sealed in a folder of its own: what a killed `ddpo prepare` has done is kept.

    .<output>.parts/made_of.json            what decides the parts; of another source or tokenizer they are deleted
    .<output>.parts/00000/                  groups.arrow, responses.arrow, counts.json
    .<output>.parts/counts.json             once all are there: how many, and what the importer dropped

A part holds the groups of consecutive rows of the source, closed by the one that brings it to PART responses; every
process reads the whole stream and so cuts it alike, and tokenises its share of the parts that are missing.
"""

import dataclasses
import itertools
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from ddpo import distributed, log
from ddpo.config import PrepareConfig
from ddpo.data.groups import Group
from ddpo.data.importers import each_group, tell_format, windows
from ddpo.data.prepared import groups_table, responses_table
from ddpo.data.tokens import ChatTokens
from ddpo.files import new_folder, read_json, write_json

PART = 4096  # responses


@dataclass(frozen=True)
class Part:
    """groups: as prepared.groups_table, and `pairs`, those that the source gave; responses: their `group` counts within
    the part; offsets (num_groups + 1,) of the groups' responses."""

    groups: pa.Table
    responses: pa.Table
    offsets: np.ndarray

    @property
    def num_groups(self) -> int:
        return len(self.offsets) - 1

    def only(self, groups: np.ndarray) -> "Part":
        """The part with some of its groups, given by a mask (num_groups,) bool."""
        sizes = np.diff(self.offsets)
        responses = self.responses.filter(pa.array(np.repeat(groups, sizes)))
        return Part(self.groups.filter(pa.array(groups)), responses, np.cumsum([0, *sizes[groups]]))

    def row(self, group: int) -> dict:
        """A group as a row of the file contract."""
        prompt, extra = (json.loads(self.groups[name][group].as_py()) for name in ("prompt", "extra"))
        responses = self.responses.slice(self.offsets[group], self.offsets[group + 1] - self.offsets[group])
        listed = [
            {"text": r["text"], "score": r["score"], **json.loads(r["extra"])}
            for r in responses.select(["text", "score", "extra"]).to_pylist()
        ]
        return {"prompt": prompt, "responses": listed, **extra}


class Parts:
    """All parts of a source, whole. dropped: what was dropped so far, by reason; num_groups: of all parts."""

    def __init__(self, folder: Path):
        self._folder = folder
        total = read_json(folder / "counts.json")
        self._counts = [read_json(folder / f"{i:05d}" / "counts.json") for i in range(total["parts"])]
        self.num_groups = sum(counts["groups"] for counts in self._counts)
        self.dropped = sum((Counter(counts["dropped"]) for counts in self._counts), Counter(total["dropped"]))

    def __len__(self) -> int:
        return len(self._counts)

    def __iter__(self) -> Iterator[Part]:
        for i in range(len(self)):
            groups, responses = (_read(self._folder / f"{i:05d}" / f"{name}.arrow") for name in ("groups", "responses"))
            offsets = np.searchsorted(responses["group"].to_numpy(), np.arange(len(groups) + 1))
            yield Part(groups, responses, offsets)


def work_folder(out: Path, made_of: dict) -> Path:
    """The folder of an output's parts, as an earlier run left it where that was of the same source and tokens."""
    folder, made_of = _folder_of(out), {**made_of, "part": PART}
    if distributed.is_first():
        known = folder / "made_of.json"
        if folder.exists() and not (known.is_file() and read_json(known) == made_of):
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(known, made_of)
    distributed.barrier()
    return folder


def forget(out: Path) -> None:
    """Deletes the parts of an output that is whole."""
    if distributed.is_first():
        shutil.rmtree(_folder_of(out), ignore_errors=True)


def _folder_of(out):
    return out.with_name(f".{out.name}.parts")


def tokenise(folder: Path, cfg: PrepareConfig, tokens: ChatTokens) -> Parts:
    """Makes the parts that are missing; under torchrun each process its share.

    Raises: ValueError for rows that break the format, with file and line, and where no response is left.
    """
    try:
        if not distributed.from_first((folder / "counts.json").is_file()):
            _tokenise(folder, cfg, tokens)
        parts = Parts(folder)
        if not parts.num_groups:
            raise ValueError(f"{cfg.source}: no response is left; dropped: {dict(parts.dropped)}")
    except ValueError:  # of the source, which must change; what was made of it is of no use
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return parts


def _tokenise(folder, cfg, tokens):
    rank, world = distributed.start()
    there = distributed.from_first({p.parent.name for p in folder.glob("[!.]*/counts.json")})
    if there:
        log.console.print(f"parts tokenised already: {len(there)}, of about {PART:,} responses")
    dropped, number, shares = Counter(), -1, itertools.cycle(range(world))
    with log.progress(transient=True) as bar:
        task = bar.add_task("responses tokenised", total=None, note="")
        for number, groups in enumerate(windows(source_groups(cfg, dropped), _size, PART)):
            if f"{number:05d}" not in there and next(shares) == rank:
                _write(folder / f"{number:05d}", groups, cfg, tokens)
            bar.advance(task, sum(map(_size, groups)))
    if number < 0:
        raise ValueError(f"{cfg.source}: no group is left; dropped: {dict(dropped) or 'nothing'}")
    distributed.barrier()
    if rank == 0:
        write_json(folder / "counts.json", {"parts": number + 1, "dropped": dropped})
    distributed.barrier()


def source_groups(cfg: PrepareConfig, dropped: Counter) -> Iterator[Group]:
    format = tell_format(cfg.source, cfg.split) if cfg.format == "auto" else cfg.format
    return each_group(cfg.source, format, cfg.split, dropped)


def fit(group: Group, tokens: ChatTokens, cfg: PrepareConfig, dropped: Counter):
    """A group with its token ids (prompt's, each response's), responses that do not fit dropped or cut; None where
    none is left."""
    if tokens.special_token_in(group.prompt):
        dropped["prompt spells a special token"] += 1
        return None
    prompt_ids, ids = tokens.group_ids(group.prompt, [r.text for r in group.responses], group.where)
    room = cfg.max_length - len(prompt_ids)
    keep = []
    for i, response in enumerate(group.responses):
        if tokens.special_token_in(response.text):
            dropped["response spells a special token"] += 1
        elif len(ids[i]) <= room:
            keep.append(i)
        elif cfg.too_long == "truncate" and room > 0:
            dropped["response truncated (kept)"] += 1
            ids[i] = ids[i][:room]
            keep.append(i)
        else:
            dropped[f"response longer than {cfg.max_length} tokens with its prompt"] += 1
    if not keep:
        dropped["prompt left without a response"] += 1
        return None
    place = {old: new for new, old in enumerate(keep)}
    given = None
    if group.pairs is not None:
        given = [(place[c], place[r]) for c, r in group.pairs if c in place and r in place]
        if len(given) < len(group.pairs):
            dropped["pair with a dropped response"] += len(group.pairs) - len(given)
    kept = dataclasses.replace(group, responses=[group.responses[i] for i in keep], pairs=given)
    return kept, prompt_ids, [ids[i] for i in keep]


def _size(group):
    return len(group.responses)


def _write(folder, groups, cfg, tokens):
    dropped: Counter = Counter()
    fitted = [found for group in groups if (found := fit(group, tokens, cfg, dropped))]
    groups, prompt_ids, ids = zip(*fitted, strict=True) if fitted else ((), (), ())
    given = pa.array([g.pairs for g in groups], pa.list_(pa.list_(pa.int32())))
    tables = {
        "groups": groups_table(groups, prompt_ids).append_column("pairs", given),
        "responses": responses_table(groups, ids),
    }
    with new_folder(folder) as draft:
        for name, table in tables.items():
            with pa.OSFile(str(draft / f"{name}.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
        write_json(draft / "counts.json", {"groups": len(groups), "dropped": dropped})


def _read(path):
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).read_all()
