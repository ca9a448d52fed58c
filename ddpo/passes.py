"""Through the policy: a batch forward and back; many responses without gradient."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from ddpo import distributed
from ddpo.data.batches import Batch, TokenSource, consecutive, filler, pack


def forward(policy: nn.Module, batch: Batch, last: bool) -> tuple[Tensor, Callable[[Tensor], None]]:
    """Log-probs of a batch, and what takes a loss of them back to the policy's parameters.

    A batch of one pack goes the usual way. Of several packs no two are held at once: their log-probs come first,
    without gradient; the loss then has a known coefficient for each of them, and each pack passes once more, forward
    and backward, with the random numbers (dropout) of its first pass.

    Args: last: no other batch follows in this step, so that processes sum their gradients after it.
    Returns: logp (k, S or more) nats, and backward(loss).
    """
    if len(batch.packs) == 1:
        distributed.sync_gradients(policy, last)
        return policy(batch.packs[0]), Tensor.backward

    parts, states = [], []
    with torch.no_grad():
        for packed in batch.packs:
            states.append(_random_state(packed.input_ids.device))
            parts.append(policy(packed))
    logp = torch.cat(parts, 1).requires_grad_()

    def backward(loss: Tensor) -> None:
        loss.backward()  # as far as logp
        assert logp.grad is not None
        coefficients = logp.grad.split([part.shape[1] for part in parts], 1)
        for i, (packed, state, coefficient) in enumerate(zip(batch.packs, states, coefficients, strict=True)):
            distributed.sync_gradients(policy, last and i == len(parts) - 1)
            with _random(state, packed.input_ids.device):
                (policy(packed) * coefficient).sum().backward()

    return logp, backward


def _random_state(device: torch.device) -> tuple[Tensor, ...]:
    return (torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else []))


@contextmanager
def _random(state: tuple[Tensor, ...], device: torch.device) -> Iterator[None]:
    """Inside, random numbers go on from the state; afterwards from where they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.set_rng_state(state[0])
        if device.type == "cuda":
            torch.cuda.set_rng_state(state[1], device)
        yield


def each_logp(
    policy: nn.Module, data: TokenSource, responses: np.ndarray, length: np.ndarray, max_tokens: int, device
) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Log-probs of many responses without gradient, pack by pack and by length, shared out over the processes.

    Args: responses (n,); length (R,) tokens of every response with its prompt; max_tokens of a pack.
    Yields: (responses, their summed log-probs in nats, float64, how many are done over all processes); equally often
    in every process, so some are empty.
    """
    rank, world = distributed.start()
    order = responses[np.argsort(length[responses], kind="stable")]
    packs = [order[a:b] for a, b in itertools.pairwise(consecutive(length[order], max_tokens))]
    for i in range(0, len(packs), world):
        mine = packs[i + rank] if i + rank < len(packs) else responses[:0]
        with torch.no_grad():
            logp = policy((pack(data, mine) if len(mine) else filler()).to(device))[0]
        yield mine, logp[: len(mine)].double().cpu().numpy(), sum(map(len, packs[: i + world]))
    distributed.reshard(policy)
