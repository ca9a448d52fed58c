"""How responses become packs, which pass the model at once, and packs a batch, which a loss needs together.

A pack holds unique responses one after another, without padding: each passes the model once, however many pairs use
it. Letters: T packed tokens, S sequences, N completion rows, I items (P pairs, or groups, or responses), M members of
items, k kinds of segments (1, with prompts 2).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class TokenSource(Protocol):
    """Where token ids come from, by response: a prepared folder, or lists."""

    def prompt_ids(self, response: int) -> np.ndarray: ...
    def response_ids(self, response: int) -> np.ndarray: ...


class _OneToken:
    def prompt_ids(self, response):
        return np.zeros(1, np.int64)

    response_ids = prompt_ids


@dataclass(frozen=True)
class Pack:
    input_ids: Tensor  # (T,) int64
    position_ids: Tensor  # (T,) int64, from 0 in each sequence
    cu_seqlens: Tensor  # (S+1,) int32 offsets of the sequences in T; stays on the host
    cu_seqlens_device: Tensor  # the same, beside the tokens: what attention kernels of GPUs read
    rows: Tensor  # (N,) int64 positions in T whose hidden state predicts a target
    targets: Tensor  # (N,) int64
    segments: Tensor  # (k * S + 1,) int64 offsets in N: S responses, then their S prompts where those are scored too

    @property
    def max_seqlen(self) -> int:
        """Tokens of the longest sequence."""
        return int(self.cu_seqlens.diff().max())

    def to(self, device: torch.device) -> "Pack":
        moved = {f.name: _sent(getattr(self, f.name), device) for f in fields(self)}
        return Pack(**{**moved, "cu_seqlens": self.cu_seqlens})


@dataclass(frozen=True)
class Batch:
    """Items (see ddpo.items) and every response they use. Several packs where one has no room; behind the S sequences
    may stand others that fill up a process's packs and count for nothing."""

    packs: list[Pack]
    responses: Tensor  # (S,) int64, which of the source's
    num_tokens: Tensor  # (k, S) int64 rows of each response, then of each prompt
    members: Tensor  # (M,) int64 into the S sequences, item after item
    offsets: Tensor  # (I+1,) int64 of the items in members
    weight: Tensor  # (I,) float64, of pairs; others have 1
    scores: Tensor  # (M,) float64, nan where there is none
    num_inputs: int  # tokens that pass the model, those that fill up left out

    @property
    def pairs(self) -> Tensor:
        """(P, 2) int64 into the S sequences, where the items are pairs: chosen, rejected."""
        return self.members.view(-1, 2)

    def to(self, device: torch.device) -> "Batch":
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        moved = {name: _sent(value, device) for name, value in tensors.items()}
        return Batch(**{**vars(self), **moved, "packs": [pack.to(device) for pack in self.packs]})


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device, on its way without anybody waiting."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def pack(data: TokenSource, responses: Sequence[int] | np.ndarray, with_prompts: bool = False) -> Pack:
    """Packs responses (S,). with_prompts: prompt tokens are scored too, as S further segments."""
    sequences, rows, targets, prompt_rows, prompt_targets = [], [], [], [], []
    start = 0
    for r in responses:
        prompt, response = data.prompt_ids(r), data.response_ids(r)
        sequences.append(np.concatenate([prompt, response[:-1]]))  # the last token is predicted, never read
        first = start + len(prompt) - 1
        rows.append(np.arange(first, first + len(response)))
        targets.append(response)
        prompt_rows.append(np.arange(start, first))
        prompt_targets.append(prompt[1:])
        start += len(sequences[-1])
    if with_prompts:
        rows, targets = rows + prompt_rows, targets + prompt_targets
    lengths = [len(s) for s in sequences]
    cu_seqlens = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32)
    return Pack(
        input_ids=_int64(sequences),
        position_ids=_int64([np.arange(n) for n in lengths]),
        cu_seqlens=cu_seqlens,
        cu_seqlens_device=cu_seqlens,
        rows=_int64(rows),
        targets=_int64(targets),
        segments=torch.tensor(np.cumsum([0, *map(len, rows)])),
    )


def filler(with_prompts: bool = False) -> Pack:
    """One sequence of one token: what a process forwards where others have a pack and it has none."""
    return pack(_OneToken(), [0], with_prompts)


def _int64(parts: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


def consecutive(sizes: np.ndarray, room: int) -> np.ndarray:
    """Offsets (n+1,) that cut items into consecutive runs of total size at most room; a larger item stands alone."""
    ends = np.cumsum(sizes)
    cuts = [0]
    while cuts[-1] < len(sizes):
        done = ends[cuts[-1] - 1] if cuts[-1] else 0
        cuts.append(max(cuts[-1] + 1, int(np.searchsorted(ends, done + room, side="right"))))
    return np.array(cuts)


def first_fit(sizes: Sequence[int], room: int) -> list[list[int]]:
    """Items in bins of total size at most room, the largest first, each into the first bin that takes it; a larger
    item gets a bin of its own."""
    bins: list[list[int]] = []
    left: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        at = next((b for b, free in enumerate(left) if sizes[i] <= free), None)
        if at is None:
            bins.append([])
            left.append(room)
            at = -1
        bins[at].append(i)
        left[at] -= sizes[i]
    return bins


def share_out(sizes: Sequence[int], num_shares: int) -> list[list[int]]:
    """Items in num_shares shares of nearly equal size: the largest first, each to the smallest share."""
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    total = [0] * num_shares
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        at = total.index(min(total))
        shares[at].append(i)
        total[at] += sizes[i]
    return shares
