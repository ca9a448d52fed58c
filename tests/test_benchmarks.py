"""The benchmarks of training steps run, their sides agree, and the GEMM floor counts what PyTorch multiplies."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT))


def quick(module):
    """The last line of a smoke run. One thread: two would wait for each other where other tests run beside it."""
    command = [sys.executable, "-m", f"benchmarks.{module}", "--quick"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_step():
    result = quick("step")
    for case in result["cases"]:
        assert case["check"]["broken"] == []
        assert case["check"]["losses_apart"] < 1e-4
        start, *later = case["check"]["losses"]["ddpo"]
        if later and not case["zero_share"]:
            assert later[-1] != start  # the policy has moved: the margins are not 0
        assert {"TRL DPOTrainer", "released algorithm", "ddpo"} <= case["sides"].keys()
        assert all(side["pairs_per_s"] > 0 for side in case["sides"].values())
    for key in ("speedup_vs_trl", "speedup_vs_release", "all_pairs_speedup_vs_trl"):
        assert result[key] > 0


def test_scaling():
    result = quick("scaling")
    assert len(result["time"]["points"]) == len(result["memory"]["points"]) == 2


def test_deviation():
    result = quick("deviation")
    assert {case["metric"] for case in result["cases"]} == {"cosine", "euclidean"}
    assert all(case["sides"]["ddpo"]["error"] <= 1e-6 for case in result["cases"])
    assert result["texts"]["texts_per_s"][1] > result["texts"]["texts_per_s"][0]


@pytest.fixture(scope="module")
def sides(tmp_path_factory, groups_file):
    """(data, ours, the released algorithm) on the benchmarks' tiny Llama."""
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    from benchmarks import states
    from benchmarks.peers import Ours, Released, collate
    from ddpo.config import PrepareConfig, TrainConfig
    from ddpo.data.prepared import Prepared
    from ddpo.prepare import prepare

    root = tmp_path_factory.mktemp("step")
    model, rule = states.tiny_model(root / "model"), {"pairs": "all", "gap": 1.0, "measures": ("style",)}
    data = prepare(PrepareConfig(source=str(groups_file), out=str(root / "data"), model=model, **rule))
    cfg = TrainConfig(data=str(data), out=str(root / "run"), model=model, dtype="float32", lr=1e-3)
    collator = DataCollatorForPreference(pad_token_id=0)
    released = Released(cfg, lambda work: [collate(collator, part) for part in work.parts()])
    return Prepared(data), Ours(cfg, root / "run"), released


def multiplied(run):
    """FLOP of the products of weights that run() makes, by PyTorch's count."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run()
    counts = counter.get_flop_counts()["Global"]
    return sum(n for op, n in counts.items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm))


def test_floor_counts_the_released_algorithm(sides):
    from benchmarks import floor
    from benchmarks.peers import Work
    from benchmarks.step import RELEASED, TRAITS

    data, _, released = sides
    work = Work(0, data, data.pairs[:2], data.weight[:2])
    products = floor.of_row(released.model.config, work, 16, TRAITS[RELEASED])
    counted = sum(p.flop for p in products if not p.kind.startswith("attention"))
    assert counted == multiplied(lambda: released.step(work))


def test_floor_leaves_out_pairs_of_weight_zero(sides):
    from benchmarks import floor
    from benchmarks.peers import Work
    from benchmarks.step import OURS, TRAITS

    data, ours, _ = sides
    config = ours.state.policy.causal.config
    half, one = (Work(0, data, data.pairs[:n], np.array([1.0, 0.0][:n])) for n in (2, 1))
    assert floor.of_row(config, half, 16, TRAITS[OURS]) == floor.of_row(config, one, 16, TRAITS[OURS])
