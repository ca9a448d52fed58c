"""What every benchmark of an op measures alike: time, interleaved; peak memory; the machine. And how it is told."""

import ctypes
import gc
import json
import os
import platform
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from ddpo.files import write_json
from ddpo.log import card
from ddpo.tune import event_ms

RESULTS = Path(__file__).parent / "results"
PEERS = ("liger-kernel", "cut-cross-entropy", "trl", "accelerate")


def interleaved(sides: dict[str, Callable], rounds: int, device: torch.device, slow=()) -> dict[str, np.ndarray]:
    """Seconds of each side in each round, A B C A B C ...; the slow ones in the first alone. Freeing what a side
    returns is part of its time."""
    times = {name: [] for name in sides}
    for i in range(rounds):
        for name, run in sides.items():
            if i == 0 or name not in slow:
                times[name].append(seconds(run, device))
    return {name: np.array(taken) for name, taken in times.items()}


def seconds(run: Callable, device: torch.device) -> float:
    if device.type == "cuda":
        return event_ms(run) / 1000
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def spread(values: np.ndarray) -> list[float]:
    """[median, 20th percentile, 80th percentile]"""
    return [short(x) for x in np.percentile(values, [50, 20, 80])]


def short(x: float) -> float:
    return float(f"{float(x):.4g}")


def peak_extra_mib(run: Callable, warm_up: Callable, device: torch.device) -> float | None:
    """Peak memory while run() runs, over what was held before, MiB. None where the system does not say."""
    warm_up()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = run()  # outputs count, so they must outlive the reading
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        try:
            ctypes.CDLL(None).malloc_trim(0)  # freed memory back to the system, else it would be counted as held
            before = resident("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the peak, starts again from VmRSS
        except (OSError, AttributeError):
            return None
        kept = run()
        peak = resident("VmHWM") - before
    del kept
    return peak / 2**20


def resident(key: str) -> int:
    """A field of /proc/self/status in bytes: VmRSS, what is held now, or VmHWM, its peak."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[key].split()[0]) << 10


def setting() -> dict:
    """The run card, and what else times depend on."""
    found = card()
    model = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    found["machine"] |= {"cpu": model[0] if model else platform.processor(), "load": list(os.getloadavg())}
    installed = {d.metadata["Name"].replace("_", "-") for d in metadata.distributions()}
    found["versions"] |= {name: metadata.version(name) for name in PEERS if name in installed}
    return found


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def tell(result: dict, tables: str, name: str, write: bool) -> None:
    """The tables, then one line of JSON; and results/<name>.json."""
    print(tables, end="\n\n")
    if write:
        write_json(RESULTS / f"{name}.json", result)
    print(json.dumps(result))
