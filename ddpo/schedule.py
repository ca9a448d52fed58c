"""What each optimiser step of a run sees: a pure function of the data, the settings and the step's number."""

import math

import numpy as np

from ddpo.config import TrainConfig
from ddpo.data.batches import Batch, epoch_order, pack, split_by_tokens
from ddpo.data.prepared import Prepared
from ddpo.objective import Totals, weight_zero_is_zero


class Schedule:
    """Items are pairs, or responses under SFT. num_steps; totals(step); batches(step, rank, world)."""

    def __init__(self, data: Prepared, cfg: TrainConfig):
        """Raises ValueError where the folder has no item for the method."""
        self.data, self.cfg = data, cfg
        self.sft = cfg.method == "sft"
        self.item_group = data.response_group if self.sft else data.pair_group
        if not len(self.item_group):
            raise ValueError(
                f"{data.folder} has no pairs for method {cfg.method!r}: scores equal or missing in every group? "
                "Prepare with another rule (--pairs all), or use --method sft"
            )
        self.steps_per_epoch = -(-len(self.item_group) // cfg.batch_size)
        self.num_steps = self.steps_per_epoch * cfg.epochs
        if cfg.max_steps is not None:
            self.num_steps = min(self.num_steps, cfg.max_steps)
        skips = weight_zero_is_zero(cfg) and not cfg.forward_zero_weight
        self._forwarded = data.weight != 0 if skips else np.ones(len(self.item_group), bool)
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def forwarded_responses(self) -> np.ndarray:
        """The responses that pass the model, sorted."""
        return np.arange(len(self.item_group)) if self.sft else np.unique(self.data.pairs[self._forwarded])

    def items(self, step: int) -> np.ndarray:
        """The step's items over all processes."""
        epoch, at = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, epoch_order(self.item_group, self.cfg.seed, epoch))
        return self._order[1][at * self.cfg.batch_size : (at + 1) * self.cfg.batch_size]

    def totals(self, step: int) -> Totals:
        items = self.items(step)
        counted = items if self.sft else self.data.pairs[items, 0]
        tokens = self.data.num_tokens[counted]
        if self.cfg.nll_tokens == "all" and not self.sft:
            tokens = tokens + self.data.num_prompt_tokens[counted] - 1  # the first token is not predicted
        return Totals(0 if self.sft else len(items), int(tokens.sum()))

    def batches(self, step: int, rank: int = 0, world: int = 1) -> list[Batch]:
        """This process's share of the step as packed micro-batches; pairs that cannot matter are left out."""
        items = self.items(step)
        items = np.array_split(items[self._forwarded[items]], world)[rank]
        members = items[:, None] if self.sft else self.data.pairs[items]  # (n, 1) or (n, 2) responses
        length = self.data.num_prompt_tokens + self.data.num_tokens - 1
        return [self._pack(items[i], members[i]) for i in split_by_tokens(list(members), length, self.cfg.micro_tokens)]

    def _pack(self, items, members):
        responses = np.array(list(dict.fromkeys(members.ravel().tolist())))  # unique, in order
        if self.sft:
            return pack(self.data, responses)
        with_prompts = self.cfg.method in ("orpo", "dorpo") and self.cfg.nll_tokens == "all"
        return pack(self.data, responses, members, self.data.weight[items], with_prompts)


def lr_at(step: int, num_steps: int, cfg: TrainConfig) -> float:
    """Learning rate of a step counted from 0: linear warm-up to the peak, then decay to min_lr * peak at num_steps."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    if cfg.lr_schedule == "constant":
        return cfg.lr
    done = (step - cfg.warmup_steps) / max(1, num_steps - cfg.warmup_steps)
    left = 1 - done if cfg.lr_schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return cfg.lr * (cfg.min_lr + (1 - cfg.min_lr) * left)
