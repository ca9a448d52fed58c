"""README's short tables and its headline, from the same results as the long tables of docs/speed.md."""

from benchmarks.tables import error, markdown, mib, of_side, shown, times

STEP = ("TRL DPOTrainer", "released algorithm", "ddpo, first epoch", "ddpo")
DEVIATION = ("released algorithm", "torch.cdist, blocks", "ddpo")
SIZES = (("cosine", 1_000), ("cosine", 20_000), ("cosine", 1_000_000), ("euclidean", 20_000), ("euclidean", 100_000))
LIKE_FOR_LIKE = "disjoint pairs, weights 1"  # the case without what weights of 0 and shared responses save


def headline(result: dict) -> str:
    """One sentence: what a step costs less than, with numbers and machine."""
    case = next(case for case in result["cases"] if case["name"] == LIKE_FOR_LIKE)
    trl, released, first, ours = (case["sides"][name] for name in STEP)
    return (
        f"A training step of DDPO on {result['model']} takes {ours['seconds'][0]:.1f} s where TRL's DPOTrainer takes "
        f"{trl['seconds'][0]:.1f} s ({_faster(ours, 'of_trl')}) and the paper's released algorithm "
        f"{released['seconds'][0]:.1f} s ({_faster(ours, 'of_released')}), in {mib(ours)} MiB beside the model instead "
        f"of {mib(trl)} and {mib(released)}: the same pairs in float32 on {_machine(result)}. In the first epoch, "
        f"which makes the reference's log-probs, it is {1 / first['of_trl']:.1f} and {_faster(first, 'of_released')}."
    )


def op_short(result: dict) -> str:
    """The op beside other ways, of the first case: time as a share of eager's, and peak memory."""
    case = result["cases"][0]
    groups = {name: report["sides"] for name, report in case["groups"].items()}
    rows = []
    for name, frozen in groups["frozen"].items():
        if shown(name):
            cells = (f"{times(group[name])}, {mib(group[name])}" if name in group else "" for group in groups.values())
            rows.append([name, *cells, error(frozen, "hidden", "head")])
    heads = [group if group == "no gradient" else f"{group} head" for group in groups]
    shape = "{N:,} rows, D {D:,}, V {V:,}, {dtype}".format(**case["shape"])
    table = markdown(["time of eager's, peak MiB", *heads, "gradient error"], rows)
    return f"{table}\n\n{case['name']}: {shape}; {_machine(result)}."


def step_short(result: dict) -> str:
    """A step beside TRL's and the release's: times TRL's speed, and peak memory."""
    rows = []
    for name in STEP:
        sides = [case["sides"][name] for case in result["cases"]]
        rows.append([name, *(f"{1 / side['of_trl']:.2f}x, {mib(side)}" for side in sides)])
    table = markdown(["of TRL's speed, peak MiB", *(case["name"] for case in result["cases"])], rows)
    return f"{table}\n\n{result['model']}, {result['data']}; {_machine(result)}."


def deviation_short(result: dict) -> str:
    """Mean distances of one group at D 384: time, peak memory, error."""
    found = {(case["metric"], case["n"]): case["sides"] for case in result["cases"] if case["D"] == 384}
    rows = [[f"{metric}, {n:,}", *(of_side(found[metric, n].get(name)) for name in DEVIATION)] for metric, n in SIZES]
    return f"{markdown(['time, MiB, error', *DEVIATION], rows)}\n\nD 384; {_machine(result)}."


def _faster(side: dict, of: str) -> str:
    return f"{1 / side[of]:.1f} times as fast"


def _machine(result: dict) -> str:
    return f"{result['machine']['threads']} CPU cores ({result['machine']['cpu']}), torch {result['versions']['torch']}"
