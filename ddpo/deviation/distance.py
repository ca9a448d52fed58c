"""Mean distances: cosine in closed form, any other over all pairs, block by block."""

import logging
import math

import torch
from torch import Tensor

from ddpo.deviation import by_faiss
from ddpo.deviation.rows import SMALL, as_rows, check_groups, larger, out_dtype, real, same_size, square_sums, unit
from ddpo.ops import cpp

METRICS, BACKENDS = ("cosine", "euclidean"), ("auto", "closed", "torch", "faiss")
NEAR = 1e-3  # of |x|^2 + |y|^2: below it |x - y|^2 is summed anew, as the product has cancelled too much of it
LARGEST_BLOCK = 4096  # rows
_told = logging.getLogger("ddpo.deviation")


def mean_distance(
    embeddings,
    metric: str = "cosine",
    groups: Tensor | None = None,
    *,
    backend: str = "auto",
    normalize: bool = False,
    buffer_mib: float = 64,
) -> Tensor:
    """Mean distance of each response to the others of its group.

    closed: cosine in O(n D): with unit vectors e and s their sum, d_i = (n - e_i.s) / (n - 1). On CPUs one C++ op that
    reads the embeddings twice.
    torch, faiss: all pairs, each once, in blocks, by torch's matrix product or by FAISS (GPU FAISS where the embeddings
    are on a GPU). Distances of near points are summed anew from their differences.
    Args:
        embeddings: (n, D) float16, bfloat16, float32 or float64, torch or NumPy, finite; cosine: no zero vector. An
            array whose rows are not whole in memory is copied.
        metric: 'cosine' (0 to 2) | 'euclidean' (units of the embedding).
        groups: (R+1,) int64 row offsets; None: one group.
        backend: 'auto' (see pick_backend; named in the log 'ddpo.deviation') | 'closed' | 'torch' | 'faiss'.
        normalize: euclidean between unit vectors.
        buffer_mib: about the most memory beside input, output and 16 bytes a row.
    Returns: (n,) float32 (float64 for float64) on the embeddings' device; 0 in a group of one; (0,) for no rows. Sums
        are float64.
    Raises: ValueError for other shapes, metrics or backends, for rows that are not finite and for zero vectors.
    """
    x = as_rows("mean_distance", embeddings)
    groups = check_groups("mean_distance", groups, len(x))
    if metric not in METRICS:
        raise ValueError(f"mean_distance: metric must be 'cosine' or 'euclidean', got {metric!r}")
    if backend not in BACKENDS:
        raise ValueError(f"mean_distance: backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "closed" and metric != "cosine":
        raise ValueError("mean_distance: the closed form is cosine's; for euclidean use backend 'torch' or 'faiss'")
    if backend == "auto":
        backend = pick_backend(metric, x.dtype)
    _told.info("%s distances of %d rows: %s", metric, len(x), backend)
    buffer = int(buffer_mib * 2**20)
    if backend == "closed":
        return _closed(x, groups, buffer)
    return _over_pairs(x, groups, metric, normalize, backend == "faiss", buffer)


def pick_backend(metric: str, dtype: torch.dtype = torch.float32) -> str:
    """What 'auto' comes to: cosine 'closed'; euclidean 'faiss', on CPUs as fast as torch or faster
    (benchmarks/deviation.py), but 'torch' for float64, since FAISS computes in float32."""
    if metric == "cosine":
        return "closed"
    return "torch" if dtype == torch.float64 else "faiss"


# --- cosine, closed form ----------------------------------------------------------------------------------


def _closed(x, groups, buffer):
    if cpp.is_built and x.device.type == "cpu":
        try:
            return torch.ops.ddpo.mean_cosine(x, groups)
        except ValueError as err:
            raise ValueError(f"mean_distance: {err}") from None
    d = torch.empty(len(x), dtype=out_dtype(x), device=x.device)
    per_row = 64 * x.shape[1]  # bytes: float64 copies, and what malloc does not use again
    chunk = max(1, buffer // per_row)
    for _, rows in same_size(groups, buffer, lambda m: per_row * m, chunk):
        e = unit("mean_distance", x[rows.to(x.device)].double(), rows)  # (G, m, D)
        d[rows.to(x.device)] = _from_sum(e, e.sum(1, keepdim=True), rows.shape[1]).to(d.dtype)
    for a, b in larger(groups, chunk):

        def units(a=a, b=b):
            for i in range(a, b, chunk):
                part = slice(i, min(i + chunk, b))
                yield part, unit("mean_distance", x[part].double(), torch.arange(part.start, part.stop))

        total = sum(e.sum(0) for _, e in units())
        for part, e in units():
            d[part] = _from_sum(e, total, b - a).to(d.dtype)
    return d


def _from_sum(e, total, n):
    """e (..., D) unit vectors, total: the sum of their group of n."""
    along = (e * total).sum(-1)
    return torch.zeros_like(along) if n == 1 else ((n - along) / (n - 1)).clamp_(min=0)


# --- over all pairs ---------------------------------------------------------------------------------------


def _over_pairs(x, groups, metric, normalize, with_faiss, buffer):
    D, item, fused = x.shape[1], 8 if x.dtype == torch.float64 else 4, runs_cpp(x, metric)
    to_unit = normalize or metric == "cosine"

    def ready(rows, index=None):
        """The rows as they are compared; checked where their numbers are given, which waits for a GPU."""
        rows = real(rows).contiguous()
        if index is not None:
            (unit if to_unit else square_sums)("mean_distance", rows, index)
        return rows / rows.norm(dim=-1, keepdim=True) if to_unit else rows

    sums = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for _, rows in same_size(groups, buffer, lambda m: item * m * (3 * D + 2 * m), SMALL):
        e = ready(x[rows.to(x.device)], rows)  # (G, m, D)
        apart = torch.cdist(e, e, compute_mode="donot_use_mm_for_euclid_dist")
        sums[rows.to(x.device)] = _as_metric(apart, metric).sum(-1, dtype=torch.float64)
    block = block_rows(D, item, buffer, fused)
    for a, b in larger(groups, SMALL):
        parts = [slice(i, min(i + block, b)) for i in range(a, b, block)]
        centre = sum(ready(x[p], torch.arange(p.start, p.stop)).sum(0, dtype=torch.float64) for p in parts) / (b - a)

        def centred(p, centre=centre):
            """A block's rows around the group's mean, so that products cancel little; and their sums of squares."""
            rows = ready(x[p]) - centre.to(real(x[:0]).dtype)
            return rows, (rows * rows).sum(1)

        for i, p in enumerate(parts):
            own = centred(p)
            for q in parts[i:]:
                other = own if q is p else centred(q)
                pairs = by_faiss.squared_distances(own[0], other[0]) if with_faiss else own[0] @ other[0].T
                _add_block(pairs, with_faiss, own, other, sums[p], sums[q], q is p, metric)
    size = groups.diff()
    sums /= torch.repeat_interleave((size - 1).clamp(min=1), size).to(x.device)
    return sums.to(out_dtype(x))


def runs_cpp(x: Tensor, metric: str) -> bool:
    return metric == "euclidean" and cpp.is_built and x.device.type == "cpu"


def block_rows(D: int, item: int, buffer: int, fused: bool = True) -> int:
    """Rows of a block that stays within the buffer: B^2 pairs, several times where no C++ sums them, and 6 B rows, with
    room for what malloc does not use again."""
    squares, rows = (5 if fused else 24) * item, 6 * D * item
    return max(1, min(LARGEST_BLOCK, int((math.sqrt(rows**2 + 4 * squares * buffer) - rows) / (2 * squares))))


def _as_metric(apart, metric):
    """Of unit vectors half the squared distance is the cosine distance, without the cancellation of 1 - e.f."""
    return apart.square_().div_(2) if metric == "cosine" else apart


def _add_block(pairs, is_squared, own, other, by_row, by_column, same, metric):
    """Adds a block's distances to the sums of its rows and columns. pairs (B, C): products, or squared distances; same:
    its diagonal is the rows' own."""
    (x, xx), (y, yy) = own, other
    if runs_cpp(x, metric):
        torch.ops.ddpo.add_distances(pairs, x, y, xx, yy, by_row, by_column, same, is_squared)
        return
    both = xx[:, None] + yy
    squared = (pairs if is_squared else pairs.mul_(-2).add_(both)).clamp_(min=0)
    near = (squared < both.mul_(NEAR)).nonzero()  # (near, 2)
    for part in near.split(max(1, pairs.numel() // (2 * x.shape[1]))):
        i, j = part.T
        squared[i, j] = (x[i] - y[j]).square_().sum(1)
    apart = squared.div_(2) if metric == "cosine" else squared.sqrt_()
    if same:
        apart.triu_(1)
    by_row += apart.sum(1, dtype=torch.float64)
    by_column += apart.sum(0, dtype=torch.float64)
