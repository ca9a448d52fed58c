"""One process or many under torchrun: who I am, what wraps the policy, and what all of us do together."""

import os
import time
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ddpo import log

T = TypeVar("T")
TIMEOUT = timedelta(hours=1)  # the others wait while the first process writes a large model


def start() -> tuple[int, int]:
    """(rank, world size); joins the process group where torchrun started several, of which the first alone speaks."""
    launched = "TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("WORLD_SIZE", "1")) > 1
    if launched and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(device())
            # gloo: to agree on something without the GPU
            dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device(), timeout=TIMEOUT)
        else:
            dist.init_process_group("gloo", timeout=TIMEOUT)
        log.console.quiet = log.console.quiet or dist.get_rank() > 0
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_first() -> bool:
    return start()[0] == 0


def finish() -> None:
    """Leaves the process group, before the interpreter ends: Gloo's threads still let go of the last collective's
    tensors, which wants the GIL, and where that comes too late they abort the process (pytorch/pytorch#179291)."""
    if dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(0.1)  # the GIL is theirs


def device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


# --- the policy over several processes --------------------------------------------------------------------


def wrap(policy: Any, how: str) -> nn.Module:
    """The policy as each process trains it: under 'ddp' a copy in each, under 'fsdp' a share of every weight in each
    (layer by layer; embedding, final norm and head stay together while the policy runs). Both average gradients."""
    if not dist.is_initialized():
        return policy
    if how == "ddp":
        ids = [device()] if device().type == "cuda" else None
        return DistributedDataParallel(policy, device_ids=ids, broadcast_buffers=False, find_unused_parameters=False)
    for layer in policy.layers():
        fully_shard(layer)
    return fully_shard(policy)


def unwrap(policy: nn.Module) -> Any:  # a ddpo.model.Policy
    return policy.module if isinstance(policy, DistributedDataParallel) else policy


def is_sharded(policy: nn.Module) -> bool:
    return isinstance(policy, FSDPModule)


def reshard(policy: nn.Module) -> None:
    """Gives up the whole weights that a forward without backward leaves in the root of a sharded policy: its modules
    would hold those, not the shares that are trained and saved."""
    if isinstance(policy, FSDPModule):
        policy.reshard()


def sync_gradients(policy: nn.Module, now: bool) -> None:
    """Whether the backward of the next forward sums the copies' gradients. Shares are always summed: whole gradients
    would not fit."""
    if isinstance(policy, DistributedDataParallel):
        policy.require_backward_grad_sync = now  # what its no_sync() sets


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, put together where each process holds a share; then all must call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# --- together ---------------------------------------------------------------------------------------------


def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    """Sums the tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def any_of_us(flag: bool) -> bool:
    """Whether the flag is true in any process; the same answer in all."""
    return bool(all_reduce(torch.tensor(float(flag))) > 0)


def from_first(value: T) -> T:
    """The first process's value, in all."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def from_all(value: T) -> list[T]:
    """Every process's value, by rank, in all."""
    if not dist.is_initialized():
        return [value]
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
