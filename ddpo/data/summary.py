"""What a prepared folder holds, counted part by part: for its manifest and for people."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

QUANTILES = {"min": 0, "p10": 10, "median": 50, "p90": 90, "max": 100}


@dataclass
class Summary:
    """Counts over the groups that stay. Arrays, one a part: gaps, the score differences of pairs whose responses both
    have one; prompt_tokens of each group, response_tokens of each response."""

    dropped: Counter
    prompts: int = 0
    responses: int = 0
    without_score: int = 0
    duplicate_texts: int = 0
    pairs: int = 0
    prompts_with_pair: int = 0
    gaps: list[np.ndarray] = field(default_factory=list)
    prompt_tokens: list[np.ndarray] = field(default_factory=list)
    response_tokens: list[np.ndarray] = field(default_factory=list)

    def add(self, groups, responses, pairs: np.ndarray) -> None:
        """A part's tables as they are written; pairs (P, 3): group, chosen, rejected, rows of these tables."""
        score = np.array(responses["score"].to_pylist(), float)  # nan for none
        texts = set(zip(responses["group"].to_pylist(), responses["text"].to_pylist(), strict=True))
        gaps = score[pairs[:, 1]] - score[pairs[:, 2]]
        self.prompts += len(groups)
        self.responses += len(responses)
        self.without_score += int(np.isnan(score).sum())
        self.duplicate_texts += len(responses) - len(texts)
        self.pairs += len(pairs)
        self.prompts_with_pair += len(np.unique(pairs[:, 0]))
        self.gaps.append(gaps[~np.isnan(gaps)])
        for lengths, table, name in (
            (self.prompt_tokens, groups, "prompt_ids"),
            (self.response_tokens, responses, "ids"),
        ):
            lengths += [np.diff(chunk.offsets.to_numpy()) for chunk in table[name].chunks]

    def told(self, heldout_prompts: int, gap: float | None) -> dict:
        """For the manifest. gap: that the pairs' rule prefers; None: it has none."""
        gaps = np.concatenate(self.gaps)
        meeting = {} if gap is None or not len(gaps) else {"gap": gap, "pairs_meeting_gap": float((gaps >= gap).mean())}
        return {
            "prompts": self.prompts,
            "responses": self.responses,
            "without_score": self.without_score,
            "duplicate_texts": self.duplicate_texts,
            "dropped": {reason: count for reason, count in self.dropped.items() if count},
            "heldout_prompts": heldout_prompts,
            "prompt_tokens": quantiles(np.concatenate(self.prompt_tokens)),
            "response_tokens": quantiles(np.concatenate(self.response_tokens)),
            "pairs": self.pairs,
            "prompts_without_pair": self.prompts - self.prompts_with_pair,
            "score_gaps": quantiles(gaps),
            **meeting,
        }


def quantiles(values: np.ndarray) -> dict | None:
    """None for no value."""
    if not len(values):
        return None
    found = np.percentile(values, list(QUANTILES.values())).tolist()
    return {**dict(zip(QUANTILES, found, strict=True)), "mean": float(values.mean())}


def tell_quantiles(found: dict) -> str:
    return ", ".join(f"{name} {value:,.4g}" for name, value in found.items())
