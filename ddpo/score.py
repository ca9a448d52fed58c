"""`ddpo score`: a reward model's number for each response of a file."""

from dataclasses import asdict, replace
from pathlib import Path

from ddpo import __version__, distributed, log
from ddpo.config import ScoreConfig
from ddpo.data.groups import group_row, read_groups_file, read_jsonl
from ddpo.files import sha256
from ddpo.ledger import Ledger, is_made, job_id
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
        log.answer(cfg, {"out": out, **_mean([row for _, row in read_jsonl(out)], cfg.column)})
        return out
    groups = read_groups_file(cfg.responses)
    model = RewardModel.load(cfg.reward, cfg.dtype, distributed.device(), cfg.max_length)
    ledger = Ledger(out, key)
    jobs = [(g, i) for g, group in enumerate(groups) for i in range(len(group.responses))]
    missing = [job for job in jobs if job_id(*job) not in ledger.done][rank::world]
    with log.progress() as bar:
        task = bar.add_task("rewards", total=len(missing), note="")
        for at in range(0, len(missing), WINDOW):
            window = missing[at : at + WINDOW]
            ids = [model.read(replace(groups[g], responses=[groups[g].responses[i]]))[0] for g, i in window]
            for which, rewards in model.each(ids, cfg.max_tokens):
                ledger.add({job_id(*window[w]): {"reward": float(r)} for w, r in zip(which, rewards, strict=True)})
                bar.advance(task, len(which))
    done = ledger.collect()
    if distributed.is_first():
        rows = list(map(group_row, groups))
        for g, i in jobs:
            rows[g]["responses"][i][cfg.column] = done[job_id(g, i)]["reward"]
        ledger.finish(rows)
        found = _mean(rows, cfg.column)
        log.console.print(f"scored {found['num_responses']} responses, mean {found['mean']:.3f}; wrote {out}")
        log.answer(cfg, {"out": out, **found})
    distributed.barrier()
    return out


def _mean(rows: list[dict], column: str) -> dict:
    rewards = [response[column] for row in rows for response in row["responses"]]
    return {"num_responses": len(rewards), "mean": sum(rewards) / len(rewards)}
