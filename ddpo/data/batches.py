"""Which pairs (or responses) each optimiser step sees, and how a few of them become one packed batch.

A packed batch holds unique responses one after another, without padding: each passes the model once, however many
pairs use it. Letters: T packed tokens, S sequences, N completion rows, P pairs.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class TokenSource(Protocol):
    """Where token ids come from, by response: a prepared folder, or lists."""

    def prompt_ids(self, response: int) -> np.ndarray: ...
    def response_ids(self, response: int) -> np.ndarray: ...


@dataclass(frozen=True)
class Batch:
    input_ids: Tensor  # (T,) int64
    position_ids: Tensor  # (T,) int64, from 0 in each sequence
    cu_seqlens: Tensor  # (S+1,) int32 offsets of the sequences in T; stays on the host
    cu_seqlens_device: Tensor  # the same, beside the tokens: what attention kernels of GPUs read
    rows: Tensor  # (N,) int64 positions in T whose hidden state predicts a target
    targets: Tensor  # (N,) int64
    segments: Tensor  # (K+1,) int64 offsets in N: S responses, then their S prompts where those are scored too
    num_tokens: Tensor  # (K,) int64 rows of each segment
    responses: Tensor  # (S,) int64, which of the source's
    pairs: Tensor  # (P, 2) int64 into the S sequences
    weight: Tensor  # (P,) float64

    @property
    def max_seqlen(self) -> int:
        """Tokens of the longest sequence."""
        return int(self.cu_seqlens.diff().max())

    def to(self, device: torch.device) -> "Batch":
        moved = {f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)}
        return Batch(**{**moved, "cu_seqlens": self.cu_seqlens})


def pack(
    data: TokenSource,
    responses: np.ndarray,
    pairs: np.ndarray | None = None,
    weight: np.ndarray | None = None,
    with_prompts: bool = False,
) -> Batch:
    """Packs responses (S,), and pairs (P, 2) of rows among them. with_prompts: prompt tokens are scored too, as S
    further segments."""
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
    local = {r: s for s, r in enumerate(responses.tolist())}
    index = [] if pairs is None else [[local[c], local[r]] for c, r in pairs.tolist()]
    lengths = [len(s) for s in sequences]
    cu_seqlens = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32)
    return Batch(
        input_ids=_int64(sequences),
        position_ids=_int64([np.arange(n) for n in lengths]),
        cu_seqlens=cu_seqlens,
        cu_seqlens_device=cu_seqlens,
        rows=_int64(rows),
        targets=_int64(targets),
        segments=torch.tensor(np.cumsum([0, *map(len, rows)])),
        num_tokens=torch.tensor([len(x) for x in rows], dtype=torch.int64),
        responses=torch.tensor(responses, dtype=torch.int64),
        pairs=torch.tensor(index, dtype=torch.int64).reshape(-1, 2),
        weight=torch.tensor([] if weight is None else weight, dtype=torch.float64),
    )


def _int64(parts: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


def epoch_order(item_group: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """A seeded order of the items (pairs or responses): groups shuffled, items of a group together and shuffled."""
    rng = np.random.default_rng([seed, epoch])
    shuffled = rng.permutation(len(item_group))
    rank = rng.permutation(item_group.max() + 1)  # of each group
    return shuffled[np.argsort(rank[item_group[shuffled]], kind="stable")]


def split_by_tokens(items: list[np.ndarray], length: np.ndarray, max_tokens: int) -> Iterator[list[int]]:
    """Consecutive items (each an array of responses) whose unique responses hold at most max_tokens together. An item
    that is longer alone stands alone."""
    chosen: list[int] = []
    seen: set[int] = set()
    tokens = 0
    for i, responses in enumerate(items):
        new = set(responses.tolist()) - seen
        added = sum(int(length[r]) for r in new)
        if chosen and tokens + added > max_tokens:
            yield chosen
            chosen, seen, tokens = [], set(), 0
            new = set(responses.tolist())
            added = sum(int(length[r]) for r in new)
        chosen.append(i)
        seen |= new
        tokens += added
    if chosen:
        yield chosen
