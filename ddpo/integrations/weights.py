"""Pair weights on their way from a data set to a loss."""

from collections.abc import Callable

import torch


def check_weights(trainer: str, dataset) -> None:
    """Raises ValueError where the first row has no weight."""
    if dataset is not None and "weight" not in (row := next(iter(dataset))):
        raise ValueError(
            f"{trainer}: train_dataset must have a column 'weight', a number a pair; got {sorted(row)}. Make it with "
            "`ddpo weigh` or ddpo.weigh_dataset, or use TRL's own trainer for unweighted pairs"
        )


class WeightedCollator:
    """A trainer's own collator, and the rows' weights (B,) float32 where all have one."""

    def __init__(self, collator: Callable):
        self._collator = collator

    def __call__(self, examples: list[dict]) -> dict:
        weights = [example.get("weight") for example in examples]
        batch = self._collator([{k: v for k, v in e.items() if k != "weight"} for e in examples])
        return batch if None in weights else {**batch, "weight": torch.tensor(weights, dtype=torch.float32)}
