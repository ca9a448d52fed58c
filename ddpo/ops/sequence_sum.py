"""Sums of consecutive rows: from token log-probs to sequence log-probs."""

import torch


def sequence_sum(values: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
    """Sum of each segment of rows: out[s] = sum of values[segments[s] : segments[s + 1]].

    Args:
        values: (N,) floating point.
        segments: (S+1,) int64 row offsets, rising from 0 to N; an empty segment sums to 0.
    Returns: (S,) in the dtype of values; the same bits on every run.
    Raises: ValueError where the shapes or dtypes are others, and on a CPU where the offsets do.
    """
    if values.dim() != 1 or not values.is_floating_point():
        raise ValueError(f"sequence_sum: values must be floating point (N,), got {values.dtype} {tuple(values.shape)}")
    if segments.dim() != 1 or segments.dtype != torch.int64 or len(segments) < 1:
        got = f"{segments.dtype} {tuple(segments.shape)}"
        raise ValueError(f"sequence_sum: segments must be int64 (S+1,) row offsets, got {got}")
    on_cpu = segments.device.type == "cpu" and not torch.compiler.is_compiling()  # elsewhere it would be a host sync
    if on_cpu and (segments[0] != 0 or segments[-1] != len(values) or (segments.diff() < 0).any()):
        raise ValueError(f"sequence_sum: segments must rise from 0 to N = {len(values)}, got {segments.tolist()}")
    if len(segments) == 1:
        return values[:0]  # keeps its place in the graph: a process may have nothing to sum
    return torch.segment_reduce(values, "sum", offsets=segments, unsafe=True, initial=0)
