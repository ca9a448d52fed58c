"""Pair weights on their way from a data set to a loss."""

from collections.abc import Callable

import numpy as np
import torch
from datasets import Dataset


def check_weights(trainer: str, dataset) -> None:
    """Raises ValueError where the rows have no weight, or where one of a data set in memory is no finite number >= 0.

    A stream's are looked at batch by batch, by the collator.
    """
    row = None if dataset is None else next(iter(dataset), None)
    if row is None:  # an empty one is TRL's to refuse
        return
    if "weight" not in row:
        raise ValueError(
            f"{trainer}: train_dataset must have a column 'weight', a number a pair; got {sorted(row)}. Make it with "
            "`ddpo weigh` or ddpo.weigh_dataset, or use TRL's own trainer for unweighted pairs"
        )
    if isinstance(dataset, Dataset):
        weights = np.array(dataset["weight"], float)  # None becomes nan
        for i in np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))[:1]:
            raise ValueError(
                f"{trainer}: weight must be a finite number >= 0, got {dataset[int(i)]['weight']!r} in row {i}"
            )


class WeightedCollator:
    """A trainer's own collator, and the rows' weights (B,) float32; none where no row has one (an evaluation set)."""

    def __init__(self, collator: Callable):
        self._collator = collator

    def __call__(self, examples: list[dict]) -> dict:
        weights = [example.get("weight") for example in examples]
        batch = self._collator([{k: v for k, v in e.items() if k != "weight"} for e in examples])
        if all(weight is None for weight in weights):
            return batch
        if None in weights:
            raise ValueError(f"weight must stand in every row of a batch or in none, got {weights}")
        return {**batch, "weight": torch.tensor(weights, dtype=torch.float32)}
