"""Measures of a whole set of responses, many groups at a time."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ddpo.deviation.distance import mean_distance
from ddpo.deviation.rows import as_rows, check_groups, same_size, unit

BUFFER = 64 << 20


def diversity(embeddings, groups: Tensor | None = None, metric: str = "cosine") -> Tensor:
    """Mean pairwise distance of each group's responses.

    Args: embeddings, groups, metric: as mean_distance.
    Returns: (R,) float64; 0 for a group of one.
    """
    groups = check_groups("diversity", groups, len(embeddings))
    d = mean_distance(embeddings, metric, groups).double()  # (n,)
    return torch.segment_reduce(d, "mean", offsets=groups.to(d.device))


def vendi_score(embeddings, groups: Tensor | None = None) -> Tensor:
    """Vendi score of each group under cosine similarity: exp of the entropy of the eigenvalues of K / n.

    From 1 (all alike) to min(n, D): about how many different responses there are. By the smaller Gram matrix, (n, n) or
    (D, D).
    Args: embeddings, groups: as mean_distance.
    Returns: (R,) float64.
    Source: arXiv 2210.02410.
    """

    def score(gram, m):
        values = torch.linalg.eigvalsh(gram / m).clamp_(min=0)
        return torch.special.entr(values / values.sum(-1, keepdim=True)).sum(-1).exp()

    return _of_groups("vendi_score", embeddings, groups, score)


def log_det(embeddings, groups: Tensor | None = None, ridge: float = 1e-3) -> Tensor:
    """log det(K + ridge I) of each group's cosine similarities K (n, n): the volume its responses span.

    Larger is more diverse; sets of different sizes do not compare. By the smaller Gram matrix, as vendi_score.
    Args: embeddings, groups: as mean_distance; ridge: above 0, keeps duplicates from giving minus infinity.
    Returns: (R,) float64.
    Source: determinantal point processes, arXiv 1207.6083.
    """
    if not ridge > 0:
        raise ValueError(f"log_det: ridge must be above 0, got {ridge}")

    def volume(gram, m):
        gram.diagonal(dim1=1, dim2=2).add_(ridge)
        missing = m - gram.shape[1]  # eigenvalues that are the ridge alone
        return torch.linalg.slogdet(gram).logabsdet + missing * math.log(ridge)

    return _of_groups("log_det", embeddings, groups, volume)


def _of_groups(where, embeddings, groups, of_gram):
    """(R,): of_gram(gram, m) of every group of m, a batch of equal sizes at a time.

    gram (G, min(m, D), min(m, D)) float64: of unit vectors E the smaller of E E^T and E^T E, which have the same
    eigenvalues but for zeros.
    """
    x = as_rows(where, embeddings)
    groups = check_groups(where, groups, len(x))
    out, D = torch.empty(len(groups) - 1, dtype=torch.float64, device=x.device), x.shape[1]
    for which, rows in same_size(groups, BUFFER, lambda m: 8 * (3 * m * D + 3 * min(m, D) ** 2)):
        m, chunk = rows.shape[1], max(1, BUFFER // (24 * D))
        parts = (unit(where, x[part.to(x.device)].double(), part) for part in rows.split(max(chunk, D), dim=1))
        if m > D:
            gram = sum(e.mT @ e for e in parts)  # a chunk at a time: a large group is a batch alone
        else:
            gram = (e := next(parts)) @ e.mT
        out[which.to(x.device)] = of_gram(gram, m)
    return out


def distinct_k(
    embeddings, groups: Tensor | None = None, threshold: float = 0.1, equivalent: Callable | None = None
) -> Tensor:
    """Number of different responses in each group.

    In order, a response joins the first class that holds an equivalent of it, else it opens a class.
    Args:
        embeddings: (n, D), as mean_distance; not read where `equivalent` is given.
        groups: (R+1,) int64 row offsets; None: one group.
        threshold: two responses are equivalent when their cosine distance is below it, 0 to 2.
        equivalent: another equivalence: rows (G, m) int64 of G groups -> (G, m, m) bool, symmetric.
    Returns: (R,) int64, from 1 to the group's size.
    Source: NoveltyBench, arXiv 2504.05228, whose equivalence is a trained classifier.
    """
    n = len(embeddings)
    groups = check_groups("distinct_k", groups, n)
    width = 0
    if equivalent is None:
        x = as_rows("distinct_k", embeddings)
        width = 24 * x.shape[1]

        def equivalent(rows):
            e = unit("distinct_k", x[rows.to(x.device)].double(), rows)
            return 1 - e @ e.mT < threshold

    out = torch.empty(len(groups) - 1, dtype=torch.int64)
    for which, rows in same_size(groups, BUFFER, lambda m: 24 * m * m + (64 + width) * m):
        same = equivalent(rows).cpu()  # (G, m, m)
        num, m = rows.shape
        home = torch.zeros(num, m, dtype=torch.int64)
        count = torch.ones(num, dtype=torch.int64)
        for i in range(1, m):
            first = home[:, :i].masked_fill(~same[:, i, :i], m).amin(1)  # the first class with an equivalent, m: none
            home[:, i] = torch.where(first == m, count, first)
            count += first == m
        out[which] = count
    return out
