"""`ddpo generate`: samples of a model's responses, each from a random generator of its own."""

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from transformers import LogitsProcessor, LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from ddpo import __version__, distributed, log
from ddpo.config import GenerateConfig
from ddpo.data.groups import Prompt, read_groups_file, read_prompts
from ddpo.data.tokens import ChatTokens
from ddpo.files import sha256
from ddpo.ledger import Ledger, is_made, job_id
from ddpo.loading import find_model, identity, load_model

NOT_OF_THE_TEXT = ("prompts", "out", "chat_template", "batch_size", "temperatures", "resume", "overwrite", "json")


def generate(cfg: GenerateConfig) -> list[Path]:
    """Writes num_samples responses to each prompt, in the groups contract without scores; returns the files, one for
    each temperature.

    Samples that a killed run had drawn are taken up. Raises: ValueError for bad input, FileExistsError.
    """
    distributed.start()
    prompts = read_prompts(cfg.prompts)
    cfgs = [replace(cfg, temperature=t, temperatures=(), out=_name(cfg.out, t)) for t in cfg.temperatures] or [cfg]
    tokens = ChatTokens.load(find_model(cfg.model), cfg.chat_template)
    parts = {
        "ddpo": __version__,
        "prompts": sha256(cfg.prompts),
        "tokenizer": tokens.fingerprint(),
        "weights": identity(cfg.model, cfg.adapter),
    }
    keys = [{**parts, **{k: v for k, v in asdict(c).items() if k not in NOT_OF_THE_TEXT}} for c in cfgs]
    to_do = [
        (c, key)
        for c, key in zip(cfgs, keys, strict=True)
        if not distributed.from_first(is_made(Path(c.out), key, c.resume, c.overwrite))
    ]
    if to_do:
        model = load_model(cfg.model, cfg.adapter, cfg.dtype, distributed.device())
    for c, key in to_do:
        ledger = Ledger(Path(c.out), key)
        for found in each_batch(model, tokens, prompts, c, ledger.done):
            ledger.add({job_id(*job): response for job, response in found.items()})
        done = ledger.collect()
        if distributed.is_first():
            ledger.finish(_rows(prompts, done, c.num_samples))
        log.console.print(f"wrote {len(prompts)} x {c.num_samples} responses to {c.out}")
    distributed.barrier()
    files = [{"out": c.out, "temperature": c.temperature, **count(Path(c.out))} for c in cfgs]
    log.answer(cfg, {"num_prompts": len(prompts), "num_samples": cfg.num_samples, "files": files})
    return [Path(c.out) for c in cfgs]


def count(out: Path) -> dict:
    """Of a file of samples: how many, and the share that was cut off."""
    finished = [r.extra.get("finished", True) for group in read_groups_file(out) for r in group.responses]
    return {"num_responses": len(finished), "cut_share": finished.count(False) / len(finished)}


def _name(out: str, temperature: float) -> str:
    """after.jsonl -> after-t0.7.jsonl"""
    return str(Path(out).with_stem(f"{Path(out).stem}-t{temperature:g}"))


def _rows(prompts, samples, num_samples):
    for i, prompt in enumerate(prompts):
        yield {"prompt": prompt, "responses": [samples[job_id(i, k)] for k in range(num_samples)]}


@torch.inference_mode()
def each_batch(
    model, tokens: ChatTokens, prompts: list[Prompt], cfg: GenerateConfig, done: dict[str, dict]
) -> Iterator[dict[tuple[int, int], dict]]:
    """Responses (text, score, finished) by (prompt, sample), a batch at a time, but those that are done; this process's
    share of them. finished is false where max_new_tokens cut it off.

    Prompts of similar length share a batch, padded on the left.
    """
    rank, world = distributed.start()
    prompt_ids = [tokens.prompt_ids(p) for p in prompts]
    by_length = np.argsort([len(ids) for ids in prompt_ids], kind="stable").tolist()
    jobs = [(i, k) for i in by_length for k in range(cfg.num_samples) if job_id(i, k) not in done]
    own = model.generation_config.eos_token_id
    stop_ids = sorted({*tokens.stop_ids(), *(own if isinstance(own, list) else [] if own is None else [own])})
    with log.progress() as bar:
        for at in range(rank * cfg.batch_size, len(jobs), world * cfg.batch_size):
            batch = jobs[at : at + cfg.batch_size]
            task = bar.add_task(f"samples {at + 1}-{at + len(batch)}", total=cfg.max_new_tokens, note="tokens")
            width = max(len(prompt_ids[i]) for i, _ in batch)
            room = [width - len(prompt_ids[i]) for i, _ in batch]
            # padding is masked; a token of the prompt itself, so that the repetition penalty sees nothing new in it
            ids = torch.tensor([prompt_ids[i][:1] * n + prompt_ids[i] for (i, _), n in zip(batch, room, strict=True)])
            mask = (torch.arange(width) >= torch.tensor(room)[:, None]).long()
            draw = Draw(batch, cfg, stop_ids, tokens.tokenizer, on_token=lambda task=task: bar.advance(task))
            processors = LogitsProcessorList([draw])
            if cfg.repetition_penalty != 1.0:
                processors.insert(0, RepetitionPenaltyLogitsProcessor(cfg.repetition_penalty))
            result = model.generate(
                ids.to(model.device),
                attention_mask=mask.to(model.device),
                logits_processor=processors,
                do_sample=False,  # Draw leaves one token a row: taking the best of it is the sample
                repetition_penalty=1.0,
                max_new_tokens=cfg.max_new_tokens,
                eos_token_id=stop_ids,
                pad_token_id=stop_ids[0],
            )
            bar.remove_task(task)
            yield {
                job: {
                    "text": tokens.tokenizer.decode(row, skip_special_tokens=True).strip(),
                    "score": None,
                    "finished": any(token in stop_ids for token in row),
                }
                for job, row in zip(batch, result[:, width:].tolist(), strict=True)
            }


class Draw(LogitsProcessor):
    """Temperature, top-k, top-p, then one token per row by the Gumbel-max trick with the row's own generator.

    A row does not stop before it holds something else than white space: an empty response is no response.
    """

    def __init__(self, jobs: list[tuple[int, int]], cfg: GenerateConfig, stop_ids, tokenizer, on_token=lambda: None):
        self._generators = [np.random.default_rng([cfg.seed, i, k]) for i, k in jobs]
        self._cfg, self._stop_ids, self._tokenizer, self._on_token = cfg, stop_ids, tokenizer, on_token
        self._blank = [True] * len(jobs)

    def __call__(self, input_ids, scores):
        cfg = self._cfg
        logits = scores.float() / cfg.temperature  # (B, V)
        if any(self._blank):
            rows = torch.tensor(self._blank).nonzero().to(logits.device)  # (b, 1)
            logits[rows, torch.tensor(self._stop_ids, device=logits.device)] = -torch.inf
        top, ids = logits.topk(min(cfg.top_k or logits.shape[1], logits.shape[1]))  # (B, k), falling
        before = top.softmax(1).cumsum(1) - top.softmax(1)  # probability of the better ones
        top = top.masked_fill(before >= cfg.top_p, -torch.inf)
        noise = torch.from_numpy(np.stack([g.gumbel(size=top.shape[1]) for g in self._generators])).to(top)
        drawn = ids.gather(1, (top + noise).argmax(1, keepdim=True))
        if any(self._blank):
            texts = self._tokenizer.batch_decode(drawn)
            self._blank = [blank and not text.strip() for blank, text in zip(self._blank, texts, strict=True)]
        self._on_token()
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)
