"""What a person and a program see of a run: the bar, journals of JSON lines, trackers."""

import dataclasses
import json
import math
import resource
import sys
from pathlib import Path
from typing import TextIO

import torch

from ddpo import log
from ddpo.config import TrainConfig
from ddpo.files import new_file


class Watch:
    """The bar and files of a run; in processes other than the first it does nothing.

    metrics.jsonl has a line a step, eval.jsonl a line an evaluation, skipped.jsonl a line a skipped step.
    """

    def __init__(self, cfg: TrainConfig, run: Path, step: int, num_steps: int, first: bool):
        """step: of the checkpoint gone on from; what a killed run wrote after it goes."""
        self._first = first
        self._journals = {name: Journal(run / f"{name}.jsonl", step) for name in ("metrics", "eval", "skipped") * first}
        self._trackers = _trackers(cfg, run) if first else []
        self._bar = log.progress()
        self._task = self._bar.add_task(cfg.method, total=num_steps, completed=step, note="")

    def __enter__(self) -> "Watch":
        self._bar.start()
        return self

    def __exit__(self, *error) -> None:
        self._bar.stop()
        for journal in self._journals.values():
            journal.close()
        for tracker in self._trackers:
            tracker.finish()

    def write(self, name: str, record: dict) -> None:
        """One record of the journal `name`; to the trackers too, without its text."""
        if not self._first:
            return
        self._journals[name].write(record)
        numbers = {key: value for key, value in record.items() if isinstance(value, int | float)}
        for tracker in self._trackers:
            tracker.log(numbers, step=record["step"])
        if name == "metrics":
            self._bar.update(self._task, completed=record["step"], note=_note(record))
        elif name == "eval":
            self.say(f"step {record['step']}: eval {_note(record, 'eval_')}")

    def has(self, name: str, step: int) -> bool:
        """Whether the journal `name` has a record of this step; true in processes that keep none."""
        return not self._first or self._journals[name].last_step >= step

    def say(self, text: str) -> None:
        self._bar.console.print(text)


def _note(record: dict, prefix: str = "") -> str:
    words = [f"loss {record[prefix + 'loss']:.4f}"]
    if f"{prefix}rewards/margins" in record:
        words += [f"margin {record[f'{prefix}rewards/margins']:+.3f}"]
        words += [f"accuracy {record[f'{prefix}rewards/accuracies']:.2f}"]
    if "tokens_per_s" in record:
        words += [f"{record['tokens_per_s']:.0f} tokens/s", f"peak {record['peak_memory_gib']:.1f} GiB"]
    return " ".join(words)


def peak_memory_gib() -> float:
    """Most memory held so far: on a GPU by tensors, else by the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


# --- trackers ---------------------------------------------------------------------------------------------


def check_trackers(names: tuple[str, ...]) -> None:
    """Raises ValueError for one that accelerate does not know, or whose package is not installed."""
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    there = {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ValueError(f"track: unknown tracker {name!r}; known: {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}")
        if name not in there:
            raise ValueError(f"track: {name} is not installed; `pip install {name}`, or leave it out")


def _trackers(cfg: TrainConfig, run: Path) -> list:
    """TensorBoard's files lie in the run folder."""
    if not cfg.track:
        return []
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # its trackers ask it which process this is
    started = []
    for name in cfg.track:
        cls = LOGGER_TYPE_TO_CLASS[name]
        tracker = cls(run.name, **({"logging_dir": str(run.parent)} if cls.requires_logging_directory else {}))
        tracker.start()
        values = {key: v if isinstance(v, int | float | bool) else str(v) for key, v in dataclasses.asdict(cfg).items()}
        tracker.store_init_configuration(values)
        started.append(tracker)
    return started


# --- journals ---------------------------------------------------------------------------------------------


class Journal:
    """A file of JSON lines, each with the step it belongs to, each step once."""

    def __init__(self, path: Path, last_step: int):
        """Keeps the lines of steps up to last_step (what a killed run wrote after its last checkpoint goes)."""
        self._path, self.last_step = path, -1
        self._file: TextIO | None = None
        if not path.exists():
            return
        kept = []
        for line in path.read_text().splitlines():
            try:
                step = json.loads(line)["step"]
                if step <= last_step:
                    kept.append(line + "\n")
                    self.last_step = step
            except (ValueError, KeyError):  # the torn last line of a killed run
                break
        with new_file(path) as draft:
            draft.write_text("".join(kept))

    def write(self, record: dict) -> None:
        """Floats with eight digits; one that is not finite as null."""
        self.last_step = record["step"]
        if self._file is None:
            self._file = self._path.open("a", buffering=1)
        self._file.write(json.dumps({k: _short(v) if isinstance(v, float) else v for k, v in record.items()}) + "\n")

    def close(self) -> None:
        if self._file:
            self._file.close()


def last_record(path: Path) -> dict | None:
    """The last record of a journal, None where it has none."""
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1]) if lines else None


def _short(value: float) -> float | None:
    return float(f"{value:.8g}") if math.isfinite(value) else None
