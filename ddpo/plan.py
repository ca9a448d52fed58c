"""`ddpo plan`: what a training run takes, before it is run and without the model's weights."""

import ctypes
import gc
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from ddpo import log
from ddpo.config import PlanConfig
from ddpo.data.prepared import Prepared
from ddpo.footprint import Pass, Size, measure, size_of
from ddpo.loading import pick_dtype, read_config
from ddpo.model import pick_drop_below
from ddpo.objective import method_of, scores_prompts
from ddpo.ops import chunked, cpp, tuned
from ddpo.schedule import MOST_TOKENS, Schedule
from ddpo.state import LEAST_TOKENS_CPU, check_dtype, pick_parallel
from ddpo.watch import peak_memory_gib

MIB = 2**20
MOST_STEPS = 64  # of a schedule that are looked at
CPP_BUFFER = 8 * MIB  # kBlockBytes of csrc/walk.h
KEPT_BYTES, MOST_KEPT = 20, 16  # of a kept probability, and V / the most a row keeps: csrc/linear_logp_sparse.cpp


@dataclass(frozen=True)
class Step:
    """Means over the steps of a run, all processes together; and its largest pack."""

    tokens: float
    rows: float  # completion rows: what reaches the head
    squares: float  # sum over sequences of tokens^2, for attention
    mean_length: float  # of a sequence, tokens
    again: float  # share of the tokens that pass forward once more, without gradient: batches of several packs
    micro_tokens: int  # as set, or what 'auto' comes to
    largest: int  # tokens of the largest pack with room without end
    longest: int  # tokens of the longest sequence
    source: str

    def pack(self, micro_tokens: int) -> int:
        """Tokens of the largest pack."""
        return min(max(micro_tokens, self.longest), self.largest)


@dataclass(frozen=True)
class Memory:
    """Bytes a process holds in a step from the second on."""

    base: float
    weights: float
    adapter: float
    gradients: float
    optimiser: float
    activations: float  # what forward keeps for backward
    backward: float  # one layer's, beside
    head: float  # buffers of linear_logp, and its gradient
    exchange: float  # between processes: buckets under DDP, whole layers under FSDP

    @property
    def total(self) -> float:
        return sum(getattr(self, f.name) for f in fields(self))


def plan(cfg: PlanConfig) -> dict:
    """Prints and returns the plan; bytes as MiB. See PlanConfig.

    Raises: ValueError for a model or setting that cannot be trained, and for a folder that is none.
    """
    on_gpu, world = cfg.gpus > 0, max(1, cfg.gpus)
    train = as_on_machine(cfg, on_gpu)
    config = read_config(cfg.model)
    if getattr(config, "quantization_config", None):
        raise ValueError(f"plan: {cfg.model} is quantised, which is not planned; name the model it was made from")
    dtype = getattr(torch, train.dtype)
    size = size_of(train, config, dtype)
    if (host := memory_of_this_machine()) < 4 * size.layer.all:
        raise ValueError(
            f"plan: measures two layers and their gradients here, more than this machine's {host / 2**20:,.0f} MiB"
        )
    step = step_of(cfg)
    bare = replace(train, compile=False, drop_below=0.0)
    with log.quiet():  # what the copies say is not for the reader
        passes = measure(bare, config, dtype, step.rows / step.tokens, for_cpu=not on_gpu)
    base = cfg.gpu_reserved * 2**30 if on_gpu else held_by_this_process()
    room = cfg.gpu_memory * 2**30 if on_gpu else memory_of_this_machine()

    def memory(tokens: int) -> Memory:
        """At the fuller of a step's first pack and a later one, which finds all gradients there."""
        later = max(1, min(tokens, step.largest - tokens))
        packs = [(tokens, True)] + [(later, False)] * (step.largest > tokens)
        found = (memory_of(train, size, step, passes(n), n, first, base, world) for n, first in packs)
        return max(found, key=lambda of: of.total)

    tokens = step.pack(step.micro_tokens)
    found = memory(tokens)
    load = base + (size.whole.all if on_gpu else loading(config, size, dtype))
    flop = flop_of(train, config, size, step, passes)
    rate = cfg.flops or (None if on_gpu else gemm_rate(dtype))
    result = {
        "model": cfg.model,
        "dtype": train.dtype,
        "machine": {"gpus": cfg.gpus, "memory_mib": room / MIB},
        "parameters": {"total": size.num_total, "trained": size.num_trained},
        "memory_mib": {**{f.name: getattr(found, f.name) / MIB for f in fields(found)}, "total": found.total / MIB},
        "loading_mib": load / MIB,
        "peak_mib": max(load, found.total) / MIB,
        "pack_tokens": tokens,
        "most_micro_tokens": most(lambda n: max(load, memory(step.pack(n)).total) <= room, step.largest),
        "step": {f.name: getattr(step, f.name) for f in fields(step)},
        "flop": {**flop, "total": sum(flop.values())},
        "flops": rate,
        "seconds": rate and sum(flop.values()) / (rate * cfg.efficiency * world),
    }
    if not cfg.json:
        tell(cfg, result)
    log.answer(cfg, result)
    return result


def as_on_machine(cfg: PlanConfig, on_gpu: bool) -> PlanConfig:
    """The settings with every 'auto' as it would turn out there. A GPU is taken to have bfloat16."""
    named = replace(cfg, dtype=check_dtype(cfg))
    if on_gpu:
        half = cfg.autocast == "bfloat16" or (cfg.autocast == cfg.dtype == "auto")
        dtype = "bfloat16" if named.dtype == "auto" else named.dtype
        return replace(named, dtype=dtype, autocast="bfloat16" if half else "off", drop_below=0.0)
    picked = pick_dtype(named.dtype, torch.device("cpu"))
    name: Any = str(picked).removeprefix("torch.")
    return replace(named, dtype=name, drop_below=pick_drop_below(cfg.drop_below, torch.device("cpu"), picked))


# --- a step -----------------------------------------------------------------------------------------------


def step_of(cfg: PlanConfig) -> Step:
    """Of the prepared folder where there is one, else as assumed. Raises ValueError."""
    least = MOST_TOKENS if cfg.gpus else LEAST_TOKENS_CPU
    if cfg.data and Path(cfg.data).exists():
        return _step_of_folder(cfg.data, cfg, least)
    length = cfg.tokens_per_prompt + cfg.tokens_per_response - 1
    of_item = {"response": 1, "pair": 2, "group": cfg.responses_per_group}[method_of(cfg).item]
    num, most = cfg.batch_size * of_item, of_item * -(-cfg.batch_size // max(1, cfg.gpus))  # in all, of a process
    rows = length if scores_prompts(cfg) else cfg.tokens_per_response
    why = f"assumed: {num} responses of {cfg.tokens_per_response} tokens, prompts of {cfg.tokens_per_prompt}"
    why += f" (there is no folder {cfg.data})" if cfg.data else ""
    micro = cfg.micro_tokens or min(MOST_TOKENS, max(least, of_item * length))
    again = float(of_item * length > micro)
    return Step(num * length, num * rows, num * length**2, length, again, micro, most * length, length, why)


def _step_of_folder(folder: str, cfg: PlanConfig, least: int) -> Step:
    data = Prepared(folder)
    schedule = Schedule(data, cfg, least)
    longest = int((data.num_prompt_tokens + data.num_tokens - 1)[schedule.forwarded_responses()].max(initial=1))
    steps = np.unique(np.linspace(0, schedule.num_steps - 1, MOST_STEPS).round().astype(int))
    world, sums, largest = max(1, cfg.gpus), np.zeros(5), 1
    for step in steps:
        for rank in range(world):
            of_rank = 0
            for batch in schedule.batches(int(step), rank, world):
                lengths = np.concatenate([np.diff(pack.cu_seqlens.numpy()) for pack in batch.packs])
                rows = sum(len(pack.targets) for pack in batch.packs)
                tokens = int(lengths.sum())
                sums += tokens, rows, (lengths.astype(float) ** 2).sum(), len(lengths), tokens * (len(batch.packs) > 1)
                of_rank += tokens
            largest = max(largest, of_rank)
    tokens, rows, squares, num, again = (sums / len(steps)).tolist()
    seen_all = len(steps) == schedule.num_steps
    why = f"{cfg.data}: mean of {len(steps)} of {schedule.num_steps} steps"
    micro = schedule.micro_tokens
    if not seen_all:  # another step may fill a pack
        largest = max(largest, micro, longest)
    return Step(tokens, rows, squares, tokens / (num or 1), again / (tokens or 1), micro, largest, longest, why)


# --- memory -----------------------------------------------------------------------------------------------


def memory_of(
    cfg: PlanConfig, size: Size, step: Step, one: Pass, tokens: int, is_first: bool, base: float, world: int
) -> Memory:
    """Of one of `world` processes, at a pack of so many tokens, the first of its step or a later one."""
    fsdp = world > 1 and pick_parallel(cfg) == "fsdp"
    shares = world if fsdp else 1
    adapter = size.whole.trained if cfg.lora else 0
    head = head_bytes(cfg, size, rows=tokens * step.rows / step.tokens, sequences=tokens / step.mean_length)
    gradients = size.whole.trained / shares
    if is_first:  # gradients come as what was saved goes
        gradients = max(0.0, gradients - one.saved - head)
    exchange = 0.0
    if fsdp:  # two layers and all that is outside of the layers stand whole, weights and gradients
        exchange = 2 * (size.layer.all + size.layer.trained) + size.outside.all + size.outside.trained
    elif world > 1:
        exchange = size.whole.trained  # the buckets of DDP
    return Memory(
        base=base,
        weights=(size.whole.all - adapter) / shares,
        adapter=adapter / shares,
        gradients=gradients,
        optimiser=2 * size.whole.trained / shares,
        activations=one.saved,
        backward=one.extra,
        head=head,
        exchange=exchange,
    )


def head_bytes(cfg: PlanConfig, size: Size, rows: float, sequences: float) -> float:
    """What linear_logp holds beside its rows: scratch, and for a trained head a gradient before it is added."""
    (V, D), item = size.head, getattr(torch, cfg.dtype).itemsize
    gradient = V * D * item if size.head_trained else 0
    if cfg.gpus:
        cast = V * D * 2 if cfg.autocast == "bfloat16" and item > 2 else 0
        return tuned.Choice().chunk_mib * MIB + gradient + cast + (4 * rows * D if size.head_trained else 0)
    if not cpp.is_built:
        return (chunked.CPU_CHUNK_BYTES if item >= 4 else chunked.HALF_CHUNK_BYTES) + gradient
    kept = 0
    if size.head_trained and cfg.drop_below:  # probabilities, a mean row a sequence, the rows themselves
        kept = rows * V / MOST_KEPT * KEPT_BYTES + sequences * V * item + rows * D * item
    return CPP_BUFFER * (1 if item >= 4 else 2) + gradient + kept


def loading(config, size: Size, dtype: torch.dtype) -> float:
    """Bytes while the weights are read: the file is mapped, and stays so beside them where its dtype is another."""
    of_file = getattr(config, "dtype", None) or torch.float32
    return size.num_total * (dtype.itemsize + (of_file.itemsize if of_file != dtype else 0))


def held_by_this_process() -> float:
    """Resident bytes of a process that has loaded what training loads, and passed a layer forward and backward."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    status = Path("/proc/self/status")
    if not status.exists():
        return peak_memory_gib() * 2**30
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def memory_of_this_machine() -> float:
    """Bytes, or what the container is allowed."""
    found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError):  # no such file, or 'max'
        found = min(found, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return found


def most(fits: Callable[[int], bool], high: int) -> int:
    """The largest number up to `high` that fits, 0 where none does."""
    if fits(high):
        return high
    low = 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


# --- work -------------------------------------------------------------------------------------------------


def flop_of(cfg: PlanConfig, config, size: Size, step: Step, passes: Callable[[int], Pass]) -> dict[str, float]:
    """FLOP of a step over all processes.

    Attention: 2 n^2 d a layer for n tokens and all heads' width d (the causal half), 2.5 times that backward. Head, in
    G = 2 N V D: frozen 2, trained 4; about 1 either way under drop_below.
    """
    text, (V, D) = config.get_text_config(), size.head
    width = text.num_attention_heads * (getattr(text, "head_dim", None) or D // text.num_attention_heads)
    forwards = 1 + cfg.activation_checkpointing
    products = passes(round(step.tokens)).flop  # a forward's share of them, where some pass once more without gradient:
    again = step.again / (forwards + 1 + (not cfg.lora))
    attention = 2 * step.squares * width * text.num_hidden_layers
    head = 1 if cfg.drop_below else 4 if size.head_trained else 2
    return {
        "layers": products * (1 + again),
        "attention": attention * (forwards + 2.5 + step.again),
        "head": 2 * step.rows * V * D * (head + step.again),
    }


def gemm_rate(dtype: torch.dtype) -> float:
    """FLOP per second of one large product on this CPU, the best of five."""
    a, b = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
    torch.mm(a, b)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(times)


# --- telling ----------------------------------------------------------------------------------------------

PARTS = {
    "base": "{base}",
    "weights": "weights, {dtype}",
    "adapter": "adapter",
    "gradients": "gradients",
    "optimiser": "AdamW's moments",
    "activations": "activations of {pack_tokens:,} tokens",
    "backward": "one layer's backward",
    "head": "head: buffers, gradient",
    "exchange": "exchange between processes",
}


def tell(cfg: PlanConfig, result: dict) -> None:
    machine = f"{cfg.gpus} GPUs of {cfg.gpu_memory:g} GiB" if cfg.gpus else "this machine's CPU"
    table = Table(title=f"{cfg.model}, {cfg.method} on {machine}: a process's memory", title_justify="left")
    table.add_column("part")
    table.add_column("MiB", justify="right")
    base = "set aside: context, libraries, gaps" if cfg.gpus else "interpreter, libraries"
    for name, label in PARTS.items():
        if result["memory_mib"][name]:
            table.add_row(label.format(**result, base=base), f"{result['memory_mib'][name]:,.0f}")
    table.add_section()
    table.add_row("a step", f"{result['memory_mib']['total']:,.0f}")
    if result["loading_mib"]:
        table.add_row("while the model is loaded", f"{result['loading_mib']:,.0f}")
    fits = "fits" if result["peak_mib"] <= result["machine"]["memory_mib"] else "does not fit"
    table.add_row(f"there is ({fits})", f"{result['machine']['memory_mib']:,.0f}")
    say = log.console.print
    say(table)
    total, trained = result["parameters"].values()
    say(f"parameters     {total:,}, trained {trained:,} ({trained / total:.2%})")
    room = result["most_micro_tokens"]
    say(f"micro_tokens   {result['step']['micro_tokens']:,}; " + (f"up to {room:,} fit" if room else "none fit"))
    step, flop = result["step"], result["flop"]
    say(f"tokens a step  {step['tokens']:,.0f}, {step['rows']:,.0f} of them reach the head; {step['source']}")
    parts = ", ".join(f"{name} {share / flop['total']:.0%}" for name, share in flop.items() if name != "total")
    say(f"FLOP a step    {flop['total']:.3g} ({parts})")
    if result["seconds"]:
        how = "given" if cfg.flops else "measured"
        say(f"seconds a step {result['seconds']:.3g} at {cfg.efficiency:.0%} of {result['flops']:.3g} FLOP/s, {how}")
    else:
        say("seconds a step: give the GPU's --flops (and --efficiency)")
