"""Where and in which precision a model runs, alone or as one of several processes."""

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from timm.utils.distributed import init_distributed_device_so, is_distributed_env
from torch import Tensor, nn

from ..errors import UserError

AMP_DTYPES = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Runtime:
    """One process's device and precision."""

    device: torch.device
    amp_dtype: torch.dtype | None = None
    channels_last: bool = False
    rank: int = 0
    world_size: int = 1

    @classmethod
    def create(cls, device: str | None = None, amp: str = "none", channels_last: bool = False) -> "Runtime":
        """Choose the device, and join the other processes when started by torchrun, `accelerate launch` or Slurm.

        Raises:
            UserError: When the device is not there or cannot do what is asked.
        """
        kind = (device or default_device()).partition(":")[0]
        _check_device(device, kind)
        if amp == "fp16" and kind == "cpu":
            raise UserError("amp: fp16 needs a GPU, on a CPU there are none and bf16")
        rank, world_size, name = 0, 1, device or kind
        if is_distributed_env() and not dist.is_initialized():
            place = init_distributed_device_so(kind)
            rank, world_size, name = place["global_rank"], place["world_size"], place["device"]
        return cls(torch.device(name), AMP_DTYPES[amp], channels_last, rank, world_size)

    @property
    def is_main(self) -> bool:
        """Whether this process writes and reports."""
        return self.rank == 0

    def autocast(self) -> AbstractContextManager:
        """Mixed precision, if it was asked for."""
        return torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None)

    def place(self, module: nn.Module) -> nn.Module:
        """Move a module to the device and memory layout."""
        return module.to(self.device, memory_format=torch.channels_last if self.channels_last else None)

    def place_images(self, images: Tensor) -> Tensor:
        """Move images to the device and memory layout."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return images.to(self.device, non_blocking=True).contiguous(memory_format=layout)

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, item: object) -> list:
        """One item from every process."""
        if self.world_size == 1:
            return [item]
        items: list = [None] * self.world_size
        dist.all_gather_object(items, item)
        return items

    def close(self) -> None:
        """Leave the other processes."""
        if self.world_size > 1:
            dist.destroy_process_group()


def default_device() -> str:
    """The accelerator that PyTorch sees, or the CPU."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _check_device(device: str | None, kind: str) -> None:
    if device is None:
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"device: cannot use {device!r}: {reason}") from error
    if kind == "meta":
        raise UserError("device: meta tensors hold no values to train or evaluate")
