"""Which responses of a group become (chosen, rejected): three rules, seeded, pure functions of the scores; and which
stay where a group is too large.

Scores may hold None: such a response is in no pair. Two identical texts are never a pair.
"""

from collections.abc import Callable, Sequence

import numpy as np

Pairs = list[tuple[int, int]]


def gap_pairs(scores: Sequence[float | None], texts: Sequence[str], gap: float, rng: np.random.Generator) -> Pairs:
    """A random matching, each response at most once: uniformly among the pairs of free responses whose scores differ
    by at least `gap`, and where none is left among those of unequal scores."""
    higher, lower, difference = _unequal(scores, texts)
    order = rng.permutation(len(higher))  # the first free pair of a random order is a uniform draw from the free ones
    free, pairs = [True] * len(scores), []
    for enough in (difference[order] >= gap, difference[order] < gap):
        for i in order[enough]:
            c, r = int(higher[i]), int(lower[i])
            if free[c] and free[r]:
                free[c] = free[r] = False
                pairs.append((c, r))
    return pairs


def all_pairs(
    scores: Sequence[float | None],
    texts: Sequence[str],
    max_pairs: int,
    rng: np.random.Generator,
    keep_ties: bool = False,
) -> Pairs:
    """Every pair of unequal scores, at most `max_pairs` of them drawn at random. keep_ties (the release): pairs of
    equal scores too, chosen and rejected as the draw has it."""
    higher, lower, _ = _unequal(scores, texts)
    pairs = list(zip(higher.tolist(), lower.tolist(), strict=True))
    if keep_ties:
        scored = [i for i, s in enumerate(scores) if s is not None]
        ties = [(i, j) for n, i in enumerate(scored) for j in scored[n + 1 :] if scores[i] == scores[j]]
        pairs += [p if rng.random() < 0.5 else p[::-1] for p in ties if texts[p[0]] != texts[p[1]]]
    return [pairs[i] for i in rng.permutation(len(pairs))[:max_pairs]]


def divpo_pairs(
    scores: Sequence[float | None],
    texts: Sequence[str],
    deviation: Callable[[list[int]], np.ndarray],
    rng: np.random.Generator,
    rho: float = 0.25,
) -> Pairs:
    """DivPO (arXiv 2501.18101, as the release builds it): the most deviating of the best-scored against the least
    deviating of the worst-scored.

    deviation: from indices of responses to their deviations inside that pool.
    """
    scored = [i for _, i in sorted((s, i) for i, s in enumerate(scores) if s is not None)]
    n = len(scored)
    k = int(min(max(2, n * rho), n / 2))
    if k < 1:
        return []
    low, high = scored[:k], scored[-k:]
    chosen = [high[i] for i in np.argsort(-deviation(high), kind="stable")[: min(2, k)]]
    rejected = [low[i] for i in np.argsort(deviation(low), kind="stable")[: min(2, k)]]
    rng.shuffle(chosen)
    rng.shuffle(rejected)
    zipped = zip(chosen, rejected, strict=True)
    return [(c, r) for c, r in zipped if scores[c] > scores[r] and texts[c] != texts[r]]


def at_most(
    pairs: Pairs, scores: Sequence[float | None], most: int, rng: np.random.Generator, top_scores: bool = False
) -> tuple[Pairs, list[int]]:
    """The pairs and the responses, in order, that are left of a group cut to `most` responses.

    A pair is kept where the responses in use, with its own, number at most `most`: in random order, or with top_scores
    by the chosen's score and then by the rejected's, best first. Room that is left goes to others at random.
    """
    order = [pairs[i] for i in rng.permutation(len(pairs))]
    if top_scores:
        order.sort(key=lambda pair: [-np.inf if scores[i] is None else scores[i] for i in pair], reverse=True)
    used: set[int] = set()
    kept = set()
    for pair in order:
        if len(used.union(pair)) <= most:
            used.update(pair)
            kept.add(pair)
    others = [i for i in range(len(scores)) if i not in used]
    used.update(rng.permutation(others)[: max(0, most - len(used))].tolist() if others else [])
    return [pair for pair in pairs if pair in kept], sorted(used)


def _unequal(scores, texts):
    """Indices of all pairs of unequal scores and different texts, higher first, and their score differences."""
    value = np.array([np.nan if s is None else s for s in scores], float)
    _, text = np.unique(np.array(texts, dtype=object), return_inverse=True)
    i, j = np.triu_indices(len(value), 1)
    keep = (np.abs(value[i] - value[j]) > 0) & (text[i] != text[j])  # a comparison with nan is false
    i, j = i[keep], j[keep]
    swap = value[j] > value[i]
    higher, lower = np.where(swap, j, i), np.where(swap, i, j)
    return higher, lower, value[higher] - value[lower]
