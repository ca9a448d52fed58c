"""Mean and nearest distances by every backend against float64: dtypes, sizes, duplicates, memory maps, bad rows."""

import itertools
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, need_cpp
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpo import reference
from ddpo.deviation import by_faiss, distance, mean_distance, nearest_distance
from ddpo.ops import cpp

sys.path.insert(0, str(ROOT))
f64 = torch.float64
CLOSED = [pytest.param(True, id="cpp", marks=need_cpp), pytest.param(False, id="torch")]


def around_a_mean(n, D, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, D, generator=generator) + torch.randn(D, generator=generator)).to(dtype)


def by_group(f, x, groups):
    return torch.cat([f(x[a:b]) for a, b in itertools.pairwise(groups.tolist())])


@pytest.fixture
def without_cpp(monkeypatch):
    return lambda: monkeypatch.setattr(cpp, "is_built", False)


@pytest.mark.parametrize("with_cpp", CLOSED)
@pytest.mark.parametrize("backend", ["closed", "torch", "faiss"])
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, f64], ids=str)
def test_backends_agree(backend, metric, dtype, with_cpp, without_cpp, monkeypatch):
    """Groups of one, small ones, one of several blocks; with duplicates in it and a pair that nearly is one."""
    if backend == "closed" and metric == "euclidean":
        pytest.skip("cosine's form")
    if not with_cpp:
        without_cpp()
    monkeypatch.setattr(distance, "LARGEST_BLOCK", 90)
    groups = torch.tensor([0, 1, 6, 11, 14, 314, 384, 385])
    x = around_a_mean(385, 24, dtype=dtype)
    x[20:60] = x[19]
    x[301] = x[20]
    x[300] = x[299] * (1 + 1e-3)
    d = mean_distance(x, metric, groups, backend=backend)
    expected = by_group(lambda e: reference.mean_distance(e.double(), metric), x, groups)
    assert d.dtype == (f64 if dtype == f64 else torch.float32)
    exact = dtype == f64 and backend != "faiss"  # FAISS multiplies in float32
    # 1e-13 of a zero's rounding is 3e-7 of its root: the reference's own diagonal under cosine
    torch.testing.assert_close(d.double(), expected, rtol=1e-12 if exact else 2e-6, atol=1e-12 if exact else 1e-6)


@pytest.mark.parametrize("with_cpp", CLOSED)
def test_blocks_of_a_large_group(with_cpp, without_cpp):
    """More rows than a block of any of the ways, odd widths; the closed form beside float64's."""
    if not with_cpp:
        without_cpp()
    x = around_a_mean(5000, 13)
    expected = reference.mean_cosine_distance_closed(x.double())
    torch.testing.assert_close(mean_distance(x, buffer_mib=0.5).double(), expected, rtol=0, atol=1e-7)
    few = mean_distance(x, backend="torch", buffer_mib=0.5)
    torch.testing.assert_close(few.double(), expected, rtol=0, atol=1e-6)
    apart = reference.mean_distance(x[:2000].double(), "euclidean")
    for strided in (torch.stack([x, x], 1)[:, 0], torch.stack([x, x], 2)[..., 0]):  # rows apart, columns apart
        assert not strided.is_contiguous()
        torch.testing.assert_close(mean_distance(strided).double(), expected, rtol=0, atol=1e-7)
        torch.testing.assert_close(mean_distance(strided[:2000], "euclidean").double(), apart, rtol=1e-6, atol=0)


@pytest.mark.parametrize("metric, backend", [("cosine", "closed"), ("euclidean", "torch"), ("euclidean", "faiss")])
@pytest.mark.parametrize("with_cpp", CLOSED)
@pytest.mark.parametrize("sizes", [[20_000], [7] * 3000], ids=["one group", "many"])
def test_memory(metric, backend, with_cpp, sizes, without_cpp):
    """Peak memory beside the embeddings and 16 bytes a row stays about the stated buffer."""
    from benchmarks.measure import peak_extra_mib

    if not with_cpp:
        without_cpp()
    groups = torch.tensor([0, *sizes]).cumsum(0)
    x = around_a_mean(sum(sizes), 96)

    def run():
        return mean_distance(x, metric, groups, backend=backend, buffer_mib=16)

    peak = peak_extra_mib(run, run, x.device)
    if peak is None:
        pytest.skip("the system does not say")
    assert peak < 16 + 16 * len(x) / 2**20 + 8  # the product's own buffers


def test_points_far_from_the_origin():
    """Where products cancel most of themselves: the group's mean is taken off first."""
    x = 30 + torch.randn(300, 384, generator=torch.Generator().manual_seed(0))
    expected = reference.mean_distance(x.double(), "euclidean")
    for backend in ("torch", "faiss"):
        found = mean_distance(x, "euclidean", backend=backend).double()
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@need_cpp
def test_ten_million_rows():
    """Sums that float32 would lose: all but a few rows alike."""
    n = 10_000_000
    x = torch.full((n, 16), 0.25)
    x[::1000] = around_a_mean(n // 1000, 16)
    rows = torch.arange(0, n, 99_999)
    unit = torch.nn.functional.normalize(x[rows].double(), dim=1)
    total = sum(torch.nn.functional.normalize(part.double(), dim=1).sum(0) for part in x.split(1 << 20))
    expected = (n - unit @ total) / (n - 1)
    torch.testing.assert_close(mean_distance(x)[rows].double(), expected, rtol=0, atol=1e-6)


@need_cpp
def test_the_same_bits_for_any_number_of_threads():
    x, groups = around_a_mean(7000, 40), torch.tensor([0, 10, 6000, 7000])
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):  # more than at::mm promises for euclidean
            torch.set_num_threads(threads)
            ways = (("cosine", "closed"), ("euclidean", "torch"))
            found.append([mean_distance(x, metric, groups, backend=backend) for metric, backend in ways])
    finally:
        torch.set_num_threads(before)
    for i in (0, 1):
        assert torch.equal(found[0][i], found[1][i])


def test_numpy_and_memory_maps(tmp_path):
    x = around_a_mean(50, 8)
    np.save(tmp_path / "x.npy", x.numpy())
    for array in (x.numpy(), np.load(tmp_path / "x.npy", mmap_mode="r"), x.double().numpy(), x.half().numpy()):
        torch.testing.assert_close(mean_distance(array).double(), mean_distance(x).double(), rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match="must be a tensor or a NumPy array, got list"):
        mean_distance([[1.0]])


def test_normalize_and_what_auto_says(caplog):
    x = around_a_mean(300, 8)
    unit = x / x.norm(dim=1, keepdim=True)
    with caplog.at_level("INFO", "ddpo.deviation"):
        d = mean_distance(x, "euclidean", normalize=True)
    assert "euclidean distances of 300 rows: faiss" in caplog.text
    torch.testing.assert_close(d, mean_distance(unit, "euclidean"), rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="closed form is cosine's"):
        mean_distance(x, "euclidean", backend="closed")
    with pytest.raises(ValueError, match="backend must be one of auto, closed, torch, faiss, got 'gpu'"):
        mean_distance(x, backend="gpu")
    with pytest.raises(ValueError, match=r"must have at least one column, got \(3, 0\)"):
        mean_distance(torch.empty(3, 0))
    assert mean_distance(torch.tensor([[1.0], [2.0], [-1.0]])).tolist() == [1, 1, 2]


@pytest.mark.parametrize("with_cpp", CLOSED)
@pytest.mark.parametrize("backend", ["closed", "torch", "faiss"])
@pytest.mark.parametrize("n", [10, 300])
def test_rows_that_cannot_be_compared(backend, n, with_cpp, without_cpp):
    if not with_cpp:
        without_cpp()
    x = around_a_mean(n, 4)
    x[7] = 0
    with pytest.raises(ValueError, match="zero vector is not defined, row 7"):
        mean_distance(x, backend=backend)
    x[5] = torch.nan
    with pytest.raises(ValueError, match="must be finite, row 5 is not"):
        mean_distance(x, backend=backend)
    if backend != "closed":
        with pytest.raises(ValueError, match="must be finite, row 5 is not"):
            mean_distance(x, "euclidean", backend=backend)
        x[5] = 1
        assert mean_distance(x, "euclidean", backend=backend).isfinite().all()  # a zero vector is a point


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.integers(1, 9), min_size=1, max_size=6), st.floats(1e-3, 1e3))
def test_invariants(seed, sizes, scale):
    """Order within groups and of groups, scale, a duplicated group."""
    groups = torch.tensor([0, *sizes]).cumsum(0)
    x = around_a_mean(sum(sizes), 5, seed, f64)
    d = mean_distance(x, groups=groups)
    order = torch.cat([a + torch.randperm(b - a) for a, b in itertools.pairwise(groups.tolist())])
    torch.testing.assert_close(mean_distance(x[order], groups=groups), d[order])
    torch.testing.assert_close(mean_distance(scale * x, groups=groups), d)
    e = mean_distance(x, "euclidean", groups)
    torch.testing.assert_close(mean_distance(scale * x, "euclidean", groups), scale * e)
    twice = mean_distance(torch.cat([x, x]), groups=torch.cat([groups, groups[1:] + len(x)]))
    torch.testing.assert_close(twice, torch.cat([d, d]))


# --- nearest ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("k", [1, 4, 1000])
def test_nearest_distance(metric, k):
    """Small groups and one that FAISS searches; itself left out, duplicates not, even many of them."""
    groups = torch.tensor([0, 1, 3, 9, 409])
    x = around_a_mean(409, 12)
    x[30:60] = x[29]
    d = nearest_distance(x, k, metric, groups)
    expected = []
    for a, b in itertools.pairwise(groups.tolist()):
        apart = reference.pairwise_distance(x[a:b].double(), metric).fill_diagonal_(torch.inf)
        near = min(k, b - a - 1)
        expected.append(apart.topk(near, largest=False).values.mean(1) if near else torch.zeros(1, dtype=f64))
    torch.testing.assert_close(d.double(), torch.cat(expected), rtol=1e-5, atol=1e-6)
    assert (d[30:60] < 1e-6).all() == (k < 30)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        nearest_distance(x, 0)


# --- GPU FAISS, by a stand-in -----------------------------------------------------------------------------


def test_gpu_faiss_is_called_as_it_is_declared(monkeypatch):
    """The calls of faiss-gpu: pairwise_distance_gpu(res, xq, xb, D, metric=, device=), index_cpu_to_gpu(res, device,
    index), add and search on tensors. Tensors of the CPU that say they are on a GPU stand in for a GPU's."""
    import faiss

    calls = []

    class Resources:
        def __init__(self):
            calls.append("resources")

    def pairwise_distance_gpu(res, xq, xb, D=None, metric=faiss.METRIC_L2, device=-1):
        assert isinstance(res, Resources) and metric == faiss.METRIC_L2
        D.copy_(torch.cdist(xq, xb).square())
        calls.append("distance")
        return D

    def index_cpu_to_gpu(res, device, index):
        assert isinstance(res, Resources)
        calls.append("index")
        return SimpleNamespace(
            add=lambda rows: index.add(rows.numpy()),
            search=lambda rows, k: tuple(map(torch.from_numpy, index.search(rows.numpy(), k))),
        )

    for name, value in {
        "StandardGpuResources": Resources,
        "pairwise_distance_gpu": pairwise_distance_gpu,
        "index_cpu_to_gpu": index_cpu_to_gpu,
    }.items():
        monkeypatch.setattr(faiss, name, value, raising=False)
    monkeypatch.setitem(sys.modules, "faiss.contrib.torch_utils", SimpleNamespace())
    x, y = around_a_mean(60, 4), around_a_mean(5, 4, 1)
    near = torch.cdist(y, x).topk(3, largest=False).indices
    by_faiss._resources.cache_clear()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
            squared = by_faiss.squared_distances(x, y)
            found = by_faiss.Index(x).search(y, 3)
    finally:
        by_faiss._resources.cache_clear()
    torch.testing.assert_close(squared, torch.cdist(x, y).square())
    assert torch.equal(found, near) and calls == ["resources", "distance", "index"]
