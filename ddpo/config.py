"""Every command's settings as frozen dataclasses. Loads neither torch nor transformers. The docstring of a field is its
help text."""

from dataclasses import dataclass
from typing import Literal


class _Checked:
    """Numbers that only make sense above zero are checked wherever a config is made."""

    _POSITIVE = (
        "max_pairs max_length epochs batch_size micro_tokens lr beta lora_r lora_alpha eval_every keep_checkpoints "
        "max_steps num_samples rows max_new_tokens temperature top_p repetition_penalty gpu_memory flops efficiency "
        "tokens_per_prompt tokens_per_response"
    ).split()

    def __post_init__(self):
        for name in self._POSITIVE:
            value = getattr(self, name, None)
            if value is not None and not value > 0:
                raise ValueError(f"config: {name} must be greater than 0, got {value}")


@dataclass(frozen=True, kw_only=True)
class Weighing(_Checked):
    """How weights come from texts: encoders, distances, deviations."""

    measures: tuple[Literal["semantic", "style"], ...] = ("semantic", "style")
    """Measures of deviation; both by default. Their geometric mean is the deviation."""
    semantic: str = "minilm"
    """Semantic encoder: 'minilm' or any sentence-transformers model (paper: jinaai/jina-embeddings-v3)."""
    semantic_prompt: str | None = None
    """Put before each text for the semantic encoder, where the model wants an instruction."""
    semantic_task: str | None = None
    """Task of a semantic encoder that has several (jina-embeddings-v3: text-matching)."""
    style: str = "builtin"
    """Style encoder: 'builtin' or any sentence-transformers model (paper: AnnaWegmann/Style-Embedding)."""
    metric: Literal["cosine", "euclidean"] = "cosine"
    """Distance of two embeddings."""
    combine: Literal["geometric", "arithmetic"] = "geometric"
    """Mean over the measures."""
    normalise_over: Literal["all", "pairs"] = "all"
    """Responses that enter distances, minimum, maximum and mean: all of the group, or those in pairs (the release)."""
    min_deviation: float = 0.0
    """Deviations are raised to at least this (0 to 1) before normalising; keeps winners that weight 0 would drop."""
    release_floor: bool = False
    """Weights are raised to at least 0.2 after normalising."""
    trust_remote_code: bool = False
    """Let an encoder's repository run its own code (jinaai/jina-embeddings-v3 needs it)."""
    embeddings: str | None = None
    """Folder where embeddings are kept, each text's once; by default in the user's cache (~/.cache/ddpo/embeddings)."""


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(Weighing):
    """Groups of responses in, a prepared folder out: import, filter, pair, weigh.

    Example: ddpo prepare groups.jsonl --out prepared --gap 1
    """

    source: str
    """A .jsonl file, a folder of datasets.save_to_disk, or a data set's name."""
    out: str
    """The prepared folder to make."""
    model: str = "smollm2-135m-instruct"
    """Model whose tokenizer and chat template are used: a folder, a hub name or 'smollm2-135m-instruct'."""
    format: Literal["auto", "groups", "preference", "writing_prompts"] = "auto"
    """Row format; 'auto' tells it by the first row's keys."""
    split: str = "train"
    """Split of a named data set."""
    pairs: Literal["gap", "all", "divpo"] = "gap"
    """Rule that makes pairs; rows that are pairs already are taken as given."""
    gap: float = 5.0
    """Score difference that `gap` pairs prefer, in units of the score."""
    max_pairs: int = 100
    """Most pairs of a group under `all`."""
    keep_ties: bool = False
    """Under `all`: pairs of equal scores too (the release)."""
    max_length: int = 2048
    """Most tokens of prompt and response together."""
    too_long: Literal["drop", "truncate"] = "drop"
    """What happens to longer responses; truncate keeps the start (of the tokens: deviation sees the whole text)."""
    holdout: float = 0.0
    """Share of the prompts kept out of the folder and written to its heldout.jsonl (paper: 0.1)."""
    chat_template: str | None = None
    """File with a chat template (Jinja) to use instead of the tokenizer's own."""
    seed: int = 0
    """Seed of pairs and hold-out."""
    overwrite: bool = False
    """Replace an existing folder."""


@dataclass(frozen=True, kw_only=True)
class WeighConfig(Weighing):
    """Weights for data that is there.

    A prepared folder is weighed anew, its pairs as they are; the old weights stay until the new are whole. Any other
    source is written to --out, row by row: each response of a group with its deviation and weight, each preference pair
    with its weight. Embeddings are kept, so that a run that was stopped goes on where it was. Options not given have
    their defaults, not what the folder was weighed with before.

    Example: ddpo weigh pairs.jsonl --out weighted
    """

    source: str
    """A prepared folder; or a .jsonl file, a folder of datasets.save_to_disk, or a data set's name."""
    out: str | None = None
    """What to write where the source is no prepared folder: a .jsonl file, or a folder for datasets.load_from_disk."""
    format: Literal["auto", "groups", "preference", "writing_prompts"] = "auto"
    """Row format; 'auto' tells it by the first row's keys."""
    split: str = "train"
    """Split of a named data set."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(_Checked):
    """Trains a policy on a prepared folder: SFT, DPO, DDPO, ORPO or DORPO.

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
    method: Literal["sft", "dpo", "ddpo", "orpo", "dorpo"] = "ddpo"
    """The loss."""
    beta: float | None = None
    """Strength: of DPO's pull to the reference (default 0.1), or ORPO's odds-ratio term (default 0.25)."""
    nll_mean: Literal["pair", "tokens"] = "pair"
    """ORPO's likelihood term: mean over pairs of token means (paper), or mean over the step's tokens (TRL, release)."""
    nll_tokens: Literal["response", "all"] = "response"
    """ORPO's likelihood term: over the response, or over prompt and response (TRL, release)."""
    dorpo_weight: Literal["outside", "inside"] = "outside"
    """DORPO's weight: outside (paper: w * ORPO) or inside the sigmoid (release)."""
    epochs: int = 1
    """Passes over the pairs (SFT: over the responses)."""
    batch_size: int = 8
    """Most pairs (SFT: responses) of an optimiser step, over all processes. Pairs that share responses stay together:
    where more than this hang together (--pairs all), they are a step."""
    micro_tokens: int | None = None
    """Most packed tokens held at once; a step's batch is split to fit and its gradients are summed. Pairs that hang
    together and do not fit go in two passes: log-probs first, then forward and backward part by part. Default: 4096;
    on a CPU, where larger packs gain no time, what those pairs need, between 1024 and 4096."""
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
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Of the model's weights; auto: bfloat16 on a GPU that has it, else float32."""
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
    """Go on from the run folder's last whole checkpoint; a run that has not begun is begun."""


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(_Checked):
    """Samples responses to prompts, to JSONL in the groups contract.

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
    top_k: int = 50
    """Sample among the k most likely tokens; 0: among all."""
    top_p: float = 0.95
    """Sample among the fewest tokens that hold this probability."""
    repetition_penalty: float = 1.1
    """Divides (multiplies, where negative) the logits of tokens that stand already; 1: none."""
    batch_size: int = 48
    """Responses sampled at a time."""
    chat_template: str | None = None
    """File with a chat template (Jinja) to use instead of the tokenizer's own."""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Of the model's weights; auto: bfloat16 on a GPU that has it, else float32."""
    seed: int = 0
    """Each (prompt, sample) draws from a generator of its own."""
    overwrite: bool = False
    """Replace an existing file."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(_Checked):
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
class DemoConfig(_Checked):
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


@dataclass(frozen=True, kw_only=True)
class TuneConfig(_Checked):
    """Times the kernels' paths on the GPU at hand and remembers the fastest for a model's head.

    Example: ddpo tune --model meta-llama/Llama-3.1-8B
    """

    model: str = "smollm2-135m-instruct"
    """The model whose width and vocabulary are tuned for; its weights are not loaded."""
    rows: int = 8192
    """Rows that reach the head in one step."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Of hidden states and head."""


@dataclass(frozen=True, kw_only=True)
class PlanConfig(TrainConfig):
    """Says what a training run takes before it is run: parameters, memory by part, FLOP and seconds of a step.

    Takes the options of `ddpo train` and a machine. Only the model's config is read, not its weights.

    Example: ddpo plan prepared --method dpo --gpus 8 --gpu-memory 80 --flops 400e12
    """

    data: str | None = None
    """The prepared folder, whose lengths are taken; without one a step's are assumed, see tokens_per_*."""
    out: str | None = None
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
    json: bool = False
    """Print one JSON object instead of the table."""

    def __post_init__(self):
        super().__post_init__()
        if self.gpus < 0:
            raise ValueError(f"config: gpus must be at least 0, got {self.gpus}")
