"""A long job's results, kept as they come: what a killed job had done is there when the same job is started again."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from ddpo import distributed, log
from ddpo.data.groups import write_jsonl
from ddpo.files import new_file, read_json, write_json


class Ledger:
    """Results by id, in hidden files of JSON lines beside the output: each process writes its own and reads all.

    key: everything that decides the results (JSON); what another key's job left is not read and goes in the end.
    done: the results that are there, dict[str, dict].
    """

    def __init__(self, out: Path, key: dict):
        rank, _ = distributed.start()
        self._out, self._made_from = out, key
        self._key = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        self.done = distributed.from_first(self._read())  # one look at the folder: all share out the same jobs
        if self.done:
            log.console.print(f"{out}: {len(self.done)} results of a run that was stopped are taken up")
        distributed.barrier()  # all have read before one writes
        out.parent.mkdir(parents=True, exist_ok=True)
        self._path = out.with_name(f".{out.name}.{rank}.part")
        _, at = self._results(self._path)
        if not at:
            self._path.write_text(json.dumps({"key": self._key}) + "\n")
        else:
            with self._path.open("rb+") as file:
                file.truncate(at)  # a line that a kill tore goes
        self._file = self._path.open("a", encoding="utf-8")

    def add(self, results: dict[str, dict]) -> None:
        """Keeps results; they are there after a kill."""
        self.done.update(results)
        self._file.writelines(json.dumps([name, result]) + "\n" for name, result in results.items())
        self._file.flush()

    def collect(self) -> dict[str, dict]:
        """All processes' results; each process must call.

        Raises: RuntimeError where the processes do not share the folder.
        """
        self._file.close()
        parts = [part.name for part in distributed.from_all(self._path)]
        lacking = [name for name in parts if not self._out.with_name(name).is_file()]
        if any(distributed.from_all(lacking)):
            raise RuntimeError(
                f"{self._out.parent}: the other processes' results are not there; wanted a shared folder"
            )
        self.done = self._read()
        return self.done

    def finish(self, rows: Iterable[dict]) -> None:
        """Writes the output as JSON lines, its card before it; the results' files go. For the first process alone."""
        write_card(self._out, self._made_from)
        with new_file(self._out) as draft:
            write_jsonl(draft, rows)
        for path in self._parts():
            path.unlink()

    def _parts(self) -> list[Path]:
        return sorted(self._out.parent.glob(f".{self._out.name}.*.part"))

    def _read(self) -> dict[str, dict]:
        return {name: result for path in self._parts() for name, result in self._results(path)[0].items()}

    def _results(self, path: Path) -> tuple[dict[str, dict], int]:
        """A file's results, and how many of its bytes are whole lines of this key's: 0 where it is another's."""
        if not path.is_file():
            return {}, 0
        head, *lines = path.read_bytes().splitlines(keepends=True) or [b""]
        if head != json.dumps({"key": self._key}).encode() + b"\n":
            return {}, 0
        results, at = {}, len(head)
        for line in lines:
            if not line.endswith(b"\n"):
                break
            name, result = json.loads(line)
            results[name], at = result, at + len(line)
        return results, at


def job_id(group: int, response: int) -> str:
    return f"{group}.{response}"


# --- the card of what was made ----------------------------------------------------------------------------


def card_path(out: Path) -> Path:
    """after.jsonl -> after.card.json"""
    return out.with_name(f"{out.name.removesuffix('.jsonl')}.card.json")


def is_made(out: Path, key: dict, resume: bool, overwrite: bool) -> bool:
    """Whether the output lies there whole, made under this key, and is to be kept.

    Raises: FileExistsError where it lies there and neither resume nor overwrite says what to do, or where it was made
    under another key.
    """
    if not out.exists() or overwrite:
        return False
    if not resume:
        raise FileExistsError(f"{out} exists already; give another name, --overwrite, or --resume to keep what is done")
    path = card_path(out)
    made = read_json(path).get("made_from") if path.is_file() else None
    key = json.loads(json.dumps(key))
    if made != key:
        changed = sorted(k for k in key if made and made.get(k) != key[k]) or "unknown settings"
        raise FileExistsError(f"{out} was made from something else ({changed}); give another name or --overwrite")
    log.console.print(f"{out} is there, made from the same")
    return True


def write_card(out: Path, key: dict) -> None:
    """What it was made from, machine and versions. Before the output itself, which so never stands without; an older
    output goes, so that none stands beside a card that is not its own."""
    out.unlink(missing_ok=True)
    write_json(card_path(out), {"made_from": key, **log.card()})
