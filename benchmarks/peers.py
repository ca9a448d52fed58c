"""The sides of benchmarks/step.py: one training step of TRL's DPOTrainer, of the released algorithm, of this library,
and of the released algorithm with this library's ideas switched on one by one.

All start from the same weights and adapter, see the same token ids, clip to the same norm and step AdamW.
"""

import copy
import functools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ddpo import losses, train
from ddpo.config import TrainConfig
from ddpo.data.batches import pack
from ddpo.data.prepared import Prepared
from ddpo.loading import add_lora, load_model
from ddpo.model import Policy, pick_drop_below
from ddpo.ops import linear_logp, sequence_sum

BETA, MAX_NORM, MICRO_PAIRS = 0.1, 1.0, 2  # MICRO_PAIRS: of one forward pass of TRL and the release
CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class Work:
    """The pairs of one optimiser step."""

    number: int  # of the step in ours
    data: Prepared
    pairs: np.ndarray  # (P, 2) responses
    weight: np.ndarray  # (P,)

    def tokens(self, response: int) -> int:
        return int(self.data.num_prompt_tokens[response] + self.data.num_tokens[response])

    def parts(self, size: int = MICRO_PAIRS) -> list["Work"]:
        cuts = range(0, len(self.pairs), size)
        return [Work(self.number, self.data, self.pairs[a : a + size], self.weight[a : a + size]) for a in cuts]

    @property
    def num_tokens(self) -> int:
        """Prompt and response of both responses of every pair."""
        return sum(self.tokens(r) for r in self.pairs.ravel())


class Side:
    """params: name -> trained parameter, named alike on all sides; step(work) -> the step's loss."""

    def __init__(self, model):
        self.model = model
        self.params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = None

    def load(self, params: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, p in self.params.items():
                p.copy_(params[name])

    def gradient(self, work: Work) -> dict[str, Tensor]:
        """What the optimiser is given for this work (after clipping); parameters are as before afterwards."""
        before, found = {name: p.detach().clone() for name, p in self.params.items()}, {}

        def keep(*_):
            found.update({name: p.grad.clone() for name, p in self.params.items()})

        hook = self.optimizer.register_step_pre_hook(keep)
        self.step(work)
        hook.remove()
        self.load(before)
        return found

    def collate(self, work: Work) -> None:
        """Makes the tensors of a work, once: they are kept and not timed."""

    def finish(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.params.values(), MAX_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()


def adamw(params, lr: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(params, lr=lr, weight_decay=0.0, fused=True)


# --- ours: all that touches ddpo.train ----------------------------------------------------------------------


class Ours(Side):
    """ddpo.train's own setup and step."""

    def __init__(self, cfg: TrainConfig, run):
        self.state = train.setup(cfg, 0, 1, run)
        super().__init__(self.state.policy)
        self.params = {name.removeprefix("model."): p for name, p in self.state.params.items()}
        self.optimizer = self.state.optimizer

    def work(self, step: int) -> Work:
        schedule = self.state.schedule
        items = schedule.items(step)
        return Work(step, schedule.data, schedule.data.pairs[items], schedule.data.weight[items])

    def step(self, work: Work) -> float:
        self.state.step = work.number
        told = train.step(self.state)
        return dict(zip(told["names"], told["values"].read(), strict=False))["loss"]

    def first_epoch(self) -> "Ours":
        """The same policy, whose steps compute their reference log-probs too, as the first run over a folder does."""
        side = copy.copy(self)
        side.step = lambda work: (side._reference(work), self.step(work))[1]
        return side

    @torch.no_grad()
    def _reference(self, work: Work) -> None:
        state = self.state
        with state.policy.reference():
            for batch in state.schedule.batches(work.number):
                for packed in batch.packs:
                    state.policy(packed)

    @property
    def drop_below(self) -> float:
        return self.state.policy.drop_below

    @drop_below.setter
    def drop_below(self, value: float) -> None:
        self.state.policy.drop_below = value

    @property
    def ref_logp(self) -> Tensor:
        return self.state.ref_logp


# --- TRL --------------------------------------------------------------------------------------------------


class Trl(Side):
    """trl.DPOTrainer as installed, in float32 and without gradient checkpointing, plus a weight a pair."""

    def __init__(self, model_folder: str, tokenizer, cfg: TrainConfig, out: str):
        from datasets import Dataset, disable_progress_bars
        from peft import LoraConfig
        from trl import DPOConfig, DPOTrainer

        class Weighted(DPOTrainer):
            def _compute_loss(self, model, inputs, return_outputs):
                weight, plain = inputs.pop("weight"), F.logsigmoid  # the loss of a pair is -logsigmoid(...)
                del inputs["responses"], inputs["pairs"]
                with patch.object(F, "logsigmoid", lambda x: weight * plain(x)):
                    return super()._compute_loss(model, inputs, return_outputs)

        disable_progress_bars()
        fair = {"bf16": False, "gradient_checkpointing": False}
        settings = {"beta": BETA, "learning_rate": cfg.lr, "max_grad_norm": MAX_NORM, "seed": cfg.seed}
        quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}
        lora = LoraConfig(
            r=cfg.lora_r, lora_alpha=cfg.lora_alpha, target_modules=list(cfg.lora_targets), task_type="CAUSAL_LM"
        )
        self.trainer = Weighted(
            model=load_model(model_folder, None, "float32", CPU),
            args=DPOConfig(out, use_cpu=True, max_length=None, **settings, **fair, **quiet),
            train_dataset=Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}]),  # it insists on one
            processing_class=tokenizer,
            peft_config=lora,
        )
        super().__init__(self.trainer.model)
        self.trainer.create_optimizer()
        self.wrapped, self.prepared = self.trainer.accelerator.prepare(self.trainer.model, self.trainer.optimizer)
        self.optimizer = getattr(self.prepared, "optimizer", self.prepared)
        self.batches = {}

    def collated(self, work: Work) -> list[dict]:
        """TRL's own collation of the work, two pairs at a time; made once, not timed."""
        key = (id(work.data), work.number, work.pairs.tobytes())
        if key not in self.batches:
            parts = work.parts()
            self.batches[key] = [collate(self.trainer.data_collator, part) for part in parts]
            for batch, part in zip(self.batches[key], parts, strict=True):  # a mean of unequal batches is the mean
                batch["weight"] *= len(part.pairs) * len(parts) / len(work.pairs)
        return [dict(batch) for batch in self.batches[key]]

    collate = collated

    def step(self, work: Work) -> float:
        batches = self.collated(work)
        self.trainer.current_gradient_accumulation_steps = len(batches)
        loss = sum(self.trainer.training_step(self.wrapped, batch) for batch in batches)
        self.trainer._clip_grad_norm(self.wrapped)
        self.prepared.step()
        self.wrapped.zero_grad()
        return float(loss)


def collate(collator, work: Work) -> dict[str, Tensor]:
    ids = work.data.response_ids
    examples = [
        {
            "prompt_ids": work.data.prompt_ids(c).tolist(),
            "chosen_ids": ids(c).tolist(),
            "rejected_ids": ids(r).tolist(),
        }
        for c, r in work.pairs
    ]
    order = work.pairs.T.reshape(-1)  # chosen, then rejected
    return {**collator(examples), **_terms(work, order, np.arange(len(order)).reshape(2, -1).T)}


def collate_unique(work: Work) -> dict[str, Tensor]:
    """Every response of the work once, padded on the right."""
    responses = np.unique(work.pairs)
    parts = [(work.data.prompt_ids(r), work.data.response_ids(r)) for r in responses]
    length = max(len(prompt) + len(response) for prompt, response in parts)
    batch = {name: torch.zeros(len(parts), length, dtype=torch.int64) for name in ("input_ids", "attention_mask")}
    batch["completion_mask"] = torch.zeros(len(parts), length, dtype=torch.int64)
    for row, (prompt, response) in enumerate(parts):
        ids = np.concatenate([prompt, response])
        batch["input_ids"][row, : len(ids)] = torch.from_numpy(ids)
        batch["attention_mask"][row, : len(ids)] = 1
        batch["completion_mask"][row, len(prompt) : len(ids)] = 1
    return {**batch, **_terms(work, responses, np.searchsorted(responses, work.pairs))}


def _terms(work: Work, responses: np.ndarray, pairs: np.ndarray) -> dict[str, Tensor]:
    weight = torch.tensor(work.weight, dtype=torch.float32)
    return {"weight": weight, "responses": torch.tensor(responses), "pairs": torch.tensor(pairs)}


# --- the released algorithm -------------------------------------------------------------------------------


class Released(Side):
    """DiversityTuning's step restated: chosen and rejected padded to one batch, all logits, log_softmax and gather,
    the reference policy's forward at every step, each pair's loss times its weight. Without its metrics.

    `alone` gives the same policy and optimiser with one thing switched on.
    """

    fused = False  # linear_logp, exact, of the responses' rows
    ref_logp: Tensor | None = None  # (R,) cached
    unique = False  # a response passes once, however many pairs use it

    def __init__(self, cfg: TrainConfig, collated):
        model = load_model(cfg.model, cfg.adapter, "float32", CPU)
        super().__init__(add_lora(model, cfg.lora_r, cfg.lora_alpha, 0.0, cfg.lora_targets, cfg.seed))
        self.model.train()
        self.optimizer = adamw(self.params.values(), cfg.lr)
        self.collated = collated

    def alone(self, **switch) -> "Released":
        side = copy.copy(self)
        vars(side).update(switch)
        if side.unique:
            side.collated = functools.cache(lambda work: [collate_unique(work)])
        return side

    def logp(self, batch: dict[str, Tensor]) -> Tensor:
        """(S,)"""
        ids, mask = batch["input_ids"], batch["completion_mask"][:, 1:]
        inputs = {"input_ids": ids, "attention_mask": batch["attention_mask"], "use_cache": False}
        if self.fused:
            causal, scored = self.model.get_base_model(), mask.bool()
            rows = causal.get_decoder()(**inputs).last_hidden_state[:, :-1][scored]  # (N, D)
            segments = F.pad(mask.sum(1).cumsum(0), (1, 0))
            return sequence_sum(linear_logp(rows, causal.get_output_embeddings().weight, ids[:, 1:][scored]), segments)
        logp = self.model(**inputs).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        return (logp * mask).sum(1)

    def collate(self, work: Work) -> None:
        self.collated(work)

    def step(self, work: Work) -> float:
        loss = self.backward(self.collated(work))
        self.finish()
        return loss

    def backward(self, batches: list[dict[str, Tensor]]) -> float:
        total = 0.0
        for batch in batches:
            if self.ref_logp is not None:
                ref_logp = self.ref_logp[batch["responses"]].float()
            else:
                with torch.no_grad(), self.model.disable_adapter():
                    ref_logp = self.logp(batch)
            chosen, rejected = (self.logp(batch) - ref_logp)[batch["pairs"]].unbind(1)
            loss = (batch["weight"] * -F.logsigmoid(BETA * (chosen - rejected))).mean() / len(batches)
            loss.backward()
            total += float(loss.detach())
        return total

    def truth(self, work: Work) -> dict[str, Tensor]:
        """The gradient in float64, clipped as in a step, a pair at a time for memory."""
        double = copy.copy(self)
        double.model = copy.deepcopy(self.model).double()
        double.params = {name: p for name, p in double.model.named_parameters() if p.requires_grad}
        double.model.zero_grad()
        for part in work.parts(1):
            (batch,) = self.collated(part)
            double.backward([{**batch, "weight": batch["weight"].double()}])
        for p in double.params.values():
            p.grad /= len(work.pairs)
        torch.nn.utils.clip_grad_norm_(double.params.values(), MAX_NORM)
        return {name: p.grad for name, p in double.params.items()}


class Row(NamedTuple):
    """What is switched on beside no padding, one on top of the other."""

    head: str = "logits"  # 'logits' of all positions | 'exact' linear_logp of the responses' | 'drop_below'
    cached: bool = False  # the reference's log-probs
    unique: bool = False  # a response passes once, however many pairs use it


class Packed(Side):
    """The released algorithm on this library's packed policy; the rows share one policy and optimiser."""

    @property
    def unique(self) -> bool:
        return self.row.unique

    def __init__(self, cfg: TrainConfig, ours: Ours):
        model = load_model(cfg.model, cfg.adapter, "float32", CPU)
        self.policy = Policy(add_lora(model, cfg.lora_r, cfg.lora_alpha, 0.0, cfg.lora_targets, cfg.seed))
        super().__init__(self.policy.model)
        self.policy.train()
        self.optimizer = adamw(self.params.values(), cfg.lr)
        self.ours, self.row, self.batches = ours, Row(), {}

    def with_row(self, row: Row) -> "Packed":
        """The same policy and optimiser under other switches."""
        side = copy.copy(self)
        side.row, side.batches = row, {}
        return side

    def packed(self, work: Work) -> list:
        """Packed batches, their pairs, weights, and responses (rows of the reference's cache); made once, not timed."""
        key = (id(work.data), work.number, work.pairs.tobytes())
        if key not in self.batches:
            self.batches[key] = [self._pack(part) for part in ([work] if self.row.unique else work.parts())]
        return self.batches[key]

    collate = packed

    def _pack(self, work: Work):
        responses = np.unique(work.pairs) if self.row.unique else work.pairs.ravel()
        place = {r: i for i, r in enumerate(responses)}
        pairs = np.array([[place[r] for r in pair] for pair in work.pairs])
        pairs = pairs if self.row.unique else np.arange(work.pairs.size).reshape(-1, 2)
        source = SimpleNamespace(
            prompt_ids=lambda i: work.data.prompt_ids(responses[i]),
            response_ids=lambda i: work.data.response_ids(responses[i]),
        )
        weight = torch.tensor(work.weight, dtype=torch.float32)
        return pack(source, np.arange(len(responses))), torch.from_numpy(pairs), weight, torch.from_numpy(responses)

    def logp(self, batch) -> Tensor:
        if self.row.head != "logits":
            default = pick_drop_below(None, CPU, torch.float32)
            self.policy.drop_below = default if self.row.head == "drop_below" else 0.0
            return self.policy(batch).reshape(-1)  # (S,)
        logits = self.policy.causal.get_output_embeddings()(self.policy.hidden(batch))  # (T, V)
        return sequence_sum(logits.log_softmax(-1)[batch.rows].gather(1, batch.targets[:, None])[:, 0], batch.segments)

    def step(self, work: Work) -> float:
        total = 0.0
        for batch, pairs, weight, responses in self.packed(work):
            if self.row.cached:
                ref_logp = self.ours.ref_logp[responses].float()
            else:
                with torch.no_grad(), self.policy.reference():
                    ref_logp = self.logp(batch)
            values = losses.ddpo(self.logp(batch), ref_logp, pairs, weight, beta=BETA)
            loss = values.sum() / len(work.pairs)
            loss.backward()
            total += float(loss.detach())
        self.finish()
        return total
