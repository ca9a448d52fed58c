"""Around a run: its folder, the wish to stop, metrics on their way to the host."""

import json
import signal
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import torch
import yaml

from ddpo import log
from ddpo.config import RewardConfig, TrainConfig
from ddpo.files import new_file, write_json
from ddpo.settings import to_yaml

MAY_CHANGE = (  # between a run and its resumption
    "resume dry_run json data out save_every keep_checkpoints track eval_data eval_every max_skips"
).split()


def check_run(cfg: TrainConfig | RewardConfig) -> Path:
    """The run folder: a name not taken, or with cfg.resume a run of the same settings, or one not begun. Writes
    nothing."""
    run = Path(cfg.out)
    if cfg.resume and (run / "config.yaml").is_file():
        begun = yaml.safe_load((run / "config.yaml").read_text())
        usual = {f.name: list(f.default) if isinstance(f.default, tuple) else f.default for f in fields(cfg)}
        before = usual | begun  # an option that there was not yet when the run began was at its default
        now = yaml.safe_load(to_yaml(cfg))
        changed = [key for key in now if key not in MAY_CHANGE and now[key] != before[key]]
        if "method_sha256" in changed and "method" not in changed:
            raise ValueError(
                f"{run}: the file of method {now['method']} has changed since the run was started; put it back, or "
                "give another --out"
            )
        if changed:
            raise ValueError(
                f"{run}: the run was started with other settings ({', '.join(changed)}); resume with those in its "
                "config.yaml, or give another --out"
            )
    elif cfg.resume and run.exists() and not all(file.name.startswith(".") for file in run.iterdir()):
        raise FileExistsError(f"{run} holds other files and no run to resume; give another --out")
    elif not cfg.resume and run.exists() and any(run.iterdir()):
        raise FileExistsError(f"{run} exists already; go on with --resume, or give another --out")
    return run


def begin_run(cfg: TrainConfig | RewardConfig, run: Path) -> None:
    """Config and card, where they do not stand yet."""
    if not (run / "config.yaml").exists():
        with new_file(run / "config.yaml") as draft:
            draft.write_text(to_yaml(cfg))
    if not (run / "card.json").exists():
        write_json(run / "card.json", log.card())


class Stop:
    """requested turns true at the first SIGINT or SIGTERM. A second SIGINT interrupts at once; not a SIGTERM, which
    torchrun sends to every process after a Ctrl-C that they have seen already."""

    def __init__(self):
        self.requested = False

    def __call__(self, number, frame):
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True


@contextmanager
def graceful(stop: Stop):
    """Inside, SIGINT and SIGTERM ask `stop` instead of killing (signals reach the main thread alone)."""
    signals = (signal.SIGINT, signal.SIGTERM)
    try:
        before = [signal.signal(s, stop) for s in signals]
    except ValueError:  # not the main thread: nobody to ask
        yield stop
        return
    try:
        yield stop
    finally:
        for s, handler in zip(signals, before, strict=True):
            signal.signal(s, handler)


class OnTheWay:
    """A step's sums and its gradient norm, copied to the host without waiting for the device."""

    def __init__(self, sums: torch.Tensor, norm: torch.Tensor):
        flat = torch.cat([sums, norm.detach().double().reshape(1)])
        self._event = None
        if flat.is_cuda:
            self._host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True).copy_(flat, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = flat

    def read(self) -> list[float]:
        if self._event:
            self._event.synchronize()
        return self._host.tolist()


def read_journal(path: Path) -> list[dict]:
    """Rows of a journal, up to one that a kill tore; NaN and infinities as None. No row where there is no file."""
    rows: list[dict] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line, parse_constant=lambda _: None))
        except ValueError:
            break
    return rows
