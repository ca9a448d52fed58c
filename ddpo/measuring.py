"""What `ddpo evaluate` measures of groups of responses: one number a prompt and measure.

A prompt for which a measure is not defined (fewer than two responses for a mean over pairs, fewer than two good ones)
has nan there. Definitions of single measures: ddpo.deviation, ddpo.text_measures, ddpo.likelihood.
"""

import math

import numpy as np
import torch

from ddpo import deviation, log, text_measures
from ddpo.config import Measuring
from ddpo.data.groups import Group
from ddpo.likelihood import Likelihood
from ddpo.weighing import load_measures

DEFINITIONS = 1  # raised where a measure is defined anew: numbers of two versions do not compare


class Measurer:
    """Measures groups by the same encoders and the same model."""

    def __init__(self, cfg: Measuring):
        self.cfg = cfg
        self.embedded = load_measures(cfg)
        self.likelihood = Likelihood(cfg.model, cfg.chat_template) if cfg.model else None

    def __call__(
        self,
        groups: list[Group],
        quality: str | None = None,
        threshold: float | None = None,
        num_words: int | None = None,
    ) -> dict[str, np.ndarray]:
        """Each measure's value per prompt, (R,) float64, nan where it is not defined.

            quality                    mean quality
            good_share                 share of responses of at least the threshold
            <measure>_diversity        mean pairwise cosine distance
            <measure>_diversity_good   the same among responses of at least the threshold
            <measure>_diversity_cut    the same after each response is cut to its first num_words words
            vendi_score, distinct_k    of the semantic embeddings
            compression_ratio, homogenisation, ngram_diversity, self_repetition
            num_words, num_tokens, logp_per_token, cut_share      means over responses

        Args:
            quality: key of each response that holds it; None: not measured.
            threshold: least quality of a good response; None: the median of these groups' responses.
            num_words: words that responses are cut to; None: no length-controlled diversity.
        Raises: ValueError with file and line where a response has no number for its quality.
        """
        texts = [[r.text for r in g.responses] for g in groups]
        values = {}
        if quality is not None:
            qualities = quality_of(groups, quality)
            threshold = float(np.median(np.concatenate(qualities))) if threshold is None else threshold
            good = [q >= threshold for q in qualities]
            values["quality"], values["good_share"] = (np.array([x.mean() for x in of]) for of in (qualities, good))
        every = [np.ones(len(t), bool) for t in texts]
        for name, embedded in self.embedded.items():
            rows = embedded.rows([t for group in texts for t in group])  # (n, D)
            values[f"{name}_diversity"] = diversity_among(rows, every)
            if quality is not None:
                values[f"{name}_diversity_good"] = diversity_among(rows, good)
            if num_words is not None:
                cut = embedded.rows([text_measures.first_words(t, num_words) for group in texts for t in group])
                values[f"{name}_diversity_cut"] = diversity_among(cut, every)
            if name == "semantic":
                groups_of = torch.from_numpy(np.cumsum([0, *map(len, texts)]))
                values["vendi_score"] = deviation.vendi_score(rows, groups_of).numpy()
                values["distinct_k"] = (
                    deviation.distinct_k(rows, groups_of, self.cfg.distinct_threshold).double().numpy()
                )
        if self.cfg.text_measures:
            values |= self._of_texts(texts)
        return values | self._of_responses(groups)

    def _of_texts(self, texts: list[list[str]]) -> dict[str, np.ndarray]:
        compat, options = self.cfg.release_compat, {"max_pairs": self.cfg.rouge_pairs, "seed": self.cfg.seed}
        found = [
            (
                text_measures.compression_ratio(group, compat),
                text_measures.homogenisation(group, **options, release_compat=compat),
                text_measures.ngram_diversity(group, release_compat=compat),
                text_measures.self_repetition(group),
            )
            for group in log.track(texts, "text measures", len(texts))
        ]
        names = ("compression_ratio", "homogenisation", "ngram_diversity", "self_repetition")
        return dict(zip(names, np.array(found).T, strict=True))

    def _of_responses(self, groups: list[Group]) -> dict[str, np.ndarray]:
        responses = [r for g in groups for r in g.responses]
        of = {"num_words": np.array([len(r.text.split()) for r in responses], float)}  # (n,) each
        if self.likelihood is not None:
            logp, num_tokens = self.likelihood(groups)
            of |= {"num_tokens": num_tokens, "logp_per_token": logp / num_tokens}
        of["cut_share"] = np.array([r.extra.get("finished") is False for r in responses], float)
        ends = np.cumsum([len(g.responses) for g in groups])
        return {name: np.array([part.mean() for part in np.split(v, ends[:-1])]) for name, v in of.items()}


def diversity_among(embeddings: torch.Tensor, kept: list[np.ndarray]) -> np.ndarray:
    """(R,): mean pairwise cosine distance of each group's kept responses, nan where fewer than two are kept.

    Args: embeddings (n, D) of all responses, group after group; kept: of each group, (responses,) bool.
    """
    num = np.array([k.sum() for k in kept])
    enough = num > 1
    values = np.full(len(kept), np.nan)
    if enough.any():
        rows = torch.from_numpy(np.concatenate([k & e for k, e in zip(kept, enough, strict=True)]))
        offsets = torch.from_numpy(np.cumsum([0, *num[enough]]))
        values[enough] = deviation.diversity(embeddings[rows], offsets).numpy()
    return values


def quality_of(groups: list[Group], key: str) -> list[np.ndarray]:
    """Of each group its responses' quality, (responses,) float64, from a key of each response.

    Raises: ValueError with file and line where a response has no finite number there.
    """
    return [np.array([_number(r, key, f"{g.where}: response {i}") for i, r in enumerate(g.responses)]) for g in groups]


def has_everywhere(groups: list[Group], key: str) -> bool:
    return all(_value(r, key) is not None for g in groups for r in g.responses)


def _value(response, key):
    return response.score if key == "score" else response.extra.get(key)


def _number(response, key, where) -> float:
    value = _value(response, key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        got = "nothing" if value is None else repr(value)
        keys = sorted(["score", *response.extra])
        raise ValueError(f"{where}: quality {key!r} must be a finite number, got {got}; it has text, {', '.join(keys)}")
    return float(value)
