"""One experiment as a whole, and what its tables must agree on."""

import math
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from wavedistill.recipe.models import Coupling, Iaf, Maf, Model, OwnModel
from wavedistill.recipe.sections import (
    Audio,
    Benchmark,
    Conditioning,
    Consistency,
    Corpus,
    Evaluate,
    Gates,
    LinearPrediction,
    Prepare,
    Section,
)
from wavedistill.recipe.trainings import AnyTraining, Distillation, Likelihood, Training

COMMANDS = {
    "run",
    "prepare",
    "evaluate",
    "benchmark",
    "report",
    "new",
    "generate",
    "info",
    "release",
    "export",
    "doctor",
    "zoo",
}
RESERVED = COMMANDS | {"audio", "samples"}
"""Commands, which a training of their name would be out of reach behind, and folders of an experiment."""


def _name(text: str) -> str:
    if text in RESERVED:
        raise ValueError(f"{text!r} is the name of a command or a folder of wavedistill: choose another")
    return text


Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$"), AfterValidator(_name)]
"""Of a model and its training, its command and its folder."""


class Recipe(Section):
    """One experiment, from corpus to report."""

    name: str
    """The recipe file's name without its ending; names the experiment's folder."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1
    corpus: Corpus
    audio: Audio = Audio()
    prepare: Prepare = Prepare()
    conditioning: Conditioning = Conditioning()
    linear_prediction: LinearPrediction = LinearPrediction()
    consistency: Consistency = Consistency()
    models: Annotated[dict[Name, Model], Field(min_length=1)]
    training: dict[Name, AnyTraining]
    """Of the model of the same name, in the order given."""
    evaluate: Evaluate = Evaluate()
    gates: Gates = Gates()
    benchmark: Benchmark = Benchmark()

    def teacher_of(self, name: str) -> str | None:
        """The model that another is distilled from; None if it is not distilled, or from a density of the user's."""
        training = self.training[name]
        return training.of if isinstance(training, Distillation) and not training.own else None

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        product, hop = math.prod(self.conditioning.upsample), self.audio.hop_length
        if product != hop:
            raise ValueError(
                f"conditioning.upsample = {list(self.conditioning.upsample)} multiplies to {product}, but "
                f"audio.hop_length = {hop}; change either, for instance conditioning.upsample = {_factors(hop)}"
            )
        most = min(hop, self.audio.n_fft // 2)
        if self.linear_prediction.order and self.linear_prediction.preemphasis:
            raise ValueError(
                "linear_prediction.order makes linear_prediction.preemphasis superfluous: set either of them to 0"
            )
        if self.linear_prediction.order > most:
            raise ValueError(
                f"linear_prediction.order = {self.linear_prediction.order} looks further back than audio.hop_length "
                f"or half of audio.n_fft; use {most} or less"
            )
        for one, other in (("models", "training"), ("training", "models")):
            for name in getattr(self, one).keys() - getattr(self, other).keys():
                raise ValueError(
                    f"{one}.{name}: there is no {other}.{name}, and a training is of the model of its name"
                )
        known: list[str] = []
        for name, training in self.training.items():
            self._fits(name, training)
            if isinstance(training, Distillation):
                self._distils(name, training, known)
            known.append(name)
        return self

    def _fits(self, name: str, training: Training) -> None:
        """Whether a model can have a training of its kind, and segments long enough for it."""
        model, segment = self.models[name], training.segment_frames * self.audio.hop_length
        if isinstance(model, Iaf | Coupling) and model.periodic_source and not self.conditioning.pitch:
            raise ValueError(f"models.{name}.periodic_source = true needs F0: set conditioning.pitch = true as well")
        if isinstance(training, Likelihood) and isinstance(model, Iaf):
            raise ValueError(
                f'training.{name}.objective = "likelihood" needs a density in one pass, which models.{name}.kind = '
                '"iaf" has of its own samples only: distil it, or make it a "maf" or a "coupling"'
            )
        if isinstance(model, OwnModel):
            return
        if isinstance(model, Iaf):
            self._groups(name, model)
        if isinstance(model, Coupling) and self.audio.hop_length % model.squeeze:
            raise ValueError(
                f"models.{name}.squeeze: {model.squeeze} does not divide audio.hop_length = {self.audio.hop_length}; "
                f"use one of {[g for g in range(2, 65) if self.audio.hop_length % g == 0]}"
            )
        field = model.receptive_field
        if field > segment:
            where = "" if isinstance(model, Coupling) else " back"
            groups = isinstance(model, Coupling) or (isinstance(model, Iaf) and max(model.squeeze) > 1)
            squeezed = f"models.{name}.squeeze or " if groups else ""
            raise ValueError(
                f"models.{name}: a network sees {field} samples{where}, but training.{name}.segment_frames = "
                f"{training.segment_frames} gives segments of {segment}: lower {squeezed}models.{name}.network."
                f"dilation_cycle, or use segment_frames = {math.ceil(field / self.audio.hop_length)} or more"
            )

    def _groups(self, name: str, model: Iaf) -> None:
        """Whether a squeezed model's groups fill what shares a feature."""
        here, repeat = f"models.{name}.squeeze", self.conditioning.upsample[-1]
        if len(model.squeeze) not in (1, len(model.flow_layers)):
            raise ValueError(
                f"{here} = {list(model.squeeze)}: give one for all flows, or one for each of the "
                f"{len(model.flow_layers)} in flow_layers"
            )
        for squeeze in model.squeeze:
            if repeat % squeeze or 2 * squeeze > self.audio.hop_length:
                raise ValueError(
                    f"{here}: {squeeze} does not divide {repeat}, the last factor of conditioning.upsample, or exceeds "
                    f"half of audio.hop_length; use one of "
                    f"{[g for g in range(1, repeat + 1) if repeat % g == 0 and 2 * g <= self.audio.hop_length]}"
                )

    def _distils(self, name: str, training: Distillation, known: list[str]) -> None:
        """Whether a distillation has a teacher that can tell what its terms ask for."""
        here, loss, student = f"training.{name}", training.loss, self.models[name]
        if isinstance(student, Maf):
            raise ValueError(f'{here}: distillation needs samples in one pass: set models.{name}.kind = "iaf"')
        if not training.own and training.of not in known:
            raise ValueError(
                f'{here}.of = "{training.of}": is no model that is trained before it; '
                + (f"there are {', '.join(known)}" if known else "give it a training above this one")
            )
        teacher = None if training.own else self.models[training.of]
        of = f"models.{training.of}"
        if isinstance(teacher, Iaf):
            raise ValueError(
                f'{here}.of = "{training.of}": its density takes as many passes as samples; give a '
                '"maf" or a "coupling"'
            )
        if isinstance(teacher, Maf) and isinstance(student, Iaf):
            gaussian = {teacher.base, student.base} == {"normal"} and teacher.affine
            if loss.kl_estimator == "closed" and not gaussian:
                raise ValueError(
                    f'{here}.loss.kl_estimator = "closed" needs {of}.base = "normal", {of}.components = 1, '
                    f'{of}.elementwise = "mixture" and models.{name}.base = "normal"; use "mc-k" for other densities'
                )
            if loss.log_scale and (not teacher.affine or teacher.base != student.base):
                raise ValueError(
                    f"{here}.loss.log_scale compares log-scales of densities of one kind: set it to 0, or {of}.base to "
                    f'models.{name}.base, {of}.components to 1 and {of}.elementwise to "mixture"'
                )
            if (loss.x_reconstruction or loss.z_reconstruction) and teacher.noise != student.noise:
                raise ValueError(
                    f"{here}.loss.x_reconstruction and z_reconstruction tie the noise of teacher and student: set "
                    f'models.{name}.base = "{teacher.noise}", as the teacher\'s, or both weights to 0'
                )
        elif loss.kl_estimator != "mc" or loss.log_scale or loss.x_reconstruction or loss.z_reconstruction:
            whole = "a density of one's own"
            if isinstance(teacher, Coupling) or isinstance(student, Coupling):
                whole = "a coupling flow, which changes a sample by those after it too"
            raise ValueError(
                f'{here}.of = "{training.of}": of {whole}, log_prob alone is known: set '
                f'{here}.loss.kl_estimator = "mc", and log_scale, x_reconstruction and z_reconstruction to 0'
            )
        if not any(loss.weights.values()):
            raise ValueError(f"{here}.loss: every weight is 0, so there is nothing to learn; set kl = 1")
        segment, longest = training.segment_frames * self.audio.hop_length, max(training.spectral_n_ffts)
        if longest > segment:
            raise ValueError(
                f"{here}.spectral_n_ffts has a window of {longest} samples, but {here}.segment_frames = "
                f"{training.segment_frames} gives segments of {segment}; shorten the window, or use segment_frames = "
                f"{math.ceil(longest / self.audio.hop_length)} or more"
            )


def _factors(hop: int) -> list[int]:
    """A sensible upsampling for a hop: a small learned factor, then repetition."""
    first = next((f for f in (4, 5, 3, 2) if hop % f == 0), 1)
    return [first, hop // first] if first > 1 else [hop]
