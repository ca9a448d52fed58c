"""`ddpo export`: a run's model in a folder that others load, with a model card."""

import json
import re
import shutil
from pathlib import Path

import torch
import yaml

from ddpo import log
from ddpo.config import ExportConfig
from ddpo.files import new_folder, read_json
from ddpo.loading import PACKAGED, load_model, load_tokenizer, pick_dtype, read_config
from ddpo.run import read_journal

PAPER = "https://arxiv.org/abs/2503.17126"
KEPT = ("method", "beta", "lr", "epochs", "batch_size", "lora", "lora_r", "lora_alpha", "lora_targets", "seed")
FIGURES = ("loss", "rewards/margins", "rewards/accuracies", "weight")
HUB_NAMES = {PACKAGED: "HuggingFaceTB/SmolLM2-135M-Instruct"}


def export(cfg: ExportConfig) -> Path:
    """Writes the folder and returns its path.

    Raises: ValueError where the run has no model yet or an evaluation is none, FileExistsError for a folder that is
    there. Nothing is left where it fails.
    """
    run, out = Path(cfg.run), Path(cfg.out)
    adapter, model = run / "adapter", run / "model"
    if not (run / "config.yaml").is_file() or not (adapter.is_dir() or model.is_dir()):
        raise ValueError(
            f"export: {run} is no finished run (config.yaml, and adapter/ or model/); finish it by --resume"
        )
    settings = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    with new_folder(out, cfg.overwrite) as draft:
        if adapter.is_dir() and cfg.merge:
            merge(settings["model"], adapter, cfg.dtype, draft)
        else:
            shutil.copytree(adapter if adapter.is_dir() else model, draft, dirs_exist_ok=True)
        kind = "adapter" if adapter.is_dir() and not cfg.merge else "model"
        (draft / "README.md").write_text(card(run, settings, kind, cfg.evaluation), encoding="utf-8")
    log.console.print(f"{kind}: {out}")
    log.answer(cfg, {"kind": kind, "folder": out})
    return out


def merge(base: str, adapter: Path, dtype: str, out: Path) -> None:
    """Writes the base model with the adapter in its weights: the sum in float32, rounded once to dtype."""
    wanted = read_config(base).dtype if dtype == "auto" else pick_dtype(dtype, torch.device("cpu"))
    model = load_model(base, str(adapter), "float32", torch.device("cpu"))
    model.to(wanted or torch.float32).save_pretrained(out)
    load_tokenizer(str(adapter)).save_pretrained(out)


# --- the card ---------------------------------------------------------------------------------------------


def card(run: Path, settings: dict, kind: str, evaluation: str | None = None) -> str:
    """Markdown with the front matter that the Hub reads; values that come from files stand in YAML, in a fence."""
    base, method = HUB_NAMES.get(settings["model"], settings["model"]), settings["method"]
    is_here = Path(base).exists()  # a folder's name means nothing elsewhere, and the Hub does not take it
    is_own, settings = ":" in method, {**settings, "method": method.rpartition("/")[2]}  # FILE.py:NAME
    front = {} if is_here else {"base_model": base}
    front |= {"library_name": "peft" if kind == "adapter" else "transformers", "pipeline_tag": "text-generation"}
    front |= {"tags": ["ddpo", *([] if is_own else [method]), "preference", "creative-writing"]}
    base = Path(base).name if is_here else base
    told = _plain(settings["method"]) if is_own else method.upper()
    parts = [f"---\n{yaml.safe_dump(front, sort_keys=False)}---", f"# {_plain(run.resolve().name)}"]
    parts.append(
        f"{_plain(base)}, trained with {told} by [ddpo]({PAPER}): each preference pair weighs as "
        "much as its chosen response deviates from the other responses to its prompt."
        if method in ("ddpo", "dorpo")
        else f"{_plain(base)}, trained with {told} by ddpo."
    )
    parts += ["## Load it", _fence(LOAD[kind].format(base=base, here="FOLDER"), "python")]
    parts += ["## Data", _fence(_yaml(_data(Path(settings["data"]))), "yaml")]
    parts += ["## Settings", _fence(_yaml({name: settings.get(name) for name in KEPT}), "yaml")]
    if numbers := _numbers(run, evaluation):
        parts += ["## Numbers", _fence(_yaml(numbers), "yaml")]
    if (run / "card.json").is_file():
        parts += ["## Made with", _fence(_yaml(read_json(run / "card.json")), "yaml")]
    return "\n\n".join(parts) + "\n"


LOAD = {
    "model": """from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("{here}"), AutoTokenizer.from_pretrained("{here}")""",
    "adapter": """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), "{here}")
tokenizer = AutoTokenizer.from_pretrained("{here}")""",
}


def _data(folder: Path) -> dict:
    """What is known of the data where they still lie, else their name."""
    if not (folder / "manifest.json").is_file():
        return {"prepared": folder.name}
    manifest = read_json(folder / "manifest.json")
    summary, made = manifest["summary"], manifest["settings"]
    counts = {name: summary.get(name) for name in ("prompts", "responses", "pairs")}
    weights = {name: summary.get("weights", {}).get(name) for name in ("mean", "zero_share", "effective_sample_size")}
    rules = {name: made.get(name) for name in ("source", "pairs", "gap", "measures", "combine", "semantic", "style")}
    rules["source"] = Path(str(rules["source"])).name
    return {**rules, **counts, "weights": weights, "content_hash": manifest["content_hash"]}


def _numbers(run: Path, evaluation: str | None) -> dict:
    found = {}
    for name, prefix in (("metrics", ""), ("eval", "eval_")):
        for row in read_journal(run / f"{name}.jsonl")[-1:]:
            figures = {figure: row[prefix + figure] for figure in FIGURES if prefix + figure in row}
            found["last step" if name == "metrics" else "held-out pairs"] = {"step": row["step"], **figures}
    if evaluation:
        result = read_json(evaluation)
        if not isinstance(result, dict) or "mean" not in result:
            raise ValueError(f"export: {evaluation} holds no numbers of `ddpo evaluate --out` (no 'mean')")
        found["evaluation"] = {"prompts": result["num_prompts"], **result["mean"]}
    return found


def _yaml(value) -> str:
    plain = json.loads(json.dumps(value, default=str))
    text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
    return text.rstrip()


def _fence(text: str, language: str) -> str:
    """A block whose fence is longer than any in the text."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _plain(name: str) -> str:
    """A name as one line of Markdown in which nothing is read as markup."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>#|!" else c for c in " ".join(str(name).split()))
