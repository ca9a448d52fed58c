"""linear_logp: from hidden rows to target log-probs, without ever holding an (N, V) tensor.

The narrow waist of the library: kernels below it, losses above it. Spec: ddpo.reference.linear_logp.
G is the unit of work, one head GEMM (2*N*V*D FLOP).

* Head frozen: d loss/d hidden[n] = c[n] * row[n] with row[n] = d logp[n]/d hidden[n], so forward forms the
  rows and backward multiplies them by the upstream c: 2G in all, any chunking, nothing recomputed.
* Head (or bias) trained: backward recomputes the logits: 4G, gradients summed in float32.
* No gradient wanted: 1G.
* drop_below > 0 (impl cpp, head frozen): probabilities under it are not multiplied one by one: little more than 1G.
"""

from typing import NamedTuple

import torch

from ddpo.ops import chunked, cpp


class Call(NamedTuple):
    """The checked arguments of one call, as every implementation gets them."""

    hidden: torch.Tensor
    head: torch.Tensor
    targets: torch.Tensor
    bias: torch.Tensor | None
    scale: float
    softcap: float | None
    segments: torch.Tensor | None
    drop_below: float


def linear_logp(
    hidden: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    segments: torch.Tensor | None = None,
    impl: str = "auto",
    drop_below: float = 0.0,
) -> torch.Tensor:
    """Log-probability of each target token under a linear head.

    z = scale * (hidden @ head.T + bias), with softcap c: z = c * tanh(z / c)
    logp[n] = z[n, targets[n]] - logsumexp_v z[n, v]

    Args:
        hidden: (N, D) float32, bfloat16, float16 or float64; valid rows only, no prompt, no padding.
        head: (V, D), dtype and device of hidden (under autocast both are cast).
        targets: (N,) int64 in [0, V).
        bias: (V,) or None.
        scale: factor on the logits, unitless.
        softcap: positive cap on the logits, or None.
        segments: (S+1,) int64 row offsets of the sequences, from 0 to N; only drop_below uses them. None: one.
        impl: 'auto', 'torch' or 'cpp' (CPU). 'auto' is the fastest that is there.
        drop_below: in [0, 1), probability. 0 is exact. Else, with a frozen head, probabilities under it enter the
            gradient of hidden by their sum times a mean head row (per segment and block of the vocabulary); the
            log-probs stay exact. Its buffer is 1,024 logits for each row of the longest segment.
    Returns: (N,) nats; float64 for float64 input, else float32. Target logit and log-sum-exp are taken in that
        precision. Differentiable once in hidden, head and bias.
    Raises: ValueError for other shapes, dtypes or values; RuntimeError for a named impl that is not there.
    Source: the log-softmax of every language model head; deferred scale and tail correction are ours.
    """
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        hidden, head, bias = hidden.to(dtype), head.to(dtype), None if bias is None else bias.to(dtype)
    segments = None if segments is None else segments.contiguous()
    call = Call(hidden, head, targets.contiguous(), bias, scale, softcap, segments, drop_below)
    _check(call)
    return _LinearLogp.apply(hidden, head, bias, call, _find(impl, call), torch.is_grad_enabled())


def _check(call: Call) -> None:
    hidden, head, targets, bias, scale, softcap, segments, drop_below = call

    def refuse(name, wanted, value):
        got = f"{value.dtype} {tuple(value.shape)} on {value.device}" if isinstance(value, torch.Tensor) else value
        raise ValueError(f"linear_logp: {name} must be {wanted}, got {got}")

    if hidden.dim() != 2 or hidden.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        refuse("hidden", "floating point (N, D)", hidden)
    N, D = hidden.shape
    if head.dim() != 2 or head.shape[1] != D or len(head) < 1 or head.dtype != hidden.dtype:
        refuse("head", f"{hidden.dtype} (V, {D}) with V >= 1", head)
    V = len(head)
    if targets.shape != (N,) or targets.dtype != torch.int64:
        refuse("targets", f"int64 (N,) = ({N},)", targets)
    if bias is not None and (bias.shape != (V,) or bias.dtype != hidden.dtype):
        refuse("bias", f"{hidden.dtype} (V,) = ({V},)", bias)
    for name, tensor in (("head", head), ("targets", targets), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            refuse(name, f"on hidden's device {hidden.device}", tensor)
    if softcap is not None and not softcap > 0:
        refuse("softcap", "positive or None", softcap)
    if not scale > 0:
        refuse("scale", "positive", scale)
    if not 0 <= drop_below < 1:
        refuse("drop_below", "in [0, 1)", drop_below)
    if segments is not None and (segments.dim() != 1 or segments.dtype != torch.int64 or len(segments) < 2):
        refuse("segments", "int64 (S+1,) row offsets", segments)
    if (
        drop_below > 0
        and segments is not None
        and (segments[0] != 0 or segments[-1] != N or (segments.diff() < 0).any())
    ):
        raise ValueError(f"linear_logp: segments must rise from 0 to N = {N}")
    if N and targets.device.type == "cpu":  # on a GPU the check would be a host sync
        low, high = targets.aminmax()
        if low < 0 or high >= V:
            raise ValueError(
                f"linear_logp: targets must lie in [0, V) = [0, {V}), got {int(low)} to {int(high)}; "
                "pass the valid rows only (no ignore_index rows)"
            )


def _find(impl, call):
    on_cpu = call.hidden.device.type == "cpu"
    if impl not in ("auto", "torch", "cpp"):
        raise ValueError(f"linear_logp: impl must be 'auto', 'torch' or 'cpp', got {impl!r}")
    if impl == "cpp" and not on_cpu:
        raise ValueError(f"linear_logp: impl 'cpp' runs on the CPU, got hidden on {call.hidden.device}; use 'auto'")
    if impl == "cpp" and not cpp.is_built():
        raise RuntimeError(cpp.MISSING)
    found = cpp if impl == "cpp" or (impl == "auto" and on_cpu and cpp.is_built()) else chunked
    if call.drop_below > 0 and found is not cpp:
        raise ValueError(f"linear_logp: drop_below > 0 wants impl 'cpp', here impl is {impl!r}; use drop_below=0")
    return found


class _LinearLogp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, bias, call, impl, grad_enabled):
        wants = [grad_enabled and needed for needed in ctx.needs_input_grad[:3]]
        ctx.head_trained = wants[1] or wants[2]
        logp, lse, grad_rows = impl.forward(call, want_rows=wants[0] and not ctx.head_trained)
        if ctx.head_trained:
            ctx.call, ctx.impl = call._replace(hidden=None, head=None, bias=None), impl
            ctx.save_for_backward(hidden, head, bias, lse)
        elif wants[0]:
            ctx.save_for_backward(grad_rows)
        return logp

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):  # (N,)
        if not ctx.head_trained:
            (grad_rows,) = ctx.saved_tensors
            return (grad_rows * upstream[:, None]).to(grad_rows.dtype), None, None, None, None, None
        hidden, head, bias, lse = ctx.saved_tensors
        call = ctx.call._replace(hidden=hidden, head=head, bias=bias)
        grads = ctx.impl.backward(call, lse, upstream, tuple(ctx.needs_input_grad[:3]))
        return *(None if g is None else g.to(hidden.dtype) for g in grads), None, None, None
