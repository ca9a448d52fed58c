"""Distances, deviations and weights against the reference, on random groups and on real ones."""

import itertools
import json

import numpy as np
import pytest
import torch
from conftest import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ddpo import deviation, reference
from ddpo.deviation import mean_distance, report, weights

f64 = torch.float64
GROUPS = torch.tensor([0, 5, 6, 14, 16])


def embeddings(seed=0, dtype=f64):
    return torch.randn(16, 6, generator=torch.Generator().manual_seed(seed), dtype=f64).to(dtype)


def by_group(f, *columns):
    return torch.cat([f(*(c[a:b] for c in columns)) for a, b in itertools.pairwise(GROUPS)])


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, f64], ids=str)
def test_mean_distance(metric, dtype):
    e = embeddings(dtype=dtype)
    d = mean_distance(e, metric, GROUPS)
    expected = by_group(lambda x: reference.mean_distance(x.double(), metric), e)
    assert d.dtype == (f64 if dtype == f64 else torch.float32)
    torch.testing.assert_close(d.double(), expected, rtol=1e-6, atol=1e-6 if dtype != f64 else 1e-13)


def test_distances_of_duplicates_and_scale():
    e = embeddings()
    assert mean_distance(e[:1].repeat(4, 1)).abs().max() < 1e-15
    assert mean_distance(e[:1].repeat(4, 1), "euclidean").abs().max() == 0
    torch.testing.assert_close(mean_distance(7 * e), mean_distance(e))
    assert mean_distance(e[:0]).shape == (0,)


@pytest.mark.parametrize("combine", ["geometric", "arithmetic"])
@pytest.mark.parametrize("options", [{}, {"min_deviation": 0.2}, {"release_floor": True}], ids=str)
def test_weights(combine, options):
    d = {"semantic": mean_distance(embeddings(0), groups=GROUPS), "style": mean_distance(embeddings(1), groups=GROUPS)}
    out = weights(d, GROUPS, combine=combine, **options)
    floor = {"release_floor": options.get("release_floor", False)}
    g = by_group(lambda *x: reference.deviation(list(x), combine, options.get("min_deviation", 0.0)), *d.values())
    torch.testing.assert_close(out.deviation, g)
    torch.testing.assert_close(out.weight, by_group(lambda x: reference.weights(x, **floor), g))


def test_equal_distances_stay_equal():
    """One rounding step must not turn equal distances into weights 0 and 2; nor two opposed measures into 0/0."""
    step = np.nextafter(np.float32(0.5), 1)
    assert weights({"semantic": torch.tensor([0.5, float(step)])}).weight.tolist() == [1, 1]
    opposed = {"semantic": torch.tensor([0.1, 0.9]), "style": torch.tensor([0.9, 0.1])}
    assert weights(opposed).weight.tolist() == [1, 1]


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.float64, st.integers(2, 12), elements=st.floats(0, 2)), st.randoms())
def test_invariants(d, random):
    d = torch.from_numpy(d)
    w = weights({"semantic": d}).weight
    assert w.min() >= 0 and w.mean().item() == pytest.approx(1)
    order = random.sample(range(len(d)), len(d))
    torch.testing.assert_close(weights({"semantic": d[order]}).weight, w[order])
    same = d == d[0]
    assert w[same].unique().numel() == 1
    assert torch.equal(w.argsort(stable=True), w.argsort(stable=True)) and w[d.argmax()] == w.max()


def test_report():
    r = report(torch.tensor([0.0, 2.0, 2.0, 0.0]))
    histogram = {"edges": [0.2 * i for i in range(11)], "counts": [2, 0, 0, 0, 0, 0, 0, 0, 0, 2]}
    assert r == {
        **{"count": 4, "mean": 1.0, "zero_share": 0.5, "effective_sample_size": 2.0},
        "histogram": {**histogram, "edges": pytest.approx(histogram["edges"])},
    }
    assert report(torch.tensor([]))["count"] == 0


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: mean_distance(torch.zeros(3)), r"embeddings must be floating point \(n, D\)"),
        (lambda: mean_distance(torch.tensor([[1.0], [float("nan")]])), "must be finite, row 1 is not"),
        (lambda: mean_distance(torch.tensor([[1.0], [0.0]])), "zero vector is not defined, row 1"),
        (lambda: mean_distance(torch.ones(2, 1), "l1"), "'cosine' or 'euclidean', got 'l1'"),
        (lambda: mean_distance(torch.ones(2, 1), groups=torch.tensor([0, 1])), "rise from 0 to n = 2"),
        (lambda: mean_distance(torch.ones(2, 1), groups=torch.tensor([0, 1, 1, 2])), "without empty groups"),
        (lambda: weights({}), "at least one measure"),
        (lambda: weights({"a": torch.ones(2), "b": torch.ones(3)}), r"distances\['b'\] must be finite \(n,\) = \(2,\)"),
        (lambda: weights({"a": torch.ones(2)}, min_deviation=2), r"min_deviation must lie in \[0, 1\], got 2"),
        (lambda: weights({"a": torch.ones(2)}, combine="max"), "'geometric' or 'arithmetic', got 'max'"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_set_metrics():
    e, groups = torch.tensor([[1.0, 0], [1, 0.01], [0, 1], [1, 0]]), torch.tensor([0, 3, 4])
    expected = reference.mean_pairwise_distance(e[:3].double())
    torch.testing.assert_close(
        deviation.diversity(e, groups), torch.stack([expected, torch.zeros((), dtype=f64)]), atol=1e-6, rtol=0
    )
    assert deviation.distinct_k(e, groups, 0.1).tolist() == [2, 1]
    assert deviation.distinct_k(e, groups, 1e-9).tolist() == [3, 1]


@pytest.mark.parametrize("name", ["noveltybench_gemini15pro.jsonl", "aut_human.jsonl"])
def test_real_groups_against_reference(name):
    """Style weights of real groups, exact duplicates among them; one group of aut_human has 1,289 responses."""
    from ddpo.encoders import style_features

    if not (SHARED / name).is_file():
        pytest.skip(f"no {SHARED / name}")
    rows = [json.loads(line) for line in (SHARED / name).read_text().splitlines()]
    texts = [r["text"] for row in rows for r in row["responses"]]
    groups = torch.tensor(np.cumsum([0, *(len(row["responses"]) for row in rows)]))
    e = style_features(texts)
    for metric in ("cosine", "euclidean"):
        w = weights({"style": mean_distance(e, metric, groups)}, groups).weight
        for a, b in itertools.pairwise(groups):
            d = reference.mean_distance(e[a:b].double(), metric)
            expected = reference.weights(reference.deviation([d]))
            torch.testing.assert_close(w[a:b], expected, rtol=1e-4, atol=1e-5)
