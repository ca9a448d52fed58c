"""linear_preference: from hidden rows to a preference loss in one op.

linear_logp, sequence sums and losses in one piece: the loss's coefficient of every row is known in forward, so the
rows' gradient is scaled there, by the launch that forms the losses. Backward only multiplies by the upstream scalar.
Spec: ddpo.reference (linear_logp, then dpo, ddpo, orpo, dorpo).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpo.ops.implementation import Call, as_wants
from ddpo.ops.linear_logp import BACKENDS, autocast, check, find_impl, gradients, keep, wanted
from ddpo.ops.sequence_sum import sequence_sum


def linear_preference(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    segments: Tensor,
    pairs: Tensor,
    weight: Tensor | None,
    *,
    loss: str = "ddpo",
    ref_logp: Tensor | None = None,
    beta: float,
    label_smoothing: float = 0.0,
    tokens_per_pair: Tensor | float | None = None,
    denominator: Tensor | float | None = None,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum over the pairs of the weighted DPO or ORPO loss, divided by the denominator.

    ddpo:  w * -((1 - e) log sigmoid(m) + e log sigmoid(-m)),  m = beta * ((lp_c - ref_c) - (lp_r - ref_r))
    dorpo: w * (-lp_c / tokens - beta * log sigmoid(log odds ratio of the mean token log-probs))

    Args:
        hidden: (N, D); head: (V, D); targets: (N,); bias, scale, softcap: as in linear_logp.
        segments: (S+1,) int64 row offsets of the sequences, rising from 0 to N.
        pairs: (P, 2) int64, chosen and rejected sequence of each pair.
        weight: (P,) unitless, or None: ones (DPO, ORPO). Like ref_logp and the scalars, a constant: no gradient.
        ref_logp: (S,) nats, the reference policy's; None: zeros. Not for dorpo.
        label_smoothing: e in [0, 0.5), ddpo only: the share of pairs whose order is wrong.
        tokens_per_pair: dorpo; chosen tokens per pair of the whole step, or None: each pair its own.
        denominator: pairs of the whole step, a number or a scalar on the device; None: P.
        impl: as in linear_logp; with a Triton one the pairs are one launch.
    Returns: loss, a scalar, differentiable once in hidden, head and bias; logp (S,) nats and losses (P,), not
        differentiable. float64 for float64 input, else float32.
    Raises: ValueError for other shapes, dtypes or values.
    Source: arXiv 2503.17126; the gradient scaled in forward is ours.
    """
    hidden, head, bias = autocast(hidden, head, bias)
    call = Call(hidden, head, targets.contiguous(), bias, scale, softcap, None, 0.0)
    check(call)
    odds = _check_pairs(len(hidden), hidden.device, segments, pairs, weight, loss, ref_logp, label_smoothing)
    device, dtype = hidden.device, torch.float64 if hidden.dtype == torch.float64 else torch.float32

    def scalar(x):  # as a fill, not a copy, which would wait for the device
        if isinstance(x, Tensor):
            return x.detach().to(device, dtype).reshape(())
        return torch.full((), float(x), device=device, dtype=dtype)

    weight, ref_logp = (None if x is None else x.detach().to(device, dtype).contiguous() for x in (weight, ref_logp))
    tokens_per_pair = None if tokens_per_pair is None else scalar(tokens_per_pair)
    denominator = scalar(max(len(pairs), 1) if denominator is None else denominator)
    tensors = (segments.contiguous(), pairs.contiguous(), weight, ref_logp, denominator, tokens_per_pair)
    terms = (*tensors, float(beta), float(label_smoothing), odds)
    value, logp, losses, *_ = _forward(*call[:6], *terms, find_impl(impl, call), wanted(hidden, head, bias))
    return value, logp.detach(), losses.detach()


def _check_pairs(N, device, segments, pairs, weight, loss, ref_logp, label_smoothing) -> bool:
    """Whether the loss is of the odds family."""

    def refuse(name, wanted, value):
        got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"linear_preference: {name} must be {wanted}, got {got}")

    for name, tensor in (("segments", segments), ("pairs", pairs)):
        if tensor.device != device:
            refuse(name, f"on hidden's device {device}", f"it on {tensor.device}")
    if segments.dim() != 1 or segments.dtype != torch.int64 or len(segments) < 1 or (len(segments) == 1 and N):
        refuse("segments", "int64 (S+1,) row offsets from 0 to N", segments)
    if pairs.dim() != 2 or pairs.shape[1] != 2 or pairs.dtype != torch.int64:
        refuse("pairs", "int64 (P, 2)", pairs)
    if weight is not None and (weight.shape != pairs.shape[:1] or not weight.is_floating_point()):
        refuse("weight", f"floating point (P,) = ({len(pairs)},) or None", weight)
    if loss not in ("ddpo", "dorpo"):
        refuse("loss", "'ddpo' or 'dorpo'", loss)
    on_cpu = device.type == "cpu" and not torch.compiler.is_compiling()  # elsewhere it would be a host sync
    if on_cpu and (segments[0] != 0 or segments[-1] != N or (segments.diff() < 0).any()):
        refuse("segments", f"rising from 0 to N = {N}", segments.tolist())
    if on_cpu and len(pairs):
        low, high = pairs.aminmax()
        if low < 0 or high >= len(segments) - 1:
            refuse("pairs", f"ids in [0, S) = [0, {len(segments) - 1})", f"{int(low)} to {int(high)}")
    odds = loss == "dorpo"
    if ref_logp is not None and (odds or ref_logp.shape != (len(segments) - 1,)):
        refuse("ref_logp", f"(S,) = ({len(segments) - 1},) or None, and None for 'dorpo'", ref_logp)
    if not 0 <= label_smoothing < 0.5 or (odds and label_smoothing):
        refuse("label_smoothing", "in [0, 0.5), and 0 for 'dorpo'", label_smoothing)
    return odds


@torch.library.custom_op("ddpo::linear_preference", mutates_args=())
def _forward(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    segments: Tensor,
    pairs: Tensor,
    weight: Tensor | None,
    ref_logp: Tensor | None,
    denominator: Tensor,
    tokens_per_pair: Tensor | None,
    beta: float,
    label_smoothing: float,
    odds: bool,
    impl: str,
    wants: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """-> loss, logp (S,), losses (P,), and for backward: each row's coefficient (N,), and what linear_logp keeps.
    Where that is the gradient's rows, they come scaled."""
    call = Call(hidden, head, targets, bias, scale, softcap, None, 0.0)
    token_logp, saved = BACKENDS[impl].forward(call, as_wants(wants))
    rows = saved[0] if _scales_rows(saved, wants) else None
    terms = (segments, pairs, weight, ref_logp, denominator, tokens_per_pair, beta, label_smoothing, odds)
    sum_pairs = _pairs_triton if impl.startswith("triton") else _pairs_torch
    logp, losses, row_c = sum_pairs(token_logp, *terms, rows)
    return losses.sum() / denominator, logp, losses, row_c, saved


@_forward.register_fake
def _(hidden, head, targets, bias, scale, softcap, segments, pairs, *terms):
    *_, impl, wants = terms
    call = Call(hidden, head, targets, bias, scale, softcap, None, 0.0)
    token_logp, saved = BACKENDS[impl].fake(call, as_wants(wants))
    S, P, N = segments.shape[0] - 1, pairs.shape[0], hidden.shape[0]
    return *(token_logp.new_empty(shape) for shape in ((), S, P, N)), saved


def _scales_rows(saved, wants) -> bool:
    """Whether linear_logp has formed the rows of hidden's gradient in forward (a frozen head, not the fused way). Not
    in float16: a loss scale comes with backward, without it small coefficients would underflow."""
    return tuple(wants) == (True, False, False) and saved[0].dim() == 2 and saved[0].dtype != torch.float16


def _setup_context(ctx, inputs, output):
    *_, row_c, saved = output
    impl, wants = inputs[-2:]
    ctx.scaled = _scales_rows(saved, wants)
    keep(ctx, Call(*inputs[:6], None, 0.0), saved, impl, wants, row_c)


def _autograd(ctx, upstream, *_):  # upstream: a scalar
    if upstream is None:
        return (None,) * 17
    tensors = ctx.saved_tensors
    row_c = tensors[5]
    factor = upstream.expand_as(row_c) if ctx.scaled else row_c * upstream
    of_hidden, of_head, of_bias = gradients(ctx, tensors, factor)
    return of_hidden, of_head, None, of_bias, *[None] * 13


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _pairs_triton(
    token_logp, segments, pairs, weight, ref_logp, denominator, tokens_per_pair, beta, smooth, odds, rows
):
    """-> logp (S,), losses (P,), c of each row (N,); rows are scaled in place."""
    from ddpo.kernels import preference as kernels

    with torch.cuda.device_of(token_logp):
        logp, losses, _, row_c = kernels.fwd(
            token_logp, segments, pairs, weight, ref_logp, denominator, tokens_per_pair, beta, smooth, odds, rows
        )
    return logp, losses, row_c


def _pairs_torch(token_logp, segments, pairs, weight, ref_logp, denominator, tokens_per_pair, beta, smooth, odds, rows):
    """The same in PyTorch."""
    logp, num_tokens = sequence_sum(token_logp, segments), segments.diff()
    num_tokens = num_tokens.clamp(min=1).to(logp.dtype)
    chosen, rejected = pairs.unbind(1)
    if odds:
        mean = logp / num_tokens
        lm = mean.clamp(max=-(2.0**-24))
        rest = -torch.expm1(lm)
        score = lm - torch.log(rest)
        slope = torch.where(mean == lm, 1 / (num_tokens * rest), 0)  # d score / d logp
    else:
        score = beta * (logp if ref_logp is None else logp - ref_logp)
        slope = torch.full_like(logp, beta)
    margin = score[chosen] - score[rejected]
    losses = (smooth - 1) * F.logsigmoid(margin) - smooth * F.logsigmoid(-margin)
    d_margin = smooth * margin.sigmoid() - (1 - smooth) * (-margin).sigmoid()
    likelihood = 0.0
    if odds:
        tokens = num_tokens[chosen] if tokens_per_pair is None else tokens_per_pair
        losses, d_margin, likelihood = beta * losses - logp[chosen] / tokens, beta * d_margin, -1 / tokens
    d_chosen, d_rejected = d_margin * slope[chosen] + likelihood, -d_margin * slope[rejected]
    if weight is not None:
        losses, d_chosen, d_rejected = weight * losses, weight * d_chosen, weight * d_rejected
    c = torch.zeros_like(logp)
    c.index_put_((pairs.T.flatten(),), torch.cat([d_chosen, d_rejected]) / denominator, accumulate=True)
    row_c = c.repeat_interleave(segments.diff(), output_size=len(token_logp))
    if rows is not None:
        rows.mul_(row_c[:, None])
    return logp, losses, row_c
