"""`ddpo generate`: samples of a model's responses, each from a random generator of its own."""

from pathlib import Path

import numpy as np
import torch
from transformers import LogitsProcessor, LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from ddpo import distributed, log
from ddpo.config import GenerateConfig
from ddpo.data.groups import Prompt, read_prompts, write_jsonl
from ddpo.data.tokens import ChatTokens
from ddpo.files import new_file
from ddpo.model import find_model, load_model


def generate(cfg: GenerateConfig) -> Path:
    """Writes num_samples responses to each prompt, in the groups contract without scores; returns the file."""
    out = Path(cfg.out)
    if out.exists() and not cfg.overwrite:
        raise FileExistsError(f"{out} exists already; give another name or --overwrite")
    prompts = read_prompts(cfg.prompts)
    device = distributed.device()
    tokens = ChatTokens.load(find_model(cfg.model), cfg.chat_template)
    model = load_model(cfg.model, cfg.adapter, cfg.dtype, device)
    texts = sample(model, tokens, prompts, cfg)
    with new_file(out) as draft:
        rows = (
            {"prompt": p, "responses": [{"text": t, "score": None} for t in texts[i]]} for i, p in enumerate(prompts)
        )
        write_jsonl(draft, rows)
    log.console.print(f"wrote {len(prompts)} x {cfg.num_samples} responses to {out}")
    return out


@torch.inference_mode()
def sample(model, tokens: ChatTokens, prompts: list[Prompt], cfg: GenerateConfig) -> list[list[str]]:
    """texts[prompt][sample]; prompts of similar length share a batch, padded on the left."""
    prompt_ids = [tokens.prompt_ids(p) for p in prompts]
    jobs = [
        (i, k)
        for i in np.argsort([len(ids) for ids in prompt_ids], kind="stable").tolist()
        for k in range(cfg.num_samples)
    ]
    tokenizer, texts = tokens.tokenizer, [[""] * cfg.num_samples for _ in prompts]
    starts = range(0, len(jobs), cfg.batch_size)
    own = model.generation_config.eos_token_id
    stop_ids = sorted({*tokens.stop_ids(), *(own if isinstance(own, list) else [] if own is None else [own])})
    with log.progress() as bar:
        for at in starts:
            batch = jobs[at : at + cfg.batch_size]
            task = bar.add_task(
                f"sampling {at // cfg.batch_size + 1}/{len(starts)}", total=cfg.max_new_tokens, note="tokens"
            )
            width = max(len(prompt_ids[i]) for i, _ in batch)
            room = [width - len(prompt_ids[i]) for i, _ in batch]
            # padding is masked; a token of the prompt itself, so that the repetition penalty sees nothing new in it
            ids = torch.tensor([prompt_ids[i][:1] * n + prompt_ids[i] for (i, _), n in zip(batch, room, strict=True)])
            mask = (torch.arange(width) >= torch.tensor(room)[:, None]).long()
            draw = Draw(batch, cfg, on_token=lambda task=task: bar.advance(task))
            processors = LogitsProcessorList([draw])
            if cfg.repetition_penalty != 1.0:
                processors.insert(0, RepetitionPenaltyLogitsProcessor(cfg.repetition_penalty))
            result = model.generate(
                ids.to(model.device),
                attention_mask=mask.to(model.device),
                logits_processor=processors,
                do_sample=False,  # Draw leaves one token a row: taking the best of it is the sample
                repetition_penalty=1.0,
                min_new_tokens=1,
                max_new_tokens=cfg.max_new_tokens,
                eos_token_id=stop_ids,
                pad_token_id=tokenizer.eos_token_id,
            )
            bar.remove_task(task)
            for (i, k), row in zip(batch, result[:, width:].tolist(), strict=True):
                texts[i][k] = tokenizer.decode(row, skip_special_tokens=True).strip()
    return texts


class Draw(LogitsProcessor):
    """Temperature, top-k, top-p, then one token per row by the Gumbel-max trick with the row's own generator."""

    def __init__(self, jobs: list[tuple[int, int]], cfg: GenerateConfig, on_token=lambda: None):
        self._generators = [np.random.default_rng([cfg.seed, i, k]) for i, k in jobs]
        self._cfg, self._on_token = cfg, on_token

    def __call__(self, input_ids, scores):
        cfg = self._cfg
        logits = scores.float() / cfg.temperature  # (B, V)
        top, ids = logits.topk(min(cfg.top_k or logits.shape[1], logits.shape[1]))  # (B, k), falling
        before = top.softmax(1).cumsum(1) - top.softmax(1)  # probability of the better ones
        top = top.masked_fill(before >= cfg.top_p, -torch.inf)
        noise = torch.from_numpy(np.stack([g.gumbel(size=top.shape[1]) for g in self._generators])).to(top)
        drawn = ids.gather(1, (top + noise).argmax(1, keepdim=True))
        self._on_token()
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)
