"""Mean distances of groups: the released algorithm, torch.cdist, FAISS and ours, side by side.

python -m benchmarks.deviation                 # about 25 minutes on two CPU cores; writes nothing
python -m benchmarks.deviation --write         # and results/deviation.json
python -m benchmarks.deviation --quick         # small sizes

Embeddings are random around a common mean, as those of one prompt's responses are. Each side is first held to float64
on some rows; one that is wrong makes the exit status 1. Then sides take turns. Memory: peak over what was held before,
less the output. "Reading": torch.sum of the array.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from benchmarks import measure, states, tables
from ddpo.config import Weighing
from ddpo.deviation import mean_distance
from ddpo.deviation.distance import block_rows
from ddpo.files import read_json
from ddpo.ops import cpp
from ddpo.weighing import deviations, load_measures

CPU = torch.device("cpu")
SIZES, WIDTHS = (8, 100, 1_000, 10_000, 20_000, 100_000, 1_000_000), (384, 1024)
ALL_PAIRS = {"cosine": 20_000, "euclidean": 100_000}  # rows up to which sides that look at every pair are run
RELEASED = 20_000  # rows whose (n, n) matrix, three times, fits this memory
LARGEST = 2 << 30  # bytes of embeddings
OURS, RELEASE = "ddpo", "released algorithm"
ERROR = 1e-6  # absolute for cosine, relative for euclidean (of sums of float32 products)
ROUNDS, SLOW = 5, 2.0  # seconds above which a side runs once
BUFFER_MIB = 64


def embeddings(n: int, D: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.empty(n, D).normal_(generator=generator)
    return x.add_(torch.empty(D).normal_(generator=generator))


# --- sides ------------------------------------------------------------------------------------------------


def released(x: Tensor, metric: str) -> Tensor:
    """The whole matrix, then a mean a row in Python, as the released code does it."""
    if metric == "cosine":
        unit = torch.nn.functional.normalize(x, dim=1)
        distance = 1 - unit @ unit.T
    else:
        distance = torch.cdist(x, x)
    distance[torch.eye(len(x)).bool()] = 0
    return torch.tensor([(row.sum() / (len(x) - 1)).item() for row in distance])


def by_cdist(x: Tensor, metric: str) -> Tensor:
    """torch.cdist in blocks of the size ours has; between unit vectors half its square is the cosine distance."""
    x = torch.nn.functional.normalize(x, dim=1) if metric == "cosine" else x
    block, sums = block_rows(x.shape[1], 4, BUFFER_MIB << 20), torch.zeros(len(x), dtype=torch.float64)
    for a in range(0, len(x), block):
        for b in range(0, len(x), block):
            distance = torch.cdist(x[a : a + block], x[b : b + block])
            if a == b:
                distance.fill_diagonal_(0)
            distance = distance.square() / 2 if metric == "cosine" else distance
            sums[a : a + block] += distance.sum(1, dtype=torch.float64)
    return (sums / (len(x) - 1)).float()


def sides_of(n: int, metric: str) -> dict[str, Callable]:
    sides = {}
    if n <= RELEASED:
        sides[RELEASE] = released
    if n <= ALL_PAIRS[metric]:
        sides["torch.cdist, blocks"] = by_cdist
        sides["ddpo, all pairs by torch"] = partial(mean_distance, backend="torch", buffer_mib=BUFFER_MIB)
        if metric == "cosine":
            sides["ddpo, all pairs by FAISS"] = partial(mean_distance, backend="faiss", buffer_mib=BUFFER_MIB)
    if metric == "cosine" or n <= ALL_PAIRS[metric]:
        sides[OURS] = partial(mean_distance, buffer_mib=BUFFER_MIB)
    return sides


def truth(x: Tensor, rows: Tensor, metric: str) -> Tensor:
    """(len(rows),) in float64, from each row's distances to all others."""
    total = torch.zeros(len(rows), dtype=torch.float64)
    own = x[rows].double()
    for part in x.split(1 << 14):
        if metric == "cosine":
            unit = [torch.nn.functional.normalize(y.double(), dim=1) for y in (own, part)]
            total += (1 - unit[0] @ unit[1].T).sum(1)
        else:
            mode = "donot_use_mm_for_euclid_dist"
            total += torch.cdist(own, part.double(), compute_mode=mode).sum(1)
    return total / (len(x) - 1)


# --- cases ------------------------------------------------------------------------------------------------


def case(n: int, D: int, metric: str) -> dict:
    x = embeddings(n, D)
    rows = torch.arange(n)[:: max(1, n // 32)]
    expected, sides, report = truth(x, rows, metric), sides_of(n, metric), {}
    runs, slow = {}, []
    for name, side in sides.items():
        run, found = partial(side, x, metric), []
        start = time.perf_counter()
        extra = extra_mib(lambda run=run, found=found: found.append(run()), 4 * n)
        slow += [name] * (time.perf_counter() - start > SLOW)
        off = (found[0][rows].double() - expected).abs() / (1 if metric == "cosine" else expected)
        report[name] = {"error": measure.short(off.max()), "extra_mib": extra}
        runs[name] = run if n >= 10_000 else partial(repeated, run, max(1, 10_000 // n))
    runs["reading"] = lambda: x.sum()
    taken = measure.interleaved(runs, ROUNDS, CPU, slow)
    reading = taken.pop("reading")
    for name, seconds in taken.items():
        times = 1 if n >= 10_000 else max(1, 10_000 // n)
        report[name]["seconds"] = measure.spread(seconds / times)
    return {"n": n, "D": D, "metric": metric, "reading_seconds": measure.spread(reading), "sides": report}


def repeated(run: Callable, times: int) -> None:
    for _ in range(times):
        run()


def extra_mib(run: Callable, out: int) -> float | None:
    peak = measure.peak_extra_mib(run, lambda: None, CPU)
    return None if peak is None else measure.short(max(0.0, peak - out / 2**20))


def many_groups(num: int, size: int, D: int) -> dict:
    """Many small groups in one call, beside one call a group of the released algorithm, on the first thousand."""
    x, groups = embeddings(num * size, D), torch.arange(0, num * size + 1, size)
    first = min(num, 1000)
    runs = {
        OURS: partial(mean_distance, x, groups=groups),
        f"{RELEASE}, {first:,} groups": lambda: [released(x[a:b], "cosine") for a, b in pairwise(groups[: first + 1])],
        "ddpo, euclidean": partial(mean_distance, x, "euclidean", groups),
        "reading": lambda: x.sum(),
    }
    runs[OURS]()
    taken = {name: measure.spread(s) for name, s in measure.interleaved(runs, ROUNDS, CPU).items()}
    extra = extra_mib(runs[OURS], 4 * len(x))
    return {"groups": num, "size": size, "D": D, "seconds": taken, "extra_mib": extra, "first": first}


def end_to_end(num_groups: int) -> dict:
    """From texts to weights by MiniLM and the built-in style encoder, twice: the second finds the embeddings kept."""
    name, groups = states.stories()
    texts = [text for _, responses in groups[:num_groups] for text in responses]
    offsets = torch.tensor([0, *(len(responses) for _, responses in groups[:num_groups])]).cumsum(0)
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        cfg = Weighing(embeddings=folder)
        measures = load_measures(cfg)
        for _ in range(2):
            start = time.perf_counter()
            rows = {m: embedded.rows(texts) for m, embedded in measures.items()}
            deviations(rows, cfg, offsets)
            seconds.append(time.perf_counter() - start)
    words = sum(len(text.split()) for text in texts) / len(texts)
    per_second = [measure.short(len(texts) / s) for s in seconds]
    return {"of": name, "texts": len(texts), "mean_words": measure.short(words), "texts_per_s": per_second}


# --- command ----------------------------------------------------------------------------------------------


def summary(result: dict) -> dict:
    """The figures that README states; None where the sizes were not run."""

    def found(metric, n, D=384):
        return next((c for c in result["cases"] if (c["metric"], c["n"], c["D"]) == (metric, n, D)), None)

    def ratio(of, a, b):
        return of and measure.short(of["sides"][a]["seconds"][0] / of["sides"][b]["seconds"][0])

    large, many = found("cosine", 1_000_000), result["many"]["seconds"]
    reading = large and large["sides"][OURS]["seconds"][0] / large["reading_seconds"][0]
    return {
        "cosine_20k_speedup_vs_release": ratio(found("cosine", 20_000), RELEASE, OURS),
        "cosine_1m_of_reading": reading and measure.short(reading),
        "euclidean_100k_speedup_vs_cdist": ratio(found("euclidean", 100_000), "torch.cdist, blocks", OURS),
        "many_groups_of_reading": measure.short(many[OURS][0] / many["reading"][0]),
    }


def measure_again(metric: str, n: int, D: int) -> int:
    """Puts a case's new figures in the place of the old ones, where something else ran beside it."""
    result, found = read_json(measure.RESULTS / "deviation.json"), case(n, D, metric)
    same = [(c["metric"], c["n"], c["D"]) == (metric, n, D) for c in result["cases"]]
    result["cases"] = [found if here else c for c, here in zip(result["cases"], same, strict=True)]
    result |= summary(result)
    measure.tell(result, tables.deviation(result), "deviation", write=True)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--write", action="store_true", help="results/deviation.json")
    again = {"nargs": 3, "metavar": ("METRIC", "N", "D"), "help": "measure one case of results/deviation.json again"}
    parser.add_argument("--again", **again)
    args = parser.parse_args()
    if args.again:
        return measure_again(args.again[0], int(args.again[1]), int(args.again[2]))
    sizes, widths = ((8, 100, 1_000), (384,)) if args.quick else (SIZES, WIDTHS)
    result, status = {**measure.setting(), "cpp": cpp.is_built, "cases": []}, 0
    for metric in ("cosine", "euclidean"):
        for D in widths:
            for n in sizes:
                too_long = n > ALL_PAIRS[metric] or (n > RELEASED and widths[0] < D)
                if n * D * 4 > LARGEST or (metric == "euclidean" and too_long):
                    continue
                result["cases"].append(case(n, D, metric))
                for name, entry in result["cases"][-1]["sides"].items():
                    if name.startswith(OURS) and not entry["error"] <= ERROR:
                        status = 1
                        print(f"WRONG: {metric}, {n} x {D}, {name}: {entry['error']:.2g} off float64", file=sys.stderr)
    result["many"] = many_groups(*((1_000, 8, 384) if args.quick else (100_000, 8, 384)))
    result["texts"] = end_to_end(4 if args.quick else 24)
    result |= summary(result)
    measure.tell(result, tables.deviation(result), "deviation", args.write and not status)
    return status


if __name__ == "__main__":
    sys.exit(main())
