"""Every kernel alone: the C++ ones, and on a GPU the Triton ones. Writes results/kernels.json.

python -m benchmarks.kernels             # random hidden states in SmolLM2's shape
python -m benchmarks.kernels --device cuda --rows 8192 --width 4096 --vocabulary 128256

FLOP and bytes are a model: the products that the algorithm asks for, and every tensor in and out once. Each rate stands
beside what this machine did in the same rounds: torch.mm of all logits, and a copy of 256 MiB.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from benchmarks import measure, states, tables
from ddpo.model import DROP_BELOW
from ddpo.ops.cpp import TAIL_BLOCK


class Kernel(NamedTuple):
    launch: Callable
    args: tuple
    flop: float

    def bytes(self) -> int:
        outputs = self.launch(*self.args)
        outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        return sum(x.nbytes for x in (*self.args, *outputs) if isinstance(x, torch.Tensor))


def cpp(case: states.Case, upstream: torch.Tensor) -> dict[str, Kernel]:
    """The kernels of csrc/, by the op's name and what sets the run apart."""
    op, G, (N, D), V, S = torch.ops.ddpo, case.gemm_flop, case.hidden.shape, len(case.head), len(case.ref_logp)
    plain = (case.hidden, case.head, case.targets, None, 1.0, None)
    sparse = (*plain, case.segments, DROP_BELOW)
    _, lse, _ = op.linear_logp_fwd(*plain, False)
    _, _, *kept, _ = op.linear_logp_sparse_fwd(*sparse, True)
    after = (case.hidden, case.targets, case.segments, upstream, 1.0, *kept)
    few = 2 * D * (kept[3].numel() + S * V + N * V // TAIL_BLOCK)  # kept entries, mean rows, and their use
    return {
        "linear_logp_fwd": Kernel(op.linear_logp_fwd, (*plain, False), G),
        "linear_logp_fwd, rows": Kernel(op.linear_logp_fwd, (*plain, True), 2 * G),
        "linear_logp_bwd, hidden": Kernel(op.linear_logp_bwd, (*plain, lse, upstream, True, False, False), 2 * G),
        "linear_logp_bwd, hidden and head": Kernel(
            op.linear_logp_bwd, (*plain, lse, upstream, True, True, False), 3 * G
        ),
        "linear_logp_sparse_fwd": Kernel(op.linear_logp_sparse_fwd, (*sparse, False), G + few),
        "linear_logp_sparse_fwd, head trained": Kernel(op.linear_logp_sparse_fwd, (*sparse, True), G + few),
        "linear_logp_sparse_bwd": Kernel(op.linear_logp_sparse_bwd, (*after, True, False), few),
    }


def triton(case: states.Case, upstream: torch.Tensor) -> dict[str, Kernel]:
    """The launchers of kernels/."""
    from ddpo.kernels import linear_logp, preference

    G, N, V, dtype = case.gemm_flop, len(case.hidden), len(case.head), case.hidden.dtype
    plain = (case.hidden, case.head, case.targets, None, 1.0, None)
    logp, lse = linear_logp.fwd(*plain)
    rows = min(N, (256 << 20) // (4 * V))  # of a chunk's logits, as ddpo.ops.triton takes them
    logits = torch.randn(rows, -(-V // 64) * 64, device=case.hidden.device)
    known = (case.targets[:rows], None, 1.0, None, logp[:rows], lse[:rows])
    denominator = upstream.new_tensor(len(case.pairs))
    pairs = (logp, case.segments, case.pairs, case.weight, case.ref_logp, denominator, None, 0.1, 0.0, False)
    return {
        "linear_logp.fwd": Kernel(linear_logp.fwd, plain, G),
        "linear_logp.bwd, hidden": Kernel(linear_logp.bwd, (*plain, lse, upstream, (True, False, False)), 2 * G),
        "linear_logp.bwd, hidden and head": Kernel(
            linear_logp.bwd, (*plain, lse, upstream, (True, True, False)), 3 * G
        ),
        "linear_logp.slopes, forward": Kernel(linear_logp.slopes, (logits, V, dtype, *known), 0),
        "linear_logp.slopes, backward": Kernel(linear_logp.slopes, (logits, V, dtype, *known, upstream[:rows]), 0),
        "preference.fwd": Kernel(preference.fwd, (*pairs, None), 0),
        "preference.fwd, rows": Kernel(preference.fwd, (*pairs, torch.randn_like(case.hidden)), 0),
    }


def without_entry(kernels: dict[str, Kernel]) -> set[str]:
    """C++ kernels that are registered and not timed."""
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("ddpo::")]
    registered = {n.split("::")[1] for n in names if torch._C._dispatch_has_kernel_for_dispatch_key(n, "CPU")}
    return registered - {name.split(",")[0] for name in kernels}


def bench(kernels: dict[str, Kernel], case: states.Case, rounds: int) -> dict:
    device = case.hidden.device
    logits = torch.mm(case.hidden, case.head.T)
    source, copy = (torch.ones(64 << 20, device=device) for _ in range(2))
    nbytes = {name: kernel.bytes() for name, kernel in kernels.items()}  # the run also warms up
    runs = {name: partial(kernel.launch, *kernel.args) for name, kernel in kernels.items()}
    runs |= {"GEMM": lambda: torch.mm(case.hidden, case.head.T, out=logits), "copy": lambda: copy.copy_(source)}
    taken = measure.interleaved(runs, rounds, device)
    gemm, copied = case.gemm_flop / taken["GEMM"] / 1e9, 2 * source.nbytes / taken["copy"] / 1e9
    report = {}
    for name, kernel in kernels.items():
        rates = {"gflops": (kernel.flop, gemm), "gbytes": (nbytes[name], copied)}
        report[name] = {"ms": measure.spread(1e3 * taken[name]), "flop": kernel.flop, "bytes": nbytes[name]}
        for key, (amount, of) in rates.items():
            rate = amount / taken[name] / 1e9
            report[name] |= {key: measure.spread(rate), f"{key}_percent": measure.spread(100 * rate / of)}
    return {"gemm_gflops": measure.spread(gemm), "copy_gbytes": measure.spread(copied), "kernels": report}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu (float32) or cuda (bfloat16)")
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--write", action="store_true", help="results/kernels.json")
    args = parser.parse_args()
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    case = states.random(args.rows, args.width, args.vocabulary, args.sequences, device, dtype)
    kernels = (triton if device.type == "cuda" else cpp)(case, torch.randn(args.rows, device=device))
    write = vars(args).pop("write")
    result = {**measure.setting(), **vars(args), **bench(kernels, case, args.rounds)}
    measure.tell(result, tables.kernels(result), "kernels", write)
    missing = without_entry(kernels) if device.type == "cpu" else set()
    if missing:
        print(f"no entry in benchmarks/kernels.py: {', '.join(sorted(missing))}", file=sys.stderr)
    return len(missing) > 0


if __name__ == "__main__":
    sys.exit(main())
