"""`ddpo demo` for several seeds: what it measures, how long it takes, its peak memory. Writes results/demo.json.

python -m benchmarks.demo --seeds 0 1 2 3
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from ddpo.files import read_json, write_json
from ddpo.log import card

RESULTS = Path(__file__).parent / "results" / "demo.json"


def run(seed: int, folder: Path) -> dict:
    """One demo in a process of its own, which is waited for alone so that the peak is its own."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "ddpo", "demo", "--seed", str(seed), "--out", str(folder)])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"demo of seed {seed} ended with status {status}")
    evaluation = read_json(folder / "evaluation.json")
    weights = read_json(folder / "prepared" / "manifest.json")["summary"]["weights"]
    return {
        "seed": seed,
        "seconds": round(time.perf_counter() - start, 1),
        "peak_mib": usage.ru_maxrss // 1024,
        "zero_share": weights["zero_share"],
        **{key: evaluation[key] for key in ("num_prompts", "mean")},
        "difference": evaluation["differences"]["after"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("runs"))
    args = parser.parse_args()
    runs = [run(seed, args.out / f"demo-seed-{seed}") for seed in args.seeds]
    result = {**card(), "runs": runs}
    write_json(RESULTS, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
