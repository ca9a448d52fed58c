"""Log-probs of the reference policy, once per response, kept with the prepared folder for all epochs and runs."""

import hashlib
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from ddpo import distributed, log
from ddpo.data.batches import pack, split_by_tokens
from ddpo.data.prepared import Prepared
from ddpo.files import new_file
from ddpo.model import Policy


def reference_logp(
    policy: Policy, data: Prepared, needed: np.ndarray, micro_tokens: int, device: torch.device
) -> torch.Tensor:
    """(R,) float64 nats, nan where neither needed nor cached. Only what the cache lacks is computed.

    The cache's key is a hash of base weights and tokens: settings, weights of pairs and adapters do not touch it.
    """
    rank, world = distributed.start()
    path = data.folder / f"reference-{_key(policy, data)}.safetensors"
    known = _read(path, len(data.responses))
    missing = needed[np.isnan(known[needed])]
    if len(missing):
        length = data.num_prompt_tokens + data.num_tokens
        order = missing[np.argsort(length[missing], kind="stable")]
        batches = [order[i] for i in split_by_tokens(list(order[:, None]), length, micro_tokens)]
        logp = np.zeros(len(known))
        mine = batches[rank::world]
        with policy.reference(), torch.inference_mode():
            for responses in log.track(mine, "reference log-probs", len(mine)) if rank == 0 else mine:
                logp[responses] = policy(pack(data, responses).to(device)).double().cpu().numpy()
        total = torch.from_numpy(logp).to(device)
        distributed.all_reduce([total])
        known[missing] = total.cpu().numpy()[missing]
        if rank == 0:
            with new_file(path) as draft:
                save_file({"logp": known}, draft)
    return torch.from_numpy(known).to(device)


def _read(path: Path, num_responses: int) -> np.ndarray:
    return load_file(path)["logp"].copy() if path.exists() else np.full(num_responses, np.nan)


def _key(policy: Policy, data: Prepared) -> str:
    files = data.manifest["files"]
    parts = [policy.base_fingerprint(), files["groups"]["sha256"], files["responses"]["sha256"]]
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:16]
