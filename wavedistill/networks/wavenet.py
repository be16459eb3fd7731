"""The conditioner network: strictly causal dilated convolutions, over a whole sequence or one step at a time.

The causal shift lives here and nowhere else. Inside, activations are time-major (T, B, C): a delay is then a
contiguous slice for every batch size, and a dilated convolution is one matrix product a tap, of slices.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wavedistill.networks.network import Network
from wavedistill.networks.products import added, product


class WaveNetState:
    """What a network remembers of a sequence that it is given block by block: zeros at the start, as training pads.

    Attributes:
        previous: (B, squeeze) the last inputs of the block before.
        hidden: (B, skip_channels) what the head makes the outputs of the last group of, which may reach into the block.
        history: per layer ((kernel_size - 1) * dilation + room, B, channels), its inputs before the block, and room for
            those of the block.
        position: steps of the block that are done.
    """

    def __init__(self, net: "WaveNet", batch_size: int, room: int) -> None:
        self._past = [(net.kernel_size - 1) * dilation for dilation in net.dilations]
        zeros = net.input.weight.new_zeros
        self.previous, self.hidden = zeros(batch_size, net.squeeze), zeros(batch_size, net.skip_channels)
        self.history = [zeros(past + room // net.squeeze, batch_size, net.channels) for past in self._past]
        self.position = 0

    def advance(self, steps: int) -> None:
        """End a block of so many steps: its last hidden values become the past of the next."""
        for history, past in zip(self.history, self._past, strict=True):
            kept = history[steps : steps + past]
            history[:past] = kept if steps >= past else kept.clone()
        self.position = 0


class WaveNet(Network):
    r"""Strictly causal gated convolution stack (van den Oord et al. 2016): outputs at t see the input before t only.

    Each layer computes, with dilation d_l and conditioning c,

    .. math:: h \leftarrow h + R\,a, \quad skip \leftarrow skip + S\,a, \quad
              a = \tanh(W_f * h + V_f c) \odot \sigma(W_g * h + V_g c)

    and two more 1x1 layers map the sum of skips to the outputs. The last one starts at zero, so that a flow built on it
    starts from what its caller chose.

    Squeezed by G, it runs once for G inputs, in a G-th of the operations (after Zhai et al. 2020, SqueezeWave). A
    group's outputs see the groups before it, and the first output at t, a shift, is linear in the values before t in
    its own group: the network gives a weight for each pair of places in a group beside it. Groups begin at `border`,
    border + G and so on; before them, where nothing is known, outputs are the last layer's bias.

    Args:
        layers: number of gated layers; layer i has dilation 2 ** (i mod dilation_cycle).
        dilation_cycle: layers until the dilation starts again at 1.
        kernel_size: taps of each dilated convolution, at least 2.
        channels: residual width; the gates are twice as wide.
        skip_channels: width of the skip path and of the head.
        out_channels: outputs a step.
        feature_channels: width of the conditioning features, or None for an unconditional network.
        repeat: samples that share one conditioning feature.
        source_channels: inputs at t that the network sees beside the past; functions of the conditioning.
        squeeze: inputs a group; divides `repeat`.
        border: where the first group begins, less than `squeeze`.
    """

    def __init__(
        self,
        *,
        layers: int,
        dilation_cycle: int,
        kernel_size: int,
        channels: int,
        skip_channels: int,
        out_channels: int,
        feature_channels: int | None = None,
        repeat: int = 1,
        source_channels: int = 0,
        squeeze: int = 1,
        border: int = 0,
    ) -> None:
        super().__init__(
            layers=layers,
            dilation_cycle=dilation_cycle,
            kernel_size=kernel_size,
            channels=channels,
            skip_channels=skip_channels,
            in_channels=squeeze * (1 + source_channels),
            out_channels=squeeze * out_channels + squeeze * (squeeze - 1) // 2,
            feature_channels=feature_channels,
            repeat=repeat,
            squeeze=squeeze,
        )
        self.outputs_a_step, self.border, self.source_channels = out_channels, border, source_channels

    def start_from(self, outputs: Tensor) -> None:
        """Let every step begin with outputs (out_channels or fewer, the first), whatever it is given."""
        with torch.no_grad():
            self.head.bias[: self.squeeze * len(outputs)] = outputs.repeat_interleave(self.squeeze)

    @property
    def receptive_field(self) -> int:
        """How many input values before t the output at t can see."""
        return self.squeeze * (2 + (self.kernel_size - 1) * sum(self.dilations)) - 1

    def trial(self, samples: int) -> tuple[Tensor | None, ...]:
        length, zeros = -(-samples // self.repeat) * self.repeat, self.input.weight.new_zeros
        features = None if self.context is None else zeros(1, length // self.repeat, self.context.in_features)
        return zeros(1, length), features, zeros(1, length, self.source_channels) if self.source_channels else None

    def forward(
        self, x: Tensor, features: Tensor | None = None, source: Tensor | None = None, state: WaveNetState | None = None
    ) -> Tensor:
        """Outputs (B, T, out_channels) for every t of x (B, T).

        Args:
            x: the signal whose past is read.
            features: (B, at least T / repeat, feature_channels), or None for an unconditional network.
            source: (B, at least T + border, source_channels), or None where these are 0.
            state: what came before x, which is replaced by what comes before the next block; without gradient. Every
                block but the last has a multiple of `repeat` steps. None for a whole sequence.
        """
        batch_size, length = x.shape
        previous = x.new_zeros(batch_size, self.squeeze) if state is None else state.previous
        values, seen, last = self.in_groups(previous, x)
        groups, repeat = seen.shape[1], self.repeat // self.squeeze
        h = self._inputs(seen.transpose(0, 1), source)  # (T / squeeze * B, C)
        context = self.project(features)
        skip = x.new_zeros(1, 1)  # under autocast, sums stay as precise as x
        for i, dilation in enumerate(self.dilations):
            past = (self.kernel_size - 1) * dilation
            if state is None:
                extended = F.pad(h, (0, 0, past * batch_size, 0))
            else:
                state.history[i][past : past + groups] = h.view(groups, batch_size, -1)
                extended = state.history[i].flatten(0, 1)
            delays = [extended[k * dilation * batch_size :][: h.shape[0]] for k in range(self.kernel_size - 1)]
            own = None if context is None else context[: groups // repeat, i, None]
            y = self._gates(i, [*delays, h], own, (-1, repeat, batch_size))
            h, skip = self._layer(i, y, h, skip)
        hidden = self._hidden(skip)
        if self.squeeze == 1:
            found = self._head(hidden).unflatten(0, (groups, batch_size)).transpose(0, 1)
        else:
            before = hidden.new_zeros(batch_size, self.skip_channels) if state is None else state.hidden
            found = self._grouped(torch.cat([before, hidden]), values.transpose(0, 1))[:, self.squeeze - self.border :]
        if state is not None:
            state.previous.copy_(last)
            state.hidden.copy_(hidden[-batch_size:])
            state.advance(length // self.squeeze)
        return found[:, :length]

    def step(
        self, previous: Tensor, state: WaveNetState, context: Tensor | None = None, source: Tensor | None = None
    ) -> Tensor:
        """Outputs (B, out_channels) of the next step of a block, from x_{t-1} (B,); of a network that is not squeezed.

        Notes its hidden values in the state.

        Args:
            previous: the value before, zero at t = 0.
            state: with room for the step.
            context: (layers, B, 2 channels) of the step, from `project`.
            source: (B, source_channels) of the step.
        """
        inputs = previous.unsqueeze(-1)
        if source is not None:
            inputs = torch.cat([inputs, source], -1)
        h = self.input(inputs)  # (B, C)
        skip = previous.new_zeros(1, 1)  # under autocast, sums stay as precise as the signal
        for i, dilation in enumerate(self.dilations):
            history = state.history[i]
            first = state.position
            history[first + (self.kernel_size - 1) * dilation] = h
            taps = [*(history[first + k * dilation] for k in range(self.kernel_size - 1)), h]
            y = self._gates(i, taps, None if context is None else context[i], (-1,))
            h, skip = self._layer(i, y, h, skip)
        state.position += 1
        return self._head(self._hidden(skip))

    def project(self, features: Tensor | None) -> Tensor | None:
        """Features (B, F', C) -> one bias per layer (F', layers, B, 2 channels).

        Raises:
            ValueError: if the network is conditional, and there are none.
        """
        if self.context is None:
            return None
        if features is None:
            raise ValueError("this network is conditional: it needs features")
        projected = product(features.transpose(0, 1), self.context.weight, self.context.bias)
        return projected.unflatten(-1, (len(self.gates), -1)).transpose(1, 2)

    def in_groups(self, previous: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A block x (B, T) after the last inputs before it (B, squeeze), in groups, filled up with zeros.

        Returns:
            Values (B, N + 1, squeeze) where the groups of outputs are, from that on which the block before began; what
            N groups see of them (B, N, squeeze), which is the causal shift, each the group before; and the last inputs
            (B, squeeze).
        """
        batch_size, length = x.shape
        covered = -(-length // self.repeat) * self.repeat
        known = torch.cat([previous, x, x.new_zeros(batch_size, covered - length + self.border)], 1)
        values = known[:, self.border :].unflatten(1, (covered // self.squeeze + 1, self.squeeze))
        return values, values[:, :-1], known[:, length : length + self.squeeze]

    def beside(self, source: Tensor, groups: int) -> Tensor:
        """The source (B, at least T + border, S) of so many groups (B, N, squeeze * S)."""
        here = slice(self.border, self.border + groups * self.squeeze)
        if source.shape[1] < here.stop:
            source = F.pad(source, (0, 0, 0, here.stop - source.shape[1]))
        return source[:, here].unflatten(1, (groups, self.squeeze)).flatten(2)

    def _inputs(self, values: Tensor, source: Tensor | None) -> Tensor:
        """The first layer's (N * B, C), of values (N, B, squeeze) and of the source (B, at least T + border, S)."""
        own, beside = self.input.weight.tensor_split([self.squeeze], 1)
        h = product(values.flatten(0, 1), own, self.input.bias)
        if source is None:
            return h
        return added(h, self.beside(source, values.shape[0]).transpose(0, 1).flatten(0, 1), beside)

    def _gates(self, i: int, taps: list[Tensor], context: Tensor | None, rows: tuple[int, ...]) -> Tensor:
        """The dilated convolution of layer i, one product a tap (N, C), and its conditioning; nothing is stacked.

        The context (..., 2 C) is added to the sum of products, seen as (*rows, 2 C).
        """
        gates = cast(nn.Linear, self.gates[i])
        first, *others = zip(taps, gates.weight.split(self.channels, 1), strict=True)
        bias = gates.bias if context is None else context + gates.bias
        y = product(*first)
        if not torch.compiler.is_compiling():
            for tap, weight in others:
                y = added(y, tap, weight)
            y.unflatten(0, rows).add_(bias)
            return y
        # A compiler adds products where they are read; next to each other, it would copy one to add the other to it.
        total = y.unflatten(0, rows) + bias
        for tap, weight in others:
            total = total + F.linear(tap, weight).unflatten(0, rows)
        return total.flatten(0, -2)

    def _layer(self, i: int, y: Tensor, h: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        filtered, gate = y.chunk(2, -1)
        # tanh(f) = 2 sigmoid(2f) - 1: on a CPU, torch's tanh takes as long as six of its sigmoids.
        opened = torch.sigmoid(gate)
        outputs = cast(nn.Linear, self.outputs[i])
        active = torch.addcmul(-opened, torch.sigmoid(2 * filtered), opened, value=2)
        out = product(active, outputs.weight, outputs.bias)
        skip = skip + out[..., : self.skip_channels]
        if i < len(self.outputs) - 1:
            h = h + out[..., self.skip_channels :]
        return h, skip

    def _hidden(self, skip: Tensor) -> Tensor:
        scaled = skip * len(self.gates) ** -0.5
        with torch.autocast(skip.device.type, enabled=False):  # a density is no more precise than its parameters
            return F.relu(product(F.relu(scaled), self.hidden.weight, self.hidden.bias))

    def _head(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return product(hidden, self.head.weight, self.head.bias)

    def _grouped(self, hidden: Tensor, values: Tensor) -> Tensor:
        """Outputs (B, (N + 1) * squeeze, out_channels) of hidden ((N + 1) * B, S) and values (N + 1, B, squeeze).

        The last layer gives the outputs of all places in a group, and a weight for each place and each before it.
        """
        count, batch_size, _ = values.shape
        with torch.autocast(hidden.device.type, enabled=False):
            # Groups last, so that what is linear within them adds long rows.
            found = product(self.head.weight, hidden) + self.head.bias[:, None]
        outputs, weights = found.tensor_split([self.squeeze * self.outputs_a_step])
        shift, *others = outputs.unflatten(0, (self.outputs_a_step, self.squeeze))
        given = values.permute(2, 0, 1).flatten(1)
        parts = weights.split(list(range(1, self.squeeze)))
        moved = [(part * given[:place]).sum(0) for place, part in enumerate(parts, 1)]
        shift = shift + F.pad(torch.stack(moved), (0, 0, 1, 0))
        stacked = torch.stack([shift, *others]).unflatten(-1, (count, batch_size))
        return stacked.permute(0, 3, 2, 1).flatten(2).movedim(0, -1)
