"""impl 'triton' of linear_logp: the kernels of kernels/, for GPUs. Same signature as ddpo.ops.chunked, and two ways:

* chunked: logits of a few rows by PyTorch's GEMM, one Triton pass over them, a second GEMM: head frozen 2G. Trained
  4G: forward as fused, backward the same three steps by columns of the vocabulary. Holds one buffer of logits and,
  trained, as much again at most of the head's gradient, and hidden's in float32.
* fused: Triton alone. Head frozen 3G, trained 4G: backward recomputes the logits, in panels of the vocabulary. Holds
  one panel and hidden's float32 gradient.

A trained head's gradient is summed in float32 and written once, in its own dtype: no (V, D) float32 buffer.
Where no gradient is wanted the two are one: 1G, no logits. Nothing here waits for the device.
"""

import importlib.util
import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ddpo.ops import tuned
from ddpo.ops.chunked import deferred, row_slices
from ddpo.ops.implementation import Call, Kept, Wants

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MISSING = (
    "linear_logp: impl 'triton' wants Triton, a GPU (or TRITON_INTERPRET=1) and float32, bfloat16 or float16; "
    "use impl='torch'"
)


def runs(hidden: torch.Tensor) -> bool:
    """Whether the kernels take such a tensor on this machine."""
    on_gpu = hidden.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    return on_gpu and hidden.dtype in DTYPES and importlib.util.find_spec("triton") is not None


def fake(call: Call, wants: Wants) -> tuple[Tensor, Kept]:
    return _path(call, wants).fake(call, wants)


def forward(call: Call, wants: Wants) -> tuple[Tensor, Kept]:
    return _path(call, wants).forward(call, wants)


def backward(call: Call, saved: Kept, upstream: Tensor, wants: Wants) -> Sequence[Tensor | None]:
    if saved[0].dim() == 2:  # rows, and no call to choose by
        return deferred(saved[0], upstream), None, None
    return _path(call, wants).backward(call, saved, upstream, wants)


def _path(call, wants) -> "Path":
    name = torch.cuda.get_device_name(call.hidden.device) if call.hidden.is_cuda else "cpu"
    return Path(
        *tuned.choice(name, call.hidden.dtype, int(call.hidden.shape[1]), int(call.head.shape[0]), wants[1] or wants[2])
    )


class Path(NamedTuple):
    """One way to compute it; fields as ddpo.ops.tuned.Choice."""

    path: str = "chunked"
    chunk_mib: int = 256

    def fake(self, call: Call, wants: Wants) -> tuple[Tensor, Kept]:
        """What forward gives, unwritten: logp (N,), and [rows (N, D)] if backward needs no more than these, else
        [lse (N,)] for a backward that recomputes."""
        logp, lse = (call.hidden.new_empty(call.hidden.shape[0], dtype=torch.float32) for _ in range(2))
        defers = self.path == "chunked" and wants == (True, False, False)
        return logp, [torch.empty_like(call.hidden, memory_format=torch.contiguous_format) if defers else lse]

    def forward(self, call: Call, wants: Wants) -> tuple[Tensor, Kept]:
        """As `fake`, with the values."""
        from ddpo.kernels import linear_logp as kernels  # not above: import ddpo.ops should not load Triton

        hidden, head, targets, bias, scale, softcap = _arguments(call)
        logp, (saved,) = self.fake(call, wants)
        with torch.cuda.device_of(hidden):
            if saved.dim() == 1:
                logp, lse = kernels.fwd(hidden, head, targets, bias, scale, softcap)
                return logp, [lse]
            lse = torch.empty_like(logp)
            for chunk, buffer, total in self.buffers(hidden, head):
                _mm(hidden[chunk], head.T, out=buffer[:, : len(head)])
                of_rows = (targets[chunk], bias, scale, softcap, logp[chunk], lse[chunk])
                dz = kernels.slopes(buffer, len(head), hidden.dtype, *of_rows)
                saved[chunk] = _mm(dz, head, out=total)
        return logp, [saved]

    def backward(self, call: Call, saved: Kept, upstream: Tensor, wants: Wants) -> Sequence[Tensor | None]:
        """-> gradients of hidden, head and bias, None where not wanted."""
        if saved[0].dim() == 2:
            return deferred(saved[0], upstream), None, None
        from ddpo.kernels import linear_logp as kernels

        (lse,) = saved
        arguments = (*_arguments(call), lse, upstream.float().contiguous(), wants)
        with torch.cuda.device_of(lse):
            grads = kernels.bwd(*arguments) if self.path == "fused" else self._recompute(kernels, *arguments)
        return [None if grad is None else grad.to(call.hidden.dtype) for grad in grads]

    def _recompute(self, kernels, hidden, head, targets, bias, scale, softcap, lse, upstream, wants):
        """By columns: lse is known, and each head row's gradient is then one product, written once."""
        (N, D), V = hidden.shape, len(head)
        grad_hidden = hidden.new_zeros((N, D), dtype=torch.float32) if wants[0] else None
        new = torch.empty_like if N else torch.zeros_like
        grad_head = new(head) if wants[1] else None
        grad_bias = new(bias) if wants[2] else None
        size = kernels.panel_size(max(N, D), V, 4, 64, int(self.chunk_mib * 2**20))
        logits = hidden.new_empty(N, size, dtype=torch.float32)
        sums = hidden.new_empty(size if wants[1] else 0, D, dtype=torch.float32)
        for first in range(0, V if N else 0, size):
            panel = slice(first, min(first + size, V))
            W, b = head[panel], None if bias is None else bias[panel]
            _mm(hidden, W.T, out=logits[:, : len(W)])
            dz = kernels.slopes(logits, len(W), hidden.dtype, targets - first, b, scale, softcap, None, lse, upstream)
            if wants[0]:
                _mm(dz, W, out=grad_hidden, add=True)
            if wants[1]:
                grad_head[panel] = _mm(dz.T, hidden, out=sums[: len(W)])
            if wants[2]:
                grad_bias[panel] = dz.sum(0, dtype=torch.float32)
        return grad_hidden, grad_head, grad_bias

    def buffers(self, hidden, head):
        """Row slices, none of one row of several, each with its float32 scratch: logits (n, >= V) and sums (n, D)."""
        (N, D), V = hidden.shape, len(head)
        pitch = -(-V // 64) * 64  # GEMMs want aligned rows, and the rows of dz start where those of the logits do
        size = max(2, int(self.chunk_mib * 2**20) // (4 * pitch))
        size -= size % 128 if size > 128 else 0  # whole tiles
        parts = row_slices(N, size)
        most = max((part.stop - part.start for part in parts), default=0)
        logits, sums = (hidden.new_empty(most, width, dtype=torch.float32) for width in (pitch, D))
        for part in parts:
            n = part.stop - part.start
            yield part, logits[:n], sums[:n]


def _arguments(call) -> tuple:
    """What every launcher takes: rows contiguous, and near enough for int32 offsets inside a tile of 256 rows."""
    hidden, head = (x if x.stride(1) == 1 and x.stride(0) < 2**23 else x.contiguous() for x in (call.hidden, call.head))
    bias = None if call.bias is None else call.bias.contiguous()
    softcap = None if call.softcap is None else float(call.softcap)
    return hidden, head, call.targets.contiguous(), bias, float(call.scale), softcap


def _mm(a, b, out, add: bool = False):
    """out = a @ b, or out += a @ b. out is float32, so that no part of the sum is rounded to a half type."""
    if not a.is_cuda:  # in the interpreter; out_dtype exists on CUDA alone
        product = a.float() @ b.float()
        return out.add_(product) if add else out.copy_(product)
    if add:
        return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    return torch.mm(a, b, out_dtype=out.dtype, out=out)
