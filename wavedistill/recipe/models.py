"""A recipe's models: each kind is one table, with its own keys and their defaults."""

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from wavedistill.recipe.sections import Section, Width

Layers = Annotated[int, Field(ge=1, le=1000)]
Bins = Annotated[int, Field(ge=2, le=64)]
"""Pieces of a spline, where there is one."""
ImportPath = Annotated[str, Field(pattern=r"^\w+(\.\w+)*:\w+$")]
""" "module:name" of code of the user's own."""
GOLDEN = (math.sqrt(5) - 1) / 2


def _each(value: Any) -> Any:
    """One number is that of each."""
    return [value] if isinstance(value, int) else value


class Network(Section):
    """A WaveNet's width and shape."""

    channels: Width = 32
    skip_channels: Width = 32
    dilation_cycle: Annotated[int, Field(ge=1, le=16)] = 10
    """Layer i has dilation 2 ** (i mod dilation_cycle)."""
    kernel_size: Annotated[int, Field(ge=2, le=16)] = 2

    def reach(self, layers: int) -> int:
        """Places beside its own that an output of so many layers sees."""
        return (self.kernel_size - 1) * sum(2 ** (i % self.dilation_cycle) for i in range(layers))

    def receptive_field(self, layers: int, squeeze: int = 1) -> int:
        """Samples that so many layers look back."""
        return squeeze * (2 + self.reach(layers)) - 1


class Maf(Section):
    """A masked autoregressive flow: its density in one pass, its samples one by one."""

    kind: Literal["maf"]
    base: Literal["normal", "logistic"] = "normal"
    """The shape of a sample's density given the ones before."""
    components: Annotated[int, Field(ge=1, le=100)] = 1
    """How many of them are mixed."""
    elementwise: Literal["mixture", "spline", "sos"] = "mixture"
    """What a sample is of its noise: a draw of the mixture, which of one component is an affine function; or an affine
    function that a monotonic spline has bent, or the integral of a sum of squared polynomials."""
    bins: Bins = 8
    polynomials: Annotated[int, Field(ge=1, le=16)] = 2
    """In a sum of squares, where there is one."""
    degree: Annotated[int, Field(ge=1, le=16)] = 3
    """Of each of them."""
    layers: Layers = 20
    min_log_scale: Annotated[float, Field(lt=0)] = -4.5
    """Lower bound of log_scale, in nats, for a residual of about unit variance."""
    network: Network = Network()

    @property
    def affine(self) -> bool:
        """Whether a sample is an affine function of its noise."""
        return self.components == 1 and self.elementwise == "mixture"

    @property
    def recordable(self) -> bool:
        """Whether a draw of a sample looks at no value, so that a CUDA graph of it can be recorded."""
        return self.components == 1 and self.elementwise != "sos"

    @property
    def receptive_field(self) -> int:
        """Samples that its network looks back."""
        return self.network.receptive_field(self.layers)

    @property
    def noise(self) -> str:
        """The distribution of its noise; a mixture of copies of the base is made of logistic noise."""
        return "logistic" if self.components > 1 else self.base

    @model_validator(mode="after")
    def _consistent(self) -> "Maf":
        if self.components > 1 and self.elementwise != "mixture":
            raise ValueError(
                f'elementwise = "{self.elementwise}" has one component, not {self.components}: set components = 1, or '
                'elementwise = "mixture"'
            )
        return self


class Iaf(Section):
    """Inverse autoregressive flows: samples in one pass, and the density of these."""

    kind: Literal["iaf"]
    base: Literal["normal", "logistic"] = "normal"
    flow_layers: Annotated[tuple[Layers, ...], Field(strict=False, min_length=1)] = (10, 10, 10)
    """Layers of each flow, from noise to waveform."""
    squeeze: Annotated[
        tuple[Annotated[int, Field(ge=1, le=64)], ...], BeforeValidator(_each), Field(strict=False, min_length=1)
    ] = (1,)
    """Samples that each flow's network is run once for: a G-th of the operations, and dependence inside so many that is
    linear. One for all flows, or one for each. Divides the last factor of `conditioning.upsample`; at most half of
    `audio.hop_length`."""
    periodic_source: bool = True
    """Whether the networks read signals that repeat with F0 beside the noise; needs `conditioning.pitch`."""
    min_log_scale: Annotated[float, Field(lt=0)] = -4.5
    """Lower bound of each flow's log_scale, in nats, for a residual of about unit variance."""
    network: Network = Network()

    @property
    def receptive_field(self) -> int:
        """Samples that the network looks back that looks furthest."""
        return max(map(self.network.receptive_field, self.flow_layers, self.squeezes))

    @property
    def squeezes(self) -> tuple[int, ...]:
        """Samples a group, of each flow."""
        return self.squeeze * len(self.flow_layers) if len(self.squeeze) == 1 else self.squeeze

    @property
    def borders(self) -> tuple[int, ...]:
        """Where the groups of each flow begin, spread by the golden section, so that flows differ."""
        return tuple(math.floor(i * GOLDEN * squeeze) % squeeze for i, squeeze in enumerate(self.squeezes))

    @property
    def noise(self) -> str:
        """The distribution of its noise."""
        return self.base


class NetworkAround(Network):
    """The width and shape of a WaveNet that looks both ways, at groups of samples."""

    dilation_cycle: Annotated[int, Field(ge=1, le=16)] = 6
    kernel_size: Annotated[int, Field(ge=3, le=15)] = 3
    """Odd."""


class Coupling(Section):
    """Coupling flows: samples in one pass, and the density of anything in one pass."""

    kind: Literal["coupling"]
    steps: Annotated[int, Field(ge=1, le=100)] = 8
    """Each normalises, mixes and couples channels, and has a network of its own."""
    squeeze: Annotated[int, Field(ge=2, le=64)] = 8
    """Samples that become the channels of a group. Divides `audio.hop_length`."""
    early_every: Annotated[int, Field(ge=1)] = 4
    """Steps after which some channels have become noise, and are changed no more."""
    early_channels: Annotated[int, Field(ge=0)] = 2
    """How many of them; 0 for none."""
    coupling: Literal["affine", "additive", "spline"] = "affine"
    """What a network does to the second half of the channels, given the first: scale and shift it (Real-NVP), shift it
    (NICE), or bend it besides."""
    mixing: Literal["conv1x1", "flip"] = "conv1x1"
    """What comes before it: an invertible matrix (Glow), or the channels in reverse order (NICE, Real-NVP)."""
    actnorm: bool = True
    """Whether each step begins with a shift and a scale of every channel, which start from the corpus."""
    periodic_source: bool = True
    """Whether the networks read signals that repeat with F0; needs `conditioning.pitch`."""
    bins: Bins = 8
    layers: Layers = 6
    """Of each network."""
    min_log_scale: Annotated[float, Field(lt=0)] = -4.5
    """Lower bound of each coupling's log_scale, in nats."""
    network: NetworkAround = NetworkAround()

    @property
    def receptive_field(self) -> int:
        """Samples that a network looks at, before and after."""
        return self.squeeze * (1 + self.network.reach(self.layers))

    @property
    def left(self) -> tuple[int, ...]:
        """Channels that have become noise before each step, from waveform to noise."""
        return tuple(i // self.early_every * self.early_channels for i in range(self.steps))

    @model_validator(mode="after")
    def _consistent(self) -> "Coupling":
        if self.network.kernel_size % 2 == 0:
            raise ValueError(
                f"network.kernel_size = {self.network.kernel_size}: looks as far ahead as back, so it is odd: use "
                f"{self.network.kernel_size + 1}"
            )
        if self.squeeze - self.left[-1] < 2:
            raise ValueError(
                f"early_channels = {self.early_channels} every early_every = {self.early_every} of steps = "
                f"{self.steps} leave {self.squeeze - self.left[-1]} of squeeze = {self.squeeze} channels, and a "
                "coupling needs two: lower early_channels or raise early_every"
            )
        return self


class OwnModel(BaseModel):
    """A kind of model of the user's own: a function of this table and the recipe; all other keys are its own."""

    model_config = ConfigDict(extra="allow", frozen=True)

    kind: ImportPath


def _kind(value: Any) -> str:
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return kind if kind in KINDS else "own"


KINDS: dict[str, type[Section]] = {"maf": Maf, "iaf": Iaf, "coupling": Coupling}
"""The tables, by kind."""
Model = Annotated[
    Annotated[Maf, Tag("maf")]
    | Annotated[Iaf, Tag("iaf")]
    | Annotated[Coupling, Tag("coupling")]
    | Annotated[OwnModel, Tag("own")],
    Discriminator(_kind),
]
