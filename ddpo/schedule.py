"""What each optimiser step of a run sees: a pure function of the data, the settings and the step's number."""

import itertools
import math
from dataclasses import replace

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ddpo.config import TrainConfig
from ddpo.data.batches import Batch, consecutive, filler, first_fit, pack, share_out
from ddpo.data.prepared import Prepared
from ddpo.objective import Totals, weight_zero_is_zero

MOST_TOKENS = 4096  # of a pack, where the settings name no number


class Schedule:
    """Items are pairs, or responses under SFT. num_steps; totals(step); batches(step, rank, world).

    Pairs that share a response, directly or through others, are one component: they stay in one step and one process,
    so that each response passes the model once an epoch. A step takes components, in an order drawn anew each epoch,
    while they hold at most batch_size items; a larger component is a step of its own.
    """

    def __init__(self, data: Prepared, cfg: TrainConfig, least_tokens: int = MOST_TOKENS):
        """least_tokens: micro_tokens where the settings name none and every component fits into it. Raises ValueError
        where the folder has no item for the method."""
        self.data, self.cfg = data, cfg
        self.sft = cfg.method == "sft"
        # (items, 1) or (items, 2) responses
        self._members = np.arange(len(data.responses))[:, None] if self.sft else data.pairs
        if not len(self._members):
            raise ValueError(
                f"{data.folder} has no pairs for method {cfg.method!r}: scores equal or missing in every group? "
                "Prepare with another rule (--pairs all), or use --method sft"
            )
        skips = weight_zero_is_zero(cfg) and not cfg.forward_zero_weight
        self._forwarded = data.weight != 0 if skips else np.ones(len(self._members), bool)
        self._length = data.num_prompt_tokens + data.num_tokens - 1  # (R,) tokens that pass the model
        self._items, self._offsets, component = _components(self._members, len(data.responses))
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
        """One step of all items."""
        everything = max(1, len(data.pairs), len(data.responses))
        return cls(data, replace(cfg, batch_size=everything, epochs=1, max_steps=None), least_tokens)

    def epoch(self, step: int) -> float:
        """Epochs done when `step` steps are."""
        epoch = min(int(np.searchsorted(self._first_step, step, side="right")) - 1, self.cfg.epochs - 1)
        start, end = self._first_step[epoch : epoch + 2]
        return epoch + (step - start) / (end - start)

    def forwarded_responses(self) -> np.ndarray:
        """The responses that pass the model, sorted."""
        return np.unique(self._members[self._forwarded])

    def items(self, step: int) -> np.ndarray:
        """The step's items over all processes."""
        return np.concatenate([self._component(component) for component in self._step_components(step)])

    def describe(self, step: int) -> dict[str, list]:
        """Which groups and responses (rows of the prepared folder) the step holds, item by item."""
        members = self._members[self.items(step)]
        return {"groups": self.data.response_group[members[:, 0]].tolist(), "responses": members.tolist()}

    def totals(self, step: int) -> Totals:
        items = self.items(step)
        counted = self._members[items, 0]
        tokens = self.data.num_tokens[counted]
        if self.cfg.nll_tokens == "all" and not self.sft:
            tokens = tokens + self.data.num_prompt_tokens[counted] - 1  # the first token is not predicted
        mean_weight = 1.0 if self.sft else float(self.data.weight[items].mean())
        return Totals(0 if self.sft else len(items), int(tokens.sum()), mean_weight)

    def batches(self, step: int, rank: int = 0, world: int = 1) -> list[Batch]:
        """This process's share of the step; items that cannot matter are left out.

        Every process gets as many batches, and in each place as many packs, as the one that has most, at least one:
        what one lacks is filled up. So no process waits for another that has nothing to do.
        """
        components = [items[self._forwarded[items]] for items in map(self._component, self._step_components(step))]
        components = [items for items in components if len(items)]
        responses = [np.unique(self._members[items]) for items in components]
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
        with_prompts = self.cfg.method in ("orpo", "dorpo") and self.cfg.nll_tokens == "all"
        none = np.empty(0, np.int64)
        responses, items = (np.concatenate([none, *parts]) for parts in (packs, items))
        place = {r: s for s, r in enumerate(responses.tolist())}
        pairs = none if self.sft else [[place[c], place[r]] for c, r in self.data.pairs[items].tolist()]
        num_tokens = [self.data.num_tokens[responses], self.data.num_prompt_tokens[responses] - 1]
        made = [pack(self.data, part, with_prompts) for part in packs]
        return Batch(
            packs=made + [filler(with_prompts)] * (num_packs - len(made)),
            responses=torch.from_numpy(responses),
            num_tokens=torch.from_numpy(np.stack(num_tokens[: 1 + with_prompts])),
            pairs=torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2),
            weight=torch.from_numpy(none.astype(float) if self.sft else self.data.weight[items]),
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


def _components(members: np.ndarray, num_responses: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Items sorted by the connected component of their responses, the components' offsets among them, and each
    response's component."""
    edges = coo_array((np.ones(len(members), bool), (members[:, 0], members[:, -1])), shape=(num_responses,) * 2)
    _, component = connected_components(edges, directed=False)
    items = np.argsort(component[members[:, 0]], kind="stable")
    changes = np.flatnonzero(np.diff(component[members[items, 0]])) + 1
    return items, np.concatenate([[0], changes, [len(items)]]), component


def lr_at(step: int, num_steps: int, cfg: TrainConfig) -> float:
    """Learning rate of a step counted from 0: linear warm-up to the peak, then decay to min_lr * peak at num_steps."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    if cfg.lr_schedule == "constant":
        return cfg.lr
    done = (step - cfg.warmup_steps) / max(1, num_steps - cfg.warmup_steps)
    left = 1 - done if cfg.lr_schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return cfg.lr * (cfg.min_lr + (1 - cfg.min_lr) * left)
