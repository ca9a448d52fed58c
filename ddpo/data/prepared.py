"""The prepared folder: what training reads. Arrow files and a manifest that names them.

    groups     prompt (JSON), prompt_ids, extra (JSON)                      one row a prompt
    responses  group, text, score, ids, extra (JSON)                        one row a response
    pairs      group, chosen, rejected (rows of responses), weight          one row a pair
    deviation  distance_<measure>..., deviation, weight                     one row a response

Each file is a stream of record batches. manifest.json holds settings, summary, and name and hash of each file. Weighing
again writes new `pairs` and `deviation` files and then the manifest, in one rename: a reader finds the old weighting or
the new, whole.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from ddpo.data.groups import Group, Prompt
from ddpo.files import inside, read_json, sha256, sync, write_json

FORMAT = 1


class Writer:
    """Fills an empty folder: groups and responses part by part, then pairs, weights and the manifest."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._files = {"groups": _File(folder, "groups"), "responses": _File(folder, "responses")}

    def add(self, groups: pa.Table, responses: pa.Table) -> None:
        """Tables as of groups_table and responses_table; the responses' group counts over the whole folder."""
        self._files["groups"].write(groups)
        self._files["responses"].write(responses)

    def finish(self, pairs: np.ndarray, weighting: dict, manifest: dict) -> None:
        """pairs (P, 3): group, chosen, rejected, rows of the whole folder; weighting: see `weigh`."""
        names = {name: file.close() for name, file in self._files.items()}
        _write_manifest(self._folder, manifest, names, _weighting_tables(pairs, weighting))


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


def groups_table(groups: list[Group], prompt_ids: list[np.ndarray]) -> pa.Table:
    return pa.table(
        {
            "prompt": pa.array([_json(g.prompt) for g in groups], pa.string()),
            "prompt_ids": pa.array(prompt_ids, pa.large_list(pa.int32())),
            "extra": pa.array([_json(g.extra) for g in groups], pa.string()),
        }
    )


def responses_table(groups: list[Group], ids: list[list[np.ndarray]]) -> pa.Table:
    """ids: of each response of each group."""
    rows = [(g, r) for g, group in enumerate(groups) for r in group.responses]
    return pa.table(
        {
            "group": pa.array([g for g, _ in rows], pa.int64()),
            "text": pa.array([r.text for _, r in rows], pa.large_string()),
            "score": pa.array([r.score for _, r in rows], pa.float64()),
            "ids": pa.array([row for group in ids for row in group], pa.large_list(pa.int32())),
            "extra": pa.array([_json(r.extra) for _, r in rows], pa.string()),
        }
    )


def _json(value):
    return json.dumps(value, ensure_ascii=False, default=str)  # a data set's rows may hold dates


def _weighting_tables(pairs, weighting):
    columns = {name: pairs[:, i] for i, name in enumerate(("group", "chosen", "rejected"))}
    return {
        "pairs": pa.table({**columns, "weight": np.asarray(weighting["pair_weight"], np.float64)}),
        "deviation": pa.table({k: np.asarray(v, np.float64) for k, v in weighting["deviation"].items()}),
    }


class _File:
    """A table written batch by batch; close gives its entry in the manifest."""

    def __init__(self, folder, name):
        self._folder, self._name, self._writer, self._rows = folder, name, None, 0
        self._draft = folder / f".{name}.arrow"
        self._sink = pa.OSFile(str(self._draft), "wb")

    def write(self, table):
        self._writer = self._writer or pa.ipc.new_stream(self._sink, table.schema)
        self._writer.write_table(table)
        self._rows += table.num_rows

    def close(self):
        self._writer.close()
        self._sink.close()
        sync(self._draft)
        digest = sha256(self._draft)
        path = f"{self._name}-{digest[:12]}.arrow"
        self._draft.replace(self._folder / path)
        return {"path": path, "sha256": digest, "rows": self._rows}


def _write_table(folder, name, table):
    file = _File(folder, name)
    file.write(table)
    return file.close()


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
        path = inside(self.folder, entry["path"])
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
        """Of these responses, or of all. A range is cut out, others are copied together."""
        column = self.responses["text"]
        if isinstance(responses, range) and responses.step == 1:
            return column.slice(responses.start, len(responses)).to_pylist()
        return (column if responses is None else column.take(pa.array(responses))).to_pylist()

    def group_offsets(self) -> np.ndarray:
        """(num_groups + 1,) row offsets of the groups' responses."""
        return np.searchsorted(self.response_group, np.arange(len(self.groups) + 1))


class _Ragged:
    """Rows of unequal length over the flat arrays of a column's chunks, none of them copied."""

    def __init__(self, column: pa.ChunkedArray):
        chunks = [chunk for chunk in column.chunks if len(chunk)]
        self._offsets = [chunk.offsets.to_numpy() for chunk in chunks]
        self._values = [chunk.values.to_numpy() for chunk in chunks]
        self._starts = np.cumsum([0, *map(len, chunks)])  # first row of each chunk
        self.lengths = np.concatenate([np.diff(o) for o in self._offsets] or [np.empty(0, np.int64)])

    def __getitem__(self, row: int) -> np.ndarray:
        chunk = int(np.searchsorted(self._starts, row, side="right")) - 1
        start, end = self._offsets[chunk][row - self._starts[chunk] :][:2]
        return self._values[chunk][start:end]


def _numpy(column) -> np.ndarray:
    return column.to_numpy()
