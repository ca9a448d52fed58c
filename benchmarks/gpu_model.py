"""What the head's log-probs and gradients should cost on a GPU: computed, not measured.

Each step takes the longer of its FLOP at the tensor cores' peak and its bytes at the memory's: a lower bound that
kernels approach, the same for every side, so that its ratios say more than its milliseconds. Registers, shared memory
and programs per multiprocessor are read from compiled code (benchmarks/compiled.py).

python -m benchmarks.gpu_model     # prints the tables, writes results/gpu_model.json
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import triton

from benchmarks import compiled

RESULTS = Path(__file__).parent / "results" / "gpu_model.json"
ROWS = 8192
PAIR_ROWS = 1024  # of one pair, chosen and rejected: the chunk of the peer that takes a pair at a time
LOGITS, PANEL = (256 << 20, 1024 << 20), 128 << 20  # bytes: the chunked path's buffer (two sizes), the fused path's


class Gpu(NamedTuple):
    """Dense bfloat16 TFLOP/s, TB/s: NVIDIA's datasheets of the SXM boards."""

    code: str  # key of compiled.GPUS
    bf16: float
    bandwidth: float
    shared_kib: int  # of a multiprocessor: CUDA C++ Programming Guide, technical specifications


GPUS = {
    "A100 80GB": Gpu("cuda80", 312.0, 2.039, 164),
    "H100": Gpu("cuda90", 989.4, 3.35, 228),
    "H200": Gpu("cuda90", 989.4, 4.8, 228),
}


class Step(NamedTuple):
    name: str
    flop: float
    bytes: float


class Side(NamedTuple):
    """One way to get log-probs and gradients of N rows; peak_bytes beside inputs and gradients in their dtype."""

    name: str
    head: str  # 'frozen' or 'trained'
    steps: list[Step]
    peak_bytes: float


def gemm(name: str, m: int, n: int, k: int, read: float, written: float) -> Step:
    return Step(name, 2.0 * m * n * k, read + written)


def ours(N: int, D: int, V: int) -> list[Side]:
    """Both paths. Half types: 2 bytes an input, 4 a logit."""
    h, W, z = 2 * N * D, 2 * V * D, N * V
    panels = triton.cdiv(2 * N * V, PANEL)
    lse = gemm("log-sum-exp", N, V, D, h + W, 4 * N * V / 1024)
    pairs = Step("pairs", 0, 8 * N)
    fused = [
        lse,
        pairs,
        gemm("dz", N, V, D, panels * h + W, 2 * z),
        gemm("dh", N, V, D, 2 * z + W, 8 * panels * N * D),
    ]
    of_head = gemm("dW", N, V, D, 2 * z + panels * h, W)
    sides = [
        Side("ours, fused", "frozen", fused, PANEL + 4 * N * D),
        Side("ours, fused", "trained", [*fused, of_head], PANEL + 4 * N * D),
    ]
    for buffer in LOGITS:
        name = f"ours, chunked, {buffer >> 20} MiB"
        chunks, columns = triton.cdiv(N, max(2, buffer // (4 * V) // 128 * 128)), triton.cdiv(4 * N * V, buffer)
        frozen = [
            gemm("logits", N, V, D, h + chunks * W, 4 * z),
            Step("slopes", 0, (8 + 2) * z),
            gemm("dh", N, V, D, 2 * z + chunks * W, (4 + 4 + 2) * N * D),
            Step("pairs, rows scaled", 0, 2 * h),
            Step("rows * upstream", 0, 2 * h),
        ]
        trained = [
            lse,
            pairs,
            gemm("logits", N, V, D, columns * h + W, 4 * z),
            Step("slopes", 0, (4 + 2) * z),
            gemm("dh", N, V, D, 2 * z + W, 8 * columns * N * D),
            gemm("dW", N, V, D, 2 * z + columns * h, (4 + 4 + 2) * V * D),
        ]
        sides.append(Side(name, "frozen", frozen, buffer + h))
        sides.append(Side(name, "trained", trained, buffer + 4 * N * D + 4 * V / columns * D))
    return sides


def peers(N: int, D: int, V: int) -> list[Side]:
    """GEMMs and V-sized buffers of Liger 0.8.5, TRL 1.16, cut-cross-entropy 25.1, torch 2.13 and verl of late 2026, as
    their sources say; what they move is set at its least: every such buffer written once and read once by each step
    that wants it. The reference policy's pass is left out, and the tiles that CCE's filter skips are counted."""
    h, W, z = 2 * N * D, 2 * V * D, N * V

    def side(name, head, num_gemms, bytes_per_logit, peak_bytes, extra=0.0):
        steps = [gemm("GEMM", N, V, D, h + W, 0) for _ in range(num_gemms)]
        return Side(name, head, [*steps, Step("V-sized buffers", 0, bytes_per_logit * z + extra)], peak_bytes)

    pair = 8.5 * PAIR_ROWS * V
    pairs = N / PAIR_ROWS
    return [
        # bf16 logits, fp32 log-softmax, their gradients; frozen: no dW
        side("eager, full logits", "frozen", 2, 14, 14 * z),
        side("eager, full logits", "trained", 3, 16, 14 * z),
        # a pair at a time; dW added up in bf16 once a pair
        side("Liger DPO", "frozen", 2, 14, pair),
        side("Liger DPO", "trained", 3, 16, pair + 12 * V * D, extra=6 * V * D * pairs),
        side("CCE", "frozen", 3, 0, 4 * N),
        side("CCE", "trained", 4, 0, 4 * N),
        *(side("verl, Triton", head, 4, 6, 2 * N * 9504 + 8 * N * V / 1024) for head in ("frozen", "trained")),
        # tiles of at most 4,096 rows in bf16, sums in fp32
        side("TRL, chunked", "frozen", 3, 12, 4 * N * D),
        side("TRL, chunked", "trained", 4, 14, 4 * N * D + 4 * V * D),
        side("torch F.linear_cross_entropy 'none'", "frozen", 3, 10, LOGITS[0]),
        side("torch F.linear_cross_entropy 'none'", "trained", 4, 12, LOGITS[0] + 4 * V * D),
    ]


def step_ms(step: Step, gpu: Gpu) -> float:
    return max(step.flop / (gpu.bf16 * 1e12), step.bytes / (gpu.bandwidth * 1e12)) * 1e3


def programs_per_multiprocessor(row: dict, gpu: Gpu) -> int:
    """What registers (64 Ki, dealt by the 8 to a warp's thread), shared memory and 64 warps leave room for."""
    by_registers = 65536 // (row["num_warps"] * 32 * (-(-row["registers"] // 8) * 8))
    by_shared = (gpu.shared_kib << 10) // (row["shared"] + 1024)
    return min(by_registers, by_shared, 64 // row["num_warps"], 32)


def model() -> dict:
    sides = []
    for name, (D, V, _) in compiled.MODELS.items():
        for gpu_name, gpu in GPUS.items():
            for side in [*ours(ROWS, D, V), *peers(ROWS, D, V)]:
                steps = [{"name": s.name, "tflop": s.flop / 1e12, "gb": s.bytes / 1e9, "ms": step_ms(s, gpu)}
                         for s in side.steps]  # fmt: skip
                found = {"model": name, "gpu": gpu_name, "side": side.name, "head": side.head}
                total = {"ms": sum(s["ms"] for s in steps), "peak_mib": side.peak_bytes / 2**20, "steps": steps}
                sides.append({**found, **total})
    kernels = []
    codes = {gpu.code: gpu for gpu in GPUS.values()}
    for code, gpu in codes.items():
        for row in compiled.report(code, list(compiled.MODELS)):
            programs = programs_per_multiprocessor(row, gpu)
            kernels.append({**row, "programs": programs, "occupancy": programs * row["num_warps"] / 64})
    return {"kind": "computed, not measured", "rows": ROWS, "sides": sides, "kernels": kernels}


def tables(result: dict) -> str:
    """Markdown: time and memory of each side, then what the compiled kernels take."""
    lines = [f"Computed, not measured: {ROWS} rows, bfloat16, lower bounds in ms, and MiB beside inputs and gradients."]
    names = list(dict.fromkeys((s["side"], s["head"]) for s in result["sides"]))
    for model_name, (D, V, _) in compiled.MODELS.items():
        lines += ["", f"| {model_name} (D {D}, V {V}) | head | " + " | ".join(GPUS) + " | MiB |"]
        lines.append("| --- " * (3 + len(GPUS)) + "|")
        for name in sorted(names, key=lambda n: n[1]):
            rows = [s for s in result["sides"] if (s["side"], s["head"]) == name and s["model"] == model_name]
            cells = [f"{s['ms']:.2f}" for s in rows] + [f"{rows[0]['peak_mib']:,.0f}"]
            lines.append("| " + " | ".join([*name, *cells]) + " |")
    lines += ["", "| kernel | code | registers | shared, KiB | warps | programs a multiprocessor | occupancy |"]
    lines.append("| --- " * 7 + "|")
    for k in result["kernels"]:
        cells = [k["kernel"], k["gpu"], k["registers"], k["shared"] >> 10, k["num_warps"], k["programs"]]
        lines.append("| " + " | ".join(map(str, cells)) + f" | {k['occupancy']:.0%} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    result = model()
    print(tables(result))
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
