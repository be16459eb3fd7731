"""Where a training computes, on which device and in how many processes: Lightning Fabric, set up for this project.

Fabric takes a second to import, so whoever asks for help or for a waveform does without.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

import torch

from wavedistill.tools.errors import UserError

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from lightning_fabric.loggers.tensorboard import TensorBoardLogger

Found = TypeVar("Found")


def launch(device: torch.device) -> "Fabric":
    """This process's part of the work: all of it, or, where `torchrun` started several, one of them.

    Those of one machine have a CUDA device each, whatever its number here, or share the CPU.

    Raises:
        UserError: if there are fewer devices than processes, or the machines do not have equally many processes.
    """
    from lightning_fabric import Fabric
    from lightning_fabric.strategies.ddp import DDPStrategy

    # All in float32 is what a recipe says: by default, a GPU's convolutions would round to ten bits.
    torch.backends.cudnn.allow_tf32 = False
    if processes() == 1:
        devices = [device.index or 0] if device.type == "cuda" else 1
        fabric = Fabric(accelerator=device.type, devices=devices)
    else:
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        if device.type == "cuda" and local > torch.cuda.device_count():
            raise UserError(
                f"torchrun: {local} processes on a machine with {torch.cuda.device_count()} GPUs, and each takes one: "
                "give --nproc-per-node as many at most, or --device cpu"
            )
        if processes() % local:
            raise UserError("torchrun: give every machine the same --nproc-per-node")
        # Buffers are constants here: the same in every process.
        strategy = DDPStrategy(broadcast_buffers=False)
        fabric = Fabric(accelerator=device.type, strategy=strategy, devices=local, num_nodes=processes() // local)
    fabric.launch()
    return fabric


def processes() -> int:
    """How many processes `torchrun` started, on all machines; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if torch.distributed.is_torchelastic_launched() else 1


def leave() -> None:
    """End what several processes had in common, whose threads would else be cut off, now and then with an abort."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def by_first(fabric: "Fabric", find: Callable[[], Found]) -> Found:
    """What the first process finds, in all of them; what a user can mend is raised in all."""
    found: Found | UserError | None = None
    if fabric.is_global_zero:
        try:
            found = find()
        except UserError as error:
            found = error
    found = fabric.broadcast(found)
    if isinstance(found, UserError):
        raise found
    return cast(Found, found)


@contextmanager
def tensorboard(folder: Path, step: int) -> "Iterator[TensorBoardLogger]":
    """A log in a folder, of the first process alone; what an earlier call has logged after a step is dropped."""
    from lightning_fabric.loggers.tensorboard import TensorBoardLogger

    log = TensorBoardLogger(folder, "tensorboard", "", purge_step=step + 1 if step else 0)
    try:
        yield log
    finally:
        log.finalize("")
