"""How a training step's time grows with its tokens, and the head's memory with the vocabulary.

python -m benchmarks.scaling --write           # and results/scaling.json
python -m benchmarks.scaling --quick           # a tiny model of random weights, two points each
python -m benchmarks.plot                      # results/scaling.svg; wants matplotlib

Time: ddpo.train's step on pairs of 512-token sequences, in packs as it makes them, batches interleaved. Memory:
the weighted DPO loss of 1,024 rows forward and backward, as the trainer calls it, beside eager's; D 576, random head.
"""

import argparse
import contextlib
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks import measure, ops, states, tables
from benchmarks.peers import CPU, Ours
from ddpo.config import PrepareConfig, TrainConfig
from ddpo.data.groups import write_jsonl
from ddpo.data.tokens import ChatTokens
from ddpo.loading import PACKAGED, find_model
from ddpo.model import pick_drop_below
from ddpo.prepare import prepare

LENGTH, PAIRS = 512, (1, 2, 4, 8, 16)  # tokens of a sequence; pairs of a batch
ROWS, WIDTH, VOCABULARIES = 1024, 576, tuple(2**k for k in range(13, 19))


def make_folder(root: Path, source: Path, model: str, num_pairs: int) -> tuple[str, Path]:
    """Prompts with two stories each that fill LENGTH tokens: one pair a prompt, cut to it -> source, folder."""
    tokens, rows = ChatTokens.load(model), []
    name, groups = states.stories(source)
    for prompt, texts in groups:
        prompt_ids, ids = tokens.group_ids(prompt, texts, name)
        long = [t for t, i in zip(texts, ids, strict=True) if len(prompt_ids) + len(i) >= LENGTH][:2]
        if len(long) == 2:
            responses = [{"text": t, "score": s} for s, t in enumerate(long)]
            rows.append({"prompt": prompt, "responses": responses})
    if len(rows) < num_pairs:
        raise ValueError(f"{name}: wanted {num_pairs} prompts with two stories of {LENGTH} tokens, got {len(rows)}")
    write_jsonl(root / "long.jsonl", rows[:num_pairs])
    rule = {"gap": 1.0, "measures": ("style",), "max_length": LENGTH, "too_long": "truncate"}
    with contextlib.redirect_stdout(sys.stderr):
        cfg = PrepareConfig(source=str(root / "long.jsonl"), out=str(root / "long"), model=model, **rule)
        return name, prepare(cfg)


def time(root: Path, source: Path, model: str, pairs: tuple[int, ...], rounds: int) -> dict:
    name, folder = make_folder(root, source, model, max(pairs))
    settings = {"data": str(folder), "out": str(root / "no-run"), "model": model, "dtype": "float32"}
    runs, tokens = {}, {}
    for n in pairs:
        with contextlib.redirect_stdout(sys.stderr):
            ours = Ours(TrainConfig(batch_size=n, **settings), root / "no-run")
        work = ours.work(0)
        runs[n], tokens[n] = partial(ours.step, work), work.num_tokens
        ours.step(work)
    taken = measure.interleaved(runs, rounds, CPU)
    x, y = (np.array([float(f(n)) for n in pairs]) for f in (tokens.get, lambda n: np.median(taken[n])))
    slope, start = np.polyfit(x, y, 1, w=1 / y)  # least squares of relative residuals
    return {
        "data": name,
        "points": [{"tokens": tokens[n], "seconds": measure.spread(taken[n])} for n in pairs],
        "fit": {"seconds_per_1k_tokens": measure.short(1000 * slope), "seconds_at_0": measure.short(start)},
        "residuals": [measure.short(r) for r in (y - start - slope * x) / y],
        "last_over_first_per_token": measure.short(y[-1] / y[0] / (x[-1] / x[0])),
    }


def memory(rows: int, vocabularies: tuple[int, ...]) -> dict:
    drop_below = pick_drop_below(None, CPU, torch.float32)
    sides = {"eager": ops.by_token(ops.eager), "linear_logp": ops.by_token(ops.ours(drop_below=drop_below))}
    points = []
    for V in vocabularies:
        case = states.random(rows, WIDTH, V, 4, CPU, torch.float32)
        points.append({"V": V, **{name: ops.peak(side, case, "frozen") for name, side in sides.items()}})
    return {"rows": rows, "D": WIDTH, "drop_below": drop_below, "points": points}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", type=Path, default=states.STORIES, help="groups with long responses")
    parser.add_argument("--quick", action="store_true", help="a tiny model of random weights, two points each")
    parser.add_argument("--write", action="store_true", help="results/scaling.json")
    args = parser.parse_args()
    result = measure.setting()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        model = states.tiny_model(root / "tiny") if args.quick else find_model(PACKAGED)
        result["model"] = "tiny, random" if args.quick else "SmolLM2-135M-Instruct"
        result["time"] = time(
            root, args.data, model, PAIRS[:2] if args.quick else PAIRS, 2 if args.quick else args.rounds
        )
    result["memory"] = memory(64 if args.quick else ROWS, VOCABULARIES[:2] if args.quick else VOCABULARIES)
    measure.tell(result, tables.scaling(result), "scaling", args.write)


if __name__ == "__main__":
    main()
