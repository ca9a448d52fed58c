"""TRL's trainers with a weight a pair: `DDPOTrainer` and `DORPOTrainer`.

Swap the import; the data set needs a column `weight` (`ddpo weigh`, `weigh_dataset`). All else, metrics included, is
TRL's. Where the head is frozen (LoRA), log-probs come from `linear_logp`.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor
from trl import DPOConfig, DPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.utils import FusedCausalLMOutput

from ddpo.fused import LOSS_TYPES, FusedLinearDORPOLoss
from ddpo.integrations.head import add_inside, logit_metrics, takes_head, token_logp
from ddpo.integrations.weights import WeightedCollator, check_weights


class Scored:
    """A model called as TRL calls it, for per-token log-probs; `outputs` keeps what the last call gave."""

    def __init__(self, model, metrics: bool):
        self._model, self._metrics, self.outputs = model, metrics, None

    def __call__(self, *args, labels=None, fused_lm_head=False, **kwargs):
        model = getattr(self._model, "module", self._model)  # what DDP wraps
        if fused_lm_head and takes_head(model.get_output_embeddings()) and not kwargs.get("output_router_logits"):
            add_inside(model)
            kwargs["inside"] = partial(self._score, labels=labels)
        elif fused_lm_head:
            kwargs.update(labels=labels, fused_lm_head=True)
        self.outputs = self._model(*args, **kwargs)
        return self.outputs

    def _score(self, hidden: Tensor, head, options: dict, labels: Tensor) -> FusedCausalLMOutput:
        hidden, targets = hidden[:, -labels.size(1) : -1], labels[:, 1:]  # prompt learning puts virtual tokens before
        more = logit_metrics(hidden, head, targets, **options) if self._metrics else {}
        return FusedCausalLMOutput(log_probs=token_logp(hidden, head, targets, **options), **more)


class DDPOTrainer(DPOTrainer):
    """DDPO in TRL's DPOTrainer: each pair's loss times its `weight`; without weights (an evaluation set, say) DPO.

    loss = 1/B sum_p weight[p] * f(beta * log-ratios of p),  f by args.loss_type (a key of ddpo.fused.LOSS_TYPES)
    Raises: ValueError for a train_dataset without weights and for settings whose loss is not a pair's own.
    Source: arXiv 2503.17126.
    """

    args: DPOConfig

    def __init__(self, *args, **kwargs):
        check_weights("DDPOTrainer", kwargs.get("train_dataset"))  # before TRL tokenises
        super().__init__(*args, **kwargs)
        check_weights("DDPOTrainer", self.train_dataset)
        given = {"f_divergence_type": "reverse_kl", "ld_alpha": None, "use_weighting": False}
        for name, wanted in given.items():
            if getattr(self, name) != wanted:
                raise ValueError(f"DDPOTrainer: {name} must be {wanted!r}, got {getattr(self, name)!r}")
        if unknown := [name for name in self.loss_types if name not in LOSS_TYPES]:
            raise ValueError(f"DDPOTrainer: loss_type must be one of {', '.join(LOSS_TYPES)}; got {unknown}")
        self.data_collator = WeightedCollator(self.data_collator)
        add_inside(self.model)  # before accelerate wraps its forward

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, "weight"]))

    def compute_ref_log_probs(self, model, inputs):
        inputs = {name: value for name, value in inputs.items() if name != "weight"}
        return super().compute_ref_log_probs(Scored(model, metrics=False), inputs)

    def _compute_loss(self, model, inputs, return_outputs):
        inputs = dict(inputs)
        weight = inputs.pop("weight", None)
        if weight is None:
            return super()._compute_loss(model, inputs, return_outputs)
        if not self.precompute_ref_logps:
            ref = self.compute_ref_log_probs(self.model if self.ref_model is None else self.ref_model, inputs)
            inputs |= {"ref_chosen_logps": ref[0], "ref_rejected_logps": ref[1]}
        policy, before = Scored(model, metrics=True), self.precompute_ref_logps
        self.precompute_ref_logps = True
        try:  # for TRL's metrics; its loss has no weights
            found = super()._compute_loss(policy, inputs, return_outputs)
        finally:
            self.precompute_ref_logps = before
        self._metrics["train" if self.model.training else "eval"]["weight"].append(
            self.accelerator.gather(weight).mean().item()
        )
        loss = self._weighted(policy.outputs, inputs, weight)
        return (loss, found[1]) if return_outputs else loss

    def _weighted(self, outputs, inputs: Mapping, weight: Tensor) -> Tensor:
        width = inputs["completion_mask"].size(1) - 1  # prompt learning puts virtual tokens before
        logp = outputs.log_probs[:, -width:].sum(1)  # (2B,)
        c, r = (
            self.beta * x
            for x in (logp - torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])).chunk(2)
        )
        options = self.label_smoothing, self.args.discopop_tau, self.beta
        factors = zip(self.loss_types, self.loss_weights, strict=True)
        values = sum(factor * LOSS_TYPES[name](c, r, c - r, *options) for name, factor in factors)  # (B,)
        aux = self.router_aux_loss_coef * outputs.aux_loss if self.aux_loss_enabled else 0
        return (weight * values).mean() + aux


class DORPOTrainer(ORPOTrainer):
    """DORPO in TRL's ORPOTrainer: both terms of a pair times its `weight`, by FusedLinearDORPOLoss.

    Raises: ValueError for a train_dataset without weights, encoder-decoder models and a router's loss.
    Source: arXiv 2503.17126.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        check_weights("DORPOTrainer", self.train_dataset)
        if self.is_encoder_decoder or self.aux_loss_enabled:
            raise ValueError("DORPOTrainer: the model must be a decoder without a router's loss (output_router_logits)")
        self.data_collator = WeightedCollator(self.data_collator)
        add_inside(self.model)

    def get_batch_loss_metrics(self, model, batch, train_eval="train"):
        batch = dict(batch)
        weight = batch.pop("weight", None)
        x = self.concatenated_inputs(batch, padding_value=self.padding_value, device=self.accelerator.device)
        ids, attention = x["concatenated_input_ids"], x["concatenated_attention_mask"]
        labels, every = x["concatenated_labels"][:, 1:], ids.masked_fill(attention == 0, -100)[:, 1:]
        weight = None if weight is None else weight.to(ids.device)

        def inside(hidden, head, options):
            if options != {"scale": 1.0, "softcap": None}:
                raise ValueError(f"DORPOTrainer: the model's logits are scaled or capped ({options}); not supported")
            return FusedLinearDORPOLoss(beta=self.beta)(head, hidden[:, :-1], labels, nll_target=every, weight=weight)

        loss, found = model(ids, attention_mask=attention, inside=inside)
        names = "logps/chosen logps/rejected logits/chosen logits/rejected nll_loss rewards/chosen rewards/rejected"
        metrics = dict(zip([*names.split(), "log_odds_ratio", "log_odds_chosen"], found, strict=True))
        chosen, rejected = metrics["rewards/chosen"], metrics["rewards/rejected"]
        metrics |= {"rewards/accuracies": (chosen > rejected).float(), "rewards/margins": chosen - rejected}
        gathered = {name: self.accelerator.gather_for_metrics(value.detach()) for name, value in metrics.items()}
        prefix = "eval_" if train_eval == "eval" else ""
        return loss, {prefix + name: value.mean().item() for name, value in gathered.items()}
