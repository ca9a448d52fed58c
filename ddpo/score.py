"""`ddpo score`: a reward model's number for each response of a file."""

from dataclasses import asdict, replace
from pathlib import Path

from ddpo import __version__, distributed, log
from ddpo.config import ScoreConfig
from ddpo.data.groups import group_row, parse_group, read_jsonl, write_jsonl
from ddpo.files import new_file, sha256
from ddpo.ledger import Ledger, is_made, write_card
from ddpo.reward_model import RewardModel, weights_of

WINDOW = 1024  # responses whose rewards are kept at a time


def score(cfg: ScoreConfig) -> Path:
    """Writes the file with each response's reward; returns it. Rewards that a killed run had are taken up.

    Raises: ValueError for bad input, FileExistsError.
    """
    rank, world = distributed.start()
    out = Path(cfg.out)
    settings = {k: v for k, v in asdict(cfg).items() if k in ("column", "max_length", "dtype")}
    key = {"ddpo": __version__, "responses": sha256(cfg.responses), "weights": weights_of(cfg.reward), **settings}
    if distributed.from_first(is_made(out, key, cfg.resume, cfg.overwrite)):
        return out
    groups = [parse_group(row, where) for where, row in read_jsonl(cfg.responses)]
    model = RewardModel.load(cfg.reward, cfg.dtype, distributed.device(), cfg.max_length)
    ledger = Ledger(out, key)
    jobs = [(g, i) for g, group in enumerate(groups) for i in range(len(group.responses))]
    missing = [job for job in jobs if _id(job) not in ledger.done][rank::world]
    with log.progress() as bar:
        task = bar.add_task("rewards", total=len(missing), note="")
        for at in range(0, len(missing), WINDOW):
            window = missing[at : at + WINDOW]
            ids = [model.read(replace(groups[g], responses=[groups[g].responses[i]]))[0] for g, i in window]
            for which, rewards in model.each(ids, cfg.max_tokens):
                ledger.add({_id(window[w]): {"reward": float(r)} for w, r in zip(which, rewards, strict=True)})
                bar.advance(task, len(which))
    done = ledger.collect()
    if distributed.is_first():
        rows = list(map(group_row, groups))
        for g, i in jobs:
            rows[g]["responses"][i][cfg.column] = done[_id((g, i))]["reward"]
        write_card(out, key)
        with new_file(out) as draft:
            write_jsonl(draft, rows)
        ledger.remove()
        mean = sum(done[_id(job)]["reward"] for job in jobs) / len(jobs)
        log.console.print(f"scored {len(jobs)} responses, mean {mean:.3f}; wrote {out}")
    distributed.barrier()
    return out


def _id(job: tuple[int, int]) -> str:
    return f"{job[0]}.{job[1]}"
