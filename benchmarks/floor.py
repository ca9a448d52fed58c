"""The GEMM floor of a training step: the time of the matrix products that its algorithm needs, each at the rate of
torch.mm into memory that is kept.

Counted: the body's linear layers forward, and backward for their inputs' gradients (the weights are frozen; the first
layer's q, k and v have no input to give one to); the adapter's four products forward and backward on q_proj and
v_proj; the head's products; QK^T and PV of attention, causal halves, 2 forward and 5 backward. Not counted: whatever
is no matrix product (softmax, norms, activations, rotary, the optimiser), and what drop_below puts in the place of the
second head product.
"""

import statistics
import time
from typing import NamedTuple

import torch

from benchmarks.peers import Work


class Product(NamedTuple):
    """(m, k) times (k, n), `count` times; the causal half of one counts a half."""

    kind: str
    m: int
    k: int
    n: int
    count: float

    @property
    def flop(self) -> float:
        return 2.0 * self.m * self.k * self.n * self.count


def body(config, rows: int, lora_r: int, backward: bool) -> list[Product]:
    """One pass of all layers over some rows; lora_r 0: the reference, adapter off."""
    D, L, inner = config.hidden_size, config.num_hidden_layers, config.intermediate_size
    q, kv = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    widths = {"q": (D, q), "k": (D, kv), "v": (D, kv), "o": (q, D), "gate": (D, inner), "up": (D, inner)}
    widths["down"] = (inner, D)
    found = []
    for name, (i, o) in widths.items():
        first = L - 1 if name in "qkv" else L
        found.append(Product(f"linear {i} to {o}", rows, i, o, L))
        if backward:
            found.append(Product(f"linear {o} to {i}", rows, o, i, first))
        if lora_r and name in "qv":
            found += [Product(f"lora {i} to r", rows, i, lora_r, L), Product(f"lora r to {o}", rows, lora_r, o, L)]
            if backward:
                found += [
                    Product(f"lora {o} to r", rows, o, lora_r, L),
                    Product(f"lora r to {i}", rows, lora_r, i, first),
                    Product(f"lora gradient {i}", lora_r, rows, i, L),
                    Product(f"lora gradient {o}", lora_r, rows, o, L),
                ]
    return found


def attention(config, lengths: list[int], backward: bool) -> list[Product]:
    count = config.num_hidden_layers * config.num_attention_heads / 2
    found = []
    for n in lengths:
        found.append(Product("attention QK", n, config.head_dim, n, count * (3 if backward else 1)))  # QK, again, dP
        found.append(Product("attention PV", n, n, config.head_dim, count * (4 if backward else 1)))  # PV, dV, dQ, dK
    return found


def head(config, rows: int, logits: int, gradients: int) -> list[Product]:
    """logits: products that make them; gradients: those that make the rows' gradient."""
    D, V = config.hidden_size, config.vocab_size
    return [Product("head logits", rows, D, V, logits), Product("head gradient", rows, V, D, gradients)]


def of_row(config, work: Work, lora_r: int, traits: "Traits") -> list[Product]:
    """All products of one optimiser step of a side."""
    found = []
    for part in [work] if traits.unique else work.parts():
        if traits.skips_zeros:
            part = Work(part.number, part.data, part.pairs[part.weight != 0], part.weight[part.weight != 0])
        responses = set(part.pairs.ravel()) if traits.unique else part.pairs.ravel()
        lengths = [part.tokens(r) for r in responses]
        scored = sum(int(part.data.num_tokens[r]) for r in responses)
        if not lengths:
            continue
        if traits.padded:
            lengths = [max(lengths)] * len(lengths)
        else:
            lengths = [n - 1 for n in lengths]  # the last token is predicted, never read
        rows = sum(lengths)
        head_rows = scored if traits.scored_only else rows
        found += body(config, rows, lora_r, True) + attention(config, lengths, True)
        found += head(config, head_rows, traits.logits, traits.gradients)
        if traits.reference:
            found += body(config, rows, 0, False) + attention(config, lengths, False) + head(config, head_rows, 1, 0)
    return found


class Traits(NamedTuple):
    """What a side's algorithm multiplies."""

    padded: bool = False
    scored_only: bool = True  # the head sees the responses' rows alone
    logits: int = 1  # products with the head forward and backward together
    gradients: int = 1
    reference: bool = False  # its forward at every step
    unique: bool = True
    skips_zeros: bool = False


class Rates:
    """FLOP a second of each kind of product, at the largest shape of it that was asked for."""

    def __init__(self, products: list[Product]):
        self.shape = {}
        for p in sorted(products, key=lambda p: p.m * p.k * p.n):
            if p.count:
                self.shape[p.kind] = (p.m, p.k, p.n)
        self.seconds = {kind: [] for kind in self.shape}

    def measure(self, rounds: int) -> None:
        for _ in range(rounds):
            for kind, (m, k, n) in self.shape.items():
                a, b = torch.ones(m, k), torch.ones(k, n)
                kept = torch.mm(a, b)
                start = time.perf_counter()
                torch.mm(a, b, out=kept)
                self.seconds[kind].append(time.perf_counter() - start)

    def floor(self, products: list[Product]) -> dict[str, float]:
        """Seconds of the linear layers and head, and of attention's products."""
        taken = {"linear": 0.0, "attention": 0.0}
        for p in products:
            if p.count:
                m, k, n = self.shape[p.kind]
                rate = 2 * m * k * n / statistics.median(self.seconds[p.kind])
                taken["attention" if p.kind.startswith("attention") else "linear"] += p.flop / rate
        return taken
