"""`ddpo reward`: trains a reward model on people's scores, by transformers' Trainer, and measures it on held-out
prompts."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from ddpo import distributed, log
from ddpo.config import RewardConfig
from ddpo.data.groups import Group, held_out, prompt_key
from ddpo.data.importers import identity, read_groups
from ddpo.data.pairs import all_pairs
from ddpo.files import new_file, read_json, write_json
from ddpo.layers import speed_up
from ddpo.loading import add_lora, load_classifier, load_tokenizer, save_model
from ddpo.reward_model import Reader, RewardModel, Target, describe, padded
from ddpo.run import begin_run, check_run

NUM_BINS = 10


def reward(cfg: RewardConfig) -> Path:
    """Trains, measures, and writes the run folder; returns it.

    Raises: ValueError for data without anything to learn, FileExistsError where another run lies in cfg.out.
    """
    _, world = distributed.start()
    if world == 1 and torch.cuda.device_count() > 1:
        raise RuntimeError("reward: this machine has several GPUs; take one (CUDA_VISIBLE_DEVICES=0) or torchrun")
    run = check_run(cfg)
    data = distributed.from_first(inputs(cfg) if distributed.is_first() else {})
    check_data(run, data)
    if distributed.from_first((run / "evaluation.json").is_file()):
        log.console.print(f"{run} is finished already")
        found = read_json(run / "evaluation.json")
        show(found)
        log.answer(cfg, {"run": run, **found})
        return run
    train_groups, stop_groups, eval_groups = split(cfg)
    distributed.barrier()  # all have looked before one writes
    if distributed.is_first():
        begin_run(cfg, run)
        write_json(run / "data.json", data)
    tokenizer = load_tokenizer(cfg.model)
    read = Reader(tokenizer, cfg.max_length)
    target = Target.fit(cfg.target, all_scores(train_groups)) if cfg.loss == "l1" else None
    model = load_classifier(cfg.model, None, "float32", torch.device("cpu"), fresh=True)
    model = add_lora(model, cfg.lora_r, cfg.lora_alpha, 0.0, cfg.lora_targets, cfg.seed, task="SEQ_CLS")
    speed_up(model)
    trainer = Judge(
        model=model,
        args=_arguments(cfg, run, bool(stop_groups)),
        train_dataset=examples(train_groups, read, target, cfg),
        eval_dataset=examples(stop_groups, read, target, cfg) if stop_groups else None,
        data_collator=lambda batch: collate(batch, model.config.pad_token_id),
        callbacks=[EarlyStoppingCallback(1), Tell()] if stop_groups else [],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=_last_checkpoint(run))
    model.eval()
    found = evaluate(RewardModel(model, read)(eval_groups), eval_groups, target)
    if distributed.is_first():
        save_model(model, run, tokenizer, None)
        describe(run / "adapter", cfg.model, cfg.loss, target, cfg.max_length)
        plot(found, run / "calibration.svg")
        write_json(run / "evaluation.json", found)
        show(found)
        log.console.print(f"reward model: {run}")
        log.answer(cfg, {"run": run, **found})
    distributed.barrier()
    return run


# --- data -------------------------------------------------------------------------------------------------


def inputs(cfg: RewardConfig) -> dict[str, str]:
    """What changes when the content of what it reads does."""
    paths = {"source": cfg.source} | ({"eval_data": cfg.eval_data} if cfg.eval_data else {})
    return {name: identity(path, cfg.split) for name, path in paths.items()}


def check_data(run: Path, data: dict) -> None:
    """Raises ValueError where a run that is there was begun on other data."""
    if (run / "data.json").is_file() and read_json(run / "data.json") != data:
        raise ValueError(f"{run} was begun on other data; give another --out")


def split(cfg: RewardConfig) -> tuple[list[Group], list[Group], list[Group]]:
    """Groups to learn from, to stop by (perhaps none) and to measure on, their scored responses alone."""
    groups, measured = scored(read_groups(cfg.source, cfg.format, cfg.split)[0]), None
    if cfg.eval_data:
        measured = scored(read_groups(cfg.eval_data, "auto", cfg.split)[0])
        asked = {prompt_key(group.prompt) for group in measured}
        num, groups = len(groups), [group for group in groups if prompt_key(group.prompt) not in asked]
        log.console.print(f"{num - len(groups)} of {num} prompts are left out: they are in {cfg.eval_data}")
        if not groups or not measured:
            raise ValueError(f"{cfg.eval_data if groups else cfg.source}: no response has a score that is left to use")
    if cfg.holdout == 0 and measured:
        return groups, [], measured
    if len(groups) < 2:
        raise ValueError(f"{cfg.source}: {len(groups)} prompts have scores; wanted 2 or more, one to hold out")
    out = held_out(len(groups), cfg.holdout, cfg.seed, least=1)
    stop = [groups[i] for i in sorted(out)]
    return [group for i, group in enumerate(groups) if i not in out], stop, measured or stop


def scored(groups: list[Group]) -> list[Group]:
    """The groups' scored responses; groups without one are left out."""
    kept = [Group(g.prompt, [r for r in g.responses if r.score is not None], g.where) for g in groups]
    return [group for group in kept if group.responses]


def all_scores(groups: list[Group]) -> np.ndarray:
    """(R,)"""
    return np.array([r.score for group in groups for r in group.responses], float)


def examples(groups: list[Group], read: Reader, target: Target | None, cfg: RewardConfig) -> list[dict]:
    """Of l1: a response's input_ids and its target; of bradley-terry: those of the better one of a pair and of the
    worse."""
    found = []
    for g, group in enumerate(groups):
        ids, scores = read(group), [r.score for r in group.responses]
        if target:
            found += [{"input_ids": i, "label": t} for i, t in zip(ids, target(np.array(scores)), strict=True)]
        else:
            texts, rng = [r.text for r in group.responses], np.random.default_rng([cfg.seed, 0, g])
            pairs = all_pairs(scores, texts, cfg.max_pairs, rng)
            found += [{"input_ids": ids[better], "worse": ids[worse]} for better, worse in pairs]
    if not found:
        raise ValueError(f"{cfg.source}: no prompt has two responses of unequal scores; bradley-terry learns of those")
    return found


def collate(batch: list[dict], pad: int) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask of all, then of the worse where there are any; label (B,) of l1."""
    out = padded([e[name] for name in ("input_ids", "worse") for e in batch if name in e], pad)
    return out | ({"label": torch.tensor([e["label"] for e in batch])} if "label" in batch[0] else {})


# --- training ---------------------------------------------------------------------------------------------


class Judge(Trainer):
    """transformers' Trainer with our two losses."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        label = inputs.pop("label", None)
        outputs = model(**inputs)
        values = outputs.logits[:, 0].float()  # (B,) or (2 B,)
        if label is not None:
            loss = (values - label).abs().mean()
        else:
            loss = -F.logsigmoid(values[: len(values) // 2] - values[len(values) // 2 :]).mean()
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)), None, None


class Tell(TrainerCallback):
    """A line an epoch."""

    def on_evaluate(self, args, state, control, metrics=None, **_):
        log.console.print(f"epoch {state.epoch:.0f}: held-out loss {metrics['eval_loss']:.4f}")


def _arguments(cfg: RewardConfig, run: Path, stops: bool) -> TrainingArguments:
    on_gpu = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(run / "checkpoints"),
        num_train_epochs=cfg.epochs,
        per_device_train_batch_size=cfg.batch_size,
        per_device_eval_batch_size=4 * cfg.batch_size,
        learning_rate=cfg.lr,
        bf16=on_gpu and torch.cuda.is_bf16_supported(),
        use_cpu=not on_gpu,
        seed=cfg.seed,
        eval_strategy="epoch" if stops else "no",
        save_strategy="epoch",
        save_total_limit=2,
        train_sampling_strategy="group_by_length",
        load_best_model_at_end=stops,
        metric_for_best_model="loss",
        prediction_loss_only=True,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )


def _last_checkpoint(run: Path) -> str | None:
    """The newest that is whole: Trainer writes its state last, and a kill may tear that."""
    whole = [state.parent for state in (run / "checkpoints").glob("checkpoint-*/trainer_state.json") if _is_json(state)]
    return str(max(whole, key=lambda folder: int(folder.name.split("-")[1]))) if whole else None


def _is_json(path: Path) -> bool:
    try:
        read_json(path)
    except ValueError:
        return False
    return True


# --- what it is worth -------------------------------------------------------------------------------------


def evaluate(rewards: np.ndarray, groups: list[Group], target: Target | None) -> dict:
    """Of held-out responses (R,), one group after the other: Spearman's rank correlation over all and within prompts
    (mean over those where it is defined), the share of a prompt's unequal pairs in the right order, mean absolute error
    against the targets (l1), and calibration.

    Calibration: responses in NUM_BINS equal parts by reward, mean reward and mean target of each; under bradley-terry
    pairs by their probability, and how often the better one got it.
    """
    scores = all_scores(groups)
    ends = np.cumsum([len(g.responses) for g in groups])[:-1]
    parts = list(zip(np.split(rewards, ends), np.split(scores, ends), strict=True))
    within = [stats.spearmanr(r, s).statistic for r, s in parts if len(set(s)) > 1 and len(set(r)) > 1]
    margins = np.concatenate([_margins(r, s) for r, s in parts])
    found = {
        "num_prompts": len(groups),
        "num_responses": len(scores),
        "spearman": _number(stats.spearmanr(rewards, scores).statistic),
        "spearman_within_prompts": _number(np.mean(within)) if within else None,
        "pair_accuracy": _number(np.mean(margins > 0)) if len(margins) else None,
    }
    if target:
        wanted = target(scores)
        found["mae"] = _number(np.abs(rewards - wanted).mean())
        found["mae_of_the_median"] = _number(np.abs(wanted - np.median(wanted)).mean())
        return {**found, "calibration": _bins(rewards, wanted)}
    probability = 1 / (1 + np.exp(-np.concatenate([margins, -margins])))
    return {**found, "calibration": _bins(probability, np.repeat([1.0, 0.0], len(margins)))}


def _margins(rewards: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Reward of the better response minus the worse one's, of each unequal pair."""
    i, j = np.triu_indices(len(scores), 1)
    return ((rewards[i] - rewards[j]) * np.sign(scores[i] - scores[j]))[scores[i] != scores[j]]


def _bins(predicted: np.ndarray, observed: np.ndarray) -> list[dict]:
    order = np.argsort(predicted, kind="stable")
    parts = [p for p in np.array_split(order, NUM_BINS) if len(p)]
    return [{"predicted": predicted[p].mean(), "observed": observed[p].mean(), "count": len(p)} for p in parts]


def _number(value) -> float | None:
    return float(value) if np.isfinite(value) else None


def plot(found: dict, path: Path) -> None:
    """Predicted against observed, a point a bin, over the line where they are equal."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    predicted, observed = ([b[name] for b in found["calibration"]] for name in ("predicted", "observed"))
    figure, axes = pyplot.subplots(figsize=(4, 4))
    ends = [min(predicted + observed), max(predicted + observed)]
    axes.plot(ends, ends, color="grey", linewidth=1)
    axes.plot(predicted, observed, "o-")
    is_l1 = "mae" in found
    axes.set_xlabel("reward" if is_l1 else "probability of being preferred")
    axes.set_ylabel("people's score, scaled" if is_l1 else "share preferred by people")
    axes.set_title(f"held-out prompts: {found['num_prompts']}, Spearman {found['spearman'] or 0:.2f}")
    with new_file(path) as draft:
        figure.savefig(draft, format="svg", bbox_inches="tight")
    pyplot.close(figure)


def show(found: dict) -> None:
    names = {
        "spearman": "Spearman",
        "spearman_within_prompts": "within prompts",
        "pair_accuracy": "pairs in the right order",
        "mae": "mean absolute error",
        "mae_of_the_median": "of the median instead",
    }
    told = [f"{label} {found[name]:.3f}" for name, label in names.items() if found.get(name) is not None]
    log.console.print(
        f"{found['num_responses']} responses to {found['num_prompts']} held-out prompts: " + ", ".join(told)
    )
