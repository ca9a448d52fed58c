"""impl 'cpp' of linear_logp: the kernels of csrc/, for CPUs. Same signature as ddpo.ops.chunked."""

import functools
import importlib.util

import torch

from ddpo.ops.chunked import opmath

MISSING = (
    "linear_logp: impl 'cpp' wants the extension ddpo._C, which was not built; install a C++ compiler and reinstall "
    "with DDPO_BUILD_CPP=1, or use impl='torch'"
)


@functools.cache
def is_built() -> bool:
    """Whether the extension was built; loads it on the first call."""
    if importlib.util.find_spec("ddpo._C") is None:
        return False
    import ddpo._C  # noqa: F401  registers torch.ops.ddpo

    for name, shapes in FAKES.items():
        torch.library.register_fake(f"ddpo::{name}", shapes)
    return True


def _fake_fwd(hidden, head, targets, bias, scale, softcap, want_rows):
    acc = opmath(hidden.dtype)
    per_row = hidden.new_empty(hidden.shape[:1], dtype=acc)
    return per_row, torch.empty_like(per_row), hidden.new_empty((hidden.shape[0] if want_rows else 0, hidden.shape[1]))


def _fake_sparse_fwd(hidden, head, targets, bias, scale, softcap, segments, drop_below):
    return hidden.new_empty(hidden.shape[:1], dtype=opmath(hidden.dtype)), hidden.new_empty(hidden.shape)


def _fake_bwd(hidden, head, targets, bias, scale, softcap, lse, upstream, want_hidden, want_head, want_bias):
    (N, D), V, acc = hidden.shape, head.shape[0], opmath(hidden.dtype)
    shapes = ((N if want_hidden else 0, D), (V if want_head else 0, D), (V if want_bias else 0,))
    return tuple(hidden.new_empty(shape, dtype=acc) for shape in shapes)


FAKES = {"linear_logp_fwd": _fake_fwd, "linear_logp_sparse_fwd": _fake_sparse_fwd, "linear_logp_bwd": _fake_bwd}


def forward(call, want_rows: bool):
    """-> logp (N,), lse (N,) or None, rows (N, D) = d logp / d hidden or None."""
    tensors = (call.hidden, call.head, call.targets, call.bias, call.scale, call.softcap)
    if want_rows and call.drop_below > 0:
        segments = call.segments
        if segments is None:
            segments = torch.tensor([0, len(call.hidden)])
        logp, rows = torch.ops.ddpo.linear_logp_sparse_fwd(*tensors, segments, call.drop_below)
        return logp, None, rows
    logp, lse, rows = torch.ops.ddpo.linear_logp_fwd(*tensors, want_rows)
    return logp, lse, rows if want_rows else None


def backward(call, lse, upstream, wants: tuple[bool, bool, bool]):
    """-> gradients of hidden, head and bias, None where not wanted."""
    tensors = (call.hidden, call.head, call.targets, call.bias, call.scale, call.softcap)
    grads = torch.ops.ddpo.linear_logp_bwd(*tensors, lse, upstream, *wants)
    return [grad if want else None for grad, want in zip(grads, wants, strict=True)]
