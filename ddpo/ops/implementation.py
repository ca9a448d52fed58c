"""What linear_logp and its implementations agree on."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

Wants = tuple[bool, bool, bool]  # whether the gradients of hidden, head and bias are wanted
Kept = list[Tensor]  # of a forward, for its backward


def as_wants(given: Sequence[bool]) -> Wants:
    """Of the list that a custom op takes."""
    of_hidden, of_head, of_bias = given
    return of_hidden, of_head, of_bias


class Call(NamedTuple):
    """The checked arguments of one call."""

    hidden: Tensor
    head: Tensor
    targets: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None
    segments: Tensor | None
    drop_below: float


class Implementation(Protocol):
    """A module, or an object, with these three."""

    def fake(self, call: Call, wants: Wants, /) -> tuple[Tensor, Kept]:
        """What forward gives, unwritten."""

    def forward(self, call: Call, wants: Wants, /) -> tuple[Tensor, Kept]:
        """-> logp (N,), and what backward needs."""

    def backward(self, call: Call, saved: Kept, upstream: Tensor, wants: Wants, /) -> Sequence[Tensor | None]:
        """-> the gradients of hidden, head and bias, None where not wanted. upstream: (N,)."""
