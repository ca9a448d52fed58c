"""What the ops are timed on: hidden states of stories under SmolLM2, and random ones of a larger vocabulary.

Sequences have equal length and chosen stand before rejected, so that peers that pad do no extra work.
"""

import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ddpo.ops import linear_logp, sequence_sum

ROOT = Path(__file__).parent.parent
STORIES = Path(os.environ.get("DDPO_SHARED_DATA", ROOT.parent / "shared" / "data")) / "hanna_llm_7way.jsonl"
MODEL = "smollm2-135m-instruct"
ENTROPY = 2.5  # nats, about SmolLM2's over the stories


class Case(NamedTuple):
    """One batch: what the loss is computed from."""

    name: str
    hidden: Tensor  # (N, D)
    head: Tensor  # (V, D)
    targets: Tensor  # (N,)
    segments: Tensor  # (S+1,)
    pairs: Tensor  # (P, 2)
    weight: Tensor  # (P,)
    ref_logp: Tensor  # (S,) nats

    @property
    def gemm_flop(self) -> int:
        """Of G, one product with the head."""
        return 2 * self.hidden.numel() * len(self.head)


def _case(name: str, hidden, head, targets, sequences: int, device, dtype) -> Case:
    """Every second pair weighs 1.4, the others 0.6; the reference is the policy give or take 5 nats a sequence, so
    that the coefficients of the sequences differ."""
    hidden, head, targets = hidden.to(device, dtype), head.to(device, dtype), targets.to(device)
    segments = torch.arange(0, len(hidden) + 1, len(hidden) // sequences, device=device)
    with torch.no_grad():
        logp = sequence_sum(linear_logp(hidden, head, targets), segments)
    noise = 5 * torch.randn(sequences, generator=torch.Generator().manual_seed(0))
    chosen = torch.arange(sequences // 2, device=device)
    weight = torch.where(chosen % 2 == 0, 1.4, 0.6)
    pairs = torch.stack([chosen, chosen + sequences // 2], 1)
    return Case(name, hidden, head, targets, segments, pairs, weight, logp + noise.to(device))


def real(rows: int, sequences: int, device: torch.device, dtype: torch.dtype) -> Case:
    """Final hidden states of SmolLM2 over people's and models' stories, two stories a prompt; the next tokens."""
    from ddpo.data.tokens import ChatTokens
    from ddpo.loading import find_model, load_model

    tokens = ChatTokens.load(find_model(MODEL))
    model = load_model(MODEL, None, "float32", device)
    length = rows // sequences
    sides = ([], [])  # (hidden, targets) of chosen, of rejected
    name, groups = stories()
    with torch.no_grad():
        for prompt, texts in groups:
            prompt_ids, responses = tokens.group_ids(prompt, texts, name)
            long = [r[:length].tolist() for r in responses if len(r) >= length][:2]
            if len(long) < 2:
                continue
            for side, response in zip(sides, long, strict=True):
                ids = torch.tensor([[*prompt_ids.tolist(), *response[:-1]]], device=device)
                states = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]  # (T, D)
                side.append((states[len(prompt_ids) - 1 :], torch.tensor(response)))
            if len(sides[0]) == sequences // 2:
                break
        else:
            raise ValueError(f"{name}: wanted {sequences // 2} prompts with two stories of {length} tokens or more")
    hidden, targets = (torch.cat(parts) for parts in zip(*sides[0], *sides[1], strict=True))
    head = model.get_output_embeddings().weight.detach()
    return _case(f"SmolLM2-135M-Instruct, {name}", hidden, head, targets, sequences, device, dtype)


def stories(source: Path = STORIES) -> tuple[str, list[tuple[str, list[str]]]]:
    """Where they come from, and (prompt, texts) of each prompt."""
    from ddpo.data.importers import read_groups

    if source.is_file():
        groups, _ = read_groups(str(source))
        return f"stories of {source.name}", [(g.prompt, [r.text for r in g.responses]) for g in groups]
    groups, _ = read_groups(str(ROOT / "ddpo" / "demo" / "stories.jsonl"))
    texts = [[r.text for r in g.responses] for g in groups]  # short ones: several make one long enough
    joined = [["\n\n".join(t[i:] + t[:i]) for i in range(len(t))] for t in texts]
    return "stand-in text (the demo's stories, joined)", [(g.prompt, j) for g, j in zip(groups, joined, strict=True)]


def random(rows: int, D: int, V: int, sequences: int, device: torch.device, dtype: torch.dtype) -> Case:
    """Normal logits of the width that gives their softmax the entropy of a language model over stories; targets drawn
    from it."""
    g = torch.Generator(device).manual_seed(0)
    hidden, head = (torch.randn(n, D, generator=g, device=device) for n in (rows, V))
    few = hidden[:128] @ head.T
    narrow, wide = 0.0, 1.0  # factors of the logits; entropy falls as they widen
    for _ in range(12):
        middle = (narrow + wide) / 2
        logp = torch.log_softmax(middle * few, 1)
        narrow, wide = (middle, wide) if -(logp.exp() * logp).sum(1).mean() > ENTROPY else (narrow, middle)
    head.mul_(wide)
    drawn = [torch.multinomial(torch.softmax(h @ head.T, 1), 1, generator=g) for h in hidden.split(64)]
    targets = torch.cat(drawn)[:, 0]
    return _case(f"random, D {D:,}, V {V:,}", hidden, head, targets, sequences, device, dtype)


def tiny_model(folder: Path) -> str:
    """A tokenizer of one token a byte, and two narrow layers of random weights."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = {"eos_token": "<|end|>", "pad_token": "<|end|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + '\n' + m['content'] + '<|end|>' }}{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8, "vocab_size": 257}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    config = AutoConfig.for_model("llama", **sizes, **heads, initializer_range=0.3, eos_token_id=256, pad_token_id=256)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return str(folder)
