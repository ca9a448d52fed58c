"""float64: what the sides of a benchmark are held to, and what other arithmetic would cost, computed and not timed."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.states import Case
from ddpo import reference

CHUNK = 128  # rows
TILE, TILE_EPS = 128, 2.0**-12  # cut_cross_entropy's filter: bfloat16's eps / 32


class Truth(NamedTuple):
    logp: Tensor  # (S,) of the sequences
    c: Tensor  # (N,) d loss / d logp of each row
    hidden: Tensor  # (N, D) gradient
    head: Tensor  # (V, D) gradient


def truth(case: Case, loss: Callable[[Tensor], Tensor]) -> Truth:
    """By autograd through ddpo.reference in float64, some rows at a time; loss takes the sequence log-probs (S,)."""
    hidden, head = (x.double().requires_grad_() for x in (case.hidden, case.head))
    chunks = [slice(a, a + CHUNK) for a in range(0, len(hidden), CHUNK)]
    with torch.no_grad():
        rows = torch.cat([reference.linear_logp(hidden[i], head, case.targets[i]) for i in chunks])
    logp = torch.stack([part.sum() for part in rows.split(case.segments.diff().tolist())]).requires_grad_()
    (of_sequence,) = torch.autograd.grad(loss(logp), logp)
    c = of_sequence.repeat_interleave(case.segments.diff())
    for i in chunks:
        (reference.linear_logp(hidden[i], head, case.targets[i]) * c[i]).sum().backward()
    return Truth(logp.detach(), c, hidden.grad, head.grad)


def errors(true: Truth, logp: Tensor, hidden: Tensor | None, head: Tensor | None) -> dict[str, float]:
    """logp: nats, the largest of a sequence. hidden, head: of the gradients, relative, by the Frobenius norm.

    The largest error of a row of hidden's gradient: worst_row over that row's own norm (a token that the model is sure
    of has a gradient near 0, and any error of it is large), row over the root mean square of the rows'.
    """
    found = {"logp": float((logp.double() - true.logp).abs().max())}
    if hidden is not None:
        found["hidden"] = relative(hidden, true.hidden)
        wrong, norm = (hidden.double() - true.hidden).norm(dim=1), true.hidden.norm(dim=1)
        found["worst_row"], found["row"] = float((wrong / norm).max()), float(wrong.max() / norm.square().mean().sqrt())
    if head is not None:
        found["head"] = relative(head, true.head)
    return found


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b).norm() / b.norm())


def other_arithmetic(case: Case, true: Truth) -> dict[str, float]:
    """Errors of hidden's gradient, each with the true coefficients: the rows' error alone.

    bf16: hidden, head and probabilities rounded to bfloat16, every sum in float32.
    tiles: 128 x 128 tiles (rows x ids, ids ordered by mean logit) left out where every |softmax - onehot| is under
        2^-12; tiles_skipped is their share. Also entropy, nats, the mean of the rows' softmax.
    """
    hidden, head = case.hidden.float(), case.head.float()
    hidden16, head16 = (x.bfloat16().float() for x in (hidden, head))
    order = (hidden.mean(0) @ head.T).argsort()
    place = order.argsort()
    grads, skipped, entropy = {"bf16": [], "tiles": []}, [], []
    for a in range(0, len(hidden), TILE):
        i = slice(a, a + TILE)
        c = true.c[i, None].float()
        dz = _slopes(torch.softmax(hidden16[i] @ head16.T, 1), case.targets[i])
        grads["bf16"].append(c * (dz.bfloat16().float() @ head16))
        z = hidden[i] @ head.T
        p = torch.softmax(z, 1)
        entropy.append(z.logsumexp(1) - (p * z).sum(1))
        dz = _slopes(p, case.targets[i])
        tops = F.pad(dz.abs().amax(0)[order], (0, -len(head) % TILE)).view(-1, TILE).amax(1)  # of each tile
        skipped.append(tops < TILE_EPS)
        dz[:, skipped[-1].repeat_interleave(TILE)[place]] = 0
        grads["tiles"].append(c * (dz @ head))
    found = {name: relative(torch.cat(rows), true.hidden) for name, rows in grads.items()}
    share, nats = (float(torch.cat(x).float().mean()) for x in (skipped, entropy))
    return {**found, "tiles_skipped": share, "entropy": nats}


def _slopes(p: Tensor, targets: Tensor) -> Tensor:
    """onehot - p, in place."""
    return p.neg_().scatter_add_(1, targets[:, None], torch.ones_like(p[:, :1]))
