"""What a person and a program see of a run: progress bars, metrics.jsonl, the run card."""

import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ddpo.files import new_file

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
        with new_file(path) as draft:
            draft.write_text("".join(kept))
        self._file = path.open("a", buffering=1)

    def write(self, record: dict) -> None:
        """Floats with eight digits; one that is not finite as null."""
        self._file.write(json.dumps({k: _short(v) if isinstance(v, float) else v for k, v in record.items()}) + "\n")

    def close(self) -> None:
        self._file.close()


def _short(value: float) -> float | None:
    return float(f"{value:.8g}") if math.isfinite(value) else None


def _commit() -> str | None:
    """The commit of the source tree, None where the package is installed from elsewhere or git is not there."""
    here = Path(__file__)
    try:
        for arguments in (("ls-files", "--error-unmatch", here.name), ("describe", "--always", "--dirty")):
            git = ["git", "-C", str(here.parent), *arguments]
            out = subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return out.strip()


def card() -> dict:
    """The machine, the versions of what matters, and the commit of the source tree if it is one."""
    import torch

    names = ("ddpo", "torch", "triton", "transformers", "peft", "datasets", "numpy")
    installed = {d.metadata["Name"] for d in metadata.distributions()}
    return {
        "machine": {
            "platform": platform.platform(),
            "python": sys.version.split()[0],
            "threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
        "versions": {n: metadata.version(n) for n in names if n in installed},
        "commit": _commit(),
    }
