"""impl 'torch' of linear_logp: the algorithm in PyTorch, a few rows at a time, on any device.

Logits are held in opmath precision (float64 for float64, else float32), one chunk of rows at a time.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ddpo.ops.implementation import Call, Kept, Wants

CPU_CHUNK_BYTES = 24 << 20  # of logits
HALF_CHUNK_BYTES = 64 << 20  # half types on a CPU convert the head to float32 once a chunk, so fewer chunks
GPU_CHUNK_BYTES = 256 << 20
HEAD_BLOCK = 4096  # head rows converted to float32 at a time


def opmath(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def fake(call: Call, wants: Wants) -> tuple[Tensor, Kept]:
    """What forward gives, unwritten: logp (N,), and for backward rows (N, D) = d logp / d hidden where only hidden's
    gradient is wanted, lse (N,) where head's or bias's is. wants: the gradients of hidden, head and bias."""
    logp, lse = (call.hidden.new_empty(call.hidden.shape[0], dtype=opmath(call.hidden.dtype)) for _ in range(2))
    return logp, [call.hidden.new_empty(call.hidden.shape)] if wants == (True, False, False) else [lse]


def forward(call: Call, wants: Wants) -> tuple[Tensor, Kept]:
    """As `fake`, with the values."""
    logp, (saved,) = fake(call, wants)
    want_rows = wants == (True, False, False)
    lse, rows = (torch.empty_like(logp), saved) if want_rows else (saved, None)
    for chunk, buffer in _buffers(call):
        z, targets = _logits(call, chunk, buffer), call.targets[chunk, None]
        target, top = z.gather(1, targets), z.amax(1, keepdim=True)
        slope = _cap_slope(call, z) if rows is not None else None
        total = z.sub_(top).exp_().sum(1, keepdim=True)
        logp[chunk] = (target - top - total.log()).squeeze(1)  # near 0 it keeps its digits
        lse[chunk] = (top + total.log()).squeeze(1)
        if rows is not None:
            _times_head(_gradient(call, z.div_(-total), slope, targets), call.head, out=rows[chunk])
    return logp, [saved]


def deferred(rows, upstream):
    """The gradient of hidden (N, D) from its rows for an upstream of one."""
    return torch.mul(rows, upstream[:, None], out=torch.empty_like(rows))  # no float32 copy on the way


def backward(call: Call, saved: Kept, upstream: Tensor, wants: Wants) -> Sequence[Tensor | None]:
    """-> gradients of hidden, head and bias, None where not wanted; with a trained head the logits are recomputed."""
    if wants == (True, False, False):
        return deferred(saved[0], upstream), None, None
    (lse,) = saved
    acc = opmath(call.hidden.dtype)
    grad_hidden = call.hidden.new_empty(call.hidden.shape) if wants[0] else None
    grad_head = call.head.new_zeros(call.head.shape, dtype=acc) if wants[1] else None
    grad_bias = None if call.bias is None or not wants[2] else torch.zeros_like(call.bias, dtype=acc)
    for chunk, buffer in _buffers(call):
        z = _logits(call, chunk, buffer)
        slope = _cap_slope(call, z)
        minus_p = z.sub_(lse[chunk, None]).exp_().neg_()
        grad = _gradient(call, minus_p, slope, call.targets[chunk, None]).mul_(upstream[chunk, None])
        if grad_head is not None:
            _add_outer(grad, call.hidden[chunk], out=grad_head)
        if grad_bias is not None:
            grad_bias += grad.sum(0)
        if grad_hidden is not None:
            _times_head(grad, call.head, out=grad_hidden[chunk])
    return [None if grad is None else grad.to(call.hidden.dtype) for grad in (grad_hidden, grad_head, grad_bias)]


def chunks(N: int, head: torch.Tensor) -> list[slice]:
    """Row slices whose logits take about the byte budget."""
    acc = opmath(head.dtype)
    if head.is_cuda:
        budget = GPU_CHUNK_BYTES
    else:
        budget = CPU_CHUNK_BYTES if head.dtype == acc else HALF_CHUNK_BYTES
    return row_slices(N, max(2, budget // (len(head) * acc.itemsize)))


def row_slices(N: int, size: int) -> list[slice]:
    """Of `size` rows each; never a tail of one row (a one-row product has other bits)."""
    starts = list(range(0, N, size))
    if len(starts) > 1 and N - starts[-1] == 1:
        starts.pop()
    return [slice(a, b) for a, b in itertools.pairwise([*starts, N])]


def _buffers(call):
    """Each chunk with its part of the one (n, V) buffer."""
    parts = chunks(len(call.hidden), call.head)
    most = max((part.stop - part.start for part in parts), default=0)
    buffer = call.hidden.new_empty(most, len(call.head), dtype=opmath(call.hidden.dtype))
    for part in parts:
        yield part, buffer[: part.stop - part.start]


def _logits(call, chunk, out):
    """z (n, V) of a chunk of rows, in opmath precision."""
    hidden, head = call.hidden[chunk], call.head
    if hidden.dtype == out.dtype:
        torch.mm(hidden, head.T, out=out)
    elif hidden.is_cuda:
        torch.mm(hidden, head.T, out.dtype, out=out)
    else:
        hidden = hidden.to(out.dtype)
        for start in range(0, len(head), HEAD_BLOCK):
            block = slice(start, start + HEAD_BLOCK)
            torch.mm(hidden, head[block].T.to(out.dtype), out=out[:, block])
    if call.bias is not None:
        out.add_(call.bias)
    if call.scale != 1.0:
        out.mul_(call.scale)
    if call.softcap is not None:
        out.div_(call.softcap).tanh_().mul_(call.softcap)
    return out


def _cap_slope(call, z):
    """1 - (z/softcap)^2, or None without a softcap."""
    return None if call.softcap is None else (z / call.softcap).square_().neg_().add_(1)


def _gradient(call, minus_p, slope, targets):
    """-softmax(z) (n, V) becomes d logp / d (h.W + b) = scale * slope * (onehot - softmax(z)), in place."""
    grad = minus_p.scatter_add_(1, targets, torch.ones_like(minus_p[:, :1]))
    if slope is not None:
        grad.mul_(slope)
    return grad if call.scale == 1.0 else grad.mul_(call.scale)


def _times_head(grad, head, out):
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


def _add_outer(grad, h, out):
    """out (V, D) += grad (n, V).T @ h (n, D), in opmath precision."""
    if h.is_cuda and h.dtype != out.dtype:
        out += torch.mm(grad.T.to(h.dtype), h, out_dtype=out.dtype)
    else:
        out.addmm_(grad.T, h.to(out.dtype))
