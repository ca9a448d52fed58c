"""packed_attention: causal attention within each sequence of a packed batch, without padding or a (T, T) tensor.

On CPUs with ddpo._C the kernels of csrc/attention.cpp, elsewhere PyTorch, a sequence at a time.
Spec: ddpo.reference.packed_attention. Letters: T packed tokens, S sequences, H query heads, Hkv key heads, d width of a
head, dv that of its values.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ddpo.ops import cpp
from ddpo.ops.chunked import opmath

CAPPED_BLOCK = 256  # query positions whose scores the PyTorch path holds at a time, where there is a softcap


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Causal attention within each sequence of a packed batch.

    s[i, j] = scale * q[i].k[j], with softcap c: c * tanh(s / c)
    out[i] = sum_j softmax_j(s[i, j]) v[j], over the j of i's sequence with 0 <= i - j < window

    Args:
        q: (T, H, d) floating point, of any strides.
        k: (T, Hkv, d), v: (T, Hkv, dv), dtype and device of q (under autocast all are cast); Hkv divides H, and query
            head h reads key head h // (H / Hkv).
        cu_seqlens: (S+1,) int32 or int64 offsets of the sequences, rising from 0 to T; on the host, whatever q is on.
        scale: factor on the scores; None is 1/sqrt(d).
        window: tokens that a position sees, itself the last of them; None: all.
        softcap: positive cap on the scores, or None.
        dropout: probability at which a softmax weight is dropped; above 0 the PyTorch path runs.
    Returns: (T, H, dv) in the dtype of q; sums in float32 for half types. Differentiable in q, k and v (once, by the
        C++ kernels, which keep one log-sum-exp a row and recompute the rest).
    Raises: ValueError for other shapes, dtypes or values.
    Source: the online softmax of FlashAttention (arXiv 2205.14135).
    """
    if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    _check(q, k, v, cu_seqlens, window, softcap, dropout)
    if runs_cpp(q, dropout):
        return torch.ops.ddpo.packed_attention_fwd(q, k, v, cu_seqlens, scale, window, softcap)[0]
    return _in_pytorch(q, k, v, cu_seqlens.tolist(), scale, window, softcap, dropout)


def runs_cpp(q: Tensor, dropout: float) -> bool:
    """Whether the C++ kernels take it."""
    kind = q.dtype in (torch.float32, torch.float64, torch.bfloat16)
    return cpp.is_built and q.device.type == "cpu" and kind and dropout == 0


def _check(q, k, v, cu_seqlens, window, softcap, dropout) -> None:
    def refuse(name, wanted, value):
        got = f"{value.dtype} {tuple(value.shape)} on {value.device}" if isinstance(value, Tensor) else value
        raise ValueError(f"packed_attention: {name} must be {wanted}, got {got}")

    if q.dim() != 3 or not q.is_floating_point() or 0 in q.shape[1:]:
        refuse("q", "floating point (T, H, d)", q)
    T, H, d = q.shape
    if k.dim() != 3 or k.shape[0] != T or k.shape[1] < 1 or H % k.shape[1] or k.shape[2] != d:
        refuse("k", f"(T, Hkv, d) = ({T}, a divisor of {H}, {d})", k)
    if v.dim() != 3 or v.shape[:2] != k.shape[:2] or v.shape[2] < 1:
        refuse("v", f"(T, Hkv, dv) = ({T}, {k.shape[1]}, any)", v)
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype or tensor.device != q.device:
            refuse(name, f"{q.dtype} on {q.device}, as q", tensor)
    whole = cu_seqlens.dim() == 1 and len(cu_seqlens) > 0 and cu_seqlens.dtype in (torch.int32, torch.int64)
    if not whole or cu_seqlens.device.type != "cpu":
        refuse("cu_seqlens", "int32 or int64 (S+1,) offsets on the host", cu_seqlens)
    if window is not None and not window > 0:
        refuse("window", "positive or None", window)
    if softcap is not None and not softcap > 0:
        refuse("softcap", "positive or None", softcap)
    if not 0 <= dropout < 1:
        refuse("dropout", "in [0, 1)", dropout)
    if torch.compiler.is_compiling():
        return  # values: a graph break; the C++ kernels check them again
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] != T or any(a > b for a, b in itertools.pairwise(offsets)):
        raise ValueError(f"packed_attention: cu_seqlens must rise from 0 to T = {T}, got {offsets}")


# --- the C++ kernels, as differentiable ops ---------------------------------------------------------------


def _fake_forward(q, k, v, cu_seqlens, scale, window, softcap):
    T, H, _ = q.shape
    return q.new_empty(T, H, v.shape[2]), q.new_empty(H, T, dtype=opmath(q.dtype))


def _fake_backward(upstream, q, k, v, out, lse, cu_seqlens, scale, window, softcap):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.scale, ctx.window, ctx.softcap = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx, upstream, _):  # upstream (T, H, dv)
    q, k, v, cu_seqlens, out, lse = ctx.saved_tensors
    options = (cu_seqlens, ctx.scale, ctx.window, ctx.softcap)
    return *torch.ops.ddpo.packed_attention_bwd(upstream, q, k, v, out, lse, *options), *[None] * 4


def _only_once(ctx, *upstream):
    raise NotImplementedError("packed_attention is differentiable once; uninstall ddpo._C for more")


if cpp.is_built:
    torch.library.register_fake("ddpo::packed_attention_fwd", _fake_forward)
    torch.library.register_fake("ddpo::packed_attention_bwd", _fake_backward)
    torch.library.register_autograd("ddpo::packed_attention_fwd", _autograd, setup_context=_setup_context)
    torch.library.register_autograd("ddpo::packed_attention_bwd", _only_once)


# --- in PyTorch, a sequence at a time -------------------------------------------------------------------------


def _in_pytorch(q, k, v, offsets: list[int], scale, window, softcap, dropout):
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # (1, H, T, d)
    alone = _plain if softcap is None else _capped
    out = []
    for a, b in itertools.pairwise(offsets if len(offsets) > 1 else [0, 0]):
        out.append(alone(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], scale, window, softcap, dropout))
    return torch.cat(out, 2)[0].transpose(0, 1)


def _plain(q, k, v, scale, window, _, dropout):
    """One sequence (1, H, n, d); one that is longer than the window gets a mask of its own length."""
    n = q.shape[2]
    mask = None if window is None or n <= window else _seen(0, n, 0, n, window, q.device)
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None, scale=scale, enable_gqa=gqa)


def _capped(q, k, v, scale, window, softcap, dropout):
    """One sequence with a softcap, which SDPA lacks: its scores are held for a block of queries, and recomputed."""
    out = []
    for a in range(0, max(q.shape[2], 1), CAPPED_BLOCK):
        b = min(a + CAPPED_BLOCK, q.shape[2])
        low = 0 if window is None else max(0, a - window + 1)
        seen = _seen(a, b, low, b, window or b, q.device)
        block = (q[:, :, a:b], k[:, :, low:b], v[:, :, low:b], seen, scale, softcap, dropout)
        out.append(checkpoint(_capped_block, *block, use_reentrant=False))
    return torch.cat(out, 2)


def _capped_block(q, k, v, seen, scale, softcap, dropout):
    acc = opmath(q.dtype)
    grouped = q.unflatten(1, (k.shape[1], -1))  # (1, Hkv, G, n, d)
    s = (grouped @ k[:, :, None].transpose(-1, -2)).to(acc) * scale
    p = (softcap * torch.tanh(s / softcap)).masked_fill(~seen, -torch.inf).softmax(-1)
    return (F.dropout(p, dropout).to(v.dtype) @ v[:, :, None]).flatten(1, 2)


def _seen(a, b, low, high, window, device):
    """(b - a, high - low) which keys low..high the queries a..b see."""
    distance = torch.arange(a, b, device=device)[:, None] - torch.arange(low, high, device=device)[None]
    return (distance >= 0) & (distance < window)
