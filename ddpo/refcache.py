"""Log-probs of the reference policy, once per response, kept with the prepared folder for all epochs and runs."""

import hashlib
import time
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch import nn

from ddpo import distributed, log
from ddpo.data.prepared import Prepared
from ddpo.files import new_file, sha256
from ddpo.model import Policy
from ddpo.passes import each_logp

SAVE_EVERY_S = 60.0  # what a kill can lose


def identity(policy: Policy, adapter: str | None) -> dict[str, str]:
    """What reference log-probs depend on beside the tokens: the cache's key, in parts that can be told apart.

    Of a policy not yet wrapped. Neither the weights of pairs nor the adapter in training touch it; `adapter` is the
    one merged before, which the reference holds too.
    """
    file = Path(adapter or "") / "adapter_model.safetensors"
    return {
        "weights": policy.base_fingerprint(),
        "adapter": sha256(file) if adapter and file.is_file() else str(adapter),
        "settings": f"weights {policy.causal.dtype}, autocast {policy.autocast}",
    }


def reference_logp(
    policy: nn.Module, data: Prepared, needed: np.ndarray, max_tokens: int, device: torch.device, parts: dict[str, str]
) -> torch.Tensor:
    """(R,) float64 nats, nan where neither needed nor cached. Only what the cache lacks is computed, by all processes
    together; what is done is on the disk once a minute.

    Args: policy, wrapped or not; needed (n,) responses; max_tokens of a pack; parts: see `identity`.
    """
    files = data.manifest["files"]
    parts = {**parts, "tokens": files["groups"]["sha256"] + files["responses"]["sha256"]}
    path = data.folder / f"reference-{hashlib.sha256(str(sorted(parts.items())).encode()).hexdigest()[:16]}.safetensors"
    first = distributed.is_first()
    known = load_file(path)["logp"].copy() if first and path.exists() else np.full(len(data.responses), np.nan)
    known = distributed.from_first(known)  # the file may be another run's to write just now
    missing = needed[np.isnan(known[needed])]
    if not len(missing):
        return torch.from_numpy(known).to(device)
    if why := _why_anew(path, parts):
        log.console.print(why)
    found = np.full((2, len(known)), 0.0)  # this process's log-probs, and a 1 for each

    def keep() -> None:
        logp, done = distributed.all_reduce(torch.from_numpy(found).to(device)).cpu().numpy()
        known[done > 0] = logp[done > 0]
        if first:
            with new_file(path) as draft:
                save_file({"logp": known}, draft, metadata=parts)

    saved, length = time.monotonic(), data.num_prompt_tokens + data.num_tokens
    with distributed.unwrap(policy).reference(), log.progress() as bar:
        task = bar.add_task("reference log-probs", total=len(missing), note="")
        for responses, logp, done in each_logp(policy, data, missing, length, max_tokens, device):
            found[0, responses], found[1, responses] = logp, 1
            bar.update(task, completed=done)
            if distributed.any_of_us(time.monotonic() - saved > SAVE_EVERY_S):
                keep()
                saved = time.monotonic()
    keep()
    return torch.from_numpy(known).to(device)


def _why_anew(path: Path, parts: dict[str, str]) -> str | None:
    """What differs from the nearest of the caches that are there, None where none or this one is."""
    if path.exists():
        return None
    others = []
    for file in set(path.parent.glob("reference-*.safetensors")) - {path}:
        with safe_open(file, "numpy") as stored:
            of_file = stored.metadata() or {}
        others.append(([name for name in parts if parts[name] != of_file.get(name)], file.name))
    if not others:
        return None
    differing, name = min(others, key=lambda other: (len(other[0]), other[1]))
    return f"reference log-probs are computed anew: {' and '.join(differing)} changed since {name}"
