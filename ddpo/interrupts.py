"""Ctrl-C and SIGTERM: a command ends in good order, and what must not be cut in two is not."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Asked:
    """Whether a signal asked to end."""

    def __init__(self):
        self.yes = False

    def __call__(self, number, frame):
        first, self.yes = not self.yes, True
        if first or number == signal.SIGINT:  # torchrun sends a SIGTERM after the Ctrl-C that all have seen
            raise KeyboardInterrupt


@contextmanager
def catching() -> Iterator[Asked]:
    """Inside, SIGINT and SIGTERM raise KeyboardInterrupt, so that drafts go. What is given tells whether one came:
    libraries may turn the interrupt into an error of theirs. One process of several keeps SIGTERM as it is: torchrun
    ends by it those that wait for one that failed."""
    asked = Asked()
    with _handled_by(asked, SIGNALS[: 1 if int(os.environ.get("WORLD_SIZE", "1")) > 1 else 2]):
        yield asked


@contextmanager
def undisturbed() -> Iterator[None]:
    """Inside, SIGINT and SIGTERM wait; they count at the end. For moments only."""
    waiting: list[int] = []
    try:
        with _handled_by(lambda number, frame: waiting.append(number), SIGNALS):
            yield
    finally:
        for number in waiting[:1]:
            signal.raise_signal(number)


@contextmanager
def _handled_by(handler: Callable, numbers: tuple[signal.Signals, ...]) -> Iterator[None]:
    """Puts a handler in place of the signals' own; in another thread than the main one nothing."""
    try:
        before = {number: signal.signal(number, handler) for number in numbers}
    except ValueError:  # signals reach the main thread alone
        yield
        return
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)
