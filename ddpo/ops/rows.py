"""The chunked algorithm behind linear_logp: logits of a few rows, the row pass over them, the products with the
head. Logits are held in opmath precision (float64 for float64, else float32), one chunk at a time.
"""

import functools
import importlib.util
import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch

CPU_CHUNK_BYTES = 32 << 20
HALF_CHUNK_BYTES = 64 << 20  # half types on a CPU convert the head to float32 once a chunk, so fewer chunks
GPU_CHUNK_BYTES = 256 << 20
HEAD_BLOCK = 4096  # head rows converted to float32 at a time


class Options(NamedTuple):
    scale: float
    softcap: float | None
    row_pass: Callable  # see the end of this file


def opmath(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def chunks(N: int, head: torch.Tensor) -> list[slice]:
    """Row slices of about the byte budget; never a tail of one row (a one-row product has other bits)."""
    acc = opmath(head.dtype)
    if head.is_cuda:
        budget = GPU_CHUNK_BYTES
    else:
        budget = CPU_CHUNK_BYTES if head.dtype == acc else HALF_CHUNK_BYTES
    size = max(2, budget // (len(head) * acc.itemsize))
    starts = list(range(0, N, size))
    if len(starts) > 1 and N - starts[-1] == 1:
        starts.pop()
    return [slice(a, b) for a, b in itertools.pairwise([*starts, N])]


def logits(h, head, bias, options: Options, grad: bool):
    """(n, D) -> z (n, V) in opmath precision, and z once more where a cap's gradient needs it."""
    z = _matmul(h, head.T)
    if bias is not None:
        z.add_(bias)
    if options.scale != 1.0:
        z.mul_(options.scale)
    if options.softcap is None:
        return z, None
    z.div_(options.softcap).tanh_().mul_(options.softcap)
    return z, z.clone() if grad else None


def through_cap(grad, capped, options: Options):
    """d logp/d z -> d logp/d (h.W + b), in place: scale * (1 - (z/softcap)^2)."""
    if options.softcap is not None:
        grad.mul_(capped.div_(options.softcap).square_().neg_().add_(1))
    if options.scale != 1.0:
        grad.mul_(options.scale)


def _matmul(a, b):
    """a @ b with the result in opmath precision, whatever the input dtype."""
    acc = opmath(a.dtype)
    if a.dtype == acc:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=acc)
    out = a.new_empty(len(a), b.shape[1], dtype=acc)
    a = a.to(acc)
    for start in range(0, b.shape[1], HEAD_BLOCK):
        block = slice(start, start + HEAD_BLOCK)
        torch.mm(a, b[:, block].to(acc), out=out[:, block])
    return out


def times_head(grad, head, out):
    """out (n, D) = grad (n, V) @ head (V, D), summed in opmath precision (on a GPU grad is in the head's dtype)."""
    acc = opmath(head.dtype)
    if head.dtype == acc:
        torch.mm(grad, head, out=out)
    elif head.is_cuda:
        torch.mm(grad.to(head.dtype), head, out=out)
    else:
        total = grad.new_zeros(out.shape)
        for start in range(0, len(head), HEAD_BLOCK):
            block = slice(start, start + HEAD_BLOCK)
            total.addmm_(grad[:, block], head[block].to(acc))
        out.copy_(total)


def add_outer(grad, h, out):
    """out (V, D) += grad (n, V).T @ h (n, D), in opmath precision."""
    if h.is_cuda and h.dtype != out.dtype:
        out += torch.mm(grad.T.to(h.dtype), h, out_dtype=out.dtype)
    else:
        out.addmm_(grad.T, h.to(out.dtype))


# --- the row pass: z (n, V), targets (n,), grad -> logp (n,); with grad, z becomes onehot - softmax(z) ------


def _torch_pass(z, targets, grad):
    lse = torch.logsumexp(z, dim=1)  # (n,)
    logp = z.gather(1, targets[:, None]).squeeze(1) - lse
    if grad:
        z.sub_(lse[:, None]).exp_().neg_()
        z.scatter_add_(1, targets[:, None], torch.ones_like(logp)[:, None])
    return logp


def _cpp_pass(z, targets, grad):
    return torch.ops.ddpo.row_logp_(z, targets, grad)


@functools.cache
def has_cpp() -> bool:
    """Whether the C++ extension was built; loads it on the first call."""
    if importlib.util.find_spec("ddpo._C") is None:
        return False
    import ddpo._C  # noqa: F401  registers torch.ops.ddpo

    return True


def find_pass(impl: str, device: torch.device) -> Callable:
    """The row pass of an implementation's name. Raises ValueError, RuntimeError as linear_logp says."""
    if impl == "auto":
        return _cpp_pass if device.type == "cpu" and has_cpp() else _torch_pass
    if impl == "torch":
        return _torch_pass
    if impl == "cpp":
        if device.type != "cpu":
            raise ValueError(f"linear_logp: impl 'cpp' runs on the CPU, got hidden on {device}; use impl='auto'")
        if not has_cpp():
            raise RuntimeError(
                "linear_logp: impl 'cpp' wants the extension ddpo._C, which was not built; install a C++ compiler "
                "and reinstall with DDPO_BUILD_CPP=1, or use impl='torch'"
            )
        return _cpp_pass
    raise ValueError(f"linear_logp: impl must be 'auto', 'torch' or 'cpp', got {impl!r}")
