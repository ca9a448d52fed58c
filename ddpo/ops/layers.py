"""What a transformer layer does beside its plain matrix products and attention: rms_norm, silu_mul, rotary on the
CPU, each in one pass over memory (csrc/layers.cpp); lora_linear in PyTorch, on any device.

Specs: ddpo.reference. All are differentiable once.
"""

import torch
from torch import Tensor

from ddpo.ops import cpp


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """Root mean square norm over the last dimension: y = x / sqrt(mean(x^2) + eps) * (weight + offset).

    Args:
        x: (..., D) float32 or float64, on the CPU.
        weight: (D,), dtype of x. Its gradient is computed only where wanted.
        eps: added to the mean square.
        offset: added to the weight: 1.0 for Gemma's.
    Returns: like x. Sums in the dtype of x.
    Raises: ValueError for other shapes or dtypes, RuntimeError without the extension or off the CPU.
    Source: arXiv 1910.07467; rounds as transformers' LlamaRMSNorm does in float32.
    """
    return _op("rms_norm")(x, weight, eps, offset)[0]


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """SwiGLU's elementwise part: gate / (1 + exp(-gate)) * up.

    Args:
        gate, up: of one shape and dtype, float32 or float64, on the CPU.
    Returns: like gate.
    Raises: ValueError for other shapes or dtypes, RuntimeError without the extension or off the CPU.
    Source: arXiv 2002.05202.
    """
    return _op("silu_mul")(gate, up)


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary position embedding: x * cos + (-x2, x1) * sin for the halves (x1, x2) of each head.

    Args:
        q, k: (B, heads, T, d), d even, float32 or float64, on the CPU; any strides.
        cos, sin: (B or 1, T, d), dtype of q; no gradient.
    Returns: like q and k, in memory (B, T, heads, d).
    Raises: ValueError for other shapes or dtypes, RuntimeError without the extension or off the CPU.
    Source: arXiv 2104.09864, in transformers' half-rotation.
    """
    return _op("rotary")(q, k, cos, sin, False)


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """A frozen linear layer with a low-rank adapter: x W^T + bias + scaling * (x A^T) B^T.

    Both products add into one result, forward and backward: no tensor of the result's size beside it. Gradients of
    x, A and B alone.

    Args:
        x: (..., D) floating point, any device.
        weight: (out, D), dtype of x; bias: (out,) or None.
        a: (r, D); b: (out, r), dtype of x.
        scaling: alpha / r.
    Returns: (..., out).
    Source: arXiv 2106.09685.
    """
    return _LoraLinear.apply(x, weight, bias, a, b, scaling)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scaling):
        rows = x.reshape(-1, x.shape[-1])  # (T, D)
        low = rows @ a.T  # (T, r)
        out = rows @ weight.T if bias is None else torch.addmm(bias, rows, weight.T)  # (T, out)
        out.addmm_(low, b.T, alpha=scaling)
        ctx.save_for_backward(rows, low, weight, a, b)
        ctx.scaling, ctx.shape = scaling, x.shape
        return out.view(*x.shape[:-1], len(weight))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        rows, low, weight, a, b = ctx.saved_tensors
        upstream = upstream.reshape(-1, upstream.shape[-1])  # (T, out)
        of_x = of_a = of_b = None
        of_low = upstream @ b  # (T, r), times scaling
        if ctx.needs_input_grad[0]:
            of_x = (upstream @ weight).addmm_(of_low, a, alpha=ctx.scaling).view(ctx.shape)
        if ctx.needs_input_grad[3]:
            of_a = (of_low.T @ rows).mul_(ctx.scaling)
        if ctx.needs_input_grad[4]:
            of_b = (upstream.T @ low).mul_(ctx.scaling)
        return of_x, None, None, of_a, of_b, None


def _op(name):
    if not cpp.is_built:
        raise RuntimeError(f"{name} wants the extension ddpo._C, which was not built; reinstall with DDPO_BUILD_CPP=1")
    return getattr(torch.ops.ddpo, name)


def _rms_norm_setup(ctx, inputs, output):
    x, weight, _, ctx.offset = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.set_materialize_grads(False)


def _rms_norm_backward(ctx, upstream, _):
    if upstream is None:
        return (None,) * 4
    want_weight = ctx.needs_input_grad[1]
    of_x, of_weight = torch.ops.ddpo.rms_norm_bwd(upstream, *ctx.saved_tensors, ctx.offset, want_weight)
    return of_x, of_weight if want_weight else None, None, None


def _silu_mul_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _silu_mul_backward(ctx, upstream):
    return torch.ops.ddpo.silu_mul_bwd(upstream, *ctx.saved_tensors)


def _rotary_setup(ctx, inputs, output):
    *_, cos, sin, ctx.back = inputs
    ctx.save_for_backward(cos, sin)


def _rotary_backward(ctx, of_q, of_k):
    return *torch.ops.ddpo.rotary(of_q, of_k, *ctx.saved_tensors, not ctx.back), None, None, None


def _only_once(ctx, *upstream):
    raise NotImplementedError("rms_norm and silu_mul are differentiable once; uninstall ddpo._C for more")


def _fake_rotary(q, k, cos, sin, back):
    return tuple(x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (q, k))


def _dense(x):
    return x.new_empty(x.shape)


def _register():
    """Fakes and gradients of the extension's ops."""
    fakes = {
        "rms_norm": lambda x, weight, eps, offset: (_dense(x), x.new_empty(x.shape[:-1].numel())),
        "rms_norm_bwd": lambda dy, x, weight, rstd, offset, want_weight: (
            _dense(x),
            weight.new_empty(weight.shape if want_weight else 0),
        ),
        "silu_mul": lambda gate, up: _dense(gate),
        "silu_mul_bwd": lambda dy, gate, up: (_dense(gate), _dense(up)),
        "rotary": _fake_rotary,
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"ddpo::{name}", fake)
    for name, backward, setup in (
        ("rms_norm", _rms_norm_backward, _rms_norm_setup),
        ("silu_mul", _silu_mul_backward, _silu_mul_setup),
        ("rotary", _rotary_backward, _rotary_setup),
    ):
        torch.library.register_autograd(f"ddpo::{name}", backward, setup_context=setup)
    for name in ("rms_norm_bwd", "silu_mul_bwd"):
        torch.library.register_autograd(f"ddpo::{name}", _only_once)


if cpp.is_built:
    _register()
