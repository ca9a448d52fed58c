"""Compiles every kernel for GPUs that are not there and reads what the compilers made of it: registers, spills,
shared memory, tensor-core instructions. Runs on any machine with Triton; no GPU is asked for anything.

Forward and backward themselves run, on tensors without memory and with a driver that names the GPU wanted and only
compiles: block sizes, warps and argument specialisation are those of a launch on that GPU.

python -m benchmarks.compiled --gpus cuda90 gfx942 --models llama-3.1-8b --json FILE
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9's default, said aloud: unset, it warns

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from ddpo.kernels import preference
from ddpo.ops.implementation import Call
from ddpo.ops.triton import Path as KernelPath

GPUS = {  # name: target; shared memory of one program, KiB; where both are said
    "cuda80": (GPUTarget("cuda", 80, 32), 163),  # CUDA C++ Programming Guide, technical specifications by capability
    "cuda90": (GPUTarget("cuda", 90, 32), 227),
    "cuda100": (GPUTarget("cuda", 100, 32), 227),
    "cuda120": (GPUTarget("cuda", 120, 32), 99),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64),  # AMD CDNA 3 and CDNA 4 instruction set guides, LDS
    "gfx950": (GPUTarget("hip", "gfx950", 64), 160),
}
MODELS = {  # D, V, softcap, from the models' config.json
    "llama-3.1-8b": (4096, 128256, None),
    "qwen2.5-0.5b": (896, 151936, None),
    "gemma-2-2b": (2304, 256000, 30.0),
    "smollm2-135m": (576, 49152, None),
}
TENSOR_CORE = {  # one of these opcodes must be there where the source says tl.dot
    "cuda80": r"\bHMMA",
    "cuda90": r"\bHGMMA",
    "cuda100": r"\b(?:UTC\w*MMA|HMMA)",
    "cuda120": r"\bHMMA",
    "gfx942": r"\bv_mfma_\w+",
    "gfx950": r"\bv_mfma_\w+",
}
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Compiler:
    """A driver of Triton for one GPU that is not there."""

    def __init__(self, gpu: str):
        self.target, shared = GPUS[gpu]
        self.device = list(GPUS).index(gpu)  # Triton keeps compiled kernels by device
        properties = {"max_shared_mem": shared << 10}
        self.utils = SimpleNamespace(get_device_properties=lambda device: properties)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return 0


def launches(gpu: str, function, *args) -> list:
    """The kernels that function(*args) would launch on the GPU, compiled: (name, kernel), each specialisation once."""
    seen = {}
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        seen[kernel.hash] = (self.fn.__name__, kernel)

    driver.set_active(Compiler(gpu))
    JITFunction.run = compile_only
    try:
        function(*args)
    finally:
        JITFunction.run = run
    return list(seen.values())


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def compile_all(gpu: str, D: int, V: int, softcap: float | None, N: int = 8192, S: int = 16) -> list:
    """Every kernel of both paths at one shape, head frozen and trained, with bfloat16 inputs. A tensor without memory
    has no values: a path that waited for one would stop here."""
    call = Call(empty(N, D), empty(V, D), empty(N, dtype=torch.int64), None, 1.0, softcap, None, 0.0)
    per_row = empty(N, dtype=torch.float32)
    found = []

    def both_ways(path, wants):
        _, saved = path.forward(call, wants)
        path.backward(call, saved, per_row, wants)

    for name in ("chunked", "fused"):
        for head_trained in (False, True):
            found += launches(gpu, both_ways, KernelPath(name), (True, head_trained, False))
    pairs, segments = empty(S // 2, 2, dtype=torch.int64), empty(S + 1, dtype=torch.int64)
    weight, ref, one = (empty(*s, dtype=torch.float32) for s in ((S // 2,), (S,), ()))
    for odds in (False, True):
        for rows in (call.hidden, None):
            args = (per_row, segments, pairs, weight, None if odds else ref, one, one if odds else None)
            found += launches(gpu, preference.fwd, *args, 0.1, 0.0, odds, rows)
    return list({kernel.hash: (name, kernel) for name, kernel in found}.values())


def read(gpu: str, name: str, kernel) -> dict:
    """What the binary says of itself."""
    meta, assembly = kernel.metadata, kernel.asm.get("ptx") or kernel.asm["amdgcn"]
    figures = {
        "kernel": name,
        "num_warps": meta.num_warps,
        "num_stages": meta.num_stages,
        "shared": meta.shared,
        "shared_limit": GPUS[gpu][1] << 10,
        "int64_products": len(re.findall(r"arith.muli .*i64", kernel.asm["ttir"])),
        "has_dot": "tt.dot" in kernel.asm["ttir"],
        "barriers": len(re.findall(r"\bbar(?:rier)?\.sync|s_barrier", assembly)),
    }
    if GPUS[gpu][0].backend == "cuda":
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            usage = _run("cuobjdump", "--dump-resource-usage", file.name)
            code = _run("nvdisasm", "-c", file.name)
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
        registers, stack, _, local = map(int, found.groups())
        spills = len(re.findall(r"\b(?:LDL|STL)\b", code))
        figures |= {"registers": registers, "stack_bytes": stack + local, "spills": spills}
    else:
        code = kernel.asm["amdgcn"]
        value = {k: int(v) for k, v in re.findall(r"\.(\w+):\s+(\d+)\n", code)}
        figures |= {
            "registers": value["vgpr_count"] + value.get("agpr_count", 0),
            "stack_bytes": value["private_segment_fixed_size"],
            "spills": value["vgpr_spill_count"] + value["sgpr_spill_count"],
        }
    figures["tensor_core"] = sorted({m.split(".")[0] for m in re.findall(TENSOR_CORE[gpu], code)})
    figures["num_tensor_core"] = len(re.findall(TENSOR_CORE[gpu], code))
    return figures


def _run(tool: str, *args: str) -> str:
    return subprocess.run([BIN / tool, *args], capture_output=True, text=True, check=True, timeout=120).stdout


def report(gpu: str, models: list[str]) -> list[dict]:
    """Figures of every distinct kernel of a GPU, with the models that launch it."""
    rows = {}
    for model in models:
        for name, kernel in compile_all(gpu, *MODELS[model]):
            if kernel.hash not in rows:
                rows[kernel.hash] = {"gpu": gpu, "models": [], **read(gpu, name, kernel)}
            rows[kernel.hash]["models"].append(model)
    return list(rows.values())


COLUMNS = ("gpu", "kernel", "num_warps", "num_stages", "registers", "spills", "stack_bytes", "shared", "tensor_core")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", nargs="+", choices=GPUS, default=list(GPUS))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with ProcessPoolExecutor(2) as pool:
        rows = [row for part in pool.map(report, args.gpus, [args.models] * len(args.gpus)) for row in part]
    print(" | ".join((*COLUMNS, "models")))
    for row in rows:
        print(" | ".join(str(row[c]) for c in COLUMNS), "|", ", ".join(row["models"]))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
