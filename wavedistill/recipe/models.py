"""A recipe's models: each kind is one table, with its own keys and their defaults."""

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag

from wavedistill.recipe.sections import Section, Width

Layers = Annotated[int, Field(ge=1, le=1000)]
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

    def receptive_field(self, layers: int, squeeze: int = 1) -> int:
        """Samples that so many layers look back."""
        dilations = sum(2 ** (i % self.dilation_cycle) for i in range(layers))
        return squeeze * (2 + (self.kernel_size - 1) * dilations) - 1


class Maf(Section):
    """A masked autoregressive flow: its density in one pass, its samples one by one."""

    kind: Literal["maf"]
    base: Literal["normal", "logistic"] = "normal"
    """The shape of a sample's density given the ones before."""
    components: Annotated[int, Field(ge=1, le=100)] = 1
    """How many of them are mixed."""
    layers: Layers = 20
    min_log_scale: Annotated[float, Field(lt=0)] = -4.5
    """Lower bound of log_scale, in nats, for a residual of about unit variance."""
    network: Network = Network()

    @property
    def receptive_field(self) -> int:
        """Samples that its network looks back."""
        return self.network.receptive_field(self.layers)

    @property
    def noise(self) -> str:
        """The distribution of its noise; a mixture of copies of the base is made of logistic noise."""
        return "logistic" if self.components > 1 else self.base


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


class OwnModel(BaseModel):
    """A kind of model of the user's own: a function of this table and the recipe; all other keys are its own."""

    model_config = ConfigDict(extra="allow", frozen=True)

    kind: ImportPath


def _kind(value: Any) -> str:
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return kind if kind in ("maf", "iaf") else "own"


Model = Annotated[
    Annotated[Maf, Tag("maf")] | Annotated[Iaf, Tag("iaf")] | Annotated[OwnModel, Tag("own")], Discriminator(_kind)
]
