"""Settings of training and of what is asked about a training run."""

import difflib
import hashlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from ddpo.config.checked import Checked, DType

METHODS = tuple("sft dpo ddpo orpo dorpo spl ipo simpo gvpo".split())  # ddpo.objective has a row for each

_READ_BY = {  # options that only some methods read
    "weighted": "dpo ddpo orpo dorpo spl ipo simpo".split(),
    "beta": "dpo ddpo orpo dorpo spl ipo simpo gvpo".split(),
    "label_smoothing": ["dpo", "ddpo"],
    "alpha": ["spl"],
    "gamma": ["simpo"],
    "ipo_logp": ["ipo"],
    "gvpo_norm": ["gvpo"],
    "nll_mean": ["orpo", "dorpo"],
    "nll_tokens": ["orpo", "dorpo"],
    "dorpo_weight": ["dorpo"],
}


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Checked):
    """Trains a policy on a prepared folder: SFT, DPO, DDPO, ORPO, DORPO and their neighbours.

    Example: ddpo train prepared --out runs/ddpo --method ddpo --lr 2e-5 --epochs 3
    """

    data: str
    """The prepared folder."""
    out: str
    """The run folder to make: config, card, metrics.jsonl, checkpoints, and the adapter or model at the end."""
    model: str = "smollm2-135m-instruct"
    """Policy to start from: a folder, a hub name or 'smollm2-135m-instruct'."""
    adapter: str | None = None
    """LoRA adapter to go on from (an SFT run's): the reference policy holds it, the adapter written includes it."""
    method: str = "ddpo"
    """The loss: sft, dpo, ddpo, orpo, dorpo, spl, ipo, simpo, gvpo, or FILE.py:NAME, your own function over pairs
    (docs/add-a-loss.md; the file is run). SFT learns from all responses, GVPO from all scored responses of a prompt
    together, all others from pairs."""
    method_sha256: str | None = None
    """Of method's FILE.py. Filled in, so that a run's config.yaml knows the file and a changed one is refused."""
    weighted: bool = False
    """Multiply a pair's loss by its weight under any method of pairs, as DDPO does DPO's and DORPO ORPO's."""
    beta: float | None = None
    """Strength: of the pull to the reference (default 0.1; IPO's tau; of its cross-entropy half under SPL), of ORPO's
    odds-ratio term (0.25), or of SimPO's rewards (2, as its paper on base models)."""
    label_smoothing: float = 0.0
    """DPO, DDPO: share of labels taken to be wrong, under 0.5; above 0 it is conservative DPO."""
    alpha: float | None = None
    """SPL: strength of the entropy half of the pull to the reference. More is more diverse, beta is DPO; it has no
    default."""
    gamma: float = 1.0
    """SimPO: margin that the chosen response's reward should have (its paper on Llama-3-Base; 0.3 to 1.6 elsewhere)."""
    ipo_logp: Literal["sum", "mean"] = "sum"
    """IPO: log-probs summed over a response (paper), or the mean per token (TRL)."""
    gvpo_norm: Literal["1", "n-1"] = "1"
    """GVPO: what the sum over a group's n responses is divided by: 1 (paper) or n - 1 (its code). Scores are taken as
    they are, in units of beta times nats."""
    nll_mean: Literal["pair", "tokens"] = "pair"
    """ORPO's likelihood term: mean over pairs of token means (paper), or mean over the step's tokens (TRL, release)."""
    nll_tokens: Literal["response", "all"] = "response"
    """ORPO's likelihood term: over the response, or over prompt and response (TRL, release)."""
    dorpo_weight: Literal["outside", "inside"] = "outside"
    """DORPO's weight: outside (paper: w * ORPO) or inside the sigmoid (release)."""
    epochs: int = 1
    """Passes over the pairs (SFT: responses, GVPO: groups)."""
    batch_size: int = 8
    """Most pairs (SFT: responses, GVPO: groups) of an optimiser step, over all processes; its loss is their mean (SFT:
    their tokens'). Pairs that share responses stay together: where more than this hang together (--pairs all), they are
    a step."""
    micro_tokens: int | None = None
    """Most packed tokens held at once; a step's batch is split to fit and its gradients are summed. Pairs that hang
    together, or a group, that do not fit go in two passes: log-probs first, then forward and backward part by part.
    Default: 4096; on a CPU, where larger packs gain no time, what those need, between 1024 and 4096."""
    forward_zero_weight: bool = False
    """Forward pairs of weight 0 too (their gradient is zero either way): slower, metrics over all pairs."""
    lr: float = 5e-6
    """Peak learning rate."""
    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Decay after the warm-up, down to min_lr * lr."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    min_lr: float = 0.0
    """Last learning rate as a share of the peak."""
    weight_decay: float = 0.0
    """Of AdamW."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this 2-norm; 0: not clipped."""
    lora: bool = True
    """Train a LoRA adapter; --no-lora trains all weights."""
    lora_r: int = 16
    """Rank (paper: 128)."""
    lora_alpha: int = 32
    """Scale (paper: 256)."""
    lora_dropout: float = 0.0
    """Dropout inside the adapter."""
    lora_targets: tuple[str, ...] = ("q_proj", "v_proj")
    """Names of the linear layers that get an adapter, or all-linear."""
    dtype: DType = "auto"
    """Of the model's weights; auto: bfloat16 on a GPU that has it, but float32 for --no-lora and under --adapter, which
    is merged into them."""
    drop_below: float | None = None
    """CPU: probabilities under it enter the gradient together, by a mean head row (0: exact). Default: 2^-16, an error
    under bfloat16 arithmetic's; 0 in float64, on GPUs and without the C++ kernels."""
    seed: int = 0
    """Seed of data order, adapter and dropout."""
    autocast: Literal["auto", "off", "bfloat16"] = "auto"
    """Type of the matrix products; auto: bfloat16 on GPUs that have it unless --dtype is given, else the weights'."""
    activation_checkpointing: bool = False
    """Keep each layer's input alone and compute the layer again in backward: less memory, one more forward pass."""
    compile: bool = False
    """torch.compile the layers; minutes before the first step."""
    liger: Literal["auto", "on", "off"] = "auto"
    """Liger's norm, rotary and MLP kernels; auto: on GPUs where liger-kernel is installed."""
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    """Several processes: a copy of the weights in each (ddp) or a share (fsdp; while loading, each holds them whole);
    auto: ddp for LoRA, fsdp for all weights."""
    deterministic: bool = False
    """The same bits on every run on a GPU too, and so after --resume; slower, and for the whole process. On CPUs they
    always are."""
    max_skips: int = 10
    """Steps of a run that may be skipped because loss or gradient is not finite; one more ends it. What they held is
    written to skipped.jsonl."""
    eval_data: str | None = None
    """Prepared folder whose loss is measured while training (`ddpo prepare prepared/heldout.jsonl`)."""
    eval_every: int = 50
    """Steps between such measurements; the first before training."""
    track: tuple[str, ...] = ()
    """Where metrics are sent besides metrics.jsonl: any of accelerate's trackers, tensorboard, wandb, trackio, ..."""
    save_every: int = 50
    """Steps between checkpoints; 0: none but at the end or when stopped."""
    keep_checkpoints: int = 2
    """Checkpoints kept, the newest ones."""
    max_steps: int | None = None
    """Stop after this many steps; the schedule of the learning rate is cut to it."""
    resume: bool = False
    """Go on from the run folder's last whole checkpoint; a run that has not begun is begun, a finished one is left."""
    dry_run: bool = False
    """Load settings, data and tokenizer, print the steps, one tokenised sample and the plan (see `ddpo plan`), and stop
    there: no weights are loaded and no run folder is made."""
    json: bool = False
    """Print how the run ended (--dry-run: the plan) as one JSON object instead of text."""

    def __post_init__(self):
        super().__post_init__()
        self._check_method()
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"config: label_smoothing must be in [0, 0.5), got {self.label_smoothing}")
        if self.gamma < 0:
            raise ValueError(f"config: gamma must be at least 0, got {self.gamma}")
        if self.method == "spl" and self.alpha is None:
            raise ValueError("config: method spl needs alpha, above beta for more diversity (equal to it, it is DPO)")
        for field in fields(TrainConfig):
            methods = _READ_BY.get(field.name, [self.method])
            own = self.method not in METHODS and field.name in ("weighted", "beta")
            if self.method not in methods and not own and getattr(self, field.name) != field.default:
                raise ValueError(
                    f"config: {field.name} does nothing under method {self.method}, got {getattr(self, field.name)!r}; "
                    f"leave it out (it is for {', '.join(methods)})"
                )

    def _check_method(self):
        """A known name, or FILE.py:NAME whose file is there; its hash is taken or compared. The file is not run."""
        file, colon, name = self.method.rpartition(":")
        if self.method in METHODS:
            if self.method_sha256 is not None:
                raise ValueError(f"config: method_sha256 is of a method FILE.py:NAME; leave it out under {self.method}")
            return
        if not (colon and file.endswith(".py") and name.isidentifier()):
            near = difflib.get_close_matches(self.method, METHODS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"wanted one of {', '.join(METHODS)}, or FILE.py:NAME"
            raise ValueError(f"config: unknown method {self.method!r}; {hint}")
        if not Path(file).is_file():
            raise ValueError(f"config: method {self.method}: there is no file {file}")
        sha256 = hashlib.sha256(Path(file).read_bytes()).hexdigest()
        if self.method_sha256 not in (None, sha256):
            raise ValueError(
                f"config: {file} has changed since method_sha256 was written; put it back, or leave method_sha256 out "
                "and give another --out"
            )
        object.__setattr__(self, "method_sha256", sha256)


@dataclass(frozen=True, kw_only=True)
class PlanConfig(TrainConfig):
    """Says what a training run takes before it is run: parameters, memory by part, FLOP and seconds of a step.

    Takes the options of `ddpo train` and a machine. Only the model's config is read, not its weights.

    Example: ddpo plan prepared --method dpo --gpus 8 --gpu-memory 80 --flops 400e12
    """

    data: str | None = None  # type: ignore[assignment]
    """The prepared folder, whose lengths are taken; without one a step's are assumed, see tokens_per_*."""
    out: str | None = None  # type: ignore[assignment]
    """Of the training run; not read, nothing is written."""
    gpus: int = 0
    """GPUs, a process each; 0: one process on this machine's CPU."""
    gpu_memory: float = 80.0
    """Memory of one GPU, GiB."""
    gpu_reserved: float = 1.0
    """GiB of each GPU that tensors cannot have: context, libraries, the allocator's gaps. Assumed, not measured."""
    flops: float | None = None
    """FLOP per second of one GPU, or of the CPU, in large matrix products (data sheet, dense). On a CPU measured where
    not given."""
    efficiency: float = 0.4
    """Share of them that a step gets."""
    tokens_per_prompt: int = 128
    """Without a prepared folder: tokens of a prompt with its chat template."""
    tokens_per_response: int = 512
    """Without a prepared folder: tokens of a response."""
    responses_per_group: int = 4
    """Without a prepared folder: responses of a prompt, under GVPO."""
    json: bool = False
    """Print one JSON object instead of the table."""

    def __post_init__(self):
        super().__post_init__()
        if self.gpus < 0:
            raise ValueError(f"config: gpus must be at least 0, got {self.gpus}")


@dataclass(frozen=True, kw_only=True)
class TuneConfig(Checked):
    """Times the kernels' paths on the GPU at hand and remembers the fastest for a model's head.

    Example: ddpo tune --model meta-llama/Llama-3.1-8B
    """

    model: str = "smollm2-135m-instruct"
    """The model whose width and vocabulary are tuned for; its weights are not loaded."""
    rows: int = 8192
    """Rows that reach the head in one step."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Of hidden states and head."""
    json: bool = False
    """Print the fastest as one JSON object instead of text."""
