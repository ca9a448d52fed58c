"""All that FAISS does for distances, on the CPU or on the GPU where the rows lie. GPU FAISS was not run here: the tests
put a stand-in of its calls in its place."""

import functools

import torch
from torch import Tensor


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """(a, D), (b, D) float -> (a, b) in x's dtype, computed in float32; a little below 0 where rows are alike."""
    import faiss

    rows, others = x.float(), y.float()
    if not x.is_cuda:
        return torch.from_numpy(faiss.pairwise_distances(rows.numpy(), others.numpy())).to(x.dtype)
    out = torch.empty(len(x), len(y), device=x.device)
    options = {"metric": faiss.METRIC_L2, "device": x.device.index}
    faiss.pairwise_distance_gpu(_resources(), rows, others, out, **options)
    return out.to(x.dtype)


class Index:
    """FAISS's exact index over rows (n, D), on their device."""

    def __init__(self, rows: Tensor):
        import faiss

        self._flat: faiss.Index = faiss.IndexFlatL2(rows.shape[1])
        if rows.is_cuda:
            self._flat = faiss.index_cpu_to_gpu(_resources(), rows.device.index, self._flat)
        self._flat.add(_handed(rows))

    def search(self, rows: Tensor, k: int) -> Tensor:
        """(p, k) int64: the k nearest to each."""
        _, found = self._flat.search(_handed(rows), k)
        return torch.as_tensor(found, device=rows.device)


def _handed(rows: Tensor):
    return rows.float() if rows.is_cuda else rows.float().numpy()


@functools.cache
def _resources():
    """GPU FAISS's scratch memory, once a process."""
    import faiss
    import faiss.contrib.torch_utils  # lets it take tensors

    return faiss.StandardGpuResources()
