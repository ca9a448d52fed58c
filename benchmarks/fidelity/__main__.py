"""Does weighting by deviation do what the paper says? The whole method at a small scale, against its baselines.

python -m benchmarks.fidelity --data aut_human.jsonl             # under two hours on two CPU cores
python -m benchmarks.fidelity --data aut_human.jsonl --write     # and results/fidelity.json, fidelity.svg

People's answers to "What is a surprising use for a BRICK?", rated for creativity by people. Three folds, each prompt
held out once. Stopped and started again it goes on where it was; --folds N does the first N alone.
"""

import argparse
import time
from pathlib import Path

from benchmarks import tables
from benchmarks.fidelity import study, table
from ddpo.files import read_json, sha256, write_json
from ddpo.log import card

RESULTS = Path(__file__).parent.parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="groups of rated responses (JSONL)")
    parser.add_argument("--out", type=Path, default=Path("runs/fidelity"))
    parser.add_argument("--methods", nargs="+", choices=study.METHODS, default=list(study.METHODS))
    parser.add_argument("--folds", type=int, default=study.FOLDS)
    parser.add_argument("--write", action="store_true", help="the results files too")
    args = parser.parse_args()
    for fold in range(args.folds):
        start = time.perf_counter()
        try:
            study.run_fold(args.data, fold, args.out, args.methods)
        finally:
            add_time(args.out / "seconds.json", f"fold{fold}", time.perf_counter() - start)
    if args.folds < study.FOLDS or len(args.methods) < len(study.METHODS):
        return
    result = {
        **card(),
        "data": {"name": args.data.name, "sha256": sha256(args.data)},
        "settings": {
            name.lower(): getattr(study, name)
            for name in "FOLDS MOST_RESPONSES MOST_RATINGS NUM_SAMPLES NEW_TOKENS SFT PREFERENCE REWARD HOT".split()
        },
        "minutes": round(sum(read_json(args.out / "seconds.json").values()) / 60, 1),
        **table.measure(args.out),
    }
    print(tables.fidelity_readme(result))
    if args.write:
        write_json(RESULTS / "fidelity.json", result)
        table.figure(result, RESULTS / "fidelity.svg")


def add_time(path: Path, name: str, seconds: float) -> None:
    """Of all runs together, where the study was interrupted in between (a kill loses its own time)."""
    before = read_json(path) if path.exists() else {}
    write_json(path, {**before, name: before.get(name, 0.0) + seconds})


if __name__ == "__main__":
    main()
