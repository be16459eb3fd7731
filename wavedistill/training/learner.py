"""What a step of a training changes: a model, the average of its weights, and the optimizer."""

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from wavedistill.corpus.segments import Batch, dequantise
from wavedistill.models.kinds import build
from wavedistill.models.waveform import WaveformModel
from wavedistill.recipe.recipe import Recipe
from wavedistill.tools.engine import by_first
from wavedistill.tools.random import Streams
from wavedistill.training.task import Task, players

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class Learner:
    """A model, the moving average of its weights, and the optimizer of those that are not given."""

    def __init__(self, task: Task, recipe: Recipe, fabric: "Fabric") -> None:
        self.task, self.fabric = task, fabric
        self.model = build(recipe, task.name, recipe.seed).to(fabric.device)
        self.model.load_state_dict({**task.start, **task.given}, strict=False)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name not in task.given)
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.players = players(task, self.model)
        groups = [{"params": player.parameters, "lr": player.schedule(0)} for player in self.players]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99), fused=True)
        self._terms, self.optimizer = fabric.setup(_Terms(task, self.model), optimizer)

    def start_from_data(self, find: Callable[[], tuple[Batch, Streams]]) -> None:
        """Set what starts from data by a batch, but for a model that begins with trained weights.

        The first process does it for all, whose rounding might differ.
        """
        if self.task.start or not self.model.starts_from_data:
            return

        def started() -> dict[str, Tensor]:
            batch, streams = find()
            self.model.start_from_data(dequantise(batch.with_margins, streams), batch.conditioning)
            return {name: weight.cpu() for name, weight in self.model.state_dict().items()}

        weights = by_first(self.fabric, started)
        self.model.load_state_dict(weights)
        self.average.load_state_dict(weights)

    def step(self, parts: Iterable[tuple[Batch, Streams]], step: int) -> tuple[dict[str, Tensor], float]:
        """Follow the gradient of a batch, unless it is not finite.

        Args:
            parts: of the batch, for this process, one for each share of memory.
            step: the number of steps before.

        Returns:
            The mean terms of this process, and the norm of the first player's gradient before clipping, NaN where any
            is not finite.
        """
        settings = self.task.settings
        for player, group in zip(self.players, self.optimizer.param_groups, strict=True):
            group["lr"] = player.schedule(step)
        self.optimizer.zero_grad(set_to_none=True)
        found: dict[str, Tensor] = {}
        for number, (batch, streams) in enumerate(parts, 1):
            with self.fabric.no_backward_sync(self._terms, enabled=number < settings.accumulate):
                terms = {name: term / settings.accumulate for name, term in self._terms(batch, streams).items()}
                self.fabric.backward(torch.stack([player.objective(terms, step) for player in self.players]).sum())
            found = {name: term.detach() + found.get(name, 0) for name, term in terms.items()}
        norms = [nn.utils.clip_grad_norm_(player.parameters, player.grad_clip) for player in self.players]
        norm, *others = torch.stack(norms).tolist()  # the one place where a step waits for a GPU
        if not math.isfinite(norm + sum(others)):
            return found, math.nan
        self.optimizer.step()
        update_average(self.average, self.model, settings.ema_decay, step + 1)
        return found, norm

    def parameter_norm(self) -> float:
        """The norm of all learnt weights."""
        return float(nn.utils.get_total_norm([weight for player in self.players for weight in player.parameters]))


class _Terms(nn.Module):
    """The loss as the forward pass of a module, which is what an engine makes parallel.

    Reduced precision is torch's autocast, not the engine's, which would round the data too.
    """

    def __init__(self, task: Task, model: WaveformModel) -> None:
        super().__init__()
        self.task, self.model = task, model

    def forward(self, batch: Batch, streams: Streams) -> Mapping[str, Tensor]:
        lowered = self.task.settings.precision == "bf16-mixed"
        with torch.autocast(batch.audio.device.type, torch.bfloat16, enabled=lowered):
            return self.task.terms(self.model, batch, streams)


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    r"""Move the average towards the model: :math:`\bar w \leftarrow d \bar w + (1 - d) w`, d smaller in early steps."""
    decay = min(decay, step / (step + 10))
    move = get_ema_multi_avg_fn(decay)
    move(list(average.parameters()), list(model.parameters()), step)
