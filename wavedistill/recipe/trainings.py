"""A recipe's trainings: each objective is one table, with its own keys and their defaults."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, NonNegativeInt, PositiveFloat, PositiveInt, Tag

from wavedistill.recipe.models import ImportPath
from wavedistill.recipe.sections import FilePath, Section

Weight = Annotated[float, Field(ge=0)]


class Training(Section):
    """One optimisation by Adam, with a linear warm-up and a cosine decay of the learning rate."""

    steps: Annotated[int, Field(ge=1, le=10**9)]
    """At the end of which the learning rate has fallen. May be changed for a training that is under way, which then
    follows the new curve from where it stands; one that is beyond them is set aside and begun anew."""
    start: FilePath | None = None
    """The checkpoint of a model of the same units and sizes, whose weights are those of the first step; None for random
    ones."""
    batch_size: Annotated[int, Field(ge=1, le=2**16)] = 1
    """Of all processes together."""
    accumulate: PositiveInt = 1
    """Parts of a batch whose gradients are computed one after another, for want of memory."""
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    """All in float32, or the networks in bfloat16 and weights, densities and losses in float32."""
    segment_frames: Annotated[int, Field(ge=1, le=100_000)] = 40
    """Mel frames of each random crop."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2e-3
    warmup_steps: NonNegativeInt = 50
    grad_clip: PositiveFloat = 1
    """Largest norm of the gradient."""
    compile: bool = False
    """Whether to compile the networks first, for a minute: 1.2 to 1.7 times the pace on a CPU; needs a C++ compiler."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.998
    """Decay of the moving average of the weights; the average is what is validated and kept."""
    validate_every: PositiveInt = 500
    """Steps between validations; a checkpoint is written at each."""
    validate_batches: PositiveInt = 24
    """Batches of the validation split, the same each time."""


class Likelihood(Training):
    """Maximum likelihood, of a model whose density takes one pass."""

    objective: Literal["likelihood"]


class DistillationLoss(Section):
    """Weights of the terms of a distillation, and how its KL is estimated."""

    kl: Weight = 1
    """Kullback-Leibler divergence from the teacher, nats a sample."""
    kl_estimator: Literal["mc", "mc-k", "closed"] = "closed"
    """From the log densities of one draw; from `kl_draws` draws of every step; or in closed form, for Gaussians."""
    kl_draws: Annotated[int, Field(ge=1, le=1000)] = 10
    """Of "mc-k"."""
    log_scale: Weight = 0
    """Squared distance of the student's log-scales from the teacher's."""
    passes: Annotated[int, Field(ge=0, le=16)] = 1
    """Steps of mel consistency between a draw and the sound that the next two terms hear."""
    spectral: Weight = 0.6
    """Relative distance of short-time spectra from the recording's."""
    log_mel: Weight = 0.2
    """Distance of log-mels from the recording's, nats of amplitude."""
    drawn_log_mel: Weight = 0
    """The same of the draw before these steps, so that it is as loud as the recording by itself."""
    late: Annotated[float, Field(gt=0)] = 1
    """Factor of the weights of these three in the last quarter of the steps: likelihood first, then sound."""
    contrastive: Weight = 0
    """Less the KL from the teacher under the conditioning of another place, nats a sample."""
    x_reconstruction: Weight = 0
    """Mean square error of the recording's residual, through the teacher to noise and through the student back."""
    z_reconstruction: Weight = 0
    """Mean square error of the noise, through the student to a residual and through the teacher back."""

    @property
    def weights(self) -> dict[str, float]:
        """Of the terms, by name."""
        return self.model_dump(exclude={"kl_estimator", "kl_draws", "passes", "late"})

    @property
    def factors(self) -> dict[str, float]:
        """Of those weights that are others in the last quarter of the steps."""
        return dict.fromkeys(("spectral", "log_mel", "drawn_log_mel"), self.late) if self.late != 1 else {}


class Distillation(Training):
    """Distillation of a model that samples in one pass, the student, from one whose density takes one, the teacher."""

    objective: Literal["distillation"]
    of: Annotated[str, Field(pattern=r"^\w+$|^\w+(\.\w+)*:\w+$")]
    """The teacher: one of the recipe's models, trained before; or the import path "module:function" of a density."""
    spectral_n_ffts: Annotated[tuple[Annotated[int, Field(ge=16)], ...], Field(strict=False, min_length=1)] = (
        *(512, 1024, 2048),
    )
    """Window lengths of the spectral and the log-mel term, in samples."""
    loss: DistillationLoss = DistillationLoss()

    @property
    def own(self) -> str | None:
        """The import path of a teacher of the user's own."""
        return self.of if ":" in self.of else None


class OwnTraining(Training):
    """An objective of the user's own: a function of this table and the experiment; all other keys are its own."""

    model_config = ConfigDict(extra="allow")

    objective: ImportPath


def _objective(value: Any) -> str:
    objective = value.get("objective") if isinstance(value, dict) else getattr(value, "objective", None)
    return objective if objective in ("likelihood", "distillation") else "own"


AnyTraining = Annotated[
    Annotated[Likelihood, Tag("likelihood")]
    | Annotated[Distillation, Tag("distillation")]
    | Annotated[OwnTraining, Tag("own")],
    Discriminator(_objective),
]
