"""The losses for other people's trainers: hidden states, head and targets in, loss out, never an (N, V) tensor.

From the inside out: `sequence_logp`, `preference_loss`, and two modules that are called as Liger's are and take pair
weights. All is plain autograd. Under DDP call the loss inside the forward of the module that DDP wraps, head included:
DDP reduces the gradients of a forward that it has seen.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from ddpo import losses
from ddpo.ops import linear_logp, linear_preference, sequence_sum
from ddpo.ops.chunked import opmath


def head_of(module, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """The matrix and bias that a head multiplies with now: (V, D), and (V,) or None.

    Args:
        module: nn.Linear, or what peft made of one: of `modules_to_save` the active copy, of an adapter that is off or
            merged the base layer. A (V, D) tensor comes back unchecked, and `.weight` of a LoRA layer is the base
            weight without the adapter: pass the module.
        bias: (V,), for a head without one of its own.
    Raises: ValueError for an adapter that is on, a layer of another kind, two biases.
    """
    if isinstance(module, Tensor):
        return module, bias
    if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
        active = [] if module.disable_adapters else module.active_adapters
        module = module.modules_to_save[active[0]] if active else module.original_module
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    if hasattr(module, "base_layer"):
        if bool(module.merged) == bool(module.disable_adapters):  # its forward would add the adapter, or take it out
            raise ValueError(
                f"head_of: the head must be a plain linear layer, got {kind}, whose adapter would be left out; take "
                "the head out of target_modules, put it in modules_to_save to train it whole, or merge the adapter"
            )
        module = module.base_layer
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        raise ValueError(f"head_of: the head must be nn.Linear or a (V, D) tensor, got {kind}")
    if bias is not None and module.bias is not None:
        raise ValueError("head_of: bias must be None for a head that has one, got a second; leave it out")
    return module.weight, bias if module.bias is None else module.bias


def sequence_logp(hidden: Tensor, head, targets: Tensor, segments: Tensor, *, bias=None, **options) -> Tensor:
    """Summed log-prob of each sequence: logp[s] = sum over its rows of linear_logp(hidden, head, targets).

    Args:
        hidden: (N, D), a sequence's rows side by side, valid rows only. targets: (N,) int64.
        head: (V, D) or a module, see `head_of`. bias: (V,) or None.
        segments: (S+1,) int64 row offsets of the sequences, from 0 to N; an empty sequence has log-prob 0.
        options: of `linear_logp` (scale, softcap, impl, drop_below).
    Returns: (S,) nats, float32 (float64 for float64). Its gradient is one coefficient per sequence on the rows.
    Raises: ValueError as `linear_logp`, `sequence_sum` and `head_of`.
    """
    head, bias = head_of(head, bias)
    return sequence_sum(linear_logp(hidden, head, targets, bias=bias, segments=segments, **options), segments)


def preference_loss(
    logp: Tensor, pairs: Tensor, weight: Tensor | None = None, *, loss: Callable, num_pairs=None, **options
) -> Tensor:
    """Weighted mean over pairs of any loss of sequence log-probs: sum_p weight[p] * loss(logp, ...)[p] / num_pairs.

    Args:
        logp: (S,) nats. pairs: (P, 2) int64 rows of logp: chosen, rejected.
        weight: (P,), or None: each 1, to the bit.
        loss: called as loss(logp, pairs=pairs, **options), gives (P,): `losses.dpo`, `losses.orpo` or your own.
        num_pairs: divisor; None: P. With the pairs of the whole optimiser step, those of weight 0 included, the losses
            of its micro-batches add up to the step's.
        options: of loss, such as ref_logp and beta.
    Returns: scalar; 0 for no pairs. Raises: ValueError for other shapes or dtypes. Source: arXiv 2503.17126.
    """
    _check("preference_loss: pairs", pairs, ("P", 2), torch.int64)
    values = loss(logp, pairs=pairs, **options)
    _check("preference_loss: the value of loss", values, (len(pairs),))
    if weight is not None:
        _check("preference_loss: weight", weight, (len(pairs),))
        values = weight.to(values.dtype) * values
    return values.sum() / (max(len(pairs), 1) if num_pairs is None else num_pairs)


class _FusedLinearPreference(nn.Module):
    """One pass through the head, a subclass's `_pair_loss`, the NLL, and the seven outputs of both losses."""

    def _find_rows(self, _input, target, rows, nll_target=None):
        """-> what reaches the head, sequence after sequence: where in (2B, S), ((N,), (N,)); targets (N,); segments
        (K+1,): the 2B responses; with an nll_target B of positions that it adds, then B of those that it leaves out."""
        name = self._get_name()
        _check(f"{name}: target", target, ("2B", "S"), torch.int64)
        _check(f"{name}: _input", _input, (*target.shape, "D"))
        if len(target) % 2 or len(target) == 0:
            raise ValueError(f"{name}: target must hold B chosen over B rejected sequences, got {len(target)} in all")
        labels, positions = target, torch.arange(target.numel(), device=target.device).view_as(target)
        if nll_target is not None:  # a position whose two targets are equal is one row
            _check(f"{name}: nll_target", nll_target, target.shape, torch.int64)
            chosen, likely, where = (x.chunk(2)[0] for x in (target, nll_target, positions))
            added, left_out = (x.where(chosen != likely, self.ignore_index) for x in (likely, chosen))
            labels, positions = torch.cat([target, added, left_out]), torch.cat([positions, where, where])
        (K, S), labels = labels.shape, labels.flatten()
        if rows is None:
            rows = (labels != self.ignore_index).nonzero().squeeze(1)  # the host sync
        else:
            _check(f"{name}: rows", rows, ("N",), torch.int64)
            if nll_target is not None:
                raise ValueError(f"{name}: rows must be None beside nll_target, which has rows of its own")
            on_cpu = rows.device.type == "cpu" and not torch.compiler.is_compiling()  # elsewhere it would be a sync
            if on_cpu and not torch.equal(rows, (labels != self.ignore_index).nonzero().squeeze(1)):
                raise ValueError(f"{name}: rows must be the flattened positions with a target, rising; got others")
        segments = torch.searchsorted(rows, S * torch.arange(K + 1, device=rows.device))
        where = positions.flatten()[rows]
        return (where // S, where % S), labels[rows], segments

    def _run(self, lin_weight, _input, bias, positions, targets, segments, weight, ref_logp=None):
        """-> loss, (chosen and rejected log-probs, their logits' means, NLL, chosen and rejected rewards)."""
        head, bias = head_of(lin_weight, bias)
        B, pairs, counts = len(_input) // 2, _pairs(_input), segments.diff()
        num_tokens = counts[: 2 * B].clamp(min=1) if self.average_log_prob else 1

        def of_nll(values):  # (K,), one a segment, to (B,): what the NLL counts
            return values[:B] + (values[2 * B : 3 * B] - values[3 * B :] if len(values) > 2 * B else 0)

        def ratio(logp):  # (2B,)
            return (logp[: 2 * B] if ref_logp is None else logp[: 2 * B] - ref_logp.to(logp.dtype)) / num_tokens

        def nll(logp):  # (B,)
            return losses.nll(of_nll(logp), None, pairs, of_nll(counts).sum().clamp(min=1).to(logp.dtype) / B)

        def pair_loss(logp, pairs):  # (B,)
            values = self._pair_loss(ratio(logp), pairs)
            return values + self.alpha * nll(logp) if self.compute_nll_loss else values

        hidden, terms = _input[positions], self._one_op(ref_logp, counts)
        if terms and len(segments) == 2 * B + 1 and not (weight is not None and weight.requires_grad):
            loss, logp, _ = linear_preference(hidden, head, targets, segments, pairs, weight, bias=bias, **terms)
        else:
            logp = sequence_logp(hidden, head, targets, segments, bias=bias)
            loss, logp = preference_loss(logp, pairs, weight, loss=pair_loss), logp.detach()
        scores, rewards = (logp[: 2 * B] / num_tokens).chunk(2), (self.beta * ratio(logp)).chunk(2)
        mean_nll = nll(logp).mean() if self.compute_nll_loss else logp.new_zeros(())
        return loss, (*scores, *_logits_means(_input, head, bias), mean_nll, *rewards)


# A pair's loss by its beta * log-ratios, c of the chosen, r of the rejected, d = c - r; e label_smoothing, t tau.
LOSS_TYPES: dict[str, Callable] = {
    "sigmoid": lambda c, r, d, *_: -logsigmoid(d),
    "hinge": lambda c, r, d, *_: torch.relu(1 - d),
    "exo_pair": lambda c, r, d, e, *_: torch.sigmoid(d) * (d - math.log(1 / e - 1)) + logsigmoid(-d) - math.log(e),
    "nca_pair": lambda c, r, d, *_: -logsigmoid(c) - (logsigmoid(-c) + logsigmoid(-r)) / 2,
    "robust": lambda c, r, d, e, *_: (e * logsigmoid(-d) - (1 - e) * logsigmoid(d)) / (1 - 2 * e),
    "bco_pair": lambda c, r, d, *_: -logsigmoid(c) - logsigmoid(-r),
    "sppo_hard": lambda c, r, d, e, t, beta: ((c - 0.5).square() + (r + 0.5).square()) / beta**2,
    "apo_zero": lambda c, r, d, *_: torch.sigmoid(-c) + torch.sigmoid(r),
    "apo_down": lambda c, r, d, *_: torch.sigmoid(c) + torch.sigmoid(-d),
    "discopop": lambda c, r, d, e, t, _: (logsigmoid(d / t) - d).exp() - torch.sigmoid(-d / t) * logsigmoid(d),
}


class FusedLinearDDPOLoss(_FusedLinearPreference):
    """DDPO (without weights DPO) from hidden states, called as Liger 0.8's LigerFusedLinearDPOLoss.

    loss = 1/B sum_p weight[p] * f(beta * (lp_c - ref_c), beta * (lp_r - ref_r)) + alpha * NLL,  f by loss_type
    NLL = -1/T sum_p weight[p] * lp_c, T the chosen tokens of the batch; only with compute_nll_loss

    Args:
        ignore_index: target of prompt and padding; such rows never reach the head.
        beta: strength of the pull to the reference, unitless. alpha: factor on the NLL.
        compiled, chunk_size: steer Liger's implementation; taken and not used.
        use_ref_model: False takes ref as 0. average_log_prob: lp and ref are means over tokens instead of sums.
        loss_type: a key of LOSS_TYPES; 'sigmoid' is DPO.
        label_smoothing: share of flipped pairs, for 'robust' and 'exo_pair'. discopop_tau: for 'discopop'.
    Raises: ValueError for an unknown loss_type or a label_smoothing it does not take. Source: arXiv 2503.17126.
    """

    def __init__(
        self, ignore_index=-100, beta=0.1, alpha=1.0, compute_nll_loss=False, compiled=True, use_ref_model=True,
        average_log_prob=False, chunk_size=1, loss_type="sigmoid", label_smoothing=0.0, discopop_tau=0.05,
    ):  # fmt: skip
        super().__init__()
        self.ignore_index, self.beta, self.alpha, self.compute_nll_loss = ignore_index, beta, alpha, compute_nll_loss
        self.use_ref_model, self.average_log_prob = use_ref_model, average_log_prob
        self.loss_type, self.label_smoothing, self.discopop_tau = loss_type, label_smoothing, discopop_tau
        self.compiled, self.chunk_size = compiled, chunk_size
        if loss_type not in LOSS_TYPES:
            raise ValueError(f"{self._get_name()}: loss_type must be one of {', '.join(LOSS_TYPES)}, got {loss_type!r}")
        e = label_smoothing
        if not {"robust": 0 <= e < 0.5, "exo_pair": 0 < e < 1}.get(loss_type, e == 0):
            wanted = "in [0, 0.5) for 'robust', in (0, 1) for 'exo_pair', 0 for other loss types"
            raise ValueError(f"{self._get_name()}: label_smoothing must be {wanted}; got {e} for {loss_type!r}")

    def forward(
        self, lin_weight, _input, target, bias=None, ref_input=None, ref_weight=None, ref_bias=None,
        *, weight=None, rows=None, ref_chosen_logps=None, ref_rejected_logps=None,
    ):  # fmt: skip
        """The loss of B pairs.

        Args:
            lin_weight: (V, D), or the head as a module; with peft always the module (see `head_of`).
            _input: (2B, S, D) hidden states, chosen over rejected. bias: (V,) or None.
            target: (2B, S) int64, already shifted: each position's next token, or ignore_index.
            ref_input, ref_weight, ref_bias: the same of the reference policy; no gradient flows there.
            weight: (B,) weights of the pairs, on both terms; None: each 1.
            rows: (N,) int64, the flattened positions (of 2B*S) with a target, rising. A collator knows them; finding
                them costs one host sync, and under torch.compile a graph break.
            ref_chosen_logps, ref_rejected_logps: (B,) nats summed over each response, instead of ref_input, ref_weight.
        Returns: loss, (chosen_logps (B,), rejected_logps (B,), chosen_logits_mean (), rejected_logits_mean (),
            nll_loss (), chosen_rewards (B,), rejected_rewards (B,)). The outputs carry no gradient and no weights; the
            logits' means are over all positions, ignored ones too. A response without targets has log-prob and mean 0.
        Raises: ValueError for other shapes or dtypes, and where no reference or two are given.
        """
        positions, targets, segments = self._find_rows(_input, target, rows)
        model, cached = (ref_input, ref_weight), (ref_chosen_logps, ref_rejected_logps)
        given = [sum(x is not None for x in two) for two in (model, cached)]
        if given not in ([[2, 0], [0, 2]] if self.use_ref_model else [[0, 0], [2, 0]]):
            raise ValueError(
                f"{self._get_name()}: the reference must be ref_input and ref_weight, or ref_chosen_logps and "
                f"ref_rejected_logps, or, with use_ref_model=False, left out; got {sum(given)} of the four"
            )
        ref_logp = None
        if cached[0] is not None:
            for x in cached:
                _check(f"{self._get_name()}: ref_chosen_logps and ref_rejected_logps", x, (len(target) // 2,))
            ref_logp = torch.cat(cached).detach()
        elif self.use_ref_model:
            _check(f"{self._get_name()}: ref_input", ref_input, (*target.shape, "D"))
            with torch.no_grad():
                ref_logp = sequence_logp(ref_input[positions], ref_weight, targets, segments, bias=ref_bias)
        return self._run(lin_weight, _input, bias, positions, targets, segments, weight, ref_logp)

    def _one_op(self, ref_logp, counts):
        """Arguments of linear_preference where it has this loss, else None."""
        plain = self.loss_type == "sigmoid" and not self.average_log_prob and not self.compute_nll_loss
        return {"loss": "ddpo", "beta": self.beta, "ref_logp": ref_logp} if plain else None

    def _pair_loss(self, ratio, pairs):
        c, r = ratio[pairs.T]
        margins = (self.beta * c, self.beta * r, self.beta * (c - r))
        return LOSS_TYPES[self.loss_type](*margins, self.label_smoothing, self.discopop_tau, self.beta)


class FusedLinearDORPOLoss(_FusedLinearPreference):
    """DORPO (without weights ORPO) from hidden states, called as Liger 0.8's LigerFusedLinearORPOLoss.

    loss = NLL - beta/B sum_p weight[p] * log sigmoid(log_odds[p])
    NLL = -1/T sum_p weight[p] * lp_c, T the chosen tokens of the batch; only with compute_nll_loss
    log_odds is `losses.log_odds`, of the mean log-probs per token, finite for log-probs near 0 too.

    Args: as FusedLinearDDPOLoss; beta is the factor on the odds ratio (the paper's lambda).
    Source: arXiv 2503.17126.
    """

    alpha, average_log_prob = 1.0, True

    def __init__(self, ignore_index=-100, beta=0.1, compute_nll_loss=True, compiled=True, chunk_size=1):
        super().__init__()
        self.ignore_index, self.beta, self.compute_nll_loss = ignore_index, beta, compute_nll_loss
        self.compiled, self.chunk_size = compiled, chunk_size

    def forward(self, lin_weight, _input, target, bias=None, nll_target=None, *, weight=None, rows=None):
        """The loss of B pairs.

        Args: lin_weight, _input, target, bias, weight, rows as FusedLinearDDPOLoss, and
            nll_target: (2B, S) int64, the NLL's targets where they are others (the prompt's tokens too, say); its
                chosen half is read. Not together with rows.
        Returns: loss, (the seven outputs of FusedLinearDDPOLoss, with the log-probs means over a response's tokens;
            log_odds_ratio (), the mean log sigmoid(log_odds); log_odds_chosen (), the mean log_odds). Raises: likewise.
        """
        found = self._find_rows(_input, target, rows, nll_target if self.compute_nll_loss else None)
        loss, outputs = self._run(lin_weight, _input, bias, *found, weight)
        log_odds = losses.log_odds(torch.cat(outputs[:2]), 1, _pairs(_input))
        return loss, (*outputs, logsigmoid(log_odds).mean(), log_odds.mean())

    def _one_op(self, _, counts):
        if not self.compute_nll_loss:
            return None
        B = len(counts) // 2
        return {"loss": "dorpo", "beta": self.beta, "tokens_per_pair": counts[:B].sum().clamp(min=1).double() / B}

    def _pair_loss(self, ratio, pairs):
        return -self.beta * logsigmoid(losses.log_odds(ratio, 1, pairs))


def _pairs(stacked: Tensor) -> Tensor:
    """(B, 2): chosen over rejected."""
    return torch.arange(len(stacked), device=stacked.device).view(2, -1).T


@torch.no_grad()
def _logits_means(_input, head, bias) -> Tensor:
    """Means of the logits over positions and vocabulary, (2,): chosen, rejected. mean(h) . mean(W) + mean(b)."""
    acc = opmath(head.dtype)
    hidden = torch.stack([half.mean((0, 1), dtype=acc) for half in _input.chunk(2)])  # (2, D)
    means = (hidden * head.mean(0, dtype=acc)).sum(1)  # not a matmul: autocast would round it
    return means if bias is None else means + bias.mean(dtype=acc)


def _check(name: str, value, shape, dtype: torch.dtype | None = None) -> None:
    """ValueError unless value has the shape (a word stands for any size) and the dtype (None: floating point)."""
    sizes = [n if isinstance(w, int) else w for n, w in zip(value.shape, shape, strict=False)]
    fits = len(value.shape) == len(shape) and sizes == list(shape)
    if not fits or (value.dtype != dtype if dtype else not value.is_floating_point()):
        wanted = f"{dtype or 'floating point'} ({', '.join(map(str, shape))})"
        raise ValueError(f"{name} must be {wanted}, got {value.dtype} {tuple(value.shape)}")
