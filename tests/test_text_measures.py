"""Measures of texts: by hand, and against the released code and the `diversity` package (frozen numbers)."""

import gzip
import io
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpo.text_measures import (
    compression_ratio,
    first_words,
    homogenisation,
    ngram_diversity,
    ngrams,
    rouge_l,
    self_repetition,
)

SEA = [
    "The sea was calm and the sky was clear.",
    "The sea was calm, and then a storm broke.",
    "No sea here.\n\nJust sand, sand and more sand!",
    "In the end the sea was calm and the sky was clear again.",
]
SETS = [
    SEA,
    [SEA[0], SEA[0], SEA[1], SEA[1]],
    [SEA[0]] * 3,
    ["Alpha beta gamma delta.", "One two three four five.", "Alpha beta two three."],
    ["cats sleep all day long", "dogs bark all night long"],
]
# compression ratio, homogenisation, n-gram diversity of mj-storytelling/DiversityTuning @cb06958, its own code run
RELEASE = [(1.188, 0.288, 3.106), (1.468, 0.352, 1.864), (1.337, 2.0, 1.377), (0.642, 0.157, 3.686), (0.505, 0.2, 3.8)]
# homogenisation, self-repetition of the PyPI package diversity 0.3.1
PACKAGE = [
    (0.409, 0.8047189562170501),
    (0.704, 1.9459101490553132),
    (1.0, 2.5649493574615367),
    (0.315, 0.0),
    (0.4, 0.0),
]


@pytest.mark.parametrize(("texts", "release", "package"), zip(SETS, RELEASE, PACKAGE, strict=True))
def test_released_code_and_package(texts, release, package):
    compat = {"release_compat": True}
    assert compression_ratio(texts, **compat) == pytest.approx(release[0], rel=0.03)  # it packs the time of day
    assert (homogenisation(texts, **compat), ngram_diversity(texts, **compat)) == release[1:]
    assert homogenisation(texts) == pytest.approx(package[0], abs=5.1e-4)  # the package rounds
    assert self_repetition(texts) == pytest.approx(package[1], rel=1e-12)


def test_compression_ratio_is_the_releases_but_for_the_clock():
    """Of the release's formula over some times of day, ours is among the values; ours knows no time."""
    text, seen = " ".join(SETS[4]).encode(), set()
    for clock in range(0, 2**31, 2**31 // 199):
        outer = io.BytesIO()
        with gzip.GzipFile("compressed.gz", "wb", fileobj=outer) as file:
            file.write(gzip.compress(text, mtime=clock))
        seen.add(round(len(text) / len(outer.getvalue()), 3))
    assert {compression_ratio(SETS[4], release_compat=True), RELEASE[4][0]} <= seen


def test_compression_ratio():
    joined = b"abc abc abc"
    assert compression_ratio(["abc"] * 3) == len(joined) / len(gzip.compress(joined))
    assert compression_ratio(["the same words"] * 50) > 5 > 1 > compression_ratio(["short"])
    assert compression_ratio(["ä" * 500]) == 1000 / len(gzip.compress(("ä" * 500).encode())), "bytes, not characters"


def test_homogenisation_by_hand():
    """a b c d, a c: the longest common subsequence is 2 of 4 and of 2 words, F = 4 / 6; nothing else is common."""
    assert homogenisation(["a b c d", "A, c!", "x"]) == pytest.approx((4 / 6 + 0 + 0) / 3)
    assert homogenisation(["a b c d", "a c"]) == homogenisation(["a c", "a b c d"])
    assert homogenisation(["one two", "one two"]) == 1
    assert math.isnan(homogenisation(["alone"])) and math.isnan(homogenisation(["alone"], release_compat=True))
    assert rouge_l("running", "runs") == 0, "no stemming"


def test_homogenisation_of_drawn_pairs():
    """Every pair can be drawn, none twice; the draw is the seed's."""
    texts = [f"w{i} {'same' if i < 3 else f'v{i}'}" for i in range(7)]  # 3 of the 21 pairs share one word of two
    whole = homogenisation(texts)
    assert whole == pytest.approx(3 * 0.5 / 21)
    assert homogenisation(texts, max_pairs=21) == homogenisation(texts, max_pairs=100) == whole
    drawn = [homogenisation(texts, max_pairs=20, seed=s) for s in range(30)]
    assert {round(d * 20 / 0.5) for d in drawn} == {2, 3}, "one pair of the 21 is left out"
    assert homogenisation(texts, max_pairs=5, seed=3) == homogenisation(texts, max_pairs=5, seed=3)


def test_ngram_diversity_by_hand():
    """a a b, a: unigrams 2 of 4, bigrams (a a), (a b) 2 of 2, trigrams 1 of 1, no 4-grams."""
    assert ngram_diversity(["a a b", "a"]) == pytest.approx(2 / 4 + 1 + 1 + 0)
    assert ngram_diversity(["a a b", "a"], release_compat=True) == pytest.approx(2 / 4 + 1 + 1 + 1), "across the border"
    assert ngram_diversity(["a b c d"] * 2) == pytest.approx(4 * 0.5)
    assert ngram_diversity(["one"], max_n=1) == 1


def test_self_repetition_by_hand():
    """'b c d e' stands in both others of the first text, 'a b c d' in one: log(1 + 3)."""
    texts = ["a b c d e", "a b c d e b c d", "x b c d e"]
    first = math.log(1 + 1 + 2)
    second = math.log(1 + 1 + 2)  # its own 'c d e b' and 'd e b c', 'e b c d' stand nowhere else
    third = math.log(1 + 2)
    assert self_repetition(texts) == pytest.approx((first + second + third) / 3)
    assert self_repetition(["a b c d a b c d"]) == 0, "only other texts count"
    assert self_repetition(["too short", "too short"]) == 0
    assert self_repetition(["too short", "too short"], n=2) == pytest.approx(math.log(2))


@given(st.text(), st.integers(1, 6))
def test_first_words(text, num):
    """A prefix that holds so many words, where there are so many."""
    cut = first_words(text, num)
    assert text.startswith(cut) and cut.split() == text.split()[:num]


def test_ngrams():
    assert ngrams("a b c".split(), 2) == [("a", "b"), ("b", "c")] and ngrams(["a"], 2) == []


@pytest.mark.parametrize("measure", [compression_ratio, homogenisation, ngram_diversity, self_repetition])
def test_no_texts(measure):
    for wrong in ([], "a text", [""]):
        with pytest.raises(ValueError, match=rf"{measure.__name__}: texts must be a list of at least one text"):
            measure(wrong)
