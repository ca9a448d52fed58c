"""Attention within each sequence of a packed batch, registered with transformers as "ddpo_packed".

On GPUs with half types flash-attn's kernel where that package is there, else torch's own; in every other case
ddpo.ops.packed_attention. Nothing here waits for a GPU: offsets and lengths come on the host as well.
"""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from ddpo import log
from ddpo.ops import attention as op

MAX_WIDTH = 256  # of a head, in both libraries' kernels
_windows: set[int | None] | None = None  # see windows_seen


def packed_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    dropout=0.0,
    sliding_window=None,
    softcap=None,
    *,
    cu_seq_lens_q,
    max_length_q,
    cu_seqlens,
    s_aux=None,
    **kwargs,
):
    """Causal attention within each sequence of a packed batch: query (1, H, T, d) -> (1, T, H, dv).

    The sequences' offsets (S+1,) come as `cu_seqlens` on the host and as int32 `cu_seq_lens_q` beside the tokens, the
    longest sequence's tokens as the int `max_length_q`.
    """
    if _windows is not None:
        _windows.add(sliding_window)
    if s_aux is not None:
        raise ValueError("models with sinks (gpt-oss) in attention are not supported")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, H, d), a view
    if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    library = pick_library(q, v, softcap, dropout)
    if library == "flash-attn":
        out = _by_flash_attn(q, k, v, cu_seq_lens_q, max_length_q, scaling, sliding_window, softcap, dropout)
    elif library == "torch":
        out = _by_varlen_attn(q, k, v, cu_seq_lens_q, max_length_q, scaling, sliding_window)
    else:
        options = {"scale": scaling, "window": sliding_window, "softcap": softcap, "dropout": dropout}
        out = op.packed_attention(q, k, v, cu_seqlens, **options)
    if not torch.compiler.is_compiling():
        _say(library or ("C++" if op.runs_cpp(q, dropout) else "PyTorch, a sequence at a time"))
    return out[None], None


@contextmanager
def windows_seen() -> Iterator[set[int | None]]:
    """Fills with the sliding windows that layers ask for inside."""
    global _windows
    seen: set[int | None] = set()
    _windows = seen
    try:
        yield seen
    finally:
        _windows = None


def pick_library(q, v, softcap, dropout) -> str | None:
    """Whose kernel runs: 'flash-attn', 'torch' or None, ours."""
    half = q.dtype in (torch.float16, torch.bfloat16)
    d = q.shape[-1]
    if not (q.is_cuda and half and v.shape[-1] == d <= MAX_WIDTH and _is_ampere(q.device)):
        return None
    if _flash_attn() is not None and not (softcap and dropout):
        return "flash-attn"
    return "torch" if d % 8 == 0 and softcap is None and dropout == 0 else None


@functools.cache
def _is_ampere(device) -> bool:
    """Whether a GPU is new enough for either library."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def _flash_attn():
    """flash-attn's function, None where the package is not there."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_varlen_func


def _by_flash_attn(q, k, v, cu_seqlens, max_seqlen, scale, window, softcap, dropout):
    return _flash_attn()(
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen,
        dropout_p=dropout,
        softmax_scale=scale,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        softcap=softcap or 0.0,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


def _by_varlen_attn(q, k, v, cu_seqlens, max_seqlen, scale, window):
    return varlen_attn(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),  # nothing to the right: causal
        enable_gqa=q.shape[1] != k.shape[1],
    )


@functools.cache
def _say(which: str) -> None:
    if os.environ.get("RANK", "0") == "0":  # under torchrun one process speaks
        log.console.print(f"attention: {which}")


AttentionInterface.register("ddpo_packed", packed_attention)  # no mask is registered: then transformers makes none
