"""What a person and a program see of a run: progress bars, metrics.jsonl, the run card."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' own bars would tear ours
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
console = Console(highlight=False, soft_wrap=True)


def progress() -> Progress:
    """Bars with description, count, time spent and time left; a field `note` after them."""
    columns = (
        TextColumn("{task.description:<22}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    return Progress(*columns, console=console)


def track(items: Iterable, label: str, total: int) -> Iterator:
    """The items, with a bar."""
    with progress() as bar:
        task = bar.add_task(label, total=total, note="")
        for item in items:
            yield item
            bar.advance(task)


class Journal:
    """metrics.jsonl: a line a step, each step once."""

    def __init__(self, path: Path, last_step: int):
        """Keeps the lines of steps up to last_step (what a killed run wrote after its last checkpoint goes)."""
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] <= last_step:
                        kept.append(line + "\n")
                except (ValueError, KeyError):  # the torn last line of a killed run
                    break
        self._file = path.open("w", buffering=1)
        self._file.writelines(kept)

    def write(self, record: dict) -> None:
        self._file.write(json.dumps({k: round(v, 8) if isinstance(v, float) else v for k, v in record.items()}) + "\n")

    def close(self) -> None:
        self._file.close()


def card() -> dict:
    """The machine, the versions of what matters, and the commit of the source tree if it is one."""
    import torch

    names = ("ddpo", "torch", "triton", "transformers", "peft", "datasets", "numpy")
    installed = {d.metadata["Name"] for d in metadata.distributions()}
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip() or None
    except OSError:  # no git on this machine
        commit = None
    return {
        "machine": {
            "platform": platform.platform(),
            "python": sys.version.split()[0],
            "threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
        "versions": {n: metadata.version(n) for n in names if n in installed},
        "commit": commit,
    }
