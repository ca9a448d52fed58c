"""Measures of whole sets against their definitions, many groups at a time."""

import itertools

import numpy as np
import pytest
import torch
from conftest import SHARED

from ddpo.data.groups import read_jsonl
from ddpo.deviation import distinct_k, log_det, vendi_score

f64 = torch.float64
GROUPS = torch.tensor([0, 1, 4, 7, 19])


def embeddings(seed=0):
    return torch.randn(19, 6, generator=torch.Generator().manual_seed(seed), dtype=f64)


def each(f, x):
    unit = x / x.norm(dim=1, keepdim=True)
    return torch.stack([f(unit[a:b] @ unit[a:b].T) for a, b in itertools.pairwise(GROUPS.tolist())])


def test_vendi_score():
    """exp of the entropy of the eigenvalues of K / n; n for orthogonal rows, 1 for equal ones."""

    def of(similarity):
        p = torch.linalg.eigvalsh(similarity / len(similarity)).clamp(min=0)
        return torch.exp(-(p * p.clamp(min=1e-300).log()).sum())

    torch.testing.assert_close(vendi_score(embeddings(), GROUPS), each(of, embeddings()))
    assert vendi_score(torch.eye(5)).item() == pytest.approx(5)
    assert vendi_score(torch.ones(5, 3)).item() == pytest.approx(1)


def test_log_det():
    def of(similarity):
        return torch.logdet(similarity + 0.01 * torch.eye(len(similarity), dtype=f64))

    torch.testing.assert_close(log_det(embeddings(), GROUPS, 0.01), each(of, embeddings()))
    assert log_det(torch.ones(5, 3)).isfinite()
    with pytest.raises(ValueError, match="ridge must be above 0"):
        log_det(torch.ones(5, 3), ridge=0)


def by_hand(same):
    classes = []
    for i in range(len(same)):
        home = next((c for c in classes if any(same[i, j] for j in c)), None)
        classes.append([i]) if home is None else home.append(i)
    return len(classes)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.8, 1.2, 2.1])
def test_distinct_k(threshold):
    expected = [by_hand(1 - s < threshold) for s in _similarities(embeddings())]
    assert distinct_k(embeddings(), GROUPS, threshold).tolist() == expected


@pytest.mark.parametrize("x", [torch.ones(5), [[1.0, 2.0]]])
def test_distinct_k_wants_rows(x):
    with pytest.raises(ValueError, match="distinct_k: "):
        distinct_k(x)


def _similarities(x):
    unit = x / x.norm(dim=1, keepdim=True)
    return [unit[a:b] @ unit[a:b].T for a, b in itertools.pairwise(GROUPS.tolist())]


@pytest.mark.skipif(not (SHARED / "noveltybench_gemini15pro.jsonl").is_file(), reason="no real groups here")
def test_distinct_k_of_people():
    """By another equivalence: NoveltyBench's own clusters, whose number is its distinct_k."""
    rows = [row for _, row in read_jsonl(SHARED / "noveltybench_gemini15pro.jsonl")]
    label = np.array([r["cluster"] for row in rows for r in row["responses"]])
    groups = torch.tensor([0, *(len(row["responses"]) for row in rows)]).cumsum(0)

    def equivalent(members):
        found = torch.from_numpy(label[members.numpy()])
        return found[:, :, None] == found[:, None, :]

    expected = [len(set(label[a:b])) for a, b in itertools.pairwise(groups.tolist())]
    assert distinct_k(torch.empty(len(label), 0), groups, equivalent=equivalent).tolist() == expected
