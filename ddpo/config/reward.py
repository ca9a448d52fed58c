"""Settings of the reward model: its training, and scoring with it."""

from dataclasses import dataclass
from typing import Literal

from ddpo.config.checked import Checked, DType


@dataclass(frozen=True, kw_only=True)
class RewardConfig(Checked):
    """Trains a reward model: a sequence classifier that gives a response one number, from people's scores.

    Prompts are held out, and what it makes of them is measured: rank correlation, error, calibration. A run that was
    stopped goes on from its last checkpoint with --resume.

    Example: ddpo reward groups.jsonl --out runs/reward --model google/gemma-2-2b
    """

    source: str
    """A .jsonl file, a folder of datasets.save_to_disk, or a data set's name; responses without a score are left
    out."""
    out: str
    """The run folder to make: config, card, checkpoints, adapter/, evaluation.json and calibration.svg."""
    model: str = "smollm2-135m-instruct"
    """Backbone: a folder, a hub name or 'smollm2-135m-instruct' (paper: google/gemma-2-2b)."""
    format: Literal["auto", "groups", "preference", "writing_prompts"] = "auto"
    """Row format; 'auto' tells it by the first row's keys."""
    split: str = "train"
    """Split of a named data set."""
    loss: Literal["l1", "bradley-terry"] = "l1"
    """l1: distance to the response's target (paper); bradley-terry: -log sigmoid of the reward difference of a prompt's
    better and worse response."""
    target: Literal["votes", "linear"] = "votes"
    """From score to target in [-1, 1]: votes through an iterated logarithm (paper), or as they are. Of l1 alone."""
    max_pairs: int = 100
    """Most pairs of a prompt under bradley-terry."""
    max_length: int = 2048
    """Most tokens of prompt and response together; longer responses lose their end."""
    holdout: float = 0.1
    """Share of the prompts held out, at least one: training stops after a pass that does not better their loss, and the
    best is kept. 0 (with eval_data): none, all passes are made."""
    eval_data: str | None = None
    """Groups to measure on (`ddpo prepare`'s heldout.jsonl), whose prompts are left out of the source, so that the
    reward model has not seen what the trained models are measured by. Without, it is measured on the prompts that
    stopped it, which flatters it a little."""
    epochs: int = 3
    """Most passes over the data."""
    batch_size: int = 4
    """Responses (bradley-terry: pairs) of a step and process."""
    lr: float = 3e-5
    """Peak learning rate, falling linearly to 0."""
    lora_r: int = 16
    """Rank."""
    lora_alpha: int = 32
    """Scale."""
    lora_targets: tuple[str, ...] = ("q_proj", "v_proj")
    """Names of the linear layers that get an adapter, or all-linear."""
    seed: int = 0
    """Seed of hold-out, pairs, adapter and order."""
    resume: bool = False
    """Go on from the run folder's last checkpoint; a finished run is left as it is."""
    json: bool = False
    """Print what the reward model is worth as one JSON object instead of text."""


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(Checked):
    """Scores responses with a reward model: JSONL of groups in, the same with each response's reward out.

    Example: ddpo score after.jsonl --reward runs/reward --out after-scored.jsonl
    """

    responses: str
    """JSONL in the groups contract, as `ddpo generate` writes it."""
    out: str
    """JSONL file to write."""
    reward: str
    """Run folder of `ddpo reward`, or any sequence classifier of one output with a chat template, by folder or hub
    name."""
    column: str = "reward"
    """Key of each response that takes its reward; 'score' makes a data set to prepare pairs from."""
    max_tokens: int = 8192
    """Padded tokens scored at once."""
    max_length: int = 2048
    """Most tokens of prompt and response, where the reward model does not say."""
    dtype: DType = "auto"
    """Of the weights; auto: bfloat16 on a GPU that has it, else float32."""
    resume: bool = False
    """Keep a file that is there and was made from the same; scores of a run that was stopped are taken up anyway."""
    overwrite: bool = False
    """Replace an existing file."""
    json: bool = False
    """Print number and mean of the rewards as one JSON object instead of text."""
