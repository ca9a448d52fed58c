"""The reward model: a sequence classifier of one output, what it reads, and what its numbers mean.

Source: arXiv 2503.17126, whose "reddit-reward" is such a classifier over gemma-2-2b.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ddpo.data.groups import Group, Prompt
from ddpo.data.tokens import ChatTokens
from ddpo.files import read_json, write_json
from ddpo.loading import identity, load_classifier, load_tokenizer

FILE = "reward.json"  # beside the adapter's weights
LOG_TIMES = 100


@dataclass(frozen=True)
class Target:
    """From people's scores to the numbers that the model learns, -1 to 1: min-max, under 'votes' after
    t = s - low + 1 and 100 times t <- ln(t + 1). Scores outside [low, high] count as these."""

    kind: Literal["votes", "linear"]
    low: float
    high: float

    @classmethod
    def fit(cls, kind: Literal["votes", "linear"], scores: np.ndarray) -> "Target":
        """Raises ValueError where all scores are equal."""
        low, high = float(np.min(scores)), float(np.max(scores))
        if not high > low:
            raise ValueError(f"reward: all scores are {low:g}; there is nothing to learn")
        return cls(kind, low, high)

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        """(n,) -> (n,) float64."""
        values = self._flat(np.clip(np.asarray(scores, float), self.low, self.high))
        low, high = self._flat(np.array([self.low, self.high]))
        return 2 * (values - low) / (high - low) - 1

    def _flat(self, scores: np.ndarray) -> np.ndarray:
        if self.kind == "linear":
            return scores
        t = scores - self.low + 1
        for _ in range(LOG_TIMES):
            t = np.log1p(t)
        return t


def tagged(prompt: Prompt, text: str) -> str:
    """What the classifier reads: <prompt>...</prompt><response>...</response>; of a conversation all its messages."""
    asked = prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)
    return f"<prompt>{asked}</prompt><response>{text}</response>"


class Reader:
    """From a prompt and a response to the classifier's token ids, at most max_length of them: the end is cut off."""

    def __init__(self, tokenizer, max_length: int, chat: bool = False):
        """chat: by the tokenizer's chat template (classifiers of other people), else by tags."""
        self._tokenizer, self._max_length = tokenizer, max_length
        self._chat = ChatTokens(tokenizer) if chat else None

    def __call__(self, group: Group) -> list[list[int]]:
        """Ids of each response of the group."""
        texts = [r.text for r in group.responses]
        if self._chat:
            prompt, responses = self._chat.group_ids(group.prompt, texts, group.where)
            found = [[*prompt.tolist(), *ids.tolist()] for ids in responses]
        else:
            found = self._tokenizer([tagged(group.prompt, text) for text in texts])["input_ids"]
        return [ids[: self._max_length] for ids in found]


@dataclass(frozen=True)
class RewardModel:
    """model: a classifier in evaluation mode; read: see Reader."""

    model: Any  # of transformers, for sequence classification
    read: Reader

    @classmethod
    def load(cls, name: str, dtype: str, device: torch.device, max_length: int = 2048) -> "RewardModel":
        """A run folder of `ddpo reward` (or the adapter in it), or any sequence classifier with a chat template.

        Raises: ValueError for a classifier of several outputs or without a template.
        """
        folder = adapter_of(name)
        if folder is None:
            model = load_classifier(name, None, dtype, device)
            return cls(model, Reader(load_tokenizer(name), max_length, chat=True))
        made = read_json(folder / FILE)
        model = load_classifier(made["model"], str(folder), dtype, device)
        return cls(model, Reader(load_tokenizer(str(folder)), made["max_length"]))

    def each(self, ids: list[list[int]], max_tokens: int) -> Iterator[tuple[list[int], np.ndarray]]:
        """(which, their rewards (b,) float64) of texts by their token ids, a batch of similar lengths at a time."""
        pad = self.model.config.pad_token_id
        for which in batches_by_length([len(i) for i in ids], max_tokens):
            batch = [ids[i] for i in which]
            with torch.inference_mode():
                found = self.model(**{k: v.to(self.model.device) for k, v in padded(batch, pad).items()}).logits
            yield which, found[:, 0].double().cpu().numpy()

    def __call__(self, groups: list[Group], max_tokens: int = 8192) -> np.ndarray:
        """(R,) rewards of the groups' responses, one after the other."""
        ids = [i for group in groups for i in self.read(group)]
        out = np.empty(len(ids))
        for which, rewards in self.each(ids, max_tokens):
            out[which] = rewards
        return out


def adapter_of(name: str) -> Path | None:
    """The adapter's folder of a run of `ddpo reward`, or the folder itself; None for another model's name."""
    return next((f for f in (Path(name), Path(name) / "adapter") if (f / FILE).is_file()), None)


def weights_of(name: str) -> dict[str, Any]:
    """What tells a reward model from another."""
    adapter = adapter_of(name)
    return identity(name, None) if adapter is None else identity(read_json(adapter / FILE)["model"], str(adapter))


def describe(folder: Path, model: str, loss: str, target: Target | None, max_length: int) -> None:
    """Writes what `RewardModel.load` and a reader want to know of an adapter."""
    made = {"model": model, "loss": loss, "max_length": max_length}
    write_json(folder / FILE, {**made, "target": target and dataclasses.asdict(target)})


def padded(ids: list[list[int]], pad: int) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask (B, L) int64, padded on the right."""
    longest = max(map(len, ids))
    return {
        "input_ids": torch.tensor([i + [pad] * (longest - len(i)) for i in ids]),
        "attention_mask": torch.tensor([[1] * len(i) + [0] * (longest - len(i)) for i in ids]),
    }


def batches_by_length(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Indices in batches of similar lengths, shortest first, at most max_tokens each when padded; a longer one stands
    alone."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batches and (len(batches[-1]) + 1) * lengths[i] <= max_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches
