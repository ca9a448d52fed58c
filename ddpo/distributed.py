"""One process or many under torchrun: who I am, and sums over all of us."""

import os

import torch
import torch.distributed as dist


def start() -> tuple[int, int]:
    """(rank, world size); joins the process group where torchrun started several."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(device())
            dist.init_process_group("nccl", device_id=device())
        else:
            dist.init_process_group("gloo")
    return (dist.get_rank(), world) if dist.is_initialized() else (0, 1)


def finish() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def all_reduce(tensors: list[torch.Tensor]) -> None:
    """Sums each tensor over all processes, in place: one collective for all of one dtype."""
    if not dist.is_initialized():
        return
    for dtype in sorted({t.dtype for t in tensors}, key=str):
        same = [t for t in tensors if t.dtype == dtype]
        flat = torch.cat([t.reshape(-1) for t in same])
        dist.all_reduce(flat)
        for t, part in zip(same, flat.split([t.numel() for t in same]), strict=True):
            t.copy_(part.view_as(t))


def any_of_us(flag: bool) -> bool:
    """Whether the flag is true in any process; the same answer in all."""
    if not dist.is_initialized():
        return flag
    total = torch.tensor(float(flag), device=device())
    dist.all_reduce(total)
    return bool(total > 0)


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
