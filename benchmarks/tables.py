"""The benchmarks' results as Markdown: for the terminal and for README."""

VERSIONS = ("torch", "liger-kernel", "cut-cross-entropy")
TRAINER = "drop_below 2^-16"  # the trainer's default on a CPU: ddpo.model.DROP_BELOW


STEP_VERSIONS = ("torch", "transformers", "peft", "trl")
MEMORY = ("eager", "linear_logp")
FIDELITY = {  # measure -> heading, decimals
    "quality": ("quality", 3),
    "semantic_diversity": ("semantic", 3),
    "semantic_diversity_cut": ("semantic, cut", 3),
    "style_diversity": ("style", 3),
    "style_diversity_cut": ("style, cut", 3),
    "num_words": ("words", 1),
    "cut_share": ("share cut off", 2),
}


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def shown(side: str) -> bool:
    """Whether a side has a row of its own; the other thresholds are points of the curve."""
    return "drop_below" not in side or side.endswith(TRAINER)


def ops(result: dict) -> str:
    """Everything: a table a group, and the curve."""
    parts = []
    for case in result["cases"]:
        parts.append(_heading(case))
        parts += [_group(group, report["sides"]) for group, report in case["groups"].items()]
        parts += [curve(case)] * _has_curve(case)
    return "\n\n".join(parts)


def _has_curve(case: dict) -> bool:
    return any(not shown(name) for name in case["groups"]["frozen"]["sides"])


def _heading(case: dict) -> str:
    shape = "N {N:,} rows in {S} sequences, D {D:,}, V {V:,}, {dtype}".format(**case["shape"])
    groups = case["groups"].values()
    flops = max(report["machine"]["gflops"][0] for report in groups)
    seconds = min(report["machine"]["G_seconds"][0] for report in groups)
    entropy = case["other_arithmetic"]["entropy"]
    return (
        f"**{case['name']}**: {shape}, entropy {entropy:.1f} nats; G {seconds:.3g} s, GEMM rate {flops:,.0f} GFLOP/s."
    )


def _group(group: str, sides: dict) -> str:
    title = group if group == "no gradient" else f"head {group}"
    rows = []
    for name, entry in sides.items():
        if shown(name):
            rate = f"{entry['gemm_percent'][0]:.0f} %" if "gemm_percent" in entry else ""
            rows.append([name, time(entry), times(entry), rate, mib(entry), error(entry, "hidden", "head")])
    return markdown([title, "time, G [20 % 80 %]", "of eager", "of GEMM rate", "peak MiB", "gradient error"], rows)


def curve(case: dict) -> str:
    """What drop_below gains and costs, beside arithmetic that was computed and not timed."""
    frozen, trained = (case["groups"][group]["sides"] for group in ("frozen", "trained"))
    rows = []
    for name in (name for name in frozen if name.startswith("ddpo cpp")):
        label = name.removeprefix("ddpo cpp, drop_below ").replace("ddpo cpp", "0 (exact)")
        f, t = frozen[name], trained[name]
        rows.append([label, time(f), error(f, "hidden"), error(f, "row"), time(t), error(t, "head")])
    other = case["other_arithmetic"]
    skipped = f"tiles of 128 x 128 under 2^-12 left out ({100 * other['tiles_skipped']:.0f} % of them)"
    rows.append([skipped, "", percent(other["tiles"]), "", "", ""])
    rows.append(["bfloat16 inputs and probabilities, float32 sums", "", percent(other["bf16"]), "", "", ""])
    errors = ["error of hidden's gradient", "of a row, at most"]
    return markdown(["drop_below", "frozen, G", *errors, "trained, G", "error of head's gradient"], rows)


def ops_readme(result: dict) -> str:
    """README's block: of each case its groups side by side, of the first also the curve."""
    parts = []
    for case in result["cases"]:
        parts += [_heading(case), _wide({name: report["sides"] for name, report in case["groups"].items()})]
        parts += [curve(case)] * _has_curve(case)
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in VERSIONS if name in result["versions"])
    machine = f"{result['machine']['threads']} threads of {result['machine']['cpu']}"
    parts.append(f"{machine}, {versions}, commit {result['commit']}: `benchmarks/results/ops.json`.")
    return "\n\n".join(parts)


def _wide(groups: dict[str, dict]) -> str:
    """A row a side, a column or two a group: time in G and over eager's, peak memory where it was measured."""
    header, columns = [""], []
    for group, sides in groups.items():
        header.append(group if group == "no gradient" else f"{group} head")
        columns.append({name: f"{time(entry)} {times(entry)}".strip() for name, entry in sides.items()})
        if any("extra_mib" in entry for entry in sides.values()):
            header.append("MiB")
            columns.append({name: mib(entry) for name, entry in sides.items()})
    columns.append({name: error(entry, "hidden", "head") for name, entry in groups["frozen"].items()})
    names = [name for name in groups["frozen"] if shown(name)]
    rows = [[name, *(column.get(name, "") for column in columns)] for name in names]
    return markdown([*header, "gradient error"], rows)


def gpu_readme(result: dict) -> str:
    """README's block of the GPU model: a column a model and head, H100; milliseconds, then MiB."""
    found = {(r["model"], r["head"], r["side"]): r for r in result["sides"] if r["gpu"] == "H100"}
    models, heads, names = (list(dict.fromkeys(key[i] for key in found)) for i in range(3))
    columns = [(model, head) for model in models for head in heads]
    rows = []
    for name in names:
        entries = [found.get((*column, name)) for column in columns]
        rows.append([name, *("" if e is None else f"{e['ms']:.1f}, {e['peak_mib']:,.0f}" for e in entries)])
    return markdown(["H100: ms, MiB", *(f"{model}, {head}" for model, head in columns)], rows)


def kernels(result: dict) -> str:
    rows = []
    for name, entry in result["kernels"].items():
        middle, low, high = entry["ms"]
        flop, rate = f"{entry['flop'] / 1e9:,.1f}", f"{entry['gflops'][0]:,.0f} ({entry['gflops_percent'][0]:.0f} %)"
        moved = f"{entry['bytes'] / 1e6:,.0f}", f"{entry['gbytes'][0]:,.1f} ({entry['gbytes_percent'][0]:.0f} %)"
        rows.append([name, f"{middle:,.4g} [{low:,.4g} {high:,.4g}]", flop, rate, *moved])
    table = markdown(["kernel", "ms [20 % 80 %]", "GFLOP", "GFLOP/s (of GEMM)", "MB", "GB/s (of copy)"], rows)
    shape = "N {rows:,}, D {width:,}, V {vocabulary:,}, {sequences} sequences".format(**result)
    return (
        f"{shape}; GEMM {result['gemm_gflops'][0]:,.0f} GFLOP/s, copy {result['copy_gbytes'][0]:,.1f} GB/s\n\n{table}"
    )


def step(result: dict) -> str:
    """A table a case."""
    parts = []
    for case in result["cases"]:
        whole = case["pairs_a_step"] > 2
        title = f"{case['pairs_a_step']} pairs a step, {case['tokens_a_step']:,} tokens in them"
        zero = f"; {100 * case['zero_share']:.0f} % of the pairs have weight 0" if case["zero_share"] else ""
        parts.append(f"**{case['name']}**: {title}, {case['rounds']} steps{zero}.")
        rows = []
        for name, entry in case["sides"].items():
            seconds = "{:.2f} [{:.2f} {:.2f}]".format(*entry["seconds"])
            rate = f"{entry['pairs_per_s']:.2f}" if whole else f"{entry['tokens_per_s']:,.0f}"
            faster = [f"{1 / entry[key]:.2f}x" for key in ("of_trl", "of_released")]
            floor = sum(entry["floor_seconds"].values())
            least = f"{floor:.2f}, {entry['floor_seconds']['attention']:.2f}"
            rows.append([name, seconds, rate, *faster, mib(entry), least, f"{entry['of_floor']:.2f}"])
        header = ["", "step, s [20 % 80 %]", "pairs/s" if whole else "tokens/s", "of TRL's speed", "of the release's"]
        parts.append(markdown([*header, "peak MiB", "GEMM floor, of it attention, s", "step / floor"], rows))
    return "\n\n".join(parts)


def step_readme(result: dict) -> str:
    """README's block of the training step: the tables, and what was checked."""
    checks = [case["check"] for case in result["cases"]]
    approximate = ("+ drop_below", "+ cached reference", "+ unique responses")
    named = [(name, error) for check in checks for name, error in check["gradient"].items()]
    exact = max(error for name, error in named if name not in approximate and not name.startswith("ddpo, "))
    default = max(error for name, error in named if name.startswith("ddpo, drop_below"))
    real = next(case for case in result["cases"] if case["zero_share"])
    notes = [
        f"{result['model']}, {result['data']}.",
        f"Checked first: losses at most {max(check['losses_apart'] for check in checks):.0e} nats apart,",
        f"gradients {percent(exact)} off float64's at most, with the default drop_below {percent(default)}.",
        f"Of all pairs {100 * real['zero_share_of_all']:.0f} % have weight 0 under real weights.",
        f"{result['machine']['threads']} threads of {result['machine']['cpu']},",
        ", ".join(f"{name} {result['versions'][name]}" for name in STEP_VERSIONS if name in result["versions"]) + ",",
        f"commit {result['commit']}: `benchmarks/results/step.json`.",
    ]
    return step(result) + "\n\n" + " ".join(notes)


def scaling_readme(result: dict) -> str:
    """README's block: both tables, and the line through the first."""
    time, off = result["time"], 100 * max(map(abs, result["time"]["residuals"]))
    fit, per_token = time["fit"], time["last_over_first_per_token"]
    notes = [
        f"Line: {fit['seconds_at_0']:.2f} s + {fit['seconds_per_1k_tokens']:.2f} s per 1,000 tokens,",
        f"{off:.0f} % off at most; the largest batch takes {per_token:.2f} times the smallest's time per token.",
        f"Commit {result['commit']}: `benchmarks/results/scaling.json`.",
    ]
    return scaling(result) + "\n\n" + " ".join(notes)


def memory(result: dict) -> str:
    rows = []
    for row in result["cases"]:
        case = (row["model"], row["trained"], "yes" if row["checkpointing"] else "", f"{row['pack_tokens']:,}")
        figures = (f"{row['planned_mib']:,.0f}", f"{row['measured_mib']:,.0f}", f"{100 * row['error']:+.1f} %")
        rows.append([*case, *figures])
    header = ["model", "trained", "checkpointing", "tokens of a pack", "planned, MiB", "measured", "error"]
    return markdown(header, rows)


def memory_readme(result: dict) -> str:
    machine = f"{result['machine']['cpu']}, torch {result['versions']['torch']}"
    commits = f"measured at commit {result['commit']}"
    if "planned_by_commit" in result:  # the plan was mended and made again for the same trainings
        commits += f", planned at {result['planned_by_commit']}"
    return f"{memory(result)}\n\n{machine}, {commits}: `benchmarks/results/memory.json`."


def deviation(result: dict) -> str:
    """A table a metric and width: a row a size, a column a side; then many small groups, and texts."""
    parts = []
    for metric, D in dict.fromkeys((case["metric"], case["D"]) for case in result["cases"]):
        cases = [case for case in result["cases"] if (case["metric"], case["D"]) == (metric, D)]
        names = list(dict.fromkeys(name for case in cases for name in case["sides"]))
        rows = []
        for case in cases:
            cells = [of_side(case["sides"].get(name)) for name in names]
            rows.append([f"{case['n']:,}", span(case["reading_seconds"][0]), *cells])
        parts.append(f"**{metric}, D {D:,}**: time, MiB beside input and output, error")
        parts.append(markdown(["n", "reading the array", *names], rows))
    many, texts = result["many"], result["texts"]
    middles = ", ".join(f"{name} {span(seconds[0])}" for name, seconds in many["seconds"].items())
    parts.append(f"{many['groups']:,} groups of {many['size']}, D {many['D']}: {middles}.")
    first, again = texts["texts_per_s"]
    parts.append(
        f"From texts to weights ({texts['of']}, {texts['mean_words']:,.0f} words; MiniLM and the built-in style "
        f"encoder): {first:,.0f} texts a second, {again:,.0f} where their embeddings are kept."
    )
    return "\n\n".join(parts)


def of_side(entry: dict | None) -> str:
    return "" if entry is None else f"{span(entry['seconds'][0])}, {mib(entry) or '?'}, {entry['error']:.0e}"


def span(seconds: float) -> str:
    """A time in its own unit."""
    for unit, factor in (("s", 1), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:,.3g} {unit}"
    return f"{seconds * 1e6:,.3g} us"


def deviation_readme(result: dict) -> str:
    machine = (
        f"{result['machine']['threads']} threads of {result['machine']['cpu']}, torch {result['versions']['torch']}"
    )
    return f"{deviation(result)}\n\n{machine}, commit {result['commit']}: `benchmarks/results/deviation.json`."


def mib_of(point: dict, name: str) -> str:
    return "?" if point[name] is None else f"{point[name]:,.0f}"


def scaling(result: dict) -> str:
    time, memory = result["time"], result["memory"]
    rows = []
    for point, off in zip(time["points"], time["residuals"], strict=True):
        rows.append([f"{point['tokens']:,}", "{:.2f} [{:.2f} {:.2f}]".format(*point["seconds"]), f"{100 * off:+.1f} %"])
    seconds = markdown(["tokens", "step, s [20 % 80 %]", "off the line"], rows)
    rows = [[f"{p['V']:,}", *(mib_of(p, name) for name in MEMORY)] for p in memory["points"]]
    return seconds + "\n\n" + markdown(["V", *(f"{name}, MiB" for name in MEMORY)], rows)


def fidelity_readme(result: dict) -> str:
    """README's block of the fidelity study: a row a method, then differences, then what both come from."""
    heads = [head for head, _ in FIDELITY.values()]
    rows, differences = [], []
    for name, means in result["mean"].items():
        interval = result["interval"][name]
        rows.append([name, *(around(means[m], interval[m], decimals) for m, (_, decimals) in FIDELITY.items())])
    for names, found in result["differences"].items():
        differences.append([names, *(difference(found[m], decimals) for m, (_, decimals) in FIDELITY.items())])
    rank = ", ".join(f"{model['spearman_within_prompts']:.2f}" for model in result["reward_model"])
    margin, accuracy = (result["held_out_pairs"][name][-1] for name in ("margins", "accuracies"))
    figures, settings = len(differences) * len(FIDELITY), result["settings"]
    notes = [
        f"{result['num_prompts']} held-out prompts x {settings['num_samples']} responses, of {settings['new_tokens']}",
        "tokens at most (share cut off: by that); mean ± half the 95 % interval over prompts; cut: to the first",
        f"{result['cut_to_words']:.0f} words. Bold: p < 0.05 by a sign-flip test over prompts (10,000 draws), not",
        f"corrected; p under {0.05 / figures:.1g} stands a correction for all {figures} figures.",
        "Quality: people's ratings, taken to -1 to 1, as reward models tell them, one a fold, whose rank",
        f"correlation within held-out prompts is {rank}. DPO's margin on held-out pairs rose from 0 to",
        f"{margin:+.2f}, with {100 * accuracy:.0f} % in the right order. {result['minutes']} minutes on",
        f"{result['trained_by']['threads']} CPU cores, torch {result['versions']['torch']}, trained at commit",
        f"{result['trained_by']['commit']}, measured at {result['commit']}: `benchmarks/results/fidelity.json`.",
    ]
    tables = markdown(["", *heads], rows), markdown(["difference", *heads], differences), " ".join(notes)
    return "\n\n".join(tables)


# --- cells ------------------------------------------------------------------------------------------------


def time(entry: dict) -> str:
    if "G" not in entry:
        return "did not run" if "skipped" in entry else ""
    return "{:.2f} [{:.2f} {:.2f}]".format(*entry["G"])


def times(entry: dict) -> str:
    return f"{entry['of_eager'][0]:.2f}x" if "of_eager" in entry else ""


def mib(entry: dict) -> str:
    return "" if entry.get("extra_mib") is None else f"{entry['extra_mib']:,.0f}"


def error(entry: dict, *keys: str) -> str:
    """The largest of the errors of these."""
    return percent(max((entry["error"][key] for key in keys if key in entry.get("error", {})), default=None))


def percent(x: float | None) -> str:
    return "" if x is None else f"{100 * x:.2g} %" if x >= 1e-4 else f"{x:.0e}"


def around(mean: float | None, interval: list[float] | None, decimals: int) -> str:
    """± half the interval."""
    if mean is None or interval is None:
        return ""
    return f"{mean:.{decimals}f} ± {(interval[1] - interval[0]) / 2:.{decimals}f}"


def difference(found: dict | None, decimals: int) -> str:
    if found is None:
        return ""
    text = f"{found['mean']:+.{decimals}f} (p {found['p']:.2g})"
    return f"**{text}**" if found["p"] < 0.05 else text
