"""Where a training computes, on which device and in how many processes: Lightning Fabric, set up for this project.

Fabric takes a second to import, so whoever asks for help or for a waveform does without.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from lightning_fabric.loggers.tensorboard import TensorBoardLogger


def launch(device: torch.device) -> "Fabric":
    """This process's part of the work: all of it, or, where `torchrun` started several, one of them.

    Those of one machine have a CUDA device each, or share the CPU.
    """
    from lightning_fabric import Fabric

    if not torch.distributed.is_torchelastic_launched():
        devices = [device.index or 0] if device.type == "cuda" else 1
        fabric = Fabric(accelerator=device.type, devices=devices)
    else:
        world, local = (int(os.environ[name]) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        fabric = Fabric(
            accelerator=device.type,
            strategy="ddp" if world > 1 else "auto",
            devices=local,
            num_nodes=world // local,
        )
    fabric.launch()
    return fabric


def tensorboard(folder: Path, step: int) -> "TensorBoardLogger":
    """A log in a folder, of the first process alone; what an earlier call has logged after a step is dropped."""
    from lightning_fabric.loggers.tensorboard import TensorBoardLogger

    return TensorBoardLogger(folder, "tensorboard", "", purge_step=step + 1 if step else 0)
