"""`ddpo tune`: times the paths of impl 'triton' on the GPU at hand and remembers the fastest."""

from collections.abc import Callable

import torch

from ddpo import log
from ddpo.config import TuneConfig
from ddpo.files import write_json
from ddpo.loading import head_shape
from ddpo.ops import triton, tuned
from ddpo.ops.implementation import Call

CHOICES = [tuned.Choice("fused"), *(tuned.Choice("chunked", mib) for mib in (64, 128, 256, 512, 1024))]
ROUNDS = 7


def tune(cfg: TuneConfig) -> dict:
    """Times every choice for the model's head, frozen and trained, interleaved; stores and returns the fastest.

    Raises: ValueError where no GPU is.
    """
    if not torch.cuda.is_available():
        raise ValueError("tune: wanted a GPU, found none; on a CPU there is nothing to choose")
    tuned.stored()  # a broken file is said now, not after minutes
    gpu = torch.cuda.get_device_name()
    V, D = head_shape(cfg.model)
    hidden, head = torch.randn(cfg.rows, D, device="cuda"), torch.randn(V, D, device="cuda") * D**-0.5
    hidden, head = (x.to(getattr(torch, cfg.dtype)) for x in (hidden, head))
    targets = torch.randint(V, (cfg.rows,), device="cuda")
    call = Call(hidden, head, targets, None, 1.0, None, None, 0.0)
    found = {}
    for head_trained in (False, True):
        times = time_choices(lambda choice, trained=head_trained: run(call, choice, trained), event_ms)
        fastest = min(times, key=lambda choice: times[choice])
        found[tuned.key(hidden.dtype, D, V, head_trained)] = fastest._asdict()
        for choice, ms in times.items():
            name = choice.path if choice.path == "fused" else f"{choice.path} {choice.chunk_mib} MiB"
            mark = " <- fastest" if choice == fastest else ""
            log.console.print(f"{tuned.key(hidden.dtype, D, V, head_trained)}  {name:<17}{ms:8.2f} ms{mark}")
    remember(gpu, found)
    log.answer(cfg, {"gpu": gpu, "file": tuned.file(), "fastest": found})
    return found


def run(call: Call, choice: tuned.Choice, head_trained: bool) -> None:
    """One forward and backward, as linear_logp would do them."""
    wants = (True, head_trained, False)
    path = triton.Path(*choice)
    _, saved = path.forward(call, wants)
    path.backward(call, saved, torch.ones(len(call.hidden), device=call.hidden.device), wants)


def time_choices(run: Callable, time_ms: Callable) -> dict[tuned.Choice, float]:
    """Median milliseconds of each choice, the choices taken in turn; the first round warms up."""
    times: dict[tuned.Choice, list[float]] = {choice: [] for choice in CHOICES}
    for _ in range(1 + ROUNDS):
        for choice, ms in times.items():
            ms.append(time_ms(lambda choice=choice: run(choice)))
    return {choice: sorted(ms[1:])[ROUNDS // 2] for choice, ms in times.items()}


def event_ms(work: Callable) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def remember(gpu: str, found: dict) -> None:
    """Adds choices for a GPU to those stored."""
    tuned.stored.cache_clear()
    kept = tuned.stored()
    write_json(tuned.file(), {**kept, gpu: {**kept.get(gpu, {}), **found}})
    tuned.stored.cache_clear()
    log.console.print(f"wrote {tuned.file()}")
