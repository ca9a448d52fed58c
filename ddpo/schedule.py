"""What each optimiser step of a run sees: a pure function of the data, the settings and the step's number."""

import itertools
import math
from dataclasses import replace

import numpy as np
import torch

from ddpo.config import TrainConfig
from ddpo.data.batches import Batch, consecutive, filler, first_fit, pack, share_out
from ddpo.data.prepared import Prepared
from ddpo.items import items_of
from ddpo.objective import Totals, method_of, scores_prompts, weight_is_a_factor

MOST_TOKENS = 4096  # of a pack, where the settings name no number


class Schedule:
    """Deals the items of `pool` (pairs; responses under SFT, groups under GVPO) to num_steps steps: items(step),
    totals(step), batches(step, rank, world).

    Items that share a response, directly or through others, are one component: they stay in one step and one process,
    so that each response passes the model once an epoch. A step takes components, in an order drawn anew each epoch,
    while they hold at most batch_size items; a larger component is a step of its own. (A response by itself and a group
    share nothing with others: each is a component.)
    """

    def __init__(self, data: Prepared, cfg: TrainConfig, least_tokens: int = MOST_TOKENS):
        """least_tokens: micro_tokens where the settings name none and every component fits into it. Raises ValueError
        where the folder has no item for the method."""
        self.data, self.cfg = data, cfg
        self.pool = items_of(data, method_of(cfg).item)
        skips = weight_is_a_factor(cfg) and not cfg.forward_zero_weight
        self._forwarded = self.pool.weight != 0 if skips else np.ones(len(self.pool), bool)
        self._length = data.num_prompt_tokens + data.num_tokens - 1  # (R,) tokens that pass the model
        self._items, self._offsets, component = self.pool.components(len(data.responses))
        used = self.forwarded_responses()
        largest = int(np.bincount(component[used], self._length[used]).max(initial=0))  # tokens of a component
        self.micro_tokens = cfg.micro_tokens or min(MOST_TOKENS, max(least_tokens, largest))
        per_epoch = [len(self._cuts(epoch)[1]) - 1 for epoch in range(cfg.epochs)]
        self._first_step = np.cumsum([0, *per_epoch])  # of each epoch
        self.num_steps = int(self._first_step[-1])
        if cfg.max_steps is not None:
            self.num_steps = min(self.num_steps, cfg.max_steps)
        self._epoch: tuple = (-1, None, None)

    @classmethod
    def of_all(cls, data: Prepared, cfg: TrainConfig, least_tokens: int) -> "Schedule":
        """One step of all items; those of weight 0 pass too, so that every method is measured over the same."""
        everything = max(1, len(data.pairs), len(data.responses))
        return cls(
            data, replace(cfg, batch_size=everything, epochs=1, max_steps=None, forward_zero_weight=True), least_tokens
        )

    def epoch(self, step: int) -> float:
        """Epochs done when `step` steps are."""
        epoch = min(int(np.searchsorted(self._first_step, step, side="right")) - 1, self.cfg.epochs - 1)
        start, end = self._first_step[epoch : epoch + 2]
        return epoch + (step - start) / (end - start)

    def forwarded_responses(self) -> np.ndarray:
        """The responses that pass the model, sorted."""
        return np.unique(self.pool.responses(np.flatnonzero(self._forwarded)))

    def items(self, step: int) -> np.ndarray:
        """The step's items over all processes."""
        return np.concatenate([self._component(component) for component in self._step_components(step)])

    def describe(self, step: int) -> dict[str, list]:
        """Which groups and responses (rows of the prepared folder) the step holds, item by item."""
        items = self.items(step)
        members = [self.pool.responses(items[i : i + 1]).tolist() for i in range(len(items))]
        return {"groups": self.data.response_group[self.pool.first[items]].tolist(), "responses": members}

    def totals(self, step: int) -> Totals:
        items = self.items(step)
        counted = self.pool.first[items]
        tokens = self.data.num_tokens[counted]
        if scores_prompts(self.cfg):
            tokens = tokens + self.data.num_prompt_tokens[counted] - 1  # the first token is not predicted
        return Totals(len(items), int(tokens.sum()), float(self.pool.weight[items].mean()))

    def batches(self, step: int, rank: int = 0, world: int = 1) -> list[Batch]:
        """This process's share of the step; items that cannot matter are left out.

        Every process gets as many batches, and in each place as many packs, as the one that has most, at least one:
        what one lacks is filled up. So no process waits for another that has nothing to do.
        """
        components = [items[self._forwarded[items]] for items in map(self._component, self._step_components(step))]
        components = [items for items in components if len(items)]
        responses = [np.unique(self.pool.responses(items)) for items in components]
        tokens = [int(self._length[r].sum()) for r in responses]
        plans = []  # of each process: of each batch: its components
        for share in share_out(tokens, world):
            bins = first_fit([tokens[i] for i in share], self.micro_tokens)
            plans.append([[share[i] for i in b] for b in bins])
        batches = []
        for place in itertools.zip_longest(*plans, fillvalue=[]):
            packs = [self._packs(responses, chosen) for chosen in place]
            items = [components[i] for i in place[rank]]
            batches.append(self._batch(items, packs[rank], max(1, *map(len, packs))))
        return batches or [self._batch([], [], 1)]

    def _packs(self, responses: list[np.ndarray], chosen: list[int]) -> list[np.ndarray]:
        """The responses of the chosen components, in packs that have room for them."""
        if not chosen:
            return []
        together = np.concatenate([responses[i] for i in chosen])
        return [together[i] for i in first_fit(self._length[together].tolist(), self.micro_tokens)]

    def _batch(self, items: list[np.ndarray], packs: list[np.ndarray], num_packs: int) -> Batch:
        with_prompts = scores_prompts(self.cfg)
        none = np.empty(0, np.int64)
        responses, ours = (np.concatenate([none, *parts]) for parts in (packs, items))
        members = self.pool.responses(ours)
        by_number = np.argsort(responses)  # of the folder's: where each member stands in the batch
        num_tokens = [self.data.num_tokens[responses], self.data.num_prompt_tokens[responses] - 1]
        made = [pack(self.data, part, with_prompts) for part in packs]
        return Batch(
            packs=made + [filler(with_prompts)] * (num_packs - len(made)),
            responses=torch.from_numpy(responses),
            num_tokens=torch.from_numpy(np.stack(num_tokens[: 1 + with_prompts])),
            members=torch.from_numpy(by_number[np.searchsorted(responses, members, sorter=by_number)]),
            offsets=torch.from_numpy(np.cumsum([0, *self.pool.sizes(ours)])),
            weight=torch.from_numpy(self.pool.weight[ours]),
            scores=torch.from_numpy(self.data.scores[members]),
            num_inputs=int(self._length[responses].sum()),
        )

    def _component(self, component: int) -> np.ndarray:
        return self._items[self._offsets[component] : self._offsets[component + 1]]

    def _step_components(self, step: int) -> np.ndarray:
        epoch = int(np.searchsorted(self._first_step, step, side="right")) - 1
        if self._epoch[0] != epoch:
            self._epoch = (epoch, *self._cuts(epoch))
        _, order, cuts = self._epoch
        at = step - self._first_step[epoch]
        return order[cuts[at] : cuts[at + 1]]

    def _cuts(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's order of the components, and the offsets of its steps in it."""
        order = np.random.default_rng([self.cfg.seed, epoch]).permutation(len(self._offsets) - 1)
        return order, consecutive(np.diff(self._offsets)[order], self.cfg.batch_size)


def lr_at(step: int, num_steps: int, cfg: TrainConfig) -> float:
    """Learning rate of a step counted from 0: linear warm-up to the peak, then decay to min_lr * peak at num_steps."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    if cfg.lr_schedule == "constant":
        return cfg.lr
    done = (step - cfg.warmup_steps) / max(1, num_steps - cfg.warmup_steps)
    left = 1 - done if cfg.lr_schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return cfg.lr * (cfg.min_lr + (1 - cfg.min_lr) * left)
