"""linear_logp: from hidden rows to target log-probs, without ever holding an (N, V) tensor.

The narrow waist of the library: kernels below it, losses above it. Spec: ddpo.reference.linear_logp.
G is the unit of work, one head GEMM (2*N*V*D FLOP).

* Head frozen: d loss/d hidden[n] = c[n] * row[n] with row[n] = d logp[n]/d hidden[n], so forward forms the
  rows and backward multiplies them by the upstream c: 2G in all, any chunking, nothing recomputed.
* Head (or bias) trained: backward recomputes the logits: 4G, gradients summed in float32.
* No gradient wanted: 1G.
* drop_below > 0 (impl cpp): probabilities under it are not multiplied one by one; a trained head's gradient is made
  of those that were kept: little more than 1G, head frozen or trained.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ddpo.ops import chunked, cpp, triton
from ddpo.ops.implementation import Call, Implementation, as_wants

MIN_MEAN_ROWS = 16  # of a segment, for drop_below to pay: a segment costs about as much as a row
BACKENDS: dict[str, Implementation] = {
    "torch": chunked,
    "cpp": cpp,
    "triton": triton,
    "triton-chunked": triton.Path("chunked"),
    "triton-fused": triton.Path("fused"),
}


def linear_logp(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    segments: Tensor | None = None,
    impl: str = "auto",
    drop_below: float = 0.0,
) -> Tensor:
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
        impl: 'auto' is the fastest that is there: 'cpp' (CPU), 'triton' (GPU; 'triton-chunked' or 'triton-fused' where
            one of its ways is meant, else what `ddpo tune` found faster, else chunked), 'torch' (anywhere).
        drop_below: in [0, 1), probability. 0 is exact. Else probabilities under it (times the softcap's slope) enter
            the gradients by their sum times a mean, per segment and 1,024 ids of the vocabulary: a mean head row in
            hidden's gradient, a mean hidden row in head's. Log-probs stay exact. Exact all the same where the call's
            segments hold fewer than 16 rows on average, which would gain nothing. For a trained head's gradient are
            kept one float per segment and id and the larger probabilities; where those are more than V/16 a row (a
            nearly flat softmax) it is recomputed, exactly.
    Returns: (N,) nats; float64 for float64 input, else float32. Target logit and log-sum-exp are taken in that
        precision. Differentiable once in hidden, head and bias.
    Raises: ValueError for other shapes, dtypes or values; RuntimeError for a named impl that is not there.
    Source: the log-softmax of every language model head; deferred scale and tail correction are ours.
    """
    hidden, head, bias = autocast(hidden, head, bias)
    segments = None if segments is None else segments.contiguous()
    call = Call(hidden, head, targets.contiguous(), bias, scale, softcap, segments, drop_below)
    check(call)
    impl = find_impl(impl, call)
    num_segments = 1 if segments is None else len(segments) - 1
    if len(hidden) == 0 or (num_segments > 1 and MIN_MEAN_ROWS * num_segments > len(hidden)):
        call = call._replace(drop_below=0.0)
    return _forward(*call, impl, wanted(hidden, head, bias))[0]


def autocast(hidden, head, bias):
    """As autocast, where it is on, would cast the inputs of a linear layer."""
    if not torch.is_autocast_enabled(hidden.device.type) or hidden.dtype == torch.float64:
        return hidden, head, bias
    dtype = torch.get_autocast_dtype(hidden.device.type)
    return hidden.to(dtype), head.to(dtype), None if bias is None else bias.to(dtype)


def wanted(hidden, head, bias) -> list[bool]:
    """Which of their gradients are."""
    return [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, head, bias)]


def check(call: Call) -> None:
    hidden, head, targets, bias, scale, softcap, segments, drop_below = call

    def refuse(name, wanted, value):
        got = f"{value.dtype} {tuple(value.shape)} on {value.device}" if isinstance(value, Tensor) else value
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
    if segments is not None and (segments.dim() != 1 or segments.dtype != torch.int64 or len(segments) < 1):
        refuse("segments", "int64 (S+1,) row offsets", segments)
    if hidden.device.type != "cpu" or torch.compiler.is_compiling():
        return  # values: a host sync, a graph break; the C++ kernels check them again
    if segments is not None and (segments[0] != 0 or segments[-1] != N or (segments.diff() < 0).any()):
        raise ValueError(f"linear_logp: segments must rise from 0 to N = {N}")
    if N:
        low, high = targets.aminmax()
        if low < 0 or high >= V:
            raise ValueError(
                f"linear_logp: targets must lie in [0, V) = [0, {V}), got {int(low)} to {int(high)}; "
                "pass the valid rows only (no ignore_index rows)"
            )


def find_impl(impl: str, call: Call) -> str:
    """The implementation that runs: a key of BACKENDS."""
    on_cpu = call.hidden.device.type == "cpu"
    if impl == "auto":
        found = "cpp" if on_cpu and cpp.is_built else "triton" if not on_cpu and triton.runs(call.hidden) else "torch"
    elif impl in BACKENDS:
        found = impl
    else:
        raise ValueError(f"linear_logp: impl must be 'auto' or one of {', '.join(BACKENDS)}, got {impl!r}")
    if found == "cpp" and not on_cpu:
        raise ValueError(f"linear_logp: impl 'cpp' runs on the CPU, got hidden on {call.hidden.device}; use 'auto'")
    if found == "cpp" and not cpp.is_built:
        raise RuntimeError(cpp.MISSING)
    if found.startswith("triton") and not triton.runs(call.hidden):
        raise RuntimeError(triton.MISSING)
    if call.drop_below > 0 and found != "cpp":
        raise ValueError(f"linear_logp: drop_below > 0 wants impl 'cpp', here impl is {impl!r}; use drop_below=0")
    return found


# --- the op: opaque to torch.compile, which sees one call forward and one backward ------------------------


@torch.library.custom_op("ddpo::linear_logp", mutates_args=())
def _forward(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    segments: Tensor | None,
    drop_below: float,
    impl: str,
    wants: Sequence[bool],
) -> tuple[Tensor, list[Tensor]]:
    """-> logp (N,), and what the implementation's backward needs of its forward."""
    call = Call(hidden, head, targets, bias, scale, softcap, segments, drop_below)
    return BACKENDS[impl].forward(call, as_wants(wants))


@_forward.register_fake
def _(hidden, head, targets, bias, scale, softcap, segments, drop_below, impl, wants):
    call = Call(hidden, head, targets, bias, scale, softcap, segments, drop_below)
    return BACKENDS[impl].fake(call, as_wants(wants))


def _setup_context(ctx, inputs, output):
    *call, impl, wants = inputs
    keep(ctx, Call(*call), output[1], impl, wants)


def keep(ctx, call: Call, saved: list[Tensor], impl: str, wants: Sequence[bool], row_c: Tensor | None = None) -> None:
    """What `gradients` needs; with a coefficient of each row (N,), where a loss has given it."""
    inputs: tuple[Tensor | None, ...] = (call.hidden, call.head, call.bias)
    if not (wants[1] or wants[2]) and saved[0].dim() == 2:  # the gradient's rows: all that backward needs
        inputs = (None, None, None)
    ctx.save_for_backward(*inputs, call.targets, call.segments, row_c, *saved)
    ctx.options = (call.scale, call.softcap, call.drop_below, impl, wants)
    ctx.set_materialize_grads(False)  # of what is saved nobody takes a gradient


def _autograd(ctx, upstream, _):  # upstream (N,)
    if upstream is None:
        return (None,) * 10
    of_hidden, of_head, of_bias = gradients(ctx, ctx.saved_tensors, upstream)
    return of_hidden, of_head, None, of_bias, *[None] * 6


def gradients(ctx, tensors: tuple, upstream: Tensor) -> list[Tensor | None]:
    """Of hidden, head and bias, None where not wanted. tensors: ctx.saved_tensors, which may be read only once."""
    hidden, head, bias, targets, segments, _, *saved = tensors
    scale, softcap, drop_below, impl, wants = ctx.options
    found = _backward(upstream, saved, hidden, head, targets, bias, scale, softcap, segments, drop_below, impl, wants)
    in_order = iter(found)
    return [next(in_order) if want else None for want in wants]


_forward.register_autograd(_autograd, setup_context=_setup_context)


@torch.library.custom_op("ddpo::linear_logp_backward", mutates_args=())
def _backward(
    upstream: Tensor,
    saved: list[Tensor],
    hidden: Tensor | None,
    head: Tensor | None,
    targets: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    segments: Tensor | None,
    drop_below: float,
    impl: str,
    wants: Sequence[bool],
) -> list[Tensor]:
    """-> the gradients wanted, of hidden, head and bias. It has none itself: linear_logp is differentiable once."""
    call = Call(hidden, head, targets, bias, scale, softcap, segments, drop_below)  # type: ignore[arg-type]  # see keep
    return [grad for grad in BACKENDS[impl].backward(call, saved, upstream, as_wants(wants)) if grad is not None]


@_backward.register_fake
def _(upstream, saved, hidden, head, targets, bias, scale, softcap, segments, drop_below, impl, wants):
    if hidden is None:
        return [torch.empty_like(saved[0])]  # its rows
    return [x.new_empty(x.shape) for x, want in zip((hidden, head, bias), wants, strict=True) if want]
