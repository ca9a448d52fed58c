"""Log-probs of responses under a model, for whole groups."""

from dataclasses import dataclass

import numpy as np
import torch

from ddpo import distributed, log
from ddpo.data.groups import Group
from ddpo.data.tokens import ChatTokens
from ddpo.loading import find_model, load_model
from ddpo.model import Policy
from ddpo.passes import each_logp

MICRO_TOKENS = 4096  # packed tokens of one forward pass, without gradient


@dataclass(frozen=True)
class _TokenLists:
    """A TokenSource over lists."""

    prompts: list[np.ndarray]  # of each response
    responses: list[np.ndarray]

    def prompt_ids(self, response):
        return self.prompts[response]

    def response_ids(self, response):
        return self.responses[response]


class Likelihood:
    """Groups -> summed log-prob (n,) in nats and number of tokens (n,) of each response under one model."""

    def __init__(self, model: str, chat_template: str | None = None):
        self.device = distributed.device()
        self.tokens = ChatTokens.load(find_model(model), chat_template)
        self.policy = Policy(load_model(model, None, "auto", self.device))

    def __call__(self, groups: list[Group]) -> tuple[np.ndarray, np.ndarray]:
        lists = _TokenLists([], [])
        for group in groups:
            prompt, responses = self.tokens.group_ids(group.prompt, [r.text for r in group.responses], group.where)
            lists.prompts.extend([prompt] * len(responses))
            cut = [r.extra.get("finished") is False for r in group.responses]  # never ended: no end of turn to score
            lists.responses.extend(ids[:-1] if c else ids for ids, c in zip(responses, cut, strict=True))
        num_tokens = np.array([len(ids) for ids in lists.responses])
        length = num_tokens + np.array([len(ids) for ids in lists.prompts])
        logp = np.zeros(len(length))
        found = each_logp(self.policy, lists, np.arange(len(length)), length, MICRO_TOKENS, self.device)
        for responses, values, _ in log.track(found, "log-probs", len(length), lambda found: len(found[0])):
            logp[responses] = values
        return distributed.all_reduce(torch.from_numpy(logp)).numpy(), num_tokens
