"""The console, progress bars, and the run card."""

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' own bars would tear ours
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
console = Console(highlight=False, soft_wrap=True)


@contextmanager
def quiet(on: bool = True) -> Iterator[None]:
    """Inside, the console says nothing, so that a command's output can be read by another program."""
    before = console.quiet
    console.quiet = before or on
    try:
        yield
    finally:
        console.quiet = before


def progress(transient: bool = False) -> Progress:
    """Bars with description, count, time spent and time left; a field `note` after them. transient: gone at the end,
    and shown to a terminal alone."""
    columns = (
        TextColumn("{task.description:<22}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    return Progress(*columns, console=console, transient=transient, disable=transient and not console.is_terminal)


def track(items: Iterable, label: str, total: int, size: Callable = lambda item: 1) -> Iterator:
    """The items, with a bar that each moves on by its size."""
    with progress() as bar:
        task = bar.add_task(label, total=total, note="")
        for item in items:
            yield item
            bar.advance(task, size(item))


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

    names = ("ddpo", "torch", "triton", "transformers", "peft", "datasets", "numpy", "scipy", "rouge-score")
    installed = {d.metadata["Name"].replace("_", "-") for d in metadata.distributions()}
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
