"""Settings of sampling responses and measuring them."""

from dataclasses import dataclass
from typing import Literal

from ddpo.config.checked import Checked


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(Checked):
    """Samples responses to prompts, to JSONL in the groups contract; under torchrun each process samples a share.

    What it was made from, machine and versions are written beside it (after.jsonl: after.card.json).

    Example: ddpo generate heldout.jsonl --adapter runs/ddpo/adapter --out after.jsonl
    """

    prompts: str
    """JSONL with a 'prompt' a line (a groups file serves)."""
    out: str
    """JSONL file to write."""
    model: str = "smollm2-135m-instruct"
    """A folder, a hub name or 'smollm2-135m-instruct'."""
    adapter: str | None = None
    """LoRA adapter over it, for example runs/ddpo/adapter."""
    num_samples: int = 4
    """Responses of each prompt."""
    max_new_tokens: int = 2048
    """Most tokens of a response."""
    temperature: float = 1.0
    """Divides the logits; lower is safer."""
    temperatures: tuple[float, ...] = ()
    """Several, instead of one: a file for each, --out after.jsonl making after-t0.7.jsonl and so on. The baseline that
    diversity by training has to beat."""
    top_k: int = 50
    """Sample among the k most likely tokens; 0: among all."""
    top_p: float = 0.95
    """Sample among the fewest tokens that hold this probability."""
    repetition_penalty: float = 1.1
    """Divides (multiplies, where negative) the logits of tokens that stand already; 1: none."""
    batch_size: int = 48
    """Responses sampled at a time; of no consequence for the draws."""
    chat_template: str | None = None
    """File with a chat template (Jinja) to use instead of the tokenizer's own."""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Of the model's weights; auto: bfloat16 on a GPU that has it, else float32."""
    seed: int = 0
    """Each (prompt, sample) draws from a generator of its own."""
    resume: bool = False
    """Keep a file that is there and was made from the same; samples of a run that was stopped are taken up anyway."""
    overwrite: bool = False
    """Replace an existing file."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Checked):
    """Measures diversity, length and likelihood of generated responses; with --before, what changed.

    Example: ddpo evaluate after.jsonl --before before.jsonl --model smollm2-135m-instruct
    """

    responses: str
    """JSONL of responses, as `ddpo generate` writes it."""
    before: str | None = None
    """JSONL of the same prompts' responses before training, to compare with."""
    out: str | None = None
    """JSON file for the numbers, per prompt and averaged."""
    model: str | None = None
    """Starting model; where given, the mean log-prob of the responses under it is measured too."""
    chat_template: str | None = None
    """File with a chat template (Jinja) to use instead of the tokenizer's own."""
    semantic: str = "minilm"
    """Semantic encoder, as in `ddpo prepare`."""
    style: str = "builtin"
    """Style encoder, as in `ddpo prepare`."""
    trust_remote_code: bool = False
    """Let an encoder's repository run its own code."""
    distinct_threshold: float = 0.25
    """Two responses count as the same to distinct_k when their semantic cosine distance is under this."""
    seed: int = 0
    """Seed of the bootstrap."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig(Checked):
    """Runs the whole method once: prepare, train, generate and evaluate before and after.

    Example: ddpo demo
    """

    out: str = "runs/demo"
    """Where everything is written; a previous demo there is replaced."""
    seed: int = 0
    """Seed of pairs, training and sampling."""
    lr: float = 5e-4
    """Peak learning rate."""
    epochs: int = 2
    """Passes over the pairs."""
