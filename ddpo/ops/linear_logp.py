"""linear_logp: from hidden rows to target log-probs, without ever holding an (N, V) tensor.

The narrow waist of the library: kernels below it, losses above it. Spec: ddpo.reference.linear_logp.
G is the unit of work, one head GEMM (2*N*V*D FLOP).

* Head frozen: d loss/d hidden[n] = c[n] * row[n] with row[n] = d logp[n]/d hidden[n], so forward forms the
  rows and backward multiplies them by the upstream c: 2G in all, any chunking, nothing recomputed.
* Head (or bias) trained: backward recomputes the logits chunk by chunk: 4G, gradients summed in float32.
* No gradient wanted: 1G.
"""

import torch

from ddpo.ops import rows


def linear_logp(
    hidden: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    impl: str = "auto",
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
        impl: 'auto', 'torch' or 'cpp' (CPU; the row pass in C++). 'auto' is the fastest that is there.
    Returns: (N,) nats; float64 for float64 input, else float32. Target logit and log-sum-exp are taken in that
        precision. Differentiable once in hidden, head and bias.
    Raises: ValueError for other shapes, dtypes or values; RuntimeError for a named impl that is not there.
    Source: the log-softmax of every language model head; the deferred scale is ours.
    """
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        hidden, head, bias = hidden.to(dtype), head.to(dtype), None if bias is None else bias.to(dtype)
    _check(hidden, head, targets, bias, scale, softcap)
    targets = targets.contiguous()
    options = rows.Options(scale, softcap, rows.find_pass(impl, hidden.device))
    return _LinearLogp.apply(hidden, head, targets, bias, options, torch.is_grad_enabled())


def _check(hidden, head, targets, bias, scale, softcap):
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
    if N and targets.device.type == "cpu":  # on a GPU the check would be a host sync
        low, high = targets.aminmax()
        if low < 0 or high >= V:
            raise ValueError(
                f"linear_logp: targets must lie in [0, V) = [0, {V}), got {int(low)} to {int(high)}; "
                "pass the valid rows only (no ignore_index rows)"
            )


class _LinearLogp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, targets, bias, options, grad_enabled):
        wants = [grad_enabled and needed for needed in ctx.needs_input_grad]
        ctx.options = options
        ctx.head_trained = wants[1] or wants[3]
        N = len(hidden)
        logp = hidden.new_empty(N, dtype=rows.opmath(hidden.dtype))  # (N,) nats
        defer = wants[0] and not ctx.head_trained
        grad_rows = torch.empty_like(hidden) if defer else None  # (N, D) d logp / d hidden
        for chunk in rows.chunks(N, head):
            logits, cap = rows.logits(hidden[chunk], head, bias, options, grad=defer)
            logp[chunk] = options.row_pass(logits, targets[chunk], defer)
            if defer:
                rows.through_cap(logits, cap, options)
                rows.times_head(logits, head, out=grad_rows[chunk])
        if ctx.head_trained:
            ctx.save_for_backward(hidden, head, targets, bias)
        elif defer:
            ctx.save_for_backward(grad_rows)
        return logp

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):  # (N,)
        if not ctx.head_trained:
            (grad_rows,) = ctx.saved_tensors
            return (grad_rows * upstream[:, None]).to(grad_rows.dtype), None, None, None, None, None
        hidden, head, targets, bias = ctx.saved_tensors
        options = ctx.options
        acc = rows.opmath(hidden.dtype)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_head = torch.zeros_like(head, dtype=acc) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=acc) if ctx.needs_input_grad[3] else None
        for chunk in rows.chunks(len(hidden), head):
            logits, cap = rows.logits(hidden[chunk], head, bias, options, grad=True)
            options.row_pass(logits, targets[chunk], True)
            rows.through_cap(logits, cap, options)
            logits.mul_(upstream[chunk, None])
            if grad_head is not None:
                rows.add_outer(logits, hidden[chunk], out=grad_head)
            if grad_bias is not None:
                grad_bias += logits.sum(0)
            if grad_hidden is not None:
                rows.times_head(logits, head, out=grad_hidden[chunk])
        cast = [None if g is None else g.to(head.dtype) for g in (grad_head, grad_bias)]
        return grad_hidden, cast[0], None, cast[1], None, None
