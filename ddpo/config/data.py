"""Settings of what makes data: pairs and weights."""

from dataclasses import dataclass
from typing import Literal

from ddpo.config.checked import Checked


@dataclass(frozen=True, kw_only=True)
class Encoding(Checked):
    """How texts become embeddings, and where these are kept."""

    measures: tuple[Literal["semantic", "style"], ...] = ("semantic", "style")
    """Measures of deviation and diversity; both by default. Deviation is their geometric mean."""
    semantic: str = "minilm"
    """Semantic encoder: 'minilm' or any sentence-transformers model (paper: jinaai/jina-embeddings-v3)."""
    semantic_prompt: str | None = None
    """Put before each text for the semantic encoder, where the model wants an instruction."""
    semantic_task: str | None = None
    """Task of a semantic encoder that has several (jina-embeddings-v3: text-matching)."""
    style: str = "builtin"
    """Style encoder: 'builtin' or any sentence-transformers model (paper: AnnaWegmann/Style-Embedding)."""
    trust_remote_code: bool = False
    """Let an encoder's repository run its own code (jinaai/jina-embeddings-v3 needs it)."""
    embeddings: str | None = None
    """Folder where embeddings are kept, each text's once; by default in the user's cache (~/.cache/ddpo/embeddings)."""


@dataclass(frozen=True, kw_only=True)
class Weighing(Encoding):
    """How weights come from texts: encoders, distances, deviations."""

    metric: Literal["cosine", "euclidean"] = "cosine"
    """Distance of two embeddings."""
    weighting: Literal["deviation", "crpo"] = "deviation"
    """A pair's weight: its chosen response's deviation over the group's mean (DDPO), or CrPO's (arXiv 2505.14442): over
    the measures, crpo_scales times how much further off the chosen response is than the rejected, where it is; not mean
    one, and combine and the floors do not enter."""
    crpo_scales: tuple[float, ...] = ()
    """CrPO's factor of each of the measures, in their order; none given: one over their number."""
    combine: Literal["geometric", "arithmetic"] = "geometric"
    """Mean over the measures."""
    normalise_over: Literal["all", "pairs"] = "all"
    """Responses that enter distances, minimum, maximum and mean: all of the group, or those in pairs (the release)."""
    min_deviation: float = 0.0
    """Deviations are raised to at least this (0 to 1) before normalising; keeps winners that weight 0 would drop."""
    release_floor: bool = False
    """Weights are raised to at least 0.2 after normalising."""

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.min_deviation <= 1:
            raise ValueError(f"config: min_deviation must lie in [0, 1], got {self.min_deviation}")
        if self.crpo_scales and self.weighting != "crpo":
            raise ValueError("config: crpo_scales are for weighting 'crpo'")
        if self.crpo_scales and (len(self.crpo_scales) != len(self.measures) or min(self.crpo_scales) < 0):
            raise ValueError(
                f"config: crpo_scales must be a number of at least 0 for each of the {len(self.measures)} measures, "
                f"got {list(self.crpo_scales)}"
            )


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(Weighing):
    """Groups of responses in, a prepared folder out: import, filter, pair, weigh.

    The source is read as a stream and cut into parts; a part that is tokenised lies in a hidden folder beside the
    output until that is whole, and embeddings are kept. So the same command goes on where it was killed. Several
    processes share the work: torchrun --nproc-per-node 4 -m ddpo prepare ...

    Example: ddpo prepare groups.jsonl --out prepared --gap 1
    """

    source: str
    """A .jsonl file, a folder of datasets.save_to_disk, or a data set's name (read as a stream). Preference rows are
    merged by prompt in memory; rows of groups and of r/WritingPrompts are not held."""
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
    max_responses: int | None = None
    """Most responses of a group. Pairs are made over the whole group and kept, in random order, while the responses
    they use number at most this; room that is left is filled with others at random."""
    top_scores: bool = False
    """Under max_responses keep the pairs of the best-scored chosen first, and of these those of the better rejected."""
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
    resume: bool = False
    """Where the folder is there and was made of the same data by the same settings: say so and leave it. Other settings
    are an error. What a killed command left is taken up without this."""
    dry_run: bool = False
    """Show the settings and one tokenised sample of the first groups; write nothing and load no encoder."""
    json: bool = False
    """Print the summary as one JSON object instead of text."""

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.holdout < 1:
            raise ValueError(f"config: holdout must lie in [0, 1), got {self.holdout}")
        if self.max_responses is not None and self.max_responses < 2:
            raise ValueError(f"config: max_responses must be at least 2, got {self.max_responses}")
        if self.top_scores and self.max_responses is None:
            raise ValueError("config: top_scores is of groups that are cut; give max_responses too")


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
    json: bool = False
    """Print what the weights are like as one JSON object instead of text."""
