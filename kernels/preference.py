"""From token log-probs to preference losses and each row's coefficient, in one launch; scales gradient rows on the way.

    logp[s]   = sum of the token log-probs of sequence s
    score[s]  = beta * (logp[s] - ref[s])                              dpo, ddpo
              = lm - log(1 - e^lm), lm = min(logp[s] / n[s], -2^-24)    orpo, dorpo (odds)
    margin[p] = score[chosen] - score[rejected]
    loss[p]   = w[p] * A * ((1 - smooth) * softplus(-margin) + smooth * softplus(margin))      A = 1; odds: beta
                odds: + w[p] * -logp[chosen] / t,  t = n[chosen] or tokens_per_pair
    c[s]      = d (sum_p loss[p] / denominator) / d logp[s];  rows[n] *= c[sequence of n]

A program owns a tile of one sequence's rows. It sums that sequence and every partner again rather than wait for
another program: no atomics, no second launch, the same bits on every run. Bytes: rows once in and out; the rest is
4 N * (1 + partners of a sequence), from L2.
Spec: ddpo.reference (dpo, ddpo, orpo, dorpo).
Names: N rows, D width, S sequences, P pairs.
"""

import torch
import triton
import triton.language as tl

INTERPRETED = triton.knobs.runtime.interpret
MAX_MEAN_LOGP = tl.constexpr(-(2.0**-24))

# --- kernels -------------------------------------------------------------------------------


@triton.jit
def _softplus(x):
    """log(1 + e^x); the quotient gives log1p the digits that 1 + e loses."""
    e = tl.exp(-tl.abs(x))
    u = 1.0 + e
    lost = u == 1.0
    log1p = tl.where(lost, e, tl.log(u) * e / tl.where(lost, 1.0, u - 1.0))
    return tl.maximum(x, 0.0) + log1p


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x > 0, 1.0, e) / (1.0 + e)


@triton.jit
def _one_minus_exp(x):
    """1 - e^x for x < 0: near 0 by its series, whose tenth term is under 2^-24 of the first up to ln 2."""
    series = 1.0
    for k in tl.static_range(10, 1, -1):
        series = 1.0 + x / k * series
    return tl.where(x > -0.6931472, -x * series, 1.0 - tl.exp(x))


@triton.jit
def _sum(x_ptr, start, stop, BLOCK_T: tl.constexpr):
    total = tl.zeros((BLOCK_T,), tl.float32)
    for t in range(start, stop, BLOCK_T):
        offs_t = t + tl.arange(0, BLOCK_T)
        total += tl.load(x_ptr + offs_t, mask=offs_t < stop, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _score(token_ptr, segments_ptr, ref_ptr, s, beta, ODDS: tl.constexpr, BLOCK_T: tl.constexpr):
    """logp, number of tokens, score and d score / d logp of sequence s."""
    start, stop = tl.load(segments_ptr + s), tl.load(segments_ptr + s + 1)
    logp = _sum(token_ptr, start, stop, BLOCK_T)
    num_tokens = tl.maximum(stop - start, 1).to(tl.float32)  # an empty sequence has no rows that could move
    if ODDS:
        mean = logp / num_tokens
        lm = tl.minimum(mean, MAX_MEAN_LOGP)
        rest = _one_minus_exp(lm)
        score = lm - tl.log(rest)
        slope = tl.where(mean <= MAX_MEAN_LOGP, 1.0 / (num_tokens * rest), 0.0)
    else:
        score = beta * logp
        if ref_ptr is not None:
            score = beta * (logp - tl.load(ref_ptr + s))
        slope = beta
    return logp, num_tokens, score, slope


@triton.jit(do_not_specialize=["S"])
def _preference_kernel(
    token_ptr, segments_ptr, entries_ptr, offsets_ptr, pairs_ptr, weight_ptr, ref_ptr,  # data in
    denominator_ptr, tokens_per_pair_ptr,
    logp_ptr, loss_ptr, c_ptr, row_c_ptr, rows_ptr,  # data out
    S, D, rows_stride_n, beta, smooth,  # sizes, strides, factors
    ODDS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,  # constants
):  # fmt: skip
    """Program f(s) + i owns tile i of sequence s, f(s) = s + segments[s] // BLOCK_N: rising by at least 1 and by
    enough for every row of s, so a binary search finds s and nothing of size N need be looked up."""
    pid = tl.program_id(0).to(tl.int64)
    s = tl.full((), 0, tl.int64)
    above = s + S
    while above - s > 1:
        middle = (s + above) // 2
        lower = middle + tl.load(segments_ptr + middle) // BLOCK_N <= pid
        s, above = tl.where(lower, middle, s), tl.where(lower, above, middle)
    start, stop = tl.load(segments_ptr + s), tl.load(segments_ptr + s + 1)
    tile = pid - s - start // BLOCK_N
    first = start + tile * BLOCK_N
    if tile > 0 and first >= stop:
        return

    logp, num_tokens, score, slope = _score(token_ptr, segments_ptr, ref_ptr, s, beta, ODDS, BLOCK_T)
    c = 0.0
    for k in range(tl.load(offsets_ptr + s), tl.load(offsets_ptr + s + 1)):
        entry = tl.load(entries_ptr + k)  # 2 * pair + (0 chosen, 1 rejected)
        chosen = entry % 2 == 0
        partner = tl.load(pairs_ptr + (entry ^ 1))
        _, _, other, _ = _score(token_ptr, segments_ptr, ref_ptr, partner, beta, ODDS, BLOCK_T)
        margin = tl.where(chosen, score - other, other - score)
        loss = (1.0 - smooth) * _softplus(-margin) + smooth * _softplus(margin)
        d_margin = smooth * _sigmoid(margin) - (1.0 - smooth) * _sigmoid(-margin)
        d_logp = tl.where(chosen, d_margin, -d_margin) * slope
        if ODDS:
            t = num_tokens
            if tokens_per_pair_ptr is not None:
                t = tl.load(tokens_per_pair_ptr)
            loss = beta * loss - logp / t
            d_logp = beta * d_logp - tl.where(chosen, 1.0 / t, 0.0)
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + entry // 2)
            loss *= weight
            d_logp *= weight
        tl.store(loss_ptr + entry // 2, loss, mask=chosen & (tile == 0))
        c += d_logp
    c /= tl.load(denominator_ptr)

    tl.store(logp_ptr + s, logp, mask=tile == 0)
    tl.store(c_ptr + s, c, mask=tile == 0)
    offs_n = first + tl.arange(0, BLOCK_N)
    mask_n = offs_n < stop
    tl.store(row_c_ptr + offs_n, tl.zeros((BLOCK_N,), tl.float32) + c, mask=mask_n)
    if rows_ptr is not None:
        for d in range(0, D, BLOCK_D):
            offs_d = d + tl.arange(0, BLOCK_D)
            ptrs = rows_ptr + offs_n[:, None] * rows_stride_n + offs_d[None, :]
            mask = mask_n[:, None] & (offs_d[None, :] < D)
            rows = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
            tl.store(ptrs, (c * rows).to(rows_ptr.dtype.element_ty), mask=mask)


# --- configurations ------------------------------------------------------------------------


def _config(scale_rows: bool) -> dict:
    """Rows of a program: few where it moves (rows, D), so that a small batch fills the GPU; many where it does not."""
    if INTERPRETED:
        return {"BLOCK_N": 4, "BLOCK_D": 8, "BLOCK_T": 4}
    return {"BLOCK_N": 16 if scale_rows else 256, "BLOCK_D": 256, "BLOCK_T": 1024, "num_warps": 4}


# --- launchers -----------------------------------------------------------------------------


def pair_lists(pairs: torch.Tensor, S: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The pairs of each sequence: entries (2P,) = 2 * pair + (0 chosen, 1 rejected), sorted by sequence, and offsets
    (S+1,) into them. Nothing here waits for the device."""
    ordered, entries = torch.sort(pairs.flatten(), stable=True)
    return entries, torch.searchsorted(ordered, torch.arange(S + 1, device=pairs.device))


def fwd(
    token_logp, segments, pairs, weight, ref_logp, denominator, tokens_per_pair, beta, smooth, odds, rows
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> logp (S,), losses (P,), c (S,) and c of each row (N,), all f32; rows (N, D), if given, are scaled in
    place. denominator and tokens_per_pair (or None) are f32 scalars on the device. Inputs are checked by ddpo.ops."""
    S, N, P = len(segments) - 1, len(token_logp), len(pairs)
    logp, losses, c, row_c = (token_logp.new_empty(n) for n in (S, P, S, N))
    if S:
        cfg = _config(rows is not None)
        D, stride = (0, 0) if rows is None else (rows.shape[1], rows.stride(0))
        entries, offsets = pair_lists(pairs, S)
        _preference_kernel[(S + triton.cdiv(N, cfg["BLOCK_N"]),)](
            token_logp, segments, entries, offsets, pairs, weight, ref_logp, denominator, tokens_per_pair,
            logp, losses, c, row_c, rows, S, D, stride, beta, smooth, ODDS=odds, **cfg,
        )  # fmt: skip
    return logp, losses, c, row_c
