"""Checkpoints of a run: trained weights and optimiser state as safetensors, the rest as JSON; no pickle.

Copies of the weights are written by the first process, shares of them by each (torch.distributed.checkpoint's
safetensors storage). state.json names every file's hash, so that a damaged checkpoint is known.
"""

import hashlib
import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.distributed import checkpoint as dcp
from torch.distributed.tensor import DTensor

from ddpo import distributed, log
from ddpo.files import inside, new_folder, read_json, sha256, write_json

FOLDER = "checkpoints"
FILE = "state.safetensors"  # of what is not shared out


def save(run: Path, step: int, params: dict[str, torch.nn.Parameter], optimizer, extra: dict, keep: int) -> None:
    """Writes checkpoints/step-N whole or not at all, then removes later ones (damaged, or of a run gone on from before
    them) and all but the `keep` newest. All processes call it. extra: what load_last gives back beside the step.
    """
    first = distributed.is_first()
    path = run / FOLDER / f"step-{step:08d}"
    with new_folder(path, overwrite=True) if first else nullcontext(Path()) as draft:
        draft = distributed.from_first(draft)
        values = tensors(params, optimizer)
        if any(isinstance(value, DTensor) for value in values.values()):
            dcp.save(values, storage_writer=dcp.HuggingFaceStorageWriter(str(draft), save_distributed=True))
        elif first:
            save_file({name: value.contiguous() for name, value in values.items()}, draft / FILE)
        distributed.barrier()
        if first:
            hashes = {file.name: sha256(file) for file in sorted(draft.iterdir())}
            state = {"step": step, **extra, "sha256": hashes}
            write_json(draft / "state.json", {**state, "seal": _seal(state)})
    if first:
        found = steps(run)
        end = found.index(path) + 1
        for old in (*found[end:], *found[:end][:-keep]):
            shutil.rmtree(old)
    distributed.barrier()


def tensors(params: dict[str, torch.nn.Parameter], optimizer) -> dict[str, torch.Tensor]:
    """Weights by name, and the optimiser's state of each by name/key."""
    state = {name: param.detach() for name, param in params.items()}
    for name, param in params.items():
        of_param = optimizer.state.get(param, {})
        state |= {f"{name}/{key}": value for key, value in of_param.items() if isinstance(value, torch.Tensor)}
    return state


def steps(run: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    return sorted((run / FOLDER).glob("step-*"))


def load_last(run: Path, params: dict[str, torch.nn.Parameter], optimizer, data_hash: str) -> dict:
    """Restores the newest checkpoint that is not damaged; returns its state.json, {"step": 0} where there is none yet.

    Raises: ValueError where all are damaged, or it is of another model or other data.
    """
    if first := distributed.is_first():
        drafts = ((run / FOLDER).glob(".step-*"), run.glob(".adapter.*"), run.glob(".model.*"))
        for draft in (d for found in drafts for d in found):  # of saves that were killed
            shutil.rmtree(draft)
    path = distributed.from_first(_last_whole(run) if first else None)
    if path is None:
        return {"step": 0}
    state = read_json(path / "state.json")
    if state["data"] != data_hash:
        raise ValueError(
            f"{path}: the prepared folder has changed since (pairs or weights); start anew with another --out"
        )
    wanted = {name: torch.empty_like(param) for name, param in params.items()}
    sharded = not (path / FILE).exists()
    if sharded != any(isinstance(value, DTensor) for value in wanted.values()):
        kinds = ("copies of the weights", "shares of the weights")
        raise ValueError(
            f"{path} holds {kinds[sharded]}, this run trains {kinds[not sharded]}; resume it with the same --parallel "
            "and one process or several, as before"
        )
    for name, param in params.items():  # what AdamW keeps: two moments like the weight, and a count
        wanted |= {f"{name}/{key}": torch.empty_like(param) for key in ("exp_avg", "exp_avg_sq")}
        wanted[f"{name}/step"] = torch.zeros((), device=param.device)  # on the device: the fused kernel wants it there
    if sharded:
        dcp.load(wanted, storage_reader=dcp.HuggingFaceStorageReader(str(path)))
    else:
        stored = load_file(path / FILE)
        if stored.keys() != wanted.keys():
            raise ValueError(f"{path} holds other trained weights than this run's model; was the model changed?")
        for name, value in wanted.items():
            value.copy_(stored[name])
    with torch.no_grad():
        for name, param in params.items():
            param.copy_(wanted[name])
            optimizer.state[param] = {key: wanted[f"{name}/{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
    return state


def _last_whole(run: Path) -> Path | None:
    """The newest checkpoint whose files are what its state.json says; aloud of those that are not."""
    found = steps(run)
    for path in reversed(found):
        damaged = _damage(path)
        if damaged is None:
            return path
        log.console.print(f"{path} is damaged ({damaged}); going on from the one before", style="yellow")
    if found:
        raise ValueError(f"{run / FOLDER}: every checkpoint is damaged; start anew with another --out")
    return None


def _damage(path: Path) -> str | None:
    try:
        state = read_json(path / "state.json")
        damaged = ["state.json"] if state.pop("seal") != _seal(state) else []
        damaged += [name for name, digest in state["sha256"].items() if sha256(inside(path, name)) != digest]
    except (OSError, ValueError, KeyError, AttributeError) as err:
        return f"{type(err).__name__}: {err}"
    return ", ".join(damaged) or None


def _seal(state: dict) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
