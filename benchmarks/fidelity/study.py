"""The experiment's chain of commands: prepare, reward, train, generate, score, a fold at a time.

Every command takes up what an earlier run of it left, so that a study that was stopped goes on where it was.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ddpo.config import GenerateConfig, PrepareConfig, RewardConfig, ScoreConfig, TrainConfig
from ddpo.data.groups import Group, group_row, read_groups_file
from ddpo.files import new_file
from ddpo.generate import generate
from ddpo.prepare import prepare
from ddpo.reward import reward
from ddpo.score import score
from ddpo.train import train

TEMPLATE = str(Path(__file__).parent / "template.jinja")
FOLDS = 3
MOST_RESPONSES, MOST_RATINGS = 24, 60  # of a prompt: for the policies, for the reward model
NUM_SAMPLES, NEW_TOKENS = 16, 32
SFT = {"lr": 5e-4, "epochs": 2, "batch_size": 16}
PREFERENCE = {"lr": 5e-4, "max_steps": 56, "epochs": 50, "batch_size": 8, "warmup_steps": 5}
REWARD = {"target": "linear", "lr": 5e-4, "epochs": 3, "batch_size": 16, "holdout": 0.0}
HOT = 1.3  # temperature of the baseline that raises diversity without training

PREPARED = {  # folder -> settings beside those that all share
    "both": {},
    "semantic": {"measures": ("semantic",)},
    "style": {"measures": ("style",)},
    "divpo": {"pairs": "divpo"},
}


@dataclass(frozen=True)
class Method:
    """data: a key of PREPARED; start: the run whose adapter it goes on from."""

    method: str
    data: str
    start: str | None = "SFT"


METHODS = {
    "SFT": Method("sft", "both", None),
    "DPO": Method("dpo", "both"),
    "DDPO-semantic": Method("ddpo", "semantic"),
    "DDPO-style": Method("ddpo", "style"),
    "DDPO-both": Method("ddpo", "both"),
    "DivPO": Method("dpo", "divpo"),
    "ORPO": Method("orpo", "both", None),
    "DORPO-both": Method("dorpo", "both", None),
}
SAMPLED = {"base": (None, 1.0), **{name: (name, 1.0) for name in METHODS}, f"DPO, T {HOT}": ("DPO", HOT)}
PEOPLE = "people"
WATCHED = "DPO"  # the run whose held-out pairs are measured, before and after


def run_fold(data: Path, fold: int, out: Path, methods: list[str]) -> None:
    """Everything of a fold, into out/fold<fold>."""
    here = out / f"fold{fold}"
    write_fold(data, fold, here)
    prepare_all(here, fold)
    reward_model = reward(
        RewardConfig(
            source=str(here / "ratings.jsonl"),
            eval_data=str(here / "heldout-ratings.jsonl"),
            out=str(here / "reward"),
            seed=fold,
            resume=True,
            **REWARD,
        )
    )
    score_file(here / f"{PEOPLE}.jsonl", reward_model)
    for name, (run, temperature) in SAMPLED.items():
        if run in methods and METHODS[run].start:
            train(train_config(here, METHODS[run].start, fold))
        if run in methods:
            train(train_config(here, run, fold))
        if run is None or run in methods:
            sample(here, name, run, temperature, fold)
            score_file(here / f"{_file(name)}.jsonl", reward_model)


def write_fold(data: Path, fold: int, here: Path) -> None:
    """The fold's groups: train.jsonl, ratings.jsonl and of the held-out prompts heldout.jsonl, heldout-ratings.jsonl
    and people.jsonl (as many answers as a model gives)."""
    groups = read_groups_file(str(data))
    held_out = set(np.random.default_rng(0).permutation(len(groups))[fold::FOLDS].tolist())
    files = {
        "train": (False, MOST_RESPONSES),
        "ratings": (False, MOST_RATINGS),
        "heldout": (True, MOST_RESPONSES),
        "heldout-ratings": (True, MOST_RATINGS),
        PEOPLE: (True, NUM_SAMPLES),
    }
    for name, (held, most) in files.items():
        rows = [group_row(draw(g, i, fold, most)) for i, g in enumerate(groups) if (i in held_out) == held]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path = here / f"{name}.jsonl"
        if not path.exists() or path.read_text() != text:
            with new_file(path) as draft:
                draft.write_text(text)


def draw(group: Group, index: int, fold: int, most: int) -> Group:
    """At most so many of the group's responses, the same first ones for every `most`."""
    order = np.random.default_rng([fold, index]).permutation(len(group.responses))[:most]
    return Group(group.prompt, [group.responses[i] for i in sorted(order)], group.where)


def prepare_all(here: Path, fold: int) -> None:
    usual = {"gap": 1.0, "chat_template": TEMPLATE, "seed": fold, "resume": True}
    for name, settings in PREPARED.items():
        prepare(PrepareConfig(source=str(here / "train.jsonl"), out=str(here / name), **usual, **settings))
    prepare(PrepareConfig(source=str(here / "heldout.jsonl"), out=str(here / "heldout"), **usual))


def train_config(here: Path, run: str, fold: int) -> TrainConfig:
    """All preference runs take the same number of steps."""
    method = METHODS[run]
    settings = SFT if method.method == "sft" else PREFERENCE
    if run == WATCHED:
        settings = settings | {"eval_data": str(here / "heldout"), "eval_every": PREFERENCE["max_steps"]}
    return TrainConfig(
        data=str(here / method.data),
        out=str(here / "runs" / run),
        method=method.method,
        adapter=str(here / "runs" / method.start / "adapter") if method.start else None,
        seed=fold,
        save_every=30,
        resume=True,
        **settings,
    )


def sample(here: Path, name: str, run: str | None, temperature: float, fold: int) -> None:
    generate(
        GenerateConfig(
            prompts=str(here / f"{PEOPLE}.jsonl"),
            out=str(here / f"{_file(name)}.jsonl"),
            adapter=str(here / "runs" / run / "adapter") if run else None,
            num_samples=NUM_SAMPLES,
            max_new_tokens=NEW_TOKENS,
            temperature=temperature,
            batch_size=112,
            chat_template=TEMPLATE,
            seed=fold,
            resume=True,
        )
    )


def score_file(path: Path, reward_model: Path) -> None:
    score(
        ScoreConfig(
            responses=str(path),
            reward=str(reward_model),
            out=str(path.with_stem(f"{path.stem}-scored")),
            resume=True,
        )
    )


def fold_groups(out: Path, name: str, fold: int) -> list[Group]:
    """A method's responses to a fold's held-out prompts, with their rewards."""
    return read_groups_file(str(out / f"fold{fold}" / f"{_file(name)}-scored.jsonl"))


def _file(name: str) -> str:
    return name.lower().replace(", ", "-").replace(" ", "")
