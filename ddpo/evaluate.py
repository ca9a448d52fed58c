"""`ddpo evaluate`: diversity, length and likelihood of responses, by prompt and averaged; with --before, the change."""

from dataclasses import asdict, dataclass

import numpy as np
import torch
from rich.table import Table

from ddpo import deviation, distributed, log, metrics
from ddpo.config import EvaluateConfig
from ddpo.data.groups import Group, parse_group, read_jsonl
from ddpo.data.tokens import ChatTokens
from ddpo.encoders import load_encoder
from ddpo.files import write_json
from ddpo.loading import find_model, load_model
from ddpo.model import Policy
from ddpo.passes import each_logp

MEASURES = {  # name -> (label, decimals)
    "semantic_diversity": ("semantic diversity", 3),
    "style_diversity": ("style diversity", 3),
    "distinct_k": ("distinct_k", 2),
    "num_words": ("mean length, words", 1),
    "num_tokens": ("mean length, tokens", 1),
    "logp_per_token": ("log-prob at start", 3),
    "cut_share": ("share cut off", 2),
}
MICRO_TOKENS = 4096  # packed tokens of one forward pass, without gradient


def evaluate(cfg: EvaluateConfig) -> dict:
    """Measures one file of responses, or two of the same prompts; prints a table and returns (and writes) the numbers.

    Raises: ValueError where the files hold bad rows, or other prompts or numbers of samples than each other.
    """
    sets = {"after" if cfg.before else "responses": _read(cfg.responses)}
    if cfg.before:
        sets = {"before": _read(cfg.before), **sets}
        shapes = [[(g.prompt, len(g.responses)) for g in groups] for groups in sets.values()]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{cfg.responses} and {cfg.before} hold other prompts, another order or other counts")
    encoders = {m: load_encoder(getattr(cfg, m), m, cfg.trust_remote_code) for m in ("semantic", "style")}
    likelihood = _Likelihood(cfg) if cfg.model else None
    values = {name: _measure(groups, encoders, likelihood, cfg) for name, groups in sets.items()}
    result = {
        "settings": asdict(cfg),
        "num_prompts": len(next(iter(sets.values()))),
        "mean": {name: {m: float(v.mean()) for m, v in per.items()} for name, per in values.items()},
        "per_prompt": {name: {m: v.tolist() for m, v in per.items()} for name, per in values.items()},
    }
    if cfg.before:
        result["difference"] = {
            m: dict(
                zip(("mean", "low", "high"), metrics.paired_bootstrap(v, values["after"][m], cfg.seed), strict=True)
            )
            for m, v in values["before"].items()
        }
    show(result)
    if cfg.out:
        write_json(cfg.out, result)
        log.console.print(f"numbers: {cfg.out}")
    return result


def _read(path: str) -> list[Group]:
    return [parse_group(row, where) for where, row in read_jsonl(path)]


def _measure(groups: list[Group], encoders, likelihood, cfg) -> dict[str, np.ndarray]:
    """Each measure's value per prompt, (R,)."""
    texts = [r.text for g in groups for r in g.responses]
    sizes = [len(g.responses) for g in groups]
    offsets = torch.tensor(np.cumsum([0, *sizes]))
    embeddings = {m: encode(texts) for m, encode in encoders.items()}
    values = {f"{m}_diversity": deviation.diversity(e, offsets).numpy() for m, e in embeddings.items()}
    values["distinct_k"] = (
        deviation.distinct_k(embeddings["semantic"], offsets, cfg.distinct_threshold).double().numpy()
    )
    if likelihood is None:
        per_response = {"num_words": np.array([len(t.split()) for t in texts], float)}
    else:
        logp, num_tokens = likelihood(groups)
        per_response = {"num_tokens": num_tokens, "logp_per_token": logp / num_tokens}
    per_response["cut_share"] = np.array([r.extra.get("finished") is False for g in groups for r in g.responses], float)
    means = {m: np.add.reduceat(v, offsets[:-1].numpy()) / np.array(sizes) for m, v in per_response.items()}
    return values | means


@dataclass(frozen=True)
class _TokenLists:
    """A TokenSource over lists."""

    prompts: list[np.ndarray]  # of each response
    responses: list[np.ndarray]

    def prompt_ids(self, response):
        return self.prompts[response]

    def response_ids(self, response):
        return self.responses[response]


class _Likelihood:
    """Groups -> summed log-prob (R,) in nats and number of tokens (R,) of each response under one model."""

    def __init__(self, cfg: EvaluateConfig):
        self.device = distributed.device()
        self.tokens = ChatTokens.load(find_model(cfg.model), cfg.chat_template)
        self.policy = Policy(load_model(cfg.model, None, "auto", self.device))

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


def table(result: dict) -> Table:
    """A column a file, the difference with its 95 % interval, and whether that leaves out 0."""
    means, difference = result["mean"], result.get("difference")
    table = Table(title=f"{result['num_prompts']} prompts, means over prompts")
    table.add_column("measure")
    for name in means:
        table.add_column(name, justify="right")
    if difference:
        table.add_column("difference [95 %]")
        table.add_column("clear?")
    for measure in next(iter(means.values())):
        label, decimals = MEASURES[measure]
        row = [label, *(f"{values[measure]:.{decimals}f}" for values in means.values())]
        if difference:
            d = difference[measure]
            row.append(f"{d['mean']:+.{decimals}f} [{d['low']:+.{decimals}f}, {d['high']:+.{decimals}f}]")
            row.append("yes" if d["low"] > 0 or d["high"] < 0 else "no")
        table.add_row(*row)
    return table


def show(result: dict) -> None:
    log.console.print(table(result))
    if "difference" in result:
        log.console.print("clear? no: the interval holds 0, the difference may be chance")
    if "logp_per_token" in next(iter(result["mean"].values())):
        log.console.print("log-prob at start: of the responses under the starting model, nats per token")
