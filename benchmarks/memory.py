"""What `ddpo plan` says of this CPU's memory beside what two training steps take. Writes results/memory.json.

python -m benchmarks.memory [--quick] [--write]
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks import tables
from benchmarks.measure import resident, setting, tell
from ddpo import distributed
from ddpo.config import PlanConfig, PrepareConfig, TrainConfig
from ddpo.loading import PACKAGED, find_model
from ddpo.ops import cpp
from ddpo.plan import plan
from ddpo.prepare import prepare
from ddpo.settings import parse, to_yaml
from ddpo.state import setup
from ddpo.train import step

ROOT = Path(__file__).parent.parent
NUM_PROMPTS = 4
TRAINED = {"LoRA": {}, "LoRA, all linear": {"lora_targets": ("all-linear",)}, "all weights": {"lora": False}}


def random_llama(folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Saves 75 million random weights (SmolLM2's vocabulary); their tokenizer is the caller's affair."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "vocab_size": 49152}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    config = AutoConfig.for_model("llama", **sizes, **heads, tie_word_embeddings=False)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)


def prepared(folder: Path, model: str) -> str:
    """A few of the demo's prompts with their stories, cut to 256 tokens, in pairs that share none."""
    lines = (ROOT / "ddpo" / "demo" / "stories.jsonl").read_text().splitlines(keepends=True)[:NUM_PROMPTS]
    source = folder / "stories.jsonl"
    source.write_text("".join(lines))
    options = {"measures": ("style",), "gap": 1.0, "max_length": 256, "too_long": "truncate"}
    out = folder / "prepared"
    prepare(PrepareConfig(source=str(source), out=str(out), model=model, **options))
    return str(out)


def compare(configs: list[TrainConfig], folder: Path) -> list[dict]:
    """Planned and measured MiB of each: all plans in one fresh process, each training in one of its own."""
    files = []
    for i, cfg in enumerate(configs):
        files.append(folder / f"case{i}.yaml")
        files[-1].write_text(to_yaml(cfg))
    plans = [json.loads(line) for line in _run("--plan", *files)]
    rows = []
    for file, planned in zip(files, plans, strict=True):
        (measured,) = _run("--train", file)
        parts = {name: round(mib, 1) for name, mib in planned["memory_mib"].items()}
        ours = planned["peak_mib"]
        row = {"planned_mib": round(ours, 1), "measured_mib": round(float(measured), 1), "parts_mib": parts}
        rows.append(row | {"error": round(ours / float(measured) - 1, 4), "pack_tokens": planned["pack_tokens"]})
    return rows


def _run(*arguments) -> list[str]:
    command = [sys.executable, "-m", "benchmarks.memory", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    return [line.removeprefix("> ") for line in done.stdout.splitlines() if line.startswith("> ")]


def train(file: str) -> None:
    """Two steps: in the second AdamW's moments stand from the start."""
    cfg = parse(TrainConfig, ["--config", file], "memory")
    state = setup(cfg, *distributed.start(), Path(cfg.out))
    for _ in range(2):
        step(state)
    print(f"> {resident('VmHWM') / 2**20}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer cases")
    parser.add_argument("--write", action="store_true", help="results/memory.json")
    parser.add_argument("--plan", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--train", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.plan:
        for file in args.plan:
            cfg = parse(PlanConfig, ["--config", file, "--json", "--flops", "1e11"], "memory")
            print(f"> {json.dumps(plan(cfg))}")
    elif args.train:
        train(args.train)
    else:
        with tempfile.TemporaryDirectory() as folder:
            report(Path(folder), args.quick, args.write)


def report(folder: Path, quick: bool, write: bool) -> None:
    from transformers import AutoTokenizer

    models = {"SmolLM2-135M": PACKAGED}
    for name, dtype in {"random llama, 75M": torch.float32, "the same in a bfloat16 file": torch.bfloat16}.items():
        models[name] = str(folder / str(dtype))
        random_llama(Path(models[name]), dtype)
        AutoTokenizer.from_pretrained(find_model(PACKAGED)).save_pretrained(models[name])
    data = prepared(folder, PACKAGED)
    cases, configs = [], []
    for (name, model), (what, trained), checkpoints, tokens in itertools.product(
        models.items(), TRAINED.items(), (False, True), (512, 1536)
    ):
        few = what != "LoRA" or checkpoints
        if (quick and (checkpoints or tokens > 512)) or ("file" in name and few) or ("linear" in what and checkpoints):
            continue
        cases.append({"model": name, "trained": what, "checkpointing": checkpoints, "micro_tokens": tokens})
        options = {"micro_tokens": tokens, "activation_checkpointing": checkpoints, **trained}
        shared = {"data": data, "model": model, "method": "orpo", "batch_size": 6}
        configs.append(TrainConfig(out=str(folder / "none"), **shared, **options))
    rows = [case | row for case, row in zip(cases, compare(configs, folder), strict=True)]
    result = {**setting(), "cpp": cpp.is_built, "cases": rows}
    tell(result, tables.memory(result), "memory", write)


if __name__ == "__main__":
    main()
