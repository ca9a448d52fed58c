"""Log-probability of each target token under a linear head: kernels that never hold an (N, V) tensor.

    z[n, v]  = scale * (h[n] . W[v] + b[v]),  with softcap c: z = c * tanh(z / c)
    lse[n]   = log sum_v exp z[n, v]
    logp[n]  = z[n, y[n]] - lse[n]
    dz[n, v] = g[n] * scale * (1 - (z/c)^2) * ([v == y[n]] - exp(z[n, v] - lse[n]))     (here z is before scale and cap)
    dh = dz @ W,  dW = dz^T @ h,  db = sum_n dz

G = 2*N*V*D FLOP. Three pieces, put together by ddpo.ops.triton:
    fwd          1G; reads h and W once per L2 group, writes N * (V / 1024) partial sums
    bwd          1G to recompute the logits, panel by panel of the vocabulary, and 1G for each of dh and dW
    slopes       the pass between two GEMMs of the caller: per logit 8 bytes read (lse known: 4), 2 written (bf16)
Spec: ddpo.reference.linear_logp.
Names: N rows, D width, V vocabulary; h hidden, W head, b bias, y target ids, g upstream gradient of logp.
"""

import torch
import triton
import triton.language as tl

SPLIT_V = 1024  # vocabulary ids of one program of fwd: small N still fills the GPU
PANEL_BYTES = 128 << 20  # of dz: what bwd holds besides its results
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LOWEST = tl.constexpr(-3.4e38)  # a maximum to start from: unlike -inf, it may be subtracted from -inf


# --- kernels -------------------------------------------------------------------------------


@triton.jit
def _cap(z, softcap):
    """softcap * tanh(z / softcap), written so that the exponential may overflow."""
    return softcap - 2.0 * softcap / (1.0 + tl.exp(z * (2.0 / softcap)))


@triton.jit
def _slope(z, softcap):
    """d cap(x) / d x, written in the capped z."""
    t = z * (1.0 / softcap)
    return 1.0 - t * t


@triton.jit
def _tile_of(pid, num_m, num_n, GROUP: tl.constexpr):
    """(m, n) of a program: GROUP row tiles share each column tile, so that both stay in L2."""
    group = pid // (GROUP * num_n)
    size = min(num_m - group * GROUP, GROUP)
    rest = pid % (GROUP * num_n)
    return group * GROUP + rest % size, rest // size


@triton.jit
def _dot(a, b, c):
    if INTERPRETED:  # the interpreter would multiply the bit patterns of bfloat16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, c, input_precision="ieee")


@triton.jit
def _logits(
    h_ptr, w_ptr, b_ptr, first_n, first_v,  # data, and where the tile begins
    N, D, V, h_stride_n, w_stride_v, scale, softcap,  # sizes, strides, factors
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,  # constants
):  # fmt: skip
    """One tile of logits, (BLOCK_N, BLOCK_V) f32. Past N and V it repeats the last row and column: no mask in the
    loop. int64 to where the tile begins, int32 inside it, which halves the registers of addresses."""
    rows = tl.minimum(tl.arange(0, BLOCK_N), N - 1 - first_n)
    columns = tl.minimum(tl.arange(0, BLOCK_V), V - 1 - first_v)
    offs_d = tl.arange(0, BLOCK_D)
    h_ptr += first_n.to(tl.int64) * h_stride_n
    w_ptr += first_v.to(tl.int64) * w_stride_v
    h_offs = rows[:, None] * h_stride_n + offs_d[None, :]
    w_offs = columns[None, :] * w_stride_v + offs_d[:, None]
    z = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for d in range(0, D, BLOCK_D):
        if EVEN_D:
            h, w = tl.load(h_ptr + h_offs), tl.load(w_ptr + w_offs)
        else:
            h = tl.load(h_ptr + h_offs, mask=offs_d[None, :] < D - d, other=0.0)
            w = tl.load(w_ptr + w_offs, mask=offs_d[:, None] < D - d, other=0.0)
        z = _dot(h, w, z)
        h_ptr += BLOCK_D
        w_ptr += BLOCK_D
    if b_ptr is not None:
        z += tl.load(b_ptr + first_v + columns)[None, :].to(tl.float32)
    z *= scale
    if softcap is not None:
        z = _cap(z, softcap)
    return z


# N and where a slice of the targets begins differ from batch to batch: not specialised where that costs nothing
_PER_BATCH = {"do_not_specialize": ["N"], "do_not_specialize_on_alignment": ["y_ptr", "g_ptr", "lse_ptr", "logp_ptr"]}
_EVEN_D = triton.heuristics({"EVEN_D": lambda args: args["D"] % args["BLOCK_D"] == 0})


@_EVEN_D
@triton.jit(**_PER_BATCH)
def _fwd_kernel(
    h_ptr, w_ptr, b_ptr, y_ptr, partial_ptr, z_y_ptr,  # data
    N, D, V, num_splits,  # sizes
    h_stride_n, w_stride_v, scale, softcap,  # strides, factors
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,  # constants
    SPLIT: tl.constexpr, GROUP: tl.constexpr, EVEN_D: tl.constexpr,
):  # fmt: skip
    """One row tile, SPLIT ids of the vocabulary: log-sum-exp over them, and the targets' logits among them."""
    pid_n, split = _tile_of(tl.program_id(0), tl.cdiv(N, BLOCK_N), num_splits, GROUP)
    first_n = pid_n * BLOCK_N
    offs_n = first_n + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    y = tl.load(y_ptr + offs_n, mask=mask_n, other=-1).to(tl.int32)
    m = tl.full((BLOCK_N,), LOWEST, tl.float32)  # running maximum
    s = tl.zeros((BLOCK_N,), tl.float32)  # running sum of exp(z - m)
    z_y = tl.zeros((BLOCK_N,), tl.float32)
    end = min((split + 1) * SPLIT, V)
    for i in range(tl.cdiv(end - split * SPLIT, BLOCK_V)):
        first_v = split * SPLIT + i * BLOCK_V
        z = _logits(
            h_ptr, w_ptr, b_ptr, first_n, first_v, N, D, V, h_stride_n, w_stride_v, scale, softcap,
            BLOCK_N, BLOCK_V, BLOCK_D, EVEN_D,
        )  # fmt: skip
        offs_v = first_v + tl.arange(0, BLOCK_V)
        z_y += tl.sum(tl.where(offs_v[None, :] == y[:, None], z, 0.0), 1)
        z = tl.where(offs_v[None, :] < V, z, -float("inf"))
        m_new = tl.maximum(m, tl.max(z, 1))
        s = s * tl.exp(m - m_new) + tl.sum(tl.exp(z - m_new[:, None]), 1)
        m = m_new
    tl.store(partial_ptr + split.to(tl.int64) * N + offs_n, m + tl.log(s), mask=mask_n)
    here = (y >= split * SPLIT) & (y < end)  # one program alone writes a row's target
    tl.store(z_y_ptr + offs_n, z_y, mask=mask_n & here)


@triton.jit(do_not_specialize=["N"])
def _merge_kernel(
    partial_ptr, z_y_ptr, lse_ptr, logp_ptr,  # data
    N, num_splits,  # sizes
    BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr,  # constants
):  # fmt: skip
    """Partial log-sum-exps, always in the same order, to lse and logp."""
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.full((BLOCK_N,), LOWEST, tl.float32)
    s = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, num_splits, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        mask = (offs_s[:, None] < num_splits) & (offs_n[None, :] < N)
        part = tl.load(partial_ptr + offs_s[:, None].to(tl.int64) * N + offs_n[None, :], mask=mask, other=-float("inf"))
        m_new = tl.maximum(m, tl.max(part, 0))
        s = s * tl.exp(m - m_new) + tl.sum(tl.exp(part - m_new[None, :]), 0)
        m = m_new
    lse = m + tl.log(s)
    mask_n = offs_n < N
    tl.store(lse_ptr + offs_n, lse, mask=mask_n)
    tl.store(logp_ptr + offs_n, tl.load(z_y_ptr + offs_n, mask=mask_n) - lse, mask=mask_n)


@_EVEN_D
@triton.jit(**_PER_BATCH)
def _dz_kernel(
    h_ptr, w_ptr, b_ptr, y_ptr, lse_ptr, g_ptr, dz_ptr,  # data
    N, D, V, first_v, num_v,  # sizes: the panel is columns first_v to first_v + num_v
    h_stride_n, w_stride_v, dz_stride_n, scale, softcap,  # strides, factors
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,  # constants
    GROUP: tl.constexpr, EVEN_D: tl.constexpr,
):  # fmt: skip
    """One tile of dz of a panel of the vocabulary; the logits are recomputed."""
    pid_n, pid_v = _tile_of(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(num_v, BLOCK_V), GROUP)
    first_n, first_p = pid_n * BLOCK_N, pid_v * BLOCK_V
    z = _logits(
        h_ptr, w_ptr, b_ptr, first_n, first_v + first_p, N, D, V, h_stride_n, w_stride_v, scale, softcap,
        BLOCK_N, BLOCK_V, BLOCK_D, EVEN_D,
    )  # fmt: skip
    offs_n, offs_p = first_n + tl.arange(0, BLOCK_N), first_p + tl.arange(0, BLOCK_V)
    mask_n = offs_n < N
    y = tl.load(y_ptr + offs_n, mask=mask_n, other=-1).to(tl.int32) - first_v
    lse = tl.load(lse_ptr + offs_n, mask=mask_n, other=0.0)
    g = tl.load(g_ptr + offs_n, mask=mask_n, other=0.0) * scale
    dz = -g[:, None] * tl.exp(z - lse[:, None])
    dz = tl.where(offs_p[None, :] == y[:, None], g[:, None] + dz, dz)  # a tile of ones and zeros beside it spills
    if softcap is not None:
        dz *= _slope(z, softcap)
    dz_ptr += first_n.to(tl.int64) * dz_stride_n
    dz_offs = tl.arange(0, BLOCK_N)[:, None] * dz_stride_n + offs_p[None, :]
    tl.store(dz_ptr + dz_offs, dz.to(dz_ptr.dtype.element_ty), mask=mask_n[:, None] & (offs_p[None, :] < num_v))


@triton.heuristics({"EVEN_K": lambda args: args["K"] % args["BLOCK_K"] == 0})
@triton.jit
def _matmul_kernel(
    a_ptr, b_ptr, c_ptr,  # data
    M, J, K,  # sizes: c (M, J) = a (M, K) @ b (K, J)
    a_stride_m, a_stride_k, b_stride_k, c_stride_m,  # strides
    BLOCK_M: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr,  # constants
    GROUP: tl.constexpr, ADD: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """c = a @ b, or c += a @ b where ADD; summed in f32, one cast at the store."""
    pid_m, pid_j = _tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(J, BLOCK_J), GROUP)
    offs_m = tl.arange(0, BLOCK_M)
    offs_j = pid_j * BLOCK_J + tl.arange(0, BLOCK_J)
    offs_k = tl.arange(0, BLOCK_K)
    first_m = pid_m * BLOCK_M
    # masks, not repeated rows: along a contiguous axis those would end wide loads
    mask_m, mask_j = offs_m[:, None] < M - first_m, offs_j[None, :] < J
    a_ptr += first_m.to(tl.int64) * a_stride_m
    a_offs = offs_m[:, None] * a_stride_m + offs_k[None, :] * a_stride_k
    b_offs = offs_k[:, None] * b_stride_k + offs_j[None, :]
    c_ptr += first_m.to(tl.int64) * c_stride_m
    c_offs = offs_m[:, None] * c_stride_m + offs_j[None, :]
    if ADD:
        c = tl.load(c_ptr + c_offs, mask=mask_m & mask_j, other=0.0)
    else:
        c = tl.zeros((BLOCK_M, BLOCK_J), tl.float32)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            a = tl.load(a_ptr + a_offs, mask=mask_m, other=0.0)
            b = tl.load(b_ptr + b_offs, mask=mask_j, other=0.0)
        else:
            a = tl.load(a_ptr + a_offs, mask=mask_m & (offs_k[None, :] < K - k), other=0.0)
            b = tl.load(b_ptr + b_offs, mask=mask_j & (offs_k[:, None] < K - k), other=0.0)
        c = _dot(a, b, c)
        a_ptr += BLOCK_K * a_stride_k
        b_ptr += BLOCK_K * b_stride_k
    tl.store(c_ptr + c_offs, c.to(c_ptr.dtype.element_ty), mask=mask_m & mask_j)


@triton.jit
def _load_logits(z_ptr, b_ptr, offs_v, V, scale, softcap):
    """Products h.W to logits; -inf past the end."""
    mask = (offs_v >= 0) & (offs_v < V)
    z = tl.load(z_ptr + offs_v, mask=mask, other=0.0)
    if b_ptr is not None:
        z += tl.load(b_ptr + offs_v, mask=mask, other=0.0).to(tl.float32)
    z *= scale
    if softcap is not None:
        z = _cap(z, softcap)
    return tl.where(mask, z, -float("inf"))


@triton.jit(**_PER_BATCH)
def _slopes_kernel(
    z_ptr, dz_ptr, b_ptr, y_ptr, g_ptr, lse_ptr, logp_ptr,  # data; z and dz are one memory
    V, z_stride_n, dz_stride_n, scale, softcap,  # sizes, strides, factors
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One row: lse and logp (where g is not given, else lse is known), then dz over the logits."""
    n = tl.program_id(0).to(tl.int64)
    z_ptr += n * z_stride_n
    dz_ptr += n * dz_stride_n
    y = tl.load(y_ptr + n)
    if g_ptr is None:
        # a maximum and a sum to each lane: one exp a logit, and no reduction inside the loop
        m = tl.full((BLOCK_V,), LOWEST, tl.float32)
        s = tl.zeros((BLOCK_V,), tl.float32)
        for start in range(0, V, BLOCK_V):
            z = _load_logits(z_ptr, b_ptr, start + tl.arange(0, BLOCK_V), V, scale, softcap)
            rise = z - m
            e = tl.exp(-tl.abs(rise))
            s = tl.where(rise > 0, s * e + 1.0, s + e)
            m = tl.maximum(m, z)
        top = tl.max(m, 0)
        lse = top + tl.log(tl.sum(s * tl.exp(m - top), 0))
        tl.store(lse_ptr + n, lse)
        logp = _load_logits(z_ptr, b_ptr, y, V, scale, softcap) - lse
        tl.store(logp_ptr + n, tl.where((y >= 0) & (y < V), logp, float("nan")))
        g = scale
    else:
        lse = tl.load(lse_ptr + n)
        g = tl.load(g_ptr + n) * scale
    for start in range(0, V, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        z = _load_logits(z_ptr, b_ptr, offs_v, V, scale, softcap)
        dz = g * (tl.where(offs_v == y, 1.0, 0.0) - tl.exp(z - lse))
        if softcap is not None:
            dz *= _slope(z, softcap)
        # dz is at most as wide as z and starts where z does: block i's stores overlap the loads of blocks i/2 to i,
        # never later ones. The barrier keeps them behind every thread's load of block i.
        tl.debug_barrier()
        tl.store(dz_ptr + offs_v, dz.to(dz_ptr.dtype.element_ty), mask=offs_v < V)


# --- configurations ------------------------------------------------------------------------


def _device() -> tuple[str, int, int]:
    """Backend, capability (0 where it is no number) and shared memory of one program, KiB, of the current device."""
    if INTERPRETED:
        return "interpreter", 0, 0
    driver = triton.runtime.driver.active
    target = driver.get_current_target()
    shared = driver.utils.get_device_properties(driver.get_current_device())["max_shared_mem"] >> 10
    return target.backend, target.arch if target.backend == "cuda" else 0, shared


TILES = {  # of a GEMM in 16-bit types: least shared memory, KiB, then rows, columns, depth, warps, stages
    "cuda": [(227, 128, 256, 64, 8, 4), (163, 128, 128, 64, 8, 4), (99, 128, 128, 64, 8, 3), (0, 64, 64, 32, 4, 3)],
    "hip": [(160, 128, 256, 64, 8, 2), (0, 128, 128, 64, 8, 2)],
    "interpreter": [(0, 16, 32, 16, 1, 1)],
}


def _config(dtype: torch.dtype, rows: str, columns: str, depth: str, wide: bool = False, add: bool = False) -> dict:
    """Tile of a GEMM kernel, under its names. A table, not autotune: no first-step stall, same bits every run. No
    choice spills a register in any case of benchmarks/compiled.py."""
    backend, capability, shared = _device()
    m, n, k, warps, stages = next(tile for least, *tile in TILES[backend] if shared >= least)
    if backend == "cuda" and (wide or (add and capability >= 100)):
        n = min(n, 128)  # a bias, the cap, and a sum that passes through tensor memory hold more registers
    if dtype == torch.float32 and backend != "interpreter":  # products in full float32: no tensor cores
        m, n, k, warps, stages = 64, 64, 32, 4, 2
    return {rows: m, columns: n, depth: k, "num_warps": warps, "num_stages": stages, "GROUP": 16}


def _slopes_config(V: int) -> dict:
    """Four programs share a multiprocessor, each with 8 logits to a thread: enough loads in flight. One stage: loads
    must not pass the barrier."""
    block = max(128, min(triton.next_power_of_2(V), 4096))
    return {"BLOCK_V": block, "num_warps": block // (8 * (64 if _device()[0] == "hip" else 32)) or 1, "num_stages": 1}


# --- launchers -----------------------------------------------------------------------------


def fwd(hidden, head, targets, bias, scale, softcap) -> tuple[torch.Tensor, torch.Tensor]:
    """-> logp (N,), lse (N,), f32. Rows of hidden and head are contiguous; inputs are checked by ddpo.ops."""
    (N, D), V = hidden.shape, len(head)
    lse, logp = (hidden.new_empty(N, dtype=torch.float32) for _ in range(2))
    if N == 0:
        return logp, lse
    cfg = _config(hidden.dtype, "BLOCK_N", "BLOCK_V", "BLOCK_D", softcap is not None or bias is not None)
    split = SPLIT_V if _device()[0] != "interpreter" else 2 * cfg["BLOCK_V"]
    num_splits = triton.cdiv(V, split)
    partial = hidden.new_empty((num_splits, N), dtype=torch.float32)
    z_y = hidden.new_full((N,), float("nan"), dtype=torch.float32)  # stays so where a target lies outside [0, V)
    _fwd_kernel[(triton.cdiv(N, cfg["BLOCK_N"]) * num_splits,)](
        hidden, head, bias, targets, partial, z_y, N, D, V, num_splits,
        hidden.stride(0), head.stride(0), scale, softcap, SPLIT=split, **cfg,
    )  # fmt: skip
    block_s = min(triton.next_power_of_2(num_splits), 128)
    _merge_kernel[(triton.cdiv(N, 32),)](partial, z_y, lse, logp, N, num_splits, BLOCK_S=block_s, BLOCK_N=32)
    return logp, lse


def bwd(hidden, head, targets, bias, scale, softcap, lse, upstream, wants):
    """-> gradients of hidden (N, D) f32, head (V, D) in its dtype, bias (V,) f32; None where not wanted."""
    (N, D), V = hidden.shape, len(head)
    grad_hidden = hidden.new_empty((N, D), dtype=torch.float32) if wants[0] else None
    grad_head = (torch.empty_like if N else torch.zeros_like)(head) if wants[1] else None
    grad_bias = hidden.new_zeros(V, dtype=torch.float32) if wants[2] else None
    if N == 0:
        return grad_hidden, grad_head, grad_bias
    cfg = _config(hidden.dtype, "BLOCK_N", "BLOCK_V", "BLOCK_D", softcap is not None or bias is not None)
    panel = panel_size(N, V, hidden.dtype.itemsize, cfg["BLOCK_V"], PANEL_BYTES)
    buffer = hidden.new_empty((N, panel))
    for first in range(0, V, panel):
        num_v = min(panel, V - first)
        dz = buffer[:, :num_v]
        _dz_kernel[(triton.cdiv(N, cfg["BLOCK_N"]) * triton.cdiv(num_v, cfg["BLOCK_V"]),)](
            hidden, head, bias, targets, lse, upstream, dz, N, D, V, first, num_v,
            hidden.stride(0), head.stride(0), dz.stride(0), scale, softcap, **cfg,
        )  # fmt: skip
        if wants[0]:
            _matmul(dz, head[first : first + num_v], grad_hidden, add=first > 0)
        if wants[1]:
            _matmul(dz.T, hidden, grad_head[first : first + num_v], add=False)
        if wants[2]:
            torch.sum(dz, 0, dtype=torch.float32, out=grad_bias[first : first + num_v])
    return grad_hidden, grad_head, grad_bias


def panel_size(N: int, V: int, itemsize: int, block: int, budget: int) -> int:
    """Columns of a panel of at most about budget bytes: whole blocks, and panels of about one size."""
    most = max(block, budget // (N * itemsize))
    return triton.cdiv(triton.cdiv(V, triton.cdiv(V, most)), block) * block


def _matmul(a, b, c, add: bool) -> None:
    """c = a @ b, or c += a @ b."""
    (M, K), J = a.shape, b.shape[1]
    cfg = _config(a.dtype, "BLOCK_M", "BLOCK_J", "BLOCK_K", add=add)
    _matmul_kernel[(triton.cdiv(M, cfg["BLOCK_M"]) * triton.cdiv(J, cfg["BLOCK_J"]),)](
        a, b, c, M, J, K, a.stride(0), a.stride(1), b.stride(0), c.stride(0), ADD=add, **cfg
    )


def slopes(buffer, V, dtype, targets, bias, scale, softcap, logp, lse, upstream=None) -> torch.Tensor:
    """Products h.W in buffer[:, :V] (n, >= V) f32 become dz (n, V) in dtype, in the same memory.

    Without upstream (n,): logp and lse (n,) are written and g is 1. With it: lse is read, and the columns may be some
    of the vocabulary, with targets counted from the first of them; one that lies elsewhere matches none.
    """
    dz = buffer.view(dtype)[:, :V]
    if len(buffer):
        _slopes_kernel[(len(buffer),)](
            buffer, dz, bias, targets, upstream, lse, logp, V,
            buffer.stride(0), dz.stride(0), scale, softcap, **_slopes_config(V),
        )  # fmt: skip
    return dz
