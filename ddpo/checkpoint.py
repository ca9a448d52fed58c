"""Checkpoints of a run: trained weights and optimiser state as safetensors, the rest as JSON; no pickle."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ddpo.files import new_folder, read_json, sha256, write_json

FOLDER = "checkpoints"


def save(run: Path, step: int, params: dict[str, torch.nn.Parameter], optimizer, data_hash: str, keep: int) -> Path:
    """Writes checkpoints/step-N whole or not at all, then removes all but the `keep` newest."""
    path = run / FOLDER / f"step-{step:08d}"
    state = {
        f"{name}/{key}": value
        for name, param in params.items()
        for key, value in optimizer.state.get(param, {}).items()
        if isinstance(value, torch.Tensor)
    }
    with new_folder(path, overwrite=True) as draft:
        save_file({name: p.detach().contiguous() for name, p in params.items()}, draft / "weights.safetensors")
        save_file(state, draft / "optimizer.safetensors")
        hashes = {file.name: sha256(file) for file in sorted(draft.iterdir())}
        write_json(draft / "state.json", {"step": step, "data": data_hash, "sha256": hashes})
    for old in steps(run)[:-keep]:
        shutil.rmtree(old)
    return path


def steps(run: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    return sorted((run / FOLDER).glob("step-*"))


def load_last(run: Path, params: dict[str, torch.nn.Parameter], optimizer, data_hash: str) -> int:
    """Restores the newest checkpoint; returns its step, 0 where there is none yet.

    Raises: ValueError where its files are damaged, or of another model or other data.
    """
    found = steps(run)
    if not found:
        return 0
    path = found[-1]
    state = read_json(path / "state.json")
    damaged = [name for name, digest in state["sha256"].items() if sha256(path / name) != digest]
    if damaged:
        raise ValueError(
            f"{path} is damaged ({', '.join(damaged)}); delete that folder and --resume from the one before"
        )
    if state["data"] != data_hash:
        raise ValueError(
            f"{path}: the prepared folder has changed since (pairs or weights); start anew with another --out"
        )
    weights = load_file(path / "weights.safetensors")
    if weights.keys() != params.keys():
        raise ValueError(f"{path} holds other trained weights than this run's model; was the model changed?")
    with torch.no_grad():
        for name, param in params.items():
            param.copy_(weights[name])
    for key, value in load_file(path / "optimizer.safetensors").items():
        name, entry = key.rsplit("/", 1)
        optimizer.state[params[name]][entry] = value.to(params[name].device)  # the fused kernel wants `step` there too
    return state["step"]
