"""The weighted DPO loss from hidden states: time, error and peak memory of linear_logp beside other ways.

python -m benchmarks.ops                      # both cases, frozen and trained head, no gradient; results/ops.json
python -m benchmarks.ops --quick --only 'eager|cpp'
python -m benchmarks.ops --device cuda        # bfloat16, the peers' GPU paths

First every side is held to float64; one that is wrong makes the exit status 1. Then all sides run interleaved in one
process. Times are in G, one torch.mm of all logits into fresh memory, and each round is divided by its own G.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import measure, states, tables
from benchmarks.truth import Truth, errors, other_arithmetic, truth
from ddpo import losses, reference
from ddpo.ops import linear_logp, sequence_sum

ROOT = Path(__file__).parent.parent
BETA = 0.1
GROUPS = {"frozen": 2, "trained": 3, "no gradient": 1}  # head GEMMs that only an approximation can save
THRESHOLDS = (10, 12, 14, 16, 18)  # drop_below = 2^-t
SOUND = 16  # the trainer's default: from here on drop_below must stay under bfloat16 arithmetic
EXACT = {"hidden": 1e-4, "head": 1e-4, "logp": 1e-2}  # or twice eager's own error, whichever is larger


# --- sides ------------------------------------------------------------------------------------------------


class Side(NamedTuple):
    run: Callable[[states.Case, Tensor, Tensor], tuple[Tensor, Tensor]]  # -> loss, sequence log-probs (S,)
    weighted: bool = True  # False: the plain DPO loss, no weights and a reference of zero
    compiled: bool = False
    bound: str | None = "exact"  # 'exact', 'bf16' (arithmetic's error), or None: published, not held
    slow: bool = False  # runs with --slow alone, and is timed in the first round alone


def by_token(logp: Callable[[states.Case, Tensor, Tensor], Tensor], **traits) -> Side:
    """A side that gives token log-probs (N,); sums and loss are PyTorch's and ours for all of them."""

    def run(case, hidden, head):
        sums = sequence_sum(logp(case, hidden, head).float(), case.segments)
        return losses.ddpo(sums, case.ref_logp, case.pairs, case.weight, beta=BETA).mean(), sums

    return Side(run, **traits)


def eager(case, hidden, head):
    return torch.log_softmax((hidden @ head.T).float(), 1).gather(1, case.targets[:, None])[:, 0]


def torch_chunked(**options):
    def logp(case, hidden, head):
        chunks = torch.nn.LinearCrossEntropyOptions(**options)
        return -F.linear_cross_entropy(hidden, head, case.targets, reduction="none", options=chunks)

    return logp


def cce(impl: str, **options):
    def logp(case, hidden, head):
        from cut_cross_entropy import linear_cross_entropy

        return -linear_cross_entropy(hidden, head, case.targets, reduction="none", impl=impl, **options)

    return logp


def liger(compiled: bool) -> Side:
    def run(case, hidden, head):
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

        loss = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=False, compiled=compiled)
        S = len(case.segments) - 1
        value, (chosen, rejected, *_) = loss(head, hidden.view(S, -1, hidden.shape[1]), case.targets.view(S, -1))
        return value, torch.cat([chosen, rejected])

    return Side(run, weighted=False, compiled=compiled)


def ours(**options):
    def logp(case, hidden, head):
        return linear_logp(hidden, head, case.targets, segments=case.segments, **options)

    return logp


def sides(device: torch.device) -> dict[str, Side]:
    found = {
        "eager": by_token(eager),
        "F.linear_cross_entropy, 256 rows": by_token(torch_chunked(batch_chunk_size=256)),
        "F.linear_cross_entropy, default": by_token(torch_chunked(), slow=device.type == "cpu"),  # 8 rows at 1,024
        "Liger DPO": liger(compiled=False),
        "Liger DPO, compiled": liger(compiled=True),
    }
    if device.type == "cuda":
        found["CCE"] = by_token(cce("cce"), compiled=True, bound=None)
        found["CCE, no filter"] = by_token(cce("cce", filter_eps=None), compiled=True)
        impls = ("torch", "triton-chunked", "triton-fused")
    else:
        found["CCE, torch_compile"] = by_token(cce("torch_compile"), compiled=True)
        impls = ("torch", "cpp")
    found |= {f"ddpo {impl}": by_token(ours(impl=impl)) for impl in impls}
    if device.type == "cpu":
        for t in THRESHOLDS:
            logp = ours(impl="cpp", drop_below=2.0**-t)
            found[f"ddpo cpp, drop_below 2^-{t}"] = by_token(logp, bound="bf16" if t >= SOUND else None)
    return found


def once(side: Side, case: states.Case, group: str) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """One forward, and backward if the group has one -> sequence log-probs, gradients of hidden and head."""
    hidden, head = case.hidden.detach(), case.head.detach()
    hidden.requires_grad_(group != "no gradient")
    head.requires_grad_(group == "trained")
    with torch.set_grad_enabled(group != "no gradient"):
        loss, logp = side.run(case, hidden, head)
    if hidden.requires_grad:
        loss.backward()
    return logp.detach(), hidden.grad, head.grad


# --- right, then fast, then small ---------------------------------------------------------------------------


def truths(case: states.Case) -> dict[bool, Truth]:
    """By whether the loss is weighted."""
    chosen, rejected = case.pairs.unbind(1)
    ref, weight = case.ref_logp.double(), case.weight.double()

    def weighted(logp):
        pair = (logp[chosen], logp[rejected], ref[chosen], ref[rejected])
        return reference.ddpo(*pair, weight, BETA).mean()

    def plain(logp):
        return reference.dpo(logp[chosen], logp[rejected], 0.0, 0.0, BETA).mean()

    return {True: truth(case, weighted), False: truth(case, plain)}


def gate(found: dict[str, Side], case: states.Case, group: str, true: dict, bf16: float) -> dict[str, dict]:
    """Runs every side once: its errors and what they break, or why it did not run. 'eager' comes first."""
    report, limits = {}, EXACT
    for name, side in found.items():
        try:
            wrong = errors(true[side.weighted], *once(side, case, group))
        except Exception as err:  # a peer that is missing or refuses is no reason to lose the others
            report[name] = {"skipped": f"{type(err).__name__}: {err}".splitlines()[0]}
            continue
        if name == "eager":
            limits = {key: max(limit, 2 * wrong.get(key, 0)) for key, limit in EXACT.items()}
        gradients = dict.fromkeys(("hidden", "head"), bf16) if side.bound == "bf16" else {}
        bounds = {**limits, **gradients} if side.bound else {}
        broken = {k: limit for k, limit in bounds.items() if k in wrong and not wrong[k] <= limit}
        report[name] = {"error": {k: measure.short(e) for k, e in wrong.items()}, "broken": broken}
    return report


def clock(found: dict[str, Side], case: states.Case, group: str, rounds: int) -> dict:
    """Seconds of every side; in G; over eager; useful GEMM rate over that of torch.mm into memory that is kept."""
    kept = torch.mm(case.hidden, case.head.T)
    runs = {
        "G": lambda: torch.mm(case.hidden, case.head.T),
        "GEMM": lambda: torch.mm(case.hidden, case.head.T, out=kept),
        **{name: partial(once, side, case, group) for name, side in found.items()},
    }
    slow = {name for name, side in found.items() if side.slow}
    taken = measure.interleaved(runs, rounds, case.hidden.device, slow)
    report = {}
    for name in found:
        own = taken[name]
        of = {key: own / side[: len(own)] for key, side in taken.items() if key in ("G", "GEMM", "eager")}
        figures = {"seconds": own, "G": of["G"], "gemm_percent": 100 * GROUPS[group] / of["GEMM"]}
        figures |= {"of_eager": of["eager"]} if "eager" in of else {}
        report[name] = {key: measure.spread(values) for key, values in figures.items()}
    machine = {"G_seconds": taken["G"], "gflops": case.gemm_flop / taken["GEMM"] / 1e9}
    return {"machine": {key: measure.spread(values) for key, values in machine.items()}, "sides": report}


def peak(side: Side, case: states.Case, group: str) -> float | None:
    """Peak extra memory of one run, MiB, without the gradient that a trained head has in any case."""
    few = case if side.compiled else first_rows(case, 16 * len(case.ref_logp))  # what compiles, compiles for a shape
    run, warm_up = partial(once, side, case, group), partial(once, side, few, group)
    found = measure.peak_extra_mib(run, warm_up, case.hidden.device)
    own = case.head.nbytes / 2**20 if group == "trained" else 0
    return None if found is None else measure.short(found - own)


def first_rows(case: states.Case, rows: int) -> states.Case:
    """A small case of as many sequences: what starts thread pools and loads libraries."""
    rows = min(rows, len(case.hidden))
    segments = case.segments * rows // len(case.hidden)
    return case._replace(hidden=case.hidden[:rows], targets=case.targets[:rows], segments=segments)


def memory(names: list[str], case: states.Case, group: str) -> dict[str, float | None]:
    """Peak extra memory of every side, on a CPU each in a process of its own."""
    device = case.hidden.device
    if device.type == "cuda":
        return {name: peak(sides(device)[name], case, group) for name in names}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        file = Path(folder) / "case.pt"
        torch.save(case._asdict(), file)

        def in_a_process(name):
            command = [
                sys.executable,
                "-m",
                "benchmarks.ops",
                "--memory-of",
                name,
                "--group",
                group,
                "--states",
                str(file),
            ]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
            if done.returncode:  # minutes of others' figures stand; this one is missing
                print(f"no peak memory: {name}, {group}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
                return None
            return json.loads(done.stdout.splitlines()[-1])

        return dict(zip(names, pool.map(in_a_process, names), strict=True))


# --- command ------------------------------------------------------------------------------------------------


def bench(case: states.Case, chosen: dict[str, Side], rounds: int, with_memory: bool) -> dict:
    torch.compiler.reset()  # else the peers' second shape would compile to code for every shape
    true = truths(case)
    other = {k: measure.short(v) for k, v in other_arithmetic(case, true[True]).items()}
    shape = {"N": len(case.hidden), "S": len(case.ref_logp), "D": case.hidden.shape[1], "V": len(case.head)}
    shape["dtype"] = str(case.hidden.dtype).removeprefix("torch.")
    report = {"name": case.name, "shape": shape, "other_arithmetic": other, "groups": {}}
    exact = {name: side for name, side in chosen.items() if side.bound == "exact"}  # the others approximate gradients
    groups = {group: exact if group == "no gradient" else chosen for group in GROUPS}
    checked = {group: gate(found, case, group, true, other["bf16"]) for group, found in groups.items()}
    del true
    for group, entries in checked.items():
        there = {name: side for name, side in groups[group].items() if "skipped" not in entries[name]}
        timed = clock(there, case, group, rounds)
        mib = memory([name for name in there if tables.shown(name)], case, group) if with_memory else {}
        for name, entry in entries.items():
            entry |= timed["sides"].get(name, {}) | ({"extra_mib": mib[name]} if name in mib else {})
        report["groups"][group] = {"machine": timed["machine"], "sides": entries}
    return report


def complain(result: dict) -> int:
    """Says on stderr what did not run and what was wrong -> exit status."""
    status = 0
    for case in result["cases"]:
        for group, report in case["groups"].items():
            for name, entry in report["sides"].items():
                if "skipped" in entry:
                    status |= name.startswith("ddpo")
                    print(f"skipped: {name}, {group}: {entry['skipped']}", file=sys.stderr)
                elif entry["broken"]:
                    status = 1
                    print(f"WRONG: {name}, {group}: {entry['error']}, wanted {entry['broken']}", file=sys.stderr)
    return status


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu (float32) or cuda (bfloat16)")
    parser.add_argument("--rows", type=int, help="completion rows N; default 1,024, on a GPU 8,192")
    parser.add_argument("--sequences", type=int, help="of equal length; default one of 256 rows each")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", metavar="REGEX", help="sides; eager always runs")
    parser.add_argument("--case", choices=("real", "random"))
    parser.add_argument("--slow", action="store_true", help="also the sides that take minutes, in one round")
    parser.add_argument(
        "--quick", action="store_true", help="256 rows of stories, three rounds, no memory, nothing written"
    )
    parser.add_argument("--write", action=argparse.BooleanOptionalAction, help="results/ops.json; default unless quick")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--group", choices=GROUPS, help=argparse.SUPPRESS)
    parser.add_argument("--states", help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = torch.device(args.device)
    found = sides(device)
    if args.memory_of:
        print(json.dumps(peak(found[args.memory_of], states.Case(**torch.load(args.states)), args.group)))
        return 0
    on_gpu = device.type == "cuda"
    rows = args.rows or (8192 if on_gpu else 256 if args.quick else 1024)
    batch = {"sequences": args.sequences or max(2, rows // 256), "device": device}
    batch["dtype"] = torch.bfloat16 if on_gpu else torch.float32
    chosen = {
        name: side
        for name, side in found.items()
        if name == "eager" or (re.search(args.only, name) and (args.slow or not side.slow))
    }
    result = {**measure.setting(), "rounds": 3 if args.quick else args.rounds, "cases": []}
    for name in [args.case] if args.case else ["real"] if args.quick else ["real", "random"]:
        if name == "real":
            case, run = states.real(rows, **batch), chosen
        else:
            shape = (rows, 4096, 128256) if on_gpu else (rows // 8, 896, 151936)
            case, run = states.random(*shape, **batch), {n: side for n, side in chosen.items() if tables.shown(n)}
        result["cases"].append(bench(case, run, result["rounds"], with_memory=name == "real" and not args.quick))
    status = complain(result)
    write = not args.quick if args.write is None else args.write
    measure.tell(result, tables.ops(result), "ops", write and not status)
    return status


if __name__ == "__main__":
    sys.exit(main())
