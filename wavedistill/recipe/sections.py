"""The tables of a recipe that are no model's and no training's own: frozen, validated, with their defaults."""

import re
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

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
Seconds = Annotated[float, Field(gt=0, le=600)]
Width = Annotated[int, Field(ge=1, le=4096)]
"""Channels of a network."""


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
    path: FilePath | None = None
    """The folder the package is fetched and unpacked to, in the user's cache by default; a package's file that is
    there already is used."""
    limit: PositiveInt | None = None
    """Use only the first so many files, in the order of their paths."""


class FolderCorpus(Section):
    """Every recording below a folder, of any kind that libsndfile reads, or ffmpeg by way of the extra `media`."""

    kind: Literal["folder"]
    licence: Licence = None
    path: FilePath
    mels: FilePath | None = None
    """A folder with a log-mel for every recording, of the same name: what models are told in place of the recording's
    own, such as the output of an acoustic model."""
    limit: PositiveInt | None = None
    """Use only the first so many files, in the order of their paths."""


OneCorpus = Annotated[NanottsCorpus | DebianCorpus | FolderCorpus, Field(discriminator="kind")]


class Part(Section):
    """One of several corpora, and how it is heard."""

    corpus: OneCorpus
    speeds: Annotated[tuple[Annotated[float, Field(ge=0.5, le=2)], ...], Field(strict=False, min_length=1)] = (1,)
    """Factors by which each recording is played faster; pitch and formants move with it, as if others had spoken."""

    @model_validator(mode="after")
    def _given_as_spoken(self) -> "Part":
        if isinstance(self.corpus, FolderCorpus) and self.corpus.mels and self.speeds != (1,):
            raise ValueError("speeds must be [1] where corpus.mels gives log-mels, which cannot be played faster")
        return self


class SeveralCorpora(Section):
    """Recordings of several corpora, for a model of many voices."""

    kind: Literal["several"]
    licence: Licence = None
    parts: Annotated[tuple[Part, ...], Field(strict=False, min_length=1)]


Corpus = Annotated[NanottsCorpus | DebianCorpus | FolderCorpus | SeveralCorpora, Field(discriminator="kind")]


class Audio(Section):
    """Units of the waveform, of its log-mel and its F0; shared by every stage."""

    sample_rate: Annotated[int, Field(ge=100, le=192_000)] = 16000
    """Hz."""
    hop_length: Annotated[int, Field(ge=1, le=2**13)] = 200
    """Samples a mel frame."""
    n_fft: Annotated[int, Field(ge=1, le=2**15)] = 1024
    """Samples of the analysis window."""
    n_mels: Annotated[int, Field(ge=1, le=1024)] = 80
    f_min: Annotated[float, Field(ge=0)] = 0
    """Hz."""
    f_max: PositiveFloat = 8000
    """Hz."""
    f0_min: Annotated[float, Field(ge=40)] = 60
    """Hz; the lowest fundamental frequency that is looked for."""
    f0_max: PositiveFloat = 400
    """Hz; the highest."""
    level_db: Annotated[float, Field(ge=-60, lt=0)] = -23
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

    trim_db: PositiveFloat = 40
    """Silence at either end, this far below the loudest part, is cut off."""
    min_seconds: Annotated[float, Field(ge=0.1)] = 0.5
    """Shorter utterances are left out."""
    max_seconds: Annotated[float, Field(ge=1)] = 10
    """Longer ones are cut at quiet places."""
    max_gain_db: PositiveFloat = 40
    """Recordings so soft that they would be amplified by more are left out."""
    valid_fraction: Fraction = 0.02
    test_fraction: Fraction = 0.03
    """Shares of the duration."""
    together: Pattern | None = None
    """What this finds in the names of recordings, or its first group, they have in common that must share a split."""
    storage: Literal["wav", "flac", "shards"] = "wav"
    """Of the prepared audio: files of either kind, or tar archives of FLAC files as webdataset reads them."""
    max_skipped: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Largest share of recordings that may be left out: no audio, cut off, silent, soft, clipped, short, a copy."""


class Conditioning(Section):
    """The network that turns log-mel frames into features; each model has one of its own."""

    channels: Width = 64
    context: Annotated[int, Field(ge=1, le=64)] = 2
    """Frames seen on either side."""
    upsample: Integers = (4, 50)
    """Factors from frames to samples; their product is the hop length, the last one is plain repetition."""
    pitch: bool = True
    """Whether F0 and voicing join the log-mel."""


class LinearPrediction(Section):
    """The last transform of every model, computed from the log-mel."""

    order: NonNegativeInt = 24
    """Number of coefficients; 0 turns linear prediction off and leaves pre-emphasis, or a fixed scale."""
    preemphasis: Annotated[float, Field(ge=0, lt=1)] = 0
    """Coefficient of pre-emphasis where `order` is 0; 0 for none."""


class Consistency(Section):
    """How a draw is brought to the log-mel it was drawn for."""

    passes: Annotated[int, Field(ge=0, le=64)] = 4
    """Steps of mel consistency; 0 leaves a draw as it is. Each adds n_fft - hop_length samples to the latency."""


class Evaluate(Section):
    """What `evaluate` synthesises and scores."""

    clips: Annotated[int, Field(ge=1, le=10_000)] = 12
    """Test utterances that are synthesised."""
    max_seconds: Annotated[float, Field(ge=0.3, le=60)] = 4
    """Each is cut to this length."""
    kl_draws: Annotated[int, Field(ge=1, le=1000)] = 2
    """Noise draws for each test utterance."""
    temperature: Annotated[float, Field(gt=0, le=2)] = 1
    """Scale of the models' noise."""


class Gates(Section):
    """What the speech of a parallel model must not fall short of on the test split, so that a whisper is called one."""

    level_db: PositiveFloat = 3
    """Largest difference of its RMS level from the recordings', either way."""
    tilt_db: PositiveFloat = 3
    """Largest difference of its spectral tilt, either way."""
    vuv_f1: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Least F1 of voiced against unvoiced."""
    periodicity: Annotated[float, Field(ge=0, le=1)] = 0.8
    """Least share of the recordings' own periodicity in voiced parts."""
    better_scores: Annotated[int, Field(ge=0, le=3)] = 1
    """Of PESQ, STOI and mel-cepstral distortion, in how many it must be better than any system without training."""
    aperiodicity_db: PositiveFloat = 3
    """Largest RMS difference of its aperiodicity from the recordings' in voiced parts."""
    aperiodicity_bias_db: PositiveFloat = 1
    """Largest mean difference of it, either way: a buzz has too little, a whisper too much."""


class Benchmark(Section):
    """What `benchmark` times."""

    seconds: Annotated[tuple[Seconds, ...], Field(strict=False, min_length=1)] = (1,)
    """Durations of the waveform drawn, the same for every sampler but the naive one."""
    naive_samples: Annotated[int, Field(ge=1, le=100_000)] = 20
    """Samples timed of the naive sampler, whose cost grows linearly."""
    threads: Annotated[tuple[Annotated[int, Field(ge=1, le=1024)], ...], Field(strict=False, min_length=1)] = (1, 2)
    """CPU threads."""
    repeats: Annotated[int, Field(ge=1, le=1000)] = 3
    """Timed runs after one warm-up; more of short ones, until they add up to a second, and fewer of very long ones."""
