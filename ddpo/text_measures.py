"""How much the texts of one set repeat each other, by their words and bytes alone.

Words are what white space separates, as they are written; homogenisation's are those of the `rouge-score` package
(lower case, letters a to z and digits). All but self-repetition have `release_compat`: the numbers of the evaluation in
the paper's released code (mj-storytelling/DiversityTuning @cb06958), which calls an early state of the `diversity`
package of arXiv 2403.00553. It rounds them to three digits.
"""

import functools
import gzip
import io
import itertools
import math
import random
import re
from collections import Counter
from collections.abc import Sequence

_WORD = re.compile(r"\S+")
CLOCK = 1_742_500_000  # of 20 March 2025; four bytes as any day of these years has them


def compression_ratio(texts: Sequence[str], release_compat: bool = False) -> float:
    """Bytes of the texts, joined by spaces, over the bytes that gzip makes of them.

    Higher means more repetition. Short texts have low ratios and many long ones high ratios: compare sets of one size.
    Args:
        texts: at least one, not all empty; UTF-8.
        release_compat: the denominator is a .gz file of what gzip made: gzipped twice, with a file name in its head.
            The released code packs the time of day too, which changes its numbers by a byte or two; here it is CLOCK.
    Returns: above 0; under 1 where the head of 18 bytes is more than compression saves.
    Raises: ValueError for no text.
    Source: arXiv 2403.00553.
    """
    _check("compression_ratio", texts)
    plain = " ".join(texts).encode()
    packed = gzip.compress(plain, mtime=CLOCK)
    if not release_compat:
        return len(plain) / len(packed)
    file = io.BytesIO()
    with gzip.GzipFile("compressed.gz", "wb", fileobj=file, mtime=0) as outer:
        outer.write(packed)
    return round(len(plain) / len(file.getvalue()), 3)


def homogenisation(
    texts: Sequence[str], max_pairs: int | None = None, seed: int = 0, release_compat: bool = False
) -> float:
    """Mean ROUGE-L F of all pairs of texts, without stemming.

        F(a, b) = 2 L / (|a| + |b|),  L the words of a's and b's longest common subsequence

    Higher means more alike. By the `rouge-score` package; its time goes with the product of the two lengths. A text
    without any of a to z and 0 to 9 has no words there, and F 0 with everything.
    Args:
        texts: at least two.
        max_pairs: where there are more, the mean of so many, drawn at random; None: all.
        seed: of that draw.
        release_compat: equal texts have F 1; the last text, with equal ones right before it, gives no rows of F to the
            sum, which is divided by all the same (where that sum is 0, it is those rows', not divided by n - 1).
    Returns: 0 to 1; nan for one text.
    Raises: ValueError for no text.
    Source: arXiv 2309.05196; ROUGE-L: Lin 2004.
    """
    _check("homogenisation", texts)
    n = len(texts)
    if release_compat:
        return _release_homogenisation(texts)
    num = n * (n - 1) // 2
    if max_pairs is None or num <= max_pairs:
        pairs = list(itertools.combinations(range(n), 2))
    else:
        pairs = [_pair(k) for k in random.Random(seed).sample(range(num), max_pairs)]
    return math.fsum(rouge_l(texts[i], texts[j]) for i, j in pairs) / len(pairs) if pairs else math.nan


def _pair(k: int) -> tuple[int, int]:
    """The k-th of (0, 1), (0, 2), (1, 2), (0, 3), ..."""
    j = (1 + math.isqrt(1 + 8 * k)) // 2
    return k - j * (j - 1) // 2, j


def rouge_l(a: str, b: str) -> float:
    """ROUGE-L F of two texts, 0 to 1, without stemming; the same either way round."""
    return _scorer().score(a, b)["rougeL"].fmeasure


@functools.cache
def _scorer():
    from rouge_score.rouge_scorer import RougeScorer  # loads nltk for seconds

    return RougeScorer(["rougeL"], use_stemmer=False)


def _release_homogenisation(texts):
    n, last = len(texts), len(texts) - 1
    if n == 1:
        return math.nan
    while last and texts[last - 1] == texts[-1]:
        last -= 1
    score = functools.cache(lambda a, b: 1.0 if a == b else rouge_l(a, b))
    rows = [sum(score(a, b) for j, b in enumerate(texts) if i != j) for i, a in enumerate(texts)]
    total = sum(rows[:last]) / (n - 1)
    return round((total or sum(rows[last:])) / n, 3)


def ngram_diversity(texts: Sequence[str], max_n: int = 4, release_compat: bool = False) -> float:
    """Distinct n-grams over all n-grams of the set, summed over n.

        sum over n = 1..max_n of |distinct n-grams| / |n-grams|

    Higher means less repetition; falls with the size of the set. n-grams end with their text. A length that no text has
    adds 0.
    Args:
        texts: at least one.
        release_compat: the texts are joined by spaces and split at single spaces alone, so that n-grams reach from one
            text into the next and a line break is no border.
    Returns: 0 to max_n.
    Raises: ValueError for no text.
    Source: arXiv 2309.05196; arXiv 2202.00666.
    """
    _check("ngram_diversity", texts)
    words = [" ".join(texts).split(" ")] if release_compat else [text.split() for text in texts]
    total = 0.0
    for n in range(1, max_n + 1):
        grams = [gram for text in words for gram in ngrams(text, n)]
        total += len(set(grams)) / len(grams) if grams else 0.0
    return round(total, 3) if release_compat else total


def self_repetition(texts: Sequence[str], n: int = 4) -> float:
    """How often the texts' n-grams come again in other texts of the set.

        mean over texts of log(1 + sum over the text's distinct n-grams of N_i)
        N_i: number of other texts that hold n-gram i

    Higher means more repetition; grows with the size of the set and the length of its texts.
    Args: texts: at least one.
    Returns: nats, at least 0; 0 where no n-gram comes again.
    Raises: ValueError for no text.
    Source: Salkar et al., Self-Repetition in Abstractive Neural Summarizers, AACL 2022; arXiv 2403.00553. By
        distinct n-grams of a text, as the `diversity` package 0.3 counts.
    """
    _check("self_repetition", texts)
    of_text = [set(ngrams(text.split(), n)) for text in texts]
    held_by = Counter(gram for grams in of_text for gram in grams)
    return math.fsum(math.log1p(sum(held_by[gram] - 1 for gram in grams)) for grams in of_text) / len(texts)


def ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """All runs of n words, in order."""
    return list(zip(*(words[i:] for i in range(n)), strict=False))


def first_words(text: str, num_words: int) -> str:
    """The text up to the end of its num_words-th word, white space inside as it is; all of it where it has fewer."""
    end = 0
    for word in itertools.islice(_WORD.finditer(text), num_words):
        end = word.end()
    return text[:end]


def _check(where: str, texts: Sequence[str]) -> None:
    if isinstance(texts, str) or not any(texts):
        raise ValueError(f"{where}: texts must be a list of at least one text, got {texts!r}")
