"""impl 'cpp' of linear_logp: the kernels of csrc/, for CPUs. Same signature as ddpo.ops.chunked."""

import importlib.util
import mmap
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ddpo.ops.chunked import deferred, opmath
from ddpo.ops.implementation import Call, Kept, Wants

MISSING = (
    "linear_logp: impl 'cpp' wants the extension ddpo._C, which was not built; install a C++ compiler and reinstall "
    "with DDPO_BUILD_CPP=1, or use impl='torch'"
)
UNITS = ("DEFAULT", "AVX2", "AVX512")  # vector units of x86, each has what those before it have
TAIL_BLOCK = 1024  # head rows that share a mean row: kTailBlock of csrc/linear_logp_sparse.cpp


def _fake_fwd(hidden, head, targets, bias, scale, softcap, want_rows):
    acc = opmath(hidden.dtype)
    per_row = hidden.new_empty(hidden.shape[:1], dtype=acc)
    return per_row, torch.empty_like(per_row), hidden.new_empty((hidden.shape[0] if want_rows else 0, hidden.shape[1]))


def _fake_bwd(hidden, head, targets, bias, scale, softcap, lse, upstream, want_hidden, want_head, want_bias):
    (N, D), V, acc = hidden.shape, head.shape[0], opmath(hidden.dtype)
    shapes = ((N if want_hidden else 0, D), (V if want_head else 0, D), (V if want_bias else 0,))
    return tuple(hidden.new_empty(shape, dtype=acc) for shape in shapes)


def _fake_sparse_fwd(hidden, head, targets, bias, scale, softcap, segments, drop_below, head_trained):
    (N, _), V, S = hidden.shape, head.shape[0], segments.shape[0] - 1
    floats = torch.empty(0, dtype=opmath(hidden.dtype), device=hidden.device)
    logp, rows = floats.new_empty(N), hidden.new_empty(hidden.shape)
    K = torch.library.get_ctx().new_dynamic_size() if head_trained else 0
    N, V, S, blocks = (N, V, S, -(-V // TAIL_BLOCK)) if head_trained else (0, V, 0, 0)
    ends, kept_rows = targets.new_empty(V if head_trained else 0), targets.new_empty(K, dtype=torch.int32)
    shapes = ((N,), (K,), (blocks, N), (S, V), (N,))
    slope, kept, tail, share, lse = (floats.new_empty(shape) for shape in shapes)
    return logp, rows, slope, ends, kept_rows, kept, tail, share, lse


def _fake_sparse_bwd(
    hidden, targets, segments, upstream, scale, slope, ends, kept_rows, kept, tail, share, want_head, want_bias
):
    V = ends.shape[0]
    return kept.new_empty(V if want_head else 0, hidden.shape[1]), kept.new_empty(V if want_bias else 0)


def built_for(file: Path) -> str | None:
    """The vector unit that an extension was built for, read without loading it; None where it does not say."""
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        found = re.search(rb"ddpo\._C built for (\w+);", content)
        return found[1].decode() if found else None


def check_unit(file: Path, here: str) -> None:
    """Raises ImportError for an extension whose instructions this machine does not know: it would die of them."""
    unit = built_for(file)
    if unit in UNITS[1:] and (here not in UNITS or UNITS.index(here) < UNITS.index(unit)):
        raise ImportError(
            f"{file}: was built for {unit}, this machine has {here}; build it anew here (reinstall ddpo with "
            "--no-build-isolation and DDPO_BUILD_CPP=1), or delete the file: the ops then run in PyTorch"
        )


def _load() -> bool:
    """Whether the extension was built; registers torch.ops.ddpo and its fake kernels."""
    spec = importlib.util.find_spec("ddpo._C")
    if spec is None or spec.origin is None:
        return False
    check_unit(Path(spec.origin), torch.backends.cpu.get_cpu_capability())
    try:
        import ddpo._C  # noqa: F401
    except ImportError as err:
        raise ImportError(
            f"ddpo._C was built against another torch than {torch.__version__} ({err}); reinstall ddpo with "
            "--no-build-isolation"
        ) from err

    fakes: dict[str, Callable] = {
        "fwd": _fake_fwd,
        "bwd": _fake_bwd,
        "sparse_fwd": _fake_sparse_fwd,
        "sparse_bwd": _fake_sparse_bwd,
    }
    for name, shapes in fakes.items():
        torch.library.register_fake(f"ddpo::linear_logp_{name}", shapes)
    return True


is_built = _load()


def allocate_tightly(on: bool = True) -> None:
    """Gives CPU tensors made from now on, in the whole process, memory that glibc can use again; off: as it was before.
    Nothing without the extension, and where PyTorch's own does (csrc/allocator.cpp)."""
    if is_built:
        torch.ops.ddpo.allocate_tightly(on)


def forward(call: Call, wants: Wants) -> tuple[Tensor, Kept]:
    """-> logp (N,), what backward needs of forward. wants: the gradients of hidden, head and bias."""
    tensors = (call.hidden, call.head, call.targets, call.bias, call.scale, call.softcap)
    head_trained = wants[1] or wants[2]
    if any(wants) and call.drop_below > 0:
        sparse = (_segments(call), call.drop_below, head_trained)
        logp, rows, *kept = torch.ops.ddpo.linear_logp_sparse_fwd(*tensors, *sparse)
        return logp, [rows if wants[0] else rows.new_empty(0), *kept] if head_trained else [rows]
    logp, lse, rows = torch.ops.ddpo.linear_logp_fwd(*tensors, wants[0] and not head_trained)
    return logp, [lse] if head_trained else [rows]


def backward(call: Call, saved: Kept, upstream: Tensor, wants: Wants) -> Sequence[Tensor | None]:
    """-> gradients of hidden, head and bias, None where not wanted."""
    if not wants[1] and not wants[2]:
        return deferred(saved[0], upstream), None, None
    tensors = (call.hidden, call.head, call.targets, call.bias, call.scale, call.softcap)
    if call.drop_below > 0:
        rows, *kept, lse = saved
        of_hidden = deferred(rows, upstream) if wants[0] else None
        if _gave_up(kept[1]):
            _, *of_rest = torch.ops.ddpo.linear_logp_bwd(*tensors, lse, upstream, False, *wants[1:])
        else:
            sparse = (call.hidden, call.targets, _segments(call), upstream, call.scale)
            of_rest = torch.ops.ddpo.linear_logp_sparse_bwd(*sparse, *kept, *wants[1:])
        grads = (of_hidden, *of_rest)
    else:
        grads = torch.ops.ddpo.linear_logp_bwd(*tensors, *saved, upstream, *wants)
    return [grad.to(call.hidden.dtype) if want else None for grad, want in zip(grads, wants, strict=True)]


def _gave_up(ends) -> bool:
    """Whether forward found too many probabilities to keep."""
    return bool(ends[-1] < 0)


fake = forward  # on fake tensors the kernels give fakes


def _segments(call):
    return torch.tensor([0, call.hidden.shape[0]]) if call.segments is None else call.segments
