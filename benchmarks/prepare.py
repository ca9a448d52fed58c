"""`ddpo prepare` on a large source: seconds, peak memory of all its processes, and a kill -9 half way.

python -m benchmarks.prepare --write           # 300,000 responses of about 500 words; and results/prepare.json
python -m benchmarks.prepare --responses 200 --words 20

Ten responses a prompt, their words drawn from the stories the other benchmarks use; SmolLM2's tokenizer; no embeddings
kept from before. The encoder is a sentence-transformers model made here, random static word vectors of 384 numbers:
what is measured is all but the time of a real encoder. `--style builtin` takes the built-in one. When half of the parts
are tokenised, and when half of the texts are embedded, every process is killed; then the same command runs again.
Finished parts and embeddings must be the same files afterwards. Memory is the sum over the processes, twice a second:
resident, in which pages that processes share or map from files count in each, and anonymous, which is what they hold
themselves.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks import measure, states
from ddpo.data.groups import write_jsonl
from ddpo.data.parts import PART
from ddpo.data.prepared import Prepared

PER_PROMPT, WIDTH, PAUSE = 10, 384, 0.5  # responses; numbers of an embedding; seconds between two looks


def source(path: Path, responses: int, words: int) -> None:
    """Lengths are uniform within a fifth of `words`, scores are integers from 0 to 50."""
    _, groups = states.stories()
    known, draw = " ".join(text for _, texts in groups for text in texts).split(), random.Random(0)

    def text(least, most):
        return " ".join(draw.choices(known, k=draw.randint(least, most)))

    def response():
        return {"text": text(words * 4 // 5, words * 6 // 5), "score": draw.randint(0, 50)}

    prompts = responses // PER_PROMPT
    write_jsonl(
        path, ({"prompt": text(10, 30), "responses": [response() for _ in range(PER_PROMPT)]} for _ in range(prompts))
    )


def static_encoder(folder: Path) -> str:
    """A word's vector is random; a text's is the mean of its words'."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer, models, pre_tokenizers

    known = sorted({word for _, texts in states.stories()[1] for text in texts for word in text.split()})
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["[UNK]", *known])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    vectors = np.random.default_rng(0).normal(size=(len(known) + 1, WIDTH)).astype(np.float32)
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=vectors)]).save(str(folder))
    return str(folder)


def tree(pid: int) -> list[int]:
    """A process and all that it started, directly or through others."""
    parent = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue  # ended meanwhile
    found = [pid]
    for process in found:
        found += [child for child, of in parent.items() if of == process]
    return found


def memory_of(pids: list[int]) -> dict[str, int]:
    """MiB, resident and anonymous, of all of them together."""
    total = {"VmRSS": 0, "RssAnon": 0}
    for pid in pids:
        try:
            fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        except OSError:
            continue
        for name in total:
            total[name] += int(fields.get(name, "0 kB").split()[0]) >> 10
    return {"resident": total["VmRSS"], "anonymous": total["RssAnon"]}


def run(command: list[str], log: Path, enough: Callable[[], bool] = lambda: False) -> dict:
    """Runs it to its end, or kills all of it (-9) once there is enough: seconds, peak MiB, whether it was killed."""
    start, peak = time.monotonic(), {"resident": 0, "anonymous": 0}
    with log.open("a") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    killed = False
    while process.poll() is None:
        pids = tree(process.pid)
        found = memory_of(pids)
        peak = {name: max(peak[name], found[name]) for name in peak}
        if not killed and enough():
            killed = True
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
        time.sleep(PAUSE)
    if not killed and process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{log.read_text()[-3000:]}")
    return {"seconds": measure.short(time.monotonic() - start), "peak_mib": peak, "killed": killed}


def files(folder: Path, pattern: str) -> dict[str, int]:
    """Name and time of each file, which are other ones where it is written again."""
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.glob(pattern)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, default=300_000)
    parser.add_argument("--words", type=int, default=500, help="of a response, about")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--style", default="static", help="static, builtin, or a sentence-transformers model")
    parser.add_argument("--write", action="store_true", help="results/prepare.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        rows, out, kept, log = (root / n for n in ("rows.jsonl", "out", "embeddings", "log.txt"))
        source(rows, args.responses, args.words)
        style = static_encoder(root / "static") if args.style == "static" else args.style
        parts = -(-args.responses // (-(-PART // PER_PROMPT) * PER_PROMPT))
        command = (
            f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node {args.processes} -m ddpo prepare"
        )
        options = (
            f"--out {out} --embeddings {kept} --style {style} --measures style --model smollm2-135m-instruct --gap 5"
        )
        command = [*command.split(), str(rows), *options.split()]

        def made():
            return {
                "parts": files(root, ".out.parts/[!.]*/counts.json"),
                "embeddings": files(kept, "*/[!.]*.arrow"),
            }

        runs = [run(command, log, lambda: 2 * len(made()["parts"]) >= parts)]
        before = made()
        runs.append(run(command, log, lambda: len(made()["embeddings"]) >= parts * args.processes // 2))
        middle = made()
        runs.append(run(command, log))
        summary, after = Prepared(out).manifest["summary"], made()
        result = {
            **measure.setting(),
            "responses": args.responses,
            "words": args.words,
            "source_mib": rows.stat().st_size >> 20,
            "folder_mib": sum(p.stat().st_size for p in out.iterdir()) >> 20,
            "processes": args.processes,
            "style": args.style,
            "parts": parts,
            "runs": runs,
            "parts_kept": len(before["parts"].items() & middle["parts"].items()),
            "embedding_files_kept": len(middle["embeddings"].items() & after["embeddings"].items()),
            "seconds": measure.short(sum(r["seconds"] for r in runs)),
            "peak_mib": {n: max(r["peak_mib"][n] for r in runs) for n in runs[0]["peak_mib"]},
            "summary": summary,
        }
        kept_all = (result["parts_kept"], result["embedding_files_kept"]) == (
            len(before["parts"]),
            len(middle["embeddings"]),
        )
        left = [p.name for p in root.iterdir() if p.name.startswith(".")]
        right = kept_all and not left and summary["responses"] == args.responses // PER_PROMPT * PER_PROMPT
        told = (
            f"{args.responses:,} responses, {args.processes} processes: {result['seconds']} s, MiB {result['peak_mib']}"
        )
        measure.tell(result, told if right else f"WRONG: {told}, left {left}", "prepare", args.write and right)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
