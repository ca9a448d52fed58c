"""The prepared folder: what training reads. Arrow files and a manifest that names them.

    groups     prompt (JSON), prompt_ids, extra (JSON)                      one row a prompt
    responses  group, text, score, ids, extra (JSON)                        one row a response
    pairs      group, chosen, rejected (rows of responses), weight          one row a pair
    deviation  distance_<measure>..., deviation, weight                     one row a response

manifest.json holds settings, summary, and name and hash of each file. Weighing again writes new `pairs` and
`deviation` files and then the manifest, in one rename: a reader finds the old weighting or the new, whole.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from ddpo.data.groups import Group, Prompt
from ddpo.files import read_json, sha256, sync, write_json

FORMAT = 1


def write(folder: Path, groups: list[Group], tokens: list, pairs: list, weighting: dict, manifest: dict) -> None:
    """Fills an empty folder. tokens: (prompt_ids, [ids of each response]) of each group; pairs: (P, 3) rows of
    group, chosen, rejected; weighting: see `weigh`."""
    files = {
        "groups": _groups_table(groups, tokens),
        "responses": _responses_table(groups, tokens),
    }
    names = {name: _write_table(folder, name, table) for name, table in files.items()}
    _write_manifest(folder, manifest, names, _weighting_tables(np.array(pairs, np.int64).reshape(-1, 3), weighting))


def weigh(folder: Path, weighting: dict, manifest: dict) -> None:
    """Replaces the weights of a prepared folder, its pairs as they are.

    weighting: {"pair_weight": (P,), "deviation": {column: (R,)}}; manifest: entries to replace.
    """
    data = Prepared(folder)
    old = data.manifest
    names = {name: old["files"][name] for name in ("groups", "responses")}
    tables = _weighting_tables(np.column_stack([data.pair_group, data.pairs]), weighting)
    _write_manifest(folder, {**old, **manifest}, names, tables)
    current = {file["path"] for file in read_json(folder / "manifest.json")["files"].values()}
    for table in folder.glob("*.arrow"):  # the old weighting's, and what a weighing that failed left
        if table.name not in current:
            table.unlink()


def _json(value):
    return json.dumps(value, ensure_ascii=False, default=str)  # a data set's rows may hold dates


def _groups_table(groups, tokens):
    return pa.table(
        {
            "prompt": [_json(g.prompt) for g in groups],
            "prompt_ids": pa.array([ids for ids, _ in tokens], pa.large_list(pa.int32())),
            "extra": [_json(g.extra) for g in groups],
        }
    )


def _responses_table(groups, tokens):
    rows = [(g, r) for g, group in enumerate(groups) for r in group.responses]
    return pa.table(
        {
            "group": pa.array([g for g, _ in rows], pa.int64()),
            "text": pa.array([r.text for _, r in rows], pa.large_string()),
            "score": pa.array([r.score for _, r in rows], pa.float64()),
            "ids": pa.array([ids for _, responses in tokens for ids in responses], pa.large_list(pa.int32())),
            "extra": [_json(r.extra) for _, r in rows],
        }
    )


def _weighting_tables(pairs, weighting):
    columns = {name: pairs[:, i] for i, name in enumerate(("group", "chosen", "rejected"))}
    return {
        "pairs": pa.table({**columns, "weight": np.asarray(weighting["pair_weight"], np.float64)}),
        "deviation": pa.table({k: np.asarray(v, np.float64) for k, v in weighting["deviation"].items()}),
    }


def _write_table(folder, name, table):
    draft = folder / f".{name}.arrow"
    with pa.OSFile(str(draft), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    sync(draft)
    digest = sha256(draft)
    path = f"{name}-{digest[:12]}.arrow"
    draft.replace(folder / path)
    return {"path": path, "sha256": digest, "rows": table.num_rows}


def _write_manifest(folder, manifest, names, tables):
    names = {**names, **{name: _write_table(folder, name, table) for name, table in tables.items()}}
    whole = hashlib.sha256("".join(names[n]["sha256"] for n in sorted(names)).encode()).hexdigest()
    write_json(folder / "manifest.json", {**manifest, "format": FORMAT, "files": names, "content_hash": whole})


class Prepared:
    """A prepared folder, opened: tables memory-mapped, their hashes checked.

    Rows are counted over the whole folder: response r has group response_group[r]; pairs (P, 2) hold rows of
    responses, weight (P,) their weights.
    Raises ValueError where the folder is none, or a file's content is not what the manifest says.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        path = self.folder / "manifest.json"
        if not path.is_file():
            raise ValueError(f"{folder} is no prepared folder (no manifest.json); make one with `ddpo prepare`")
        self.manifest = read_json(path)
        if self.manifest.get("format") != FORMAT:
            raise ValueError(f"{path}: format {self.manifest.get('format')}, wanted {FORMAT}; prepare it again")
        self.groups, self.responses, pairs, self.deviation = map(
            self._open, ("groups", "responses", "pairs", "deviation")
        )
        self.response_group = _numpy(self.responses["group"])  # (R,) int64
        self.pair_group = _numpy(pairs["group"])  # (P,) int64
        self.pairs = np.column_stack([_numpy(pairs["chosen"]), _numpy(pairs["rejected"])])  # (P, 2) int64
        self.weight = _numpy(pairs["weight"])  # (P,) float64
        self.scores = _numpy(self.responses["score"])  # (R,) float64, nan where there is none
        self._prompt_ids = _Ragged(self.groups["prompt_ids"])
        self._ids = _Ragged(self.responses["ids"])
        self.num_prompt_tokens = self._prompt_ids.lengths[self.response_group]  # (R,) int64
        self.num_tokens = self._ids.lengths  # (R,) int64

    def _open(self, name):
        entry = self.manifest["files"][name]
        path = self.folder / entry["path"]
        if not path.is_file() or sha256(path) != entry["sha256"]:
            raise ValueError(f"{path} is missing or damaged (its hash is not the manifest's); prepare it again")
        with pa.memory_map(str(path)) as source:
            return pa.ipc.open_stream(source).read_all()

    def prompt(self, group: int) -> Prompt:
        return json.loads(self.groups["prompt"][group].as_py())

    def prompt_ids(self, response: int) -> np.ndarray:
        return self._prompt_ids[self.response_group[response]]

    def response_ids(self, response: int) -> np.ndarray:
        return self._ids[response]

    def texts(self, responses: Sequence[int] | None = None) -> list[str]:
        column = self.responses["text"]
        return (column if responses is None else column.take(pa.array(responses))).to_pylist()

    def group_offsets(self) -> np.ndarray:
        """(num_groups + 1,) row offsets of the groups' responses."""
        return np.searchsorted(self.response_group, np.arange(len(self.groups) + 1))


class _Ragged:
    """Rows of unequal length over one flat array."""

    def __init__(self, column: pa.ChunkedArray):
        array = column.combine_chunks()
        if isinstance(array, pa.ChunkedArray):
            array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], column.type)
        self._offsets, self._values = array.offsets.to_numpy(), array.values.to_numpy()
        self.lengths = np.diff(self._offsets)

    def __getitem__(self, row: int) -> np.ndarray:
        return self._values[self._offsets[row] : self._offsets[row + 1]]


def _numpy(column) -> np.ndarray:
    return column.to_numpy()
