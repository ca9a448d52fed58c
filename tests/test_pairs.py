"""Rules that make pairs: what each may draw, and that it draws all of it."""

import itertools
from collections import Counter

import numpy as np
import pytest

from ddpo.data.pairs import all_pairs, at_most, divpo_pairs, gap_pairs


def rng(seed=0):
    return np.random.default_rng(seed)


def random_group(seed):
    """Scores with ties and gaps in them, and texts with duplicates."""
    n = int(rng(seed).integers(1, 14))
    scores = [None if x == 9 else float(x) for x in rng(seed).integers(0, 10, n)]
    return scores, [f"text {t}" for t in rng(seed + 1).integers(0, n + 2, n)]


def may_pair(scores, texts, i, j):
    return None not in (scores[i], scores[j]) and scores[i] != scores[j] and texts[i] != texts[j]


def admissible(scores, texts):
    """All (higher, lower) of unequal scores and texts."""
    pairs = ((i, j) for i, j in itertools.permutations(range(len(scores)), 2) if may_pair(scores, texts, i, j))
    return {(i, j) for i, j in pairs if scores[i] > scores[j]}


@pytest.mark.parametrize("seed", range(40))
def test_gap_is_a_matching_that_prefers_the_gap(seed):
    scores, texts = random_group(seed)
    pairs = gap_pairs(scores, texts, 4.0, rng(seed))
    assert set(pairs) <= admissible(scores, texts)
    used = [i for pair in pairs for i in pair]
    assert len(used) == len(set(used))
    unpaired = set(range(len(scores))) - set(used)
    assert not any(may_pair(scores, texts, i, j) for i, j in itertools.combinations(unpaired, 2))
    wide = [p for p in pairs if scores[p[0]] - scores[p[1]] >= 4]
    assert pairs[: len(wide)] == wide  # those that meet the gap are drawn first, and then none of them was left
    rest = set(range(len(scores))) - {i for pair in wide for i in pair}
    assert not any(scores[i] - scores[j] >= 4 for i, j in admissible(scores, texts) if {i, j} <= rest)


def test_gap_by_hand():
    scores, texts = [1.0, 10.0, 2.0, 3.0], list("abcd")
    for seed in range(20):  # the 10 goes first and with any other; of the rest one pair remains
        first, second = gap_pairs(scores, texts, 5.0, rng(seed))
        assert first[0] == 1 and set(first) | set(second) == {0, 1, 2, 3}


def test_gap_draws_uniformly():
    scores, texts = [1.0, 2.0, 3.0, 3.0], list("abcd")
    counts = Counter(gap_pairs(scores, texts, 1.0, rng(seed))[0] for seed in range(1000))
    assert counts.keys() == admissible(scores, texts) and len(counts) == 5
    assert all(140 < count < 260 for count in counts.values())


@pytest.mark.parametrize("draw", [lambda s, t, r: gap_pairs(s, t, 2.0, r), lambda s, t, r: all_pairs(s, t, 5, r)])
def test_draws_are_seeded(draw):
    scores, texts = [float(i) for i in range(10)], [str(i) for i in range(10)]
    assert draw(scores, texts, rng(3)) == draw(scores, texts, rng(3))
    assert len({tuple(draw(scores, texts, rng(seed))) for seed in range(5)}) == 5


@pytest.mark.parametrize("seed", range(10))
def test_all_is_every_pair(seed):
    scores, texts = random_group(seed)
    pairs = all_pairs(scores, texts, 100, rng())
    assert len(pairs) == len(set(pairs)) and set(pairs) == admissible(scores, texts)


def test_all_draws_max_pairs_of_them():
    scores, texts = [1.0, 2.0, 3.0, 4.0], list("abcd")
    draws = [all_pairs(scores, texts, 2, rng(seed)) for seed in range(300)]
    assert all(len(set(pairs)) == 2 for pairs in draws)
    counts = Counter(pair for pairs in draws for pair in pairs)
    assert counts.keys() == admissible(scores, texts) and min(counts.values()) > 60


def test_keep_ties_adds_pairs_of_equal_scores_in_either_order():
    scores, texts = [2.0, 2.0, 1.0, None, 2.0], ["a", "b", "c", "d", "a"]
    draws = [all_pairs(scores, texts, 100, rng(seed), keep_ties=True) for seed in range(30)]
    ties = [frozenset(p) for p in draws[0] if scores[p[0]] == scores[p[1]]]
    assert sorted(map(sorted, ties)) == [[0, 1], [1, 4]]  # 0 and 4 are one text
    assert all(set(pairs) >= admissible(scores, texts) and len(pairs) == 5 for pairs in draws)
    assert {p for pairs in draws for p in pairs} >= {(0, 1), (1, 0)}


RULES = {
    "gap": lambda s, t: gap_pairs(s, t, 1.0, rng()),
    "all": lambda s, t: all_pairs(s, t, 100, rng()),
    "all with ties": lambda s, t: all_pairs(s, t, 100, rng(), keep_ties=True),
    "divpo": lambda s, t: divpo_pairs(s, t, lambda pool: np.arange(len(pool)), rng()),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize(
    ("scores", "texts"),
    [([1.0], ["a"]), ([None, None, None], list("abc")), ([1.0, None, None], list("abc")), ([1.0, 5.0], ["a", "a"])],
    ids=["one response", "no score", "one score", "duplicates"],
)
def test_groups_without_a_pair(rule, scores, texts):
    assert rule(scores, texts) == []


@pytest.mark.parametrize("name", ["gap", "all", "divpo"])
def test_equal_scores_make_no_pair(name):
    assert RULES[name]([2.0] * 5, list("abcde")) == []


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_missing_score_is_in_no_pair(rule):
    scores = [None, 3.0, None, 1.0, 8.0, None, 5.0]
    pairs = rule(scores, list("abcdefg"))
    assert pairs and {i for pair in pairs for i in pair} <= {1, 3, 4, 6}


def test_divpo_by_hand():
    """16 scores, so k = 4: the best four are 5, 7, 9, 11, the worst 4, 6, 8, 10; one more has no score."""
    order = [4, 6, 8, 10, 0, 1, 2, 3, 12, 13, 14, 15, 5, 7, 9, 11]  # by score
    scores = [None] * 17
    for score, i in enumerate(order):
        scores[i] = float(score)
    value = {5: 0.2, 7: 0.9, 9: 0.1, 11: 0.8, 4: 0.7, 6: 0.3, 8: 0.6, 10: 0.4}
    pools = []

    def deviation(pool):
        pools.append(sorted(pool))
        return np.array([value[i] for i in pool])

    found = {tuple(divpo_pairs(scores, [str(i) for i in range(17)], deviation, rng(seed))) for seed in range(40)}
    assert {frozenset(pairs) for pairs in found} == {frozenset({(7, 6), (11, 10)}), frozenset({(7, 10), (11, 6)})}
    assert pools[:2] == [[5, 7, 9, 11], [4, 6, 8, 10]]  # the deviation is taken inside each pool


@pytest.mark.parametrize(("n", "k"), [(2, 1), (3, 1), (4, 2), (8, 2), (11, 2), (12, 3), (15, 3), (16, 4)])
def test_divpo_pool_size(n, k):
    sizes = []

    def deviation(pool):
        sizes.append(len(pool))
        return np.ones(len(pool))

    pairs = divpo_pairs([float(i) for i in range(n)], [str(i) for i in range(n)], deviation, rng())
    assert sizes == [k, k] and len(pairs) == min(2, k)


# --- groups that are cut ----------------------------------------------------------------------------------


@pytest.mark.parametrize("top_scores", [False, True])
@pytest.mark.parametrize("most", [2, 3, 5])
def test_a_cut_group_holds_all_pairs_that_fit(most, top_scores):
    scores, texts = [3.0, 1.0, None, 1.0, 5.0, 9.0, 2.0, 6.0], list("abcdefgh")
    for pairs in (gap_pairs(scores, texts, 3.0, rng(1)), all_pairs(scores, texts, 9, rng(1))):
        for seed in range(10):
            left, kept = at_most(pairs, scores, most, rng(seed), top_scores)
            assert len(kept) == most and kept == sorted(set(kept))
            assert left == [pair for pair in pairs if set(pair) <= set(kept)]
            used = {i for pair in left for i in pair}
            new = [len(set(pair) - used) for pair in pairs if pair not in left]
            assert all(n > most - len(used) for n in new)  # no other pair would have had room


def test_a_cut_draws_pairs_and_others_uniformly():
    pairs, scores = [(1, 0), (3, 2)], [1.0, 2.0, 1.0, 2.0, 5.0]
    counts = Counter(tuple(at_most(pairs, scores, 3, rng(seed))[1]) for seed in range(600))
    assert counts.keys() == {(0, 1, 2), (0, 1, 3), (0, 1, 4), (0, 2, 3), (1, 2, 3), (2, 3, 4)}
    assert all(60 < count < 140 for count in counts.values())


def test_a_cut_by_scores():
    """Best chosen first, then the better rejected, ties at random; what has no score comes last."""
    scores = [9.0, 1.0, 9.0, 3.0, 5.0, 4.0, None, None]
    pairs = [(6, 7), (4, 5), (0, 1), (2, 3)]
    assert {tuple(at_most(pairs, scores, 2, rng(seed), True)[0]) for seed in range(9)} == {((2, 3),)}
    assert at_most(pairs, scores, 4, rng(), True) == ([(0, 1), (2, 3)], [0, 1, 2, 3])
    assert at_most(pairs, scores, 6, rng(), True) == ([(4, 5), (0, 1), (2, 3)], [0, 1, 2, 3, 4, 5])
    ties = {tuple(at_most([(0, 1), (2, 1)], scores, 2, rng(seed), True)[0]) for seed in range(9)}
    assert ties == {((0, 1),), ((2, 1),)}


def test_a_cut_keeps_a_pair_as_often_as_it_is_given():
    assert at_most([(0, 1), (0, 1), (1, 0)], [None] * 3, 2, rng()) == ([(0, 1), (0, 1), (1, 0)], [0, 1])


def test_a_group_without_pairs_is_cut_at_random():
    kept = {tuple(at_most([], [None] * 4, 2, rng(seed))[1]) for seed in range(60)}
    assert kept == set(itertools.combinations(range(4), 2))
