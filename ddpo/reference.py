"""Every definition in plain PyTorch: the specification. Exact in float64, slow, and called by tests and
benchmark gates only. Source of the formulas: arXiv 2503.17126; where another paper is meant it is named.

Letters: N rows, D width, V vocabulary, S sequences, P pairs, n responses of one group; T tokens, H heads, d width of
a head.
"""

import torch
import torch.nn.functional as F


def linear_logp(hidden, head, targets, bias=None, scale=1.0, softcap=None):
    """Log-probability of each target: z = scale * (h.W_v + b_v), capped; logp = z_y - logsumexp(z).

    hidden (N, D), head (V, D), targets (N,) int64, bias (V,) -> (N,) nats.
    """
    z = hidden @ head.T
    if bias is not None:
        z = z + bias
    z = scale * z
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return torch.log_softmax(z, dim=-1).gather(1, targets[:, None]).squeeze(1)


def packed_attention(q, k, v, cu_seqlens, scale=None, window=None, softcap=None):
    """Causal attention within each sequence: s_ij = scale * q_i.k_j, capped; out_i = sum_j softmax_j(s_ij) v_j over
    the keys j of i's own sequence with 0 <= i - j < window.

    q (T, H, d), k (T, Hkv, d), v (T, Hkv, dv): query head h reads key head h // (H / Hkv); cu_seqlens (S+1,) rises
    from 0 to T; scale None: 1/sqrt(d) -> (T, H, dv).
    """
    T, H, d = q.shape
    k, v = (x.repeat_interleave(H // x.shape[1], 1) for x in (k, v))
    s = torch.einsum("ihd,jhd->hij", q, k) * (d**-0.5 if scale is None else scale)  # (H, T, T)
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    position = torch.arange(T)
    sequence = torch.searchsorted(cu_seqlens.long(), position, right=True)
    distance = position[:, None] - position[None]
    seen = (sequence[:, None] == sequence[None]) & (distance >= 0) & (distance < (window or T + 1))
    return torch.einsum("hij,jhd->ihd", s.masked_fill(~seen, -torch.inf).softmax(-1), v)


def log1mexp(x):
    """log(1 - e^x) for x < 0, stable at both ends (Maechler, "Accurately computing log(1 - exp(-|a|))")."""
    near_zero = x > -0.6931471805599453  # -ln 2
    a = torch.where(near_zero, torch.log(-torch.expm1(torch.where(near_zero, x, -1.0))), 0.0)
    b = torch.where(near_zero, 0.0, torch.log1p(-torch.exp(torch.where(near_zero, -1.0, x))))
    return a + b


# --- a layer of the body: T rows, D width, H heads of width d, rank r ---------------------------------------


def rms_norm(x, weight, eps, offset=0.0):
    """x / sqrt(mean(x^2) + eps) * (weight + offset). x (..., D), weight (D,). arXiv 1910.07467; Gemma's offset is 1."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (weight + offset)


def silu_mul(gate, up):
    """silu(gate) * up: the elementwise part of SwiGLU, arXiv 2002.05202."""
    return F.silu(gate) * up


def rotary(q, k, cos, sin):
    """x * cos + (-x2, x1) * sin for the halves (x1, x2) of each head. q, k (B, H, T, d), cos, sin (B or 1, T, d)."""

    def turned(x):
        x1, x2 = x.chunk(2, dim=-1)
        return x * cos[:, None] + torch.cat((-x2, x1), dim=-1) * sin[:, None]

    return turned(q), turned(k)


def lora_linear(x, weight, bias, a, b, scaling):
    """x W^T + bias + scaling * (x A^T) B^T. weight (out, D), a (r, D), b (out, r). arXiv 2106.09685."""
    return F.linear(x, weight, bias) + scaling * (x @ a.T @ b.T)


# --- losses of one pair: log-probs in nats, summed (lp) or per token (lm); w the pair's weight ------------


def dpo(lp_c, lp_r, ref_c, ref_r, beta=0.1):
    """-log sigmoid(beta * margin), margin = (lp_c - ref_c) - (lp_r - ref_r). arXiv 2305.18290, eq. 7."""
    return -F.logsigmoid(beta * ((lp_c - ref_c) - (lp_r - ref_r)))


def ddpo(lp_c, lp_r, ref_c, ref_r, w, beta=0.1):
    """w * DPO."""
    return w * dpo(lp_c, lp_r, ref_c, ref_r, beta)


def cdpo(lp_c, lp_r, ref_c, ref_r, beta=0.1, label_smoothing=0.0):
    """-(1-e) log sigmoid(beta * margin) - e log sigmoid(-beta * margin): conservative DPO, labels of which a share e is
    wrong. Mitchell 2023, "A note on DPO with noisy preferences", eq. 3 (ericmitchell.ai/cdpo.pdf)."""
    h = beta * ((lp_c - ref_c) - (lp_r - ref_r))
    return -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)


def spl(lp_c, lp_r, ref_c, ref_r, alpha, beta=0.1):
    """-log sigmoid(alpha (lp_c - lp_r) - beta (ref_c - ref_r)). Soft preference learning, arXiv 2511.08594."""
    return -F.logsigmoid(alpha * (lp_c - lp_r) - beta * (ref_c - ref_r))


def ipo(lp_c, lp_r, ref_c, ref_r, beta=0.1):
    """(margin - 1/(2 beta))^2. arXiv 2310.12036, eq. 17 (its tau is beta here). TRL has means per token for lp, ref."""
    return ((lp_c - ref_c) - (lp_r - ref_r) - 1 / (2 * beta)) ** 2


def simpo(lm_c, lm_r, beta=2.0, gamma=1.0):
    """-log sigmoid(beta (lm_c - lm_r) - gamma). arXiv 2405.14734, eq. 6."""
    return -F.logsigmoid(beta * lm_c - beta * lm_r - gamma)


def log_odds(lm_c, lm_r):
    """(lm_c - lm_r) - (log1mexp(lm_c) - log1mexp(lm_r)), each lm clamped to at most -2^-24."""
    lm_c, lm_r = lm_c.clamp(max=-(2.0**-24)), lm_r.clamp(max=-(2.0**-24))
    return (lm_c - lm_r) - (log1mexp(lm_c) - log1mexp(lm_r))


def orpo(lm_c, lm_r, beta=0.25):
    """-lm_c - beta * log sigmoid(log_odds). arXiv 2403.07691, eq. 6 (its lambda is beta here)."""
    return -lm_c - beta * F.logsigmoid(log_odds(lm_c, lm_r))


def dorpo(lm_c, lm_r, w, beta=0.25):
    """w * ORPO: both terms carry the weight."""
    return w * orpo(lm_c, lm_r, beta)


def dorpo_release(lm_c, lm_r, w, nll_batch, beta=0.25):
    """The released code: the weight inside the sigmoid, NLL the batch's token mean times the mean weight."""
    return w.mean() * nll_batch - beta * F.logsigmoid(w * log_odds(lm_c, lm_r))


def sft(lp, num_tokens):
    """Negative log-likelihood per token over the whole step: -sum lp / sum num_tokens."""
    return -lp.sum() / num_tokens.sum()


def gvpo(lp, ref, scores, beta=0.1, norm="1"):
    """1/2 sum over one group of ((R_i - mean R) - (S_i - mean S))^2, R_i = beta (lp_i - ref_i); (n,) -> scalar.
    arXiv 2504.19599; norm 'n-1' divides by that, as the authors' code does."""
    r = beta * (lp - ref)
    value = ((r - r.mean()) - (scores - scores.mean())).square().sum() / 2
    return value if norm == "1" else value / (len(lp) - 1)


# --- distance, deviation, weight: one group of n responses -----------------------------------------------


def pairwise_distance(embeddings, metric="cosine"):
    """(n, D) -> (n, n). cosine: 1 - cos, in [0, 2]; euclidean: the 2-norm of the difference."""
    if metric == "cosine":
        unit = embeddings / embeddings.norm(dim=1, keepdim=True)
        return 1 - unit @ unit.T
    if metric == "euclidean":
        return (embeddings[:, None] - embeddings[None]).norm(dim=2)
    raise ValueError(f"pairwise_distance: metric must be 'cosine' or 'euclidean', got {metric!r}")


def mean_distance(embeddings, metric="cosine"):
    """d_i = 1/(n-1) * sum_{j != i} distance(i, j); 0 for n = 1. (n, D) -> (n,)."""
    n = len(embeddings)
    off_diagonal = pairwise_distance(embeddings, metric) * (1 - torch.eye(n, dtype=embeddings.dtype))
    return off_diagonal.sum(1) / max(n - 1, 1)


def mean_cosine_distance_closed(embeddings):
    """The same for cosine in O(n D): with unit vectors e and s = sum_j e_j, d_i = (n - e_i.s)/(n-1)."""
    n = len(embeddings)
    unit = embeddings / embeddings.norm(dim=1, keepdim=True)
    return (n - unit @ unit.sum(0)) / max(n - 1, 1) if n > 1 else torch.zeros(n, dtype=embeddings.dtype)


def relative_distance(d):
    """u_i = (d_i - min d)/(max d - min d); all ones where max - min <= 1e-6 * max(1, max d)."""
    spread = d.max() - d.min()
    if spread <= 1e-6 * max(1.0, float(d.max())):
        return torch.ones_like(d)
    return (d - d.min()) / spread


def deviation(distances, combine="geometric", min_deviation=0.0):
    """g_i over k measures, distances: list of (n,). Geometric or arithmetic mean of u, floored."""
    u = torch.stack([relative_distance(d) for d in distances])
    g = u.prod(0) ** (1 / len(distances)) if combine == "geometric" else u.mean(0)
    return g.clamp(min=min_deviation)


def weights(g, release_floor=False):
    """w_i = g_i / mean(g): mean one in the group. release_floor: at least 0.2, after normalising."""
    w = g / g.mean() if g.max() > g.min() else torch.ones_like(g)
    return w.clamp(min=0.2) if release_floor else w


def crpo(u_c, u_r, scales):
    """CrPO's weight of a pair: sum over measures of scale * max(0, u_c - u_r); u the relative distances (k,) of chosen
    and rejected. Not mean one. arXiv 2505.14442."""
    return (scales * (u_c - u_r).clamp(min=0)).sum()


def mean_pairwise_distance(embeddings, metric="cosine"):
    """Diversity of a set of outputs: the mean distance over its n(n-1)/2 pairs."""
    return mean_distance(embeddings, metric).mean()
