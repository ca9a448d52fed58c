"""Rows of embeddings and the groups they fall into."""

import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

SMALL = 64  # rows of a group that is taken together with others of its size


def as_rows(where: str, embeddings) -> Tensor:
    """A tensor over the memory of `embeddings` (n, D). Raises ValueError."""
    if isinstance(embeddings, np.ndarray):
        with warnings.catch_warnings():  # a memory map may be read-only; nothing here writes
            warnings.simplefilter("ignore", UserWarning)
            embeddings = torch.from_numpy(embeddings)
    if not isinstance(embeddings, Tensor):
        raise ValueError(f"{where}: embeddings must be a tensor or a NumPy array, got {type(embeddings).__name__}")
    if embeddings.dim() != 2 or not embeddings.is_floating_point():
        got = f"{embeddings.dtype} {tuple(embeddings.shape)}"
        raise ValueError(f"{where}: embeddings must be floating point (n, D), got {got}")
    if not embeddings.shape[1]:
        raise ValueError(f"{where}: embeddings must have at least one column, got {tuple(embeddings.shape)}")
    return embeddings.detach()


def check_groups(where: str, groups: Tensor | None, n: int) -> Tensor:
    """(R+1,) int64 row offsets on the CPU, one group where none are given. Raises ValueError."""
    if groups is None:
        return torch.tensor([0, n]) if n else torch.tensor([0])
    groups = torch.as_tensor(groups).cpu()
    if groups.dim() != 1 or groups.dtype != torch.int64 or len(groups) < 1:
        got = f"{groups.dtype} {tuple(groups.shape)}"
        raise ValueError(f"{where}: groups must be int64 (R+1,) row offsets, got {got}")
    if groups[0] != 0 or groups[-1] != n or (groups.diff() < 1).any():
        raise ValueError(f"{where}: groups must rise from 0 to n = {n} without empty groups")
    return groups


def sizes(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of each group (R,) and each row's group (n,)."""
    size = groups.diff()
    return size, torch.repeat_interleave(torch.arange(len(size), device=groups.device), size)


def real(rows: Tensor) -> Tensor:
    """Half types as float32; float32 and float64 as they are."""
    return rows if rows.dtype == torch.float64 else rows.float()


def out_dtype(rows: Tensor) -> torch.dtype:
    return torch.float64 if rows.dtype == torch.float64 else torch.float32


def square_sums(where: str, rows: Tensor, index: Tensor) -> Tensor:
    """Sum of squares of each row, (...) of (..., D). index (...): the rows' numbers, for the message.

    Raises: ValueError where one is not finite.
    """
    squares = (rows * rows).sum(-1)
    if not torch.isfinite(squares).all():
        row = int(index.to(squares.device)[~torch.isfinite(squares)].min())
        raise ValueError(f"{where}: embeddings must be finite, row {row} is not (or its length overflows)")
    return squares


def unit(where: str, rows: Tensor, index: Tensor) -> Tensor:
    """Rows over their lengths. Raises ValueError for one that is zero or not finite."""
    squares = square_sums(where, rows, index)
    if (squares == 0).any():
        row = int(index.to(squares.device)[squares == 0].min())
        raise ValueError(f"{where}: cosine distance of a zero vector is not defined, row {row}")
    return rows / squares.sqrt()[..., None]


def larger(groups: Tensor, than: int) -> Iterator[tuple[int, int]]:
    """First row and end of each group of more rows."""
    for group in (groups.diff() > than).nonzero()[:, 0].tolist():
        yield int(groups[group]), int(groups[group + 1])


def same_size(
    groups: Tensor, buffer: int, bytes_of: Callable[[int], int], most_rows: int | None = None
) -> Iterator[tuple]:
    """Groups of one size at a time, as many as fit: their numbers (G,), their rows (G, m).

    buffer: bytes for a batch, bytes_of(m): of one group. most_rows: larger groups are left out.
    """
    size = groups.diff()
    for m in size.unique().tolist():
        if most_rows is not None and m > most_rows:
            continue
        which = (size == m).nonzero()[:, 0]
        for part in which.split(max(1, buffer // bytes_of(m))):
            yield part, groups[part][:, None] + torch.arange(m)
