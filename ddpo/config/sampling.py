"""Settings of sampling responses and measuring them."""

from dataclasses import dataclass

from ddpo.config.checked import Checked, DType
from ddpo.config.data import Encoding


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
    dtype: DType = "auto"
    """Of the model's weights; auto: bfloat16 on a GPU that has it, else float32."""
    seed: int = 0
    """Each (prompt, sample) draws from a generator of its own."""
    resume: bool = False
    """Keep a file that is there and was made from the same; samples of a run that was stopped are taken up anyway."""
    overwrite: bool = False
    """Replace an existing file."""
    json: bool = False
    """Print what was sampled as one JSON object instead of text."""


@dataclass(frozen=True, kw_only=True)
class Measuring(Encoding):
    """What is measured of responses, and how."""

    quality: str | None = None
    """Key of each response that says how good it is (reward, score, ...); by default 'reward' where all have one."""
    quality_threshold: float | None = None
    """Least quality of a good response; by default the median of all files' responses together."""
    text_measures: bool = True
    """Compression ratio, homogenisation (slow for long texts), n-gram diversity and self-repetition."""
    rouge_pairs: int = 1000
    """Most pairs of a prompt's responses that homogenisation compares, drawn at random where there are more."""
    release_compat: bool = False
    """Compression ratio, homogenisation and n-gram diversity as the released code has them (gzipped twice, ...)."""
    distinct_threshold: float = 0.25
    """Two responses count as the same to distinct_k when their semantic cosine distance is under this."""
    model: str | None = None
    """Starting model; where given, length in tokens and the mean log-prob under it are measured too."""
    chat_template: str | None = None
    """File with a chat template (Jinja) to use instead of the tokenizer's own."""
    seed: int = 0
    """Seed of resampling and of homogenisation's pairs."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Measuring):
    """Measures quality, diversity, length and likelihood of responses; with --before, what changed.

    Files hold the same prompts in the same order; numbers of responses may differ. Means over prompts with bootstrap
    95 % intervals; differences to --before are paired by prompt, p by a sign-flip test. Diversity is the mean pairwise
    cosine distance of a prompt's responses, also among good ones (--quality-threshold) and with each response cut to
    the smallest of the files' median lengths in words.

    Example: ddpo evaluate dpo.jsonl ddpo.jsonl --before before.jsonl --out numbers.json
    """

    responses: tuple[str, ...]
    """JSONL of responses, as `ddpo generate` writes it; people's answers in the groups contract serve too."""
    before: str | None = None
    """JSONL of the same prompts' responses, the baseline that each other file is compared with."""
    out: str | None = None
    """JSON file for the numbers, per prompt and averaged; an older one is replaced."""
    export_annotation: str | None = None
    """Folder to make with blinded sets of two files' responses for people to compare: `ddpo annotate` by its
    defaults."""
    json: bool = False
    """Print the numbers as JSON instead of a table."""

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.responses, str):  # one file, named from Python
            object.__setattr__(self, "responses", (self.responses,))
        if self.export_annotation and len(self.files) != 2:
            raise ValueError(f"evaluate: --export-annotation wants two files to compare, got {list(self.files)}")

    @property
    def files(self) -> tuple[str, ...]:
        """All files of responses, the baseline first."""
        return (*((self.before,) if self.before else ()), *self.responses)


@dataclass(frozen=True, kw_only=True)
class AnnotateConfig(Checked):
    """Writes blinded side-by-side sets of two files' responses for people to compare.

    A folder with sets.csv for the annotators (a row a prompt: set A, set B, empty columns for answers A, B or tie) and
    key.json, which says which file was which side and which `ddpo winrate` wants; keep it from the annotators. Order of
    rows and sides is drawn at random, each file is set A as often as B.

    Example: ddpo annotate ddpo.jsonl dpo.jsonl --out comparison --num-prompts 50
    """

    responses: tuple[str, ...]
    """Two JSONL files of responses to the same prompts."""
    out: str
    """Folder to make."""
    num_responses: int = 4
    """Responses of a set, drawn at random where a prompt has more (paper: 4)."""
    num_prompts: int | None = None
    """Prompts to compare, drawn at random; by default all."""
    questions: tuple[str, ...] = ("more_diverse", "better_quality")
    """Columns that annotators fill in."""
    seed: int = 0
    """Seed of prompts, responses, order and sides."""
    overwrite: bool = False
    """Replace an existing folder."""
    json: bool = False
    """Print what was drawn as one JSON object instead of text."""


@dataclass(frozen=True, kw_only=True)
class WinrateConfig(Checked):
    """Win rates from people's answers to the sets of `ddpo annotate`.

    Answers are A, B or tie, in any case; empty cells are left out and counted. Several annotators: a file each, or a
    column `annotator`. The win rate leaves out ties; its 95 % interval is Wilson's, and where a prompt has several
    answers a bootstrap over prompts.

    Example: ddpo winrate anna.csv ben.csv --key comparison/key.json
    """

    answers: tuple[str, ...]
    """CSV files with the answers filled in."""
    key: str
    """The key.json that `ddpo annotate` wrote with the sets."""
    out: str | None = None
    """JSON file for the numbers; an older one is replaced."""
    json: bool = False
    """Print the numbers as JSON instead of a table."""
    seed: int = 0
    """Seed of the bootstrap."""


@dataclass(frozen=True, kw_only=True)
class DoctorConfig(Checked):
    """Looks over the installation: versions, kernels, memory, disk, caches, and what to do where something lacks.

    Ends with exit code 1 where something that is required is broken.

    Example: ddpo doctor
    """

    json: bool = False
    """Print the findings as one JSON object instead of a table."""


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
    json: bool = False
    """Print the evaluation's numbers as one JSON object instead of text."""
