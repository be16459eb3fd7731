"""Frozen, validated description of one experiment; nothing else reads TOML."""

import difflib
import math
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from wavedistill.tools.errors import RecipeError

# TOML has arrays only, so a tuple of a recipe arrives as a list.
Integers = Annotated[tuple[PositiveInt, ...], Field(strict=False, min_length=1)]
BACKSLASHES = "in double quotes a backslash begins an escape: write a Windows path with / or in single quotes"
Licence = str | None
"""What the recordings may be used for, and who is to be named; every checkpoint carries it."""


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"{text!r} is no regular expression: {error}") from error
    return text


def _path(text: str) -> str:
    if not text.isprintable():
        raise ValueError(f"{text!r} holds a control character; {BACKSLASHES}")
    return text


Pattern = Annotated[str, Field(min_length=1), AfterValidator(_pattern)]
FilePath = Annotated[str, Field(min_length=1), AfterValidator(_path)]
"""Where ~ is home."""
Fraction = Annotated[float, Field(gt=0, lt=0.5)]


class Section(BaseModel):
    """A table of a recipe: unknown keys and wrong types are errors, and nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class NanottsCorpus(Section):
    """Speech made on the spot by the offline synthesiser of the `py-nanotts` package."""

    kind: Literal["nanotts"]
    licence: Licence = None
    text: FilePath
    """Text file with one sentence a line."""
    voice: Literal["en-US", "en-GB", "de-DE", "es-ES", "fr-FR", "it-IT"]
    limit: PositiveInt | None = None
    """Use only the first so many sentences."""


class DebianCorpus(Section):
    """Every recording in a Debian package."""

    kind: Literal["debian"]
    licence: Licence = None
    package: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9+.-]+$")]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    """Of the package's file."""
    path: FilePath
    """The folder the package is fetched and unpacked to; a package's file that is there already is used."""
    limit: PositiveInt | None = None
    """Use only the first so many files, in the order of their paths."""


class FolderCorpus(Section):
    """Every recording below a folder, of any kind that libsndfile reads."""

    kind: Literal["folder"]
    licence: Licence = None
    path: FilePath
    limit: PositiveInt | None = None
    """Use only the first so many files, in the order of their paths."""


Corpus = Annotated[NanottsCorpus | DebianCorpus | FolderCorpus, Field(discriminator="kind")]


class Audio(Section):
    """Units of the waveform, of its log-mel and its F0; shared by every stage."""

    sample_rate: PositiveInt
    """Hz."""
    hop_length: PositiveInt
    """Samples a mel frame."""
    n_fft: PositiveInt
    """Samples of the analysis window."""
    n_mels: PositiveInt
    f_min: Annotated[float, Field(ge=0)]
    """Hz."""
    f_max: PositiveFloat
    """Hz."""
    f0_min: Annotated[float, Field(ge=40)]
    """Hz; the lowest fundamental frequency that is looked for."""
    f0_max: PositiveFloat
    """Hz; the highest."""
    level_db: Annotated[float, Field(lt=0)]
    """RMS level every recording is brought to, in dB relative to full scale; less where its peak would clip."""

    @property
    def overlap(self) -> int:
        """Samples that a mel frame sees beyond its hop, on either side."""
        return (self.n_fft - self.hop_length) // 2

    @model_validator(mode="after")
    def _consistent(self) -> "Audio":
        if self.n_fft < self.hop_length or (self.n_fft - self.hop_length) % 2:
            raise ValueError(
                f"n_fft = {self.n_fft} must exceed hop_length = {self.hop_length} by an even number, so frames are "
                f"centred on hops; for instance n_fft = {self.hop_length * 4}"
            )
        if not self.f_min < self.f_max <= self.sample_rate / 2:
            raise ValueError(
                f"f_min = {self.f_min} and f_max = {self.f_max} must satisfy f_min < f_max <= sample_rate / 2; "
                f"for instance f_max = {self.sample_rate / 2}"
            )
        if not 1.5 * self.f0_min <= self.f0_max <= self.sample_rate / 4:
            raise ValueError(
                f"f0_min = {self.f0_min} and f0_max = {self.f0_max} must satisfy 1.5 f0_min <= f0_max <= "
                "sample_rate / 4; for instance f0_min = 60, f0_max = 400"
            )
        return self


class Prepare(Section):
    """How a corpus becomes utterances."""

    trim_db: PositiveFloat
    """Silence at either end, this far below the loudest part, is cut off."""
    min_seconds: Annotated[float, Field(ge=0.1)]
    """Shorter utterances are left out."""
    max_seconds: Annotated[float, Field(ge=1)]
    """Longer ones are cut at quiet places."""
    max_gain_db: PositiveFloat
    """Recordings so soft that they would be amplified by more are left out."""
    valid_fraction: Fraction
    test_fraction: Fraction
    """Shares of the duration."""
    together: Pattern | None = None
    """What this finds in the names of recordings, or its first group, they have in common that must share a split."""
    storage: Literal["wav", "flac", "shards"]
    """Of the prepared audio: files of either kind, or tar archives of FLAC files as webdataset reads them."""
    max_skipped: Annotated[float, Field(ge=0, le=1)]
    """Largest share of recordings that may be left out: no audio, cut off, silent, soft, clipped, short, a copy."""


class Conditioning(Section):
    """The network that turns log-mel frames into features; teacher and student have one each."""

    channels: PositiveInt
    context: PositiveInt
    """Frames seen on either side."""
    upsample: Integers
    """Factors from frames to samples; their product is the hop length, the last one is plain repetition."""
    pitch: bool
    """Whether F0 and voicing join the log-mel."""


class LinearPrediction(Section):
    """The last transform of teacher and student, computed from the log-mel."""

    order: NonNegativeInt
    """Number of coefficients; 0 turns linear prediction off and leaves pre-emphasis, or a fixed scale."""
    preemphasis: Annotated[float, Field(ge=0, lt=1)]
    """Coefficient of pre-emphasis where `order` is 0; 0 for none."""


class Network(Section):
    """A WaveNet's width and shape."""

    channels: PositiveInt
    skip_channels: PositiveInt
    dilation_cycle: PositiveInt
    """Layer i has dilation 2 ** (i mod dilation_cycle)."""
    kernel_size: Annotated[int, Field(ge=2)]


class Training(Section):
    """One optimisation by Adam, with a linear warm-up and a cosine decay of the learning rate."""

    steps: PositiveInt
    """At the end of which the learning rate has fallen. May be changed for a training that is under way, which then
    follows the new curve from where it stands; one that is beyond them is set aside and begun anew."""
    batch_size: PositiveInt
    """Of all processes together."""
    accumulate: PositiveInt
    """Parts of a batch whose gradients are computed one after another, for want of memory."""
    precision: Literal["32-true", "bf16-mixed"]
    """All in float32, or the networks in bfloat16 and weights, densities and losses in float32."""
    segment_frames: PositiveInt
    """Mel frames of each random crop."""
    learning_rate: PositiveFloat
    warmup_steps: NonNegativeInt
    grad_clip: PositiveFloat
    """Largest norm of the gradient."""
    compile: bool
    """Whether to compile the networks first, for a minute: 1.2 to 1.7 times the pace on a CPU; needs a C++ compiler."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)]
    """Decay of the moving average of the weights; the average is what is validated and kept."""
    validate_every: PositiveInt
    """Steps between validations; a checkpoint is written at each."""
    validate_batches: PositiveInt
    """Batches of the validation split, the same each time."""


class Teacher(Section):
    """The masked autoregressive flow that is trained by maximum likelihood."""

    base: Literal["normal", "logistic"]
    """The shape of a sample's density given the ones before."""
    components: PositiveInt
    """How many of them are mixed."""
    layers: PositiveInt
    min_log_scale: Annotated[float, Field(lt=0)]
    """Lower bound of log_scale, in nats, for a residual of about unit variance."""
    network: Network
    training: Training


Weight = Annotated[float, Field(ge=0)]


class StudentLoss(Section):
    """Weights of the distillation objective's terms, and how its KL is estimated."""

    kl: Weight
    """Kullback-Leibler divergence from the teacher, nats a sample."""
    kl_estimator: Literal["mc", "mc-k", "closed"]
    """From the log densities of one draw; from `kl_draws` draws of every step; or in closed form, for Gaussians."""
    kl_draws: PositiveInt
    """Of "mc-k"."""
    log_scale: Weight
    """Squared distance of the student's log-scales from the teacher's."""
    spectral: Weight
    """Relative distance of short-time spectra from the recording's."""
    log_mel: Weight
    """Distance of log-mels from the recording's, nats of amplitude."""
    contrastive: Weight
    """Less the KL from the teacher under the conditioning of another place, nats a sample."""
    x_reconstruction: Weight
    """Mean square error of the recording's residual, through the teacher to noise and through the student back."""
    z_reconstruction: Weight
    """Mean square error of the noise, through the student to a residual and through the teacher back."""


class Student(Section):
    """The inverse autoregressive flows that are distilled from the teacher."""

    teacher: Annotated[str, Field(pattern=r"^\w+(\.\w+)*:\w+$")] | None = None
    """Import path "module:function" of a density of the user's own to distil from, in place of the recipe's teacher."""
    base: Literal["normal", "logistic"]
    flow_layers: Integers
    """Layers of each flow, from noise to waveform."""
    periodic_source: bool
    """Whether the networks read signals that repeat with F0 beside the noise; needs `conditioning.pitch`."""
    min_log_scale: Annotated[float, Field(lt=0)]
    """Lower bound of each flow's log_scale, in nats, for a residual of about unit variance."""
    spectral_n_ffts: Annotated[tuple[Annotated[int, Field(ge=16)], ...], Field(strict=False, min_length=1)]
    """Window lengths of the spectral and the log-mel term, in samples."""
    loss: StudentLoss
    network: Network
    training: Training


class Evaluate(Section):
    """What `evaluate` synthesises and scores."""

    clips: PositiveInt
    """Test utterances that are synthesised."""
    max_seconds: Annotated[float, Field(ge=0.3)]
    """Each is cut to this length."""
    kl_draws: PositiveInt
    """Noise draws for each test utterance."""
    temperature: PositiveFloat
    """Scale of the teacher's and the student's noise."""


class Gates(Section):
    """What the student's speech must not fall short of on the test split, so that a whisper is called one."""

    level_db: PositiveFloat
    """Largest difference of its RMS level from the recordings', either way."""
    tilt_db: PositiveFloat
    """Largest difference of its spectral tilt, either way."""
    vuv_f1: Annotated[float, Field(ge=0, le=1)]
    """Least F1 of voiced against unvoiced."""
    periodicity: Annotated[float, Field(ge=0, le=1)]
    """Least share of the recordings' own periodicity in voiced parts."""
    better_scores: Annotated[int, Field(ge=0, le=3)]
    """Of PESQ, STOI and mel-cepstral distortion, in how many it must be better than any system without training."""


class Benchmark(Section):
    """What `benchmark` times."""

    seconds: Annotated[tuple[PositiveFloat, ...], Field(strict=False, min_length=1)]
    """Durations of the waveform drawn, the same for every sampler but the naive one."""
    naive_samples: PositiveInt
    """Samples timed of the naive sampler, whose cost grows linearly."""
    threads: Integers
    """CPU threads."""
    repeats: PositiveInt
    """Timed runs after one warm-up; more of short ones, until they add up to a second, and fewer of very long ones."""


class Recipe(Section):
    """One experiment, from corpus to report."""

    name: str
    """The recipe file's name without its ending; names the experiment's folder."""
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    corpus: Corpus
    audio: Audio
    prepare: Prepare
    conditioning: Conditioning
    linear_prediction: LinearPrediction
    teacher: Teacher
    student: Student
    evaluate: Evaluate
    gates: Gates
    benchmark: Benchmark

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
        gaussian = {self.teacher.base, self.student.base} == {"normal"} and self.teacher.components == 1
        if self.student.loss.kl_estimator == "closed" and not gaussian:
            raise ValueError(
                'student.loss.kl_estimator = "closed" needs teacher.base = "normal", teacher.components = 1 and '
                'student.base = "normal"; use "mc-k" for other densities'
            )
        loss = self.student.loss
        if loss.log_scale and (self.teacher.components > 1 or self.teacher.base != self.student.base):
            raise ValueError(
                "student.loss.log_scale compares log-scales of densities of one kind: set it to 0, or teacher.base to "
                "student.base and teacher.components to 1"
            )
        noise = "logistic" if self.teacher.components > 1 else self.teacher.base  # a mixture's noise is logistic
        if (loss.x_reconstruction or loss.z_reconstruction) and noise != self.student.base:
            raise ValueError(
                f"student.loss.x_reconstruction and z_reconstruction tie the noise of teacher and student: set "
                f'student.base = "{noise}", as the teacher\'s, or both weights to 0'
            )
        if self.student.teacher and (
            loss.kl_estimator != "mc" or loss.log_scale or loss.x_reconstruction or loss.z_reconstruction
        ):
            raise ValueError(
                "student.teacher names a density of which log_prob alone is known: set student.loss.kl_estimator = "
                '"mc", and log_scale, x_reconstruction and z_reconstruction to 0'
            )
        if not any(loss.model_dump(exclude={"kl_estimator", "kl_draws"}).values()):
            raise ValueError("student.loss: every weight is 0, so there is nothing to learn; set kl = 1")
        if self.student.periodic_source and not self.conditioning.pitch:
            raise ValueError("student.periodic_source = true needs F0: set conditioning.pitch = true as well")
        segment = self.student.training.segment_frames * hop
        longest = max(self.student.spectral_n_ffts)
        if longest > segment:
            raise ValueError(
                f"student.spectral_n_ffts has a window of {longest} samples, but student.training.segment_frames = "
                f"{self.student.training.segment_frames} gives segments of {segment}; shorten the window, or use "
                f"segment_frames = {math.ceil(longest / hop)} or more"
            )
        return self


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and validate a recipe file.

    Args:
        path: the TOML file.
        overrides: settings of the form `section.key=value`, the value in TOML; a bare word is a string.

    Raises:
        RecipeError: if the file cannot be read, or does not describe an experiment; names every faulty key.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        data = tomllib.loads(text)
    except OSError as error:
        raise RecipeError(f"{path}: cannot read the recipe: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not valid TOML: {error}") from error
    except tomllib.TOMLDecodeError as error:
        number = re.search(r"at line (\d+)", str(error))
        hint = f"; {BACKSLASHES}" if number and "\\" in text.split("\n")[int(number[1]) - 1] else ""
        raise RecipeError(f"{path}: not valid TOML: {error}{hint}") from error
    for override in overrides:
        _override(data, override)
    if "name" in data:
        raise RecipeError(f"{path}: name: unknown key; the file's own name names the experiment: remove it")
    return validate_recipe({**data, "name": path.stem}, str(path))


def validate_recipe(data: dict[str, Any], source: str) -> Recipe:
    """Validate a recipe given as nested dictionaries; `source` names it in errors.

    Raises:
        RecipeError: if it does not describe an experiment; names every faulty key.
    """
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        wrong = {item["loc"][: len(item["loc"]) - 1] for item in error.errors()}
        # A list whose items are wrong is said to be too short as well, because it lacks them.
        items = [item for item in error.errors() if item["type"] != "too_short" or item["loc"] not in wrong]
        lines = [_explain(item["type"], item["loc"], item["msg"], item["input"]) for item in items]
        raise RecipeError("\n".join(f"{source}: {line}" for line in lines)) from error


def _override(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(part.strip() for part in key.split(".")):
        raise RecipeError(f"--set {override}: expected key=value, for instance --set teacher.training.steps=500")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *sections, last = (part.strip() for part in key.split("."))
    for section in sections:
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise RecipeError(f"--set {override}: {section} is a value, not a section")
    data[last] = value


def _explain(kind: str, location: tuple[int | str, ...], message: str, value: object) -> str:
    """One line for one fault: the key, the value, and the fix."""
    # Below `corpus`, pydantic puts the union's tag into the location; it is no key of the file.
    keys = [str(part) for i, part in enumerate(location) if not (i == 1 and location[0] == "corpus")]
    key = ".".join(keys)
    match kind:
        case "extra_forbidden":
            *section, _ = location
            known = _fields(section)
            close = difflib.get_close_matches(keys[-1], known, n=1)
            return f"{key}: unknown key; " + (
                f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
            )
        case "missing":
            return f"{key}: missing; add it"
        case "union_tag_invalid" | "union_tag_not_found":
            return f"{key}: {message}"
        case "value_error":
            return (
                message.removeprefix("Value error, ") if not key else f"{key}: {message.removeprefix('Value error, ')}"
            )
        case _:
            return f"{key} = {value!r}: {message[0].lower()}{message[1:]}"


def _fields(location: Sequence[int | str]) -> list[str]:
    """Names of the keys that the section at a location may hold."""
    section: type[BaseModel] = Recipe
    for part in location:
        annotation = section.model_fields[str(part)].annotation if str(part) in section.model_fields else None
        if annotation is None:  # the union's tag
            section = next(
                m for m in get_args(get_args(Corpus)[0]) if get_args(m.model_fields["kind"].annotation)[0] == part
            )
        elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
            section = annotation
    return [name for name in section.model_fields if section is not Recipe or name != "name"]


def _factors(hop: int) -> list[int]:
    """A sensible upsampling for a hop: a small learned factor, then repetition."""
    first = next((f for f in (4, 5, 3, 2) if hop % f == 0), 1)
    return [first, hop // first] if first > 1 else [hop]
