"""Checkpoints of a run: trained weights, optimiser state and RNG as safetensors, the rest as JSON; no pickle."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ddpo.files import new_folder, read_json, sha256, write_json

FOLDER = "checkpoints"


def save(run: Path, step: int, params: dict[str, torch.nn.Parameter], optimizer, keep: int) -> Path:
    """Writes checkpoints/step-N whole or not at all, then removes all but the `keep` newest."""
    path = run / FOLDER / f"step-{step:08d}"
    state = {
        f"{name}/{key}": value
        for name, param in params.items()
        for key, value in optimizer.state.get(param, {}).items()
        if isinstance(value, torch.Tensor)
    }
    rng = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        rng["cuda"] = torch.cuda.get_rng_state()
    with new_folder(path, overwrite=True) as draft:
        save_file({name: p.detach().contiguous() for name, p in params.items()}, draft / "weights.safetensors")
        save_file(state, draft / "optimizer.safetensors")
        save_file(rng, draft / "rng.safetensors")
        hashes = {file.name: sha256(file) for file in sorted(draft.iterdir())}
        write_json(draft / "state.json", {"step": step, "sha256": hashes})
    for old in steps(run)[:-keep]:
        shutil.rmtree(old)
    return path


def steps(run: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    return sorted((run / FOLDER).glob("step-*"))


def load_last(run: Path, params: dict[str, torch.nn.Parameter], optimizer) -> int:
    """Restores the newest checkpoint; returns its step, 0 where there is none yet.

    Raises: ValueError where its files are damaged or of another model.
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
    weights = load_file(path / "weights.safetensors")
    if weights.keys() != params.keys():
        raise ValueError(f"{path} holds other trained weights than this run's model; was the config changed?")
    with torch.no_grad():
        for name, param in params.items():
            param.copy_(weights[name])
    moments = load_file(path / "optimizer.safetensors")
    for key, value in moments.items():
        name, entry = key.rsplit("/", 1)
        param = params[name]
        optimizer.state[param][entry] = value if entry == "step" else value.to(param.device)
    rng = load_file(path / "rng.safetensors")
    torch.set_rng_state(rng["cpu"])
    if "cuda" in rng and torch.cuda.is_available():
        torch.cuda.set_rng_state(rng["cuda"])
    return state["step"]
