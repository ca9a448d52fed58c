"""The console, progress bars, and the run card."""

import json
import math
import os
import platform
import re
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
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
# what a terminal would obey: control characters but tab and line feed, and marks that turn the writing direction; and
# halves of surrogate pairs, which it cannot be sent
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """The text with control characters written out, so that no text of a file steers the terminal."""
    return _UNSEEN.sub(lambda found: ascii(found[0])[1:-1], text)


class _Console(Console):
    """Texts come from files and models: none is markup, and none reaches the terminal with its control characters."""

    def render_str(self, text, **options):
        return super().render_str(visible(text), **options)


console = _Console(highlight=False, soft_wrap=True, markup=False, emoji=False)


@contextmanager
def quiet(on: bool = True) -> Iterator[None]:
    """Inside, the console says nothing, so that a command's output can be read by another program."""
    before = console.quiet
    console.quiet = before or on
    try:
        yield
    finally:
        console.quiet = before


def answer(cfg, result: dict) -> None:
    """Prints a command's result as one JSON object where cfg.json asks for it, in the first process; what is not a
    finite number as null."""
    if cfg.json and os.environ.get("RANK", "0") == "0":
        print(json.dumps(_plain(result), allow_nan=False), flush=True)


def _plain(value):
    if isinstance(value, dict):
        return {str(key): _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):  # numpy's and torch's numbers
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def progress(transient: bool = False) -> Progress:
    """Bars with description, count, time spent and time left; a field `note` after them; shown to a terminal alone.
    transient: gone at the end."""
    columns = (
        TextColumn("{task.description:<22}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    return Progress(*columns, console=console, transient=transient, disable=not console.is_terminal)


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
