"""Vocos and HiFi-GAN in a pair's time: another system trained on an experiment's corpus, for minutes of one processor.

    pip install --no-deps --target gan vocos==0.1.0 speechbrain==1.1.2 encodec einops "huggingface_hub<1" hyperpyyaml \
        ruamel.yaml PyYAML requests urllib3 idna charset_normalizer sentencepiece certifi tqdm filelock fsspec
    export PYTHONPATH=gan
    python recipes/same_hours.py exp/festvox_ru vocos --cpu-minutes 15 30 45 60
    wavedistill evaluate festvox_ru --also vocos_60=exp/festvox_ru/same_hours/vocos/60min
    python recipes/same_hours.py exp/festvox_ru --plot same_hours.png --pair-minutes 48

The experiment is one that `wavedistill evaluate` has finished. Its train split is trained on, by the mel loss alone at
first (`--mel-first`, Vocos's `pretrain_mel_steps`), and after each of the minutes, which are those of this process
(`time.process_time`), its test clips are made of log-mels. A training that is interrupted goes on from the last mark.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import soundfile
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from wavedistill.corpus.segments import Segments
from wavedistill.corpus.utterances import Manifest, read_samples
from wavedistill.recipe.sections import Audio
from wavedistill.speech.audio import LogMel, write
from wavedistill.tools.errors import UserError
from wavedistill.tools.files import replacing, write_json
from wavedistill.tools.memory import keep_freed_memory
from wavedistill.tools.random import random_stream

BATCH, FRAMES = 2, 40
"""Segments in a batch and their length in hops: few and short, so that a processor takes many steps."""
UPSAMPLING = {200: ([5, 5, 4, 2], [11, 11, 8, 4]), 256: ([8, 8, 2, 2], [16, 16, 4, 4])}  # HiFi-GAN's, by the hop
SHOWN = {"pesq_wb": "PESQ-wb", "aperiodicity_db": "aperiodicity error, dB"}
NAMES = {"vocos": "Vocos", "vocos_small": "small Vocos", "hifigan_v2": "HiFi-GAN V2"}
"""The scores and the systems of the plot."""


class System(nn.Module):
    """A generator of waveforms (B, F * hop_length) from log-mels (B, n_mels, F), and discriminators to train against.

    It has a `mel_loss` that the generator minimises alone, and a `generator_loss` and a `discriminator_loss` that both
    minimise together, of real and made waveforms (B, T).
    """

    rate: float
    betas: tuple[float, float]
    generator: nn.Module
    discriminators: nn.Module


class Vocos(System):
    """Vocos (Siuzdak 2023) by its own package, with the weights and the rate of its own `configs/vocos.yaml`."""

    rate, betas, weights = 5e-4, (0.8, 0.9), (1, 0.1)

    def __init__(self, audio: Audio, dim: int, intermediate_dim: int, num_layers: int) -> None:
        from vocos.discriminators import MultiPeriodDiscriminator, MultiResolutionDiscriminator
        from vocos.heads import ISTFTHead
        from vocos.loss import DiscriminatorLoss, FeatureMatchingLoss, GeneratorLoss, MelSpecReconstructionLoss
        from vocos.models import VocosBackbone

        super().__init__()
        head = ISTFTHead(dim, audio.n_fft, audio.hop_length, padding="same")
        self.generator = nn.Sequential(VocosBackbone(audio.n_mels, dim, intermediate_dim, num_layers), head)
        self.discriminators = nn.ModuleList([MultiPeriodDiscriminator(), MultiResolutionDiscriminator()])
        self.fooled, self.told, self.features = GeneratorLoss(), DiscriminatorLoss(), FeatureMatchingLoss()
        self.mel = MelSpecReconstructionLoss(audio.sample_rate, audio.n_fft, audio.hop_length, audio.n_mels)

    def mel_loss(self, real: Tensor, made: Tensor) -> Tensor:
        return 45 * self.mel(made, real)

    def generator_loss(self, real: Tensor, made: Tensor) -> Tensor:
        total = self.mel_loss(real, made)
        for discriminator, weight in zip(self.discriminators, self.weights, strict=True):
            _, scores, wanted, found = discriminator(real, made)
            adversarial = self.fooled(scores)[0] + self.features(wanted, found)
            total = total + weight * adversarial.squeeze() / len(scores)
        return total

    def discriminator_loss(self, real: Tensor, made: Tensor) -> Tensor:
        total = real.new_zeros(())
        for discriminator, weight in zip(self.discriminators, self.weights, strict=True):
            right, wrong, _, _ = discriminator(real, made)
            total = total + weight * self.told(right, wrong)[0].squeeze() / len(right)
        return total


class HifiGan(System):
    """HiFi-GAN V2 (Kong et al. 2020) by SpeechBrain, with the weights and the rate of its LJSpeech recipe."""

    rate, betas = 2e-4, (0.8, 0.99)

    def __init__(self, audio: Audio) -> None:
        from speechbrain.lobes.models import HifiGAN

        if audio.hop_length not in UPSAMPLING:
            raise UserError(f"hifigan_v2: no factors for a hop of {audio.hop_length}: add them to UPSAMPLING")
        super().__init__()
        factors, kernels = UPSAMPLING[audio.hop_length]
        generator = HifiGAN.HifiganGenerator(audio.n_mels, 1, "1", [[1, 3, 5]] * 3, [3, 7, 11], kernels, 128, factors)
        self.generator = nn.Sequential(generator, nn.Flatten())
        self.discriminators = HifiGAN.HifiganDiscriminator()
        mel = HifiGAN.L1SpecLoss(audio.sample_rate, audio.hop_length, audio.n_fft, audio.n_mels, audio.n_fft)
        self.told = HifiGAN.DiscriminatorLoss(HifiGAN.MSEDLoss())
        # Each with its weight: no distance of spectra, the scores, the features, the mel loss.
        self.fooled = HifiGAN.GeneratorLoss(None, 0, HifiGAN.MSEGLoss(), 1, HifiGAN.MelganFeatureLoss(), 10, mel, 45)

    def mel_loss(self, real: Tensor, made: Tensor) -> Tensor:
        return self.fooled(None, made[:, None], real[:, None])["G_loss"]

    def generator_loss(self, real: Tensor, made: Tensor) -> Tensor:
        with torch.no_grad():
            _, wanted = self.discriminators(real[:, None])
        scores, found = self.discriminators(made[:, None])
        return self.fooled(None, made[:, None], real[:, None], scores, found, wanted)["G_loss"]

    def discriminator_loss(self, real: Tensor, made: Tensor) -> Tensor:
        return self.told(self.discriminators(made[:, None])[0], self.discriminators(real[:, None])[0])["D_loss"]


SYSTEMS: dict[str, Callable[[Audio], System]] = {
    "vocos": lambda audio: Vocos(audio, dim=512, intermediate_dim=1536, num_layers=8),
    "vocos_small": lambda audio: Vocos(audio, dim=256, intermediate_dim=768, num_layers=8),
    "hifigan_v2": HifiGan,
}
"""By name: each in its own size, and Vocos at 0.036 MFLOP a sample, about as many as the student of festvox_ru_fast."""


class Plan(NamedTuple):
    """So many steps by the mel loss alone, in a share `mel_first` of the time, then so many with discriminators."""

    alone: int
    both: int
    mel_first: float

    def passed(self, step: int) -> float:
        """The share of the time that has passed before a step."""
        if step < self.alone:
            return self.mel_first * step / self.alone
        return self.mel_first + (1 - self.mel_first) * (step - self.alone) / self.both


class Training:
    """A system, its optimizers, and how far they are: `step`, and `seconds` of the process."""

    def __init__(self, name: str, segments: Segments, audio: Audio, seed: int) -> None:
        torch.manual_seed(seed)
        self.system, self.segments, self.seed = SYSTEMS[name](audio), segments, seed
        self.step, self.seconds = 0, 0.0
        self.optimizers = [
            torch.optim.AdamW(module.parameters(), self.system.rate, self.system.betas, fused=True)
            for module in (self.system.generator, self.system.discriminators)
        ]

    def advance(self, passed: float, *, adversarial: bool) -> float:
        """One step, at a rate that falls with the share of the time that has passed, along a cosine; its loss."""
        began = time.process_time()
        system, (generator, discriminators) = self.system, self.optimizers
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = system.rate * (1 + math.cos(math.pi * passed)) / 2
            optimizer.zero_grad()
        batch = self.segments.draw([random_stream(self.seed, self.step, item) for item in range(BATCH)])
        made = system.generator(batch.conditioning.mel)
        if adversarial:
            system.discriminator_loss(batch.audio, made.detach()).backward()
            discriminators.step()
        system.discriminators.requires_grad_(False)
        loss = (system.generator_loss if adversarial else system.mel_loss)(batch.audio, made)
        loss.backward()
        system.discriminators.requires_grad_(True)
        generator.step()
        self.step += 1
        self.seconds += time.process_time() - began
        return float(loss.detach())

    def pace(self, *, adversarial: bool) -> float:
        """Seconds of a step, the last of three."""
        for _ in range(3):
            before = self.seconds
            self.advance(0, adversarial=adversarial)
        return self.seconds - before

    def save(self, path: Path, plan: Plan) -> None:
        """Write all that the rest of the training depends on."""
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        with replacing(path) as file:
            torch.save([self.step, self.seconds, tuple(plan), self.system.state_dict(), optimizers], file)

    def load(self, path: Path) -> Plan:
        """Go on from there."""
        self.step, self.seconds, plan, system, optimizers = torch.load(path, weights_only=True)
        self.system.load_state_dict(system)
        for optimizer, state in zip(self.optimizers, optimizers, strict=True):
            optimizer.load_state_dict(state)
        return Plan(*plan)


def train(
    root: Path, name: str, minutes: Sequence[float], out: Path, mel_first: float, seed: int, steps: Sequence[int] | None
) -> None:
    """Train a system for the last of so many minutes, and leave its clips at each of them.

    How many steps fit is measured first, so that a training is repeated by its seed and its steps.
    """
    torch.set_num_threads(1)
    keep_freed_memory()
    manifest = Manifest.read(root / "manifest.json")
    clips, log_mel = recorded(root, manifest), LogMel(manifest.audio)
    segments = Segments(manifest, root / "audio", "train", frames=FRAMES, margin=0)
    state = out / "state.pt"
    if steps is None and not state.is_file():
        probed, budget = Training(name, segments, manifest.audio, seed), 60 * minutes[-1]
        alone, both = (probed.pace(adversarial=adversarial) for adversarial in (False, True))
        steps = round(mel_first * budget / alone), round((1 - mel_first) * budget / both)
    training = Training(name, segments, manifest.audio, seed)
    plan = training.load(state) if state.is_file() else Plan(*(steps or ()), mel_first)
    for mark in minutes:
        if training.seconds >= 60 * mark:
            continue
        while training.seconds < 60 * mark and training.step < plan.alone + plan.both:
            adversarial = training.step >= plan.alone
            loss = training.advance(plan.passed(training.step), adversarial=adversarial)
            if training.step % (10 if adversarial else 100) == 0:
                print(f"{training.seconds / 60:.2f} min, step {training.step} of {plan}: {loss:.3f}", flush=True)
        folder = out / f"{mark:g}min"
        folder.mkdir(parents=True, exist_ok=True)
        for wav, clip in clips.items():
            with torch.inference_mode():
                made = training.system.generator(log_mel.of_file(clip[None]))[0].clamp(-1, 1)
            write(folder / wav, made, manifest.audio.sample_rate)
        with replacing(folder / "generator.pt") as file:
            torch.save(training.system.generator.state_dict(), file)
        about = {"system": name, "minutes": training.seconds / 60, "step": training.step, "seed": seed}
        write_json(folder / "about.json", {**about, "plan": plan._asdict()})
        training.save(state, plan)


def recorded(root: Path, manifest: Manifest) -> dict[str, Tensor]:
    """The clips (T,) that were evaluated, by the names of their files."""
    lengths = {path.name: soundfile.info(path).frames for path in (root / "samples" / "recorded").glob("*.wav")}
    if not lengths:
        raise UserError(f"{root / 'samples'}: no recorded clips: run `wavedistill evaluate` first")
    test = {f"{utterance.name}.wav": utterance for utterance in manifest.of("test")}
    return {name: read_samples(root / "audio", test[name], 0, length) for name, length in lengths.items()}


def plot(metrics: Path, path: Path, pair_minutes: float) -> None:
    """Draw the scores of trainings against their minutes, from the `metrics.json` of `evaluate --also`."""
    found = json.loads(metrics.read_text())
    also = found["about"]["also"]
    marks = {name: json.loads((Path(also[name]["folder"]) / "about.json").read_text()) for name in also}
    figure = Figure(figsize=(8, 3.6), layout="constrained", dpi=150)
    for axes, (score, label) in zip(figure.subplots(1, len(SHOWN)), SHOWN.items(), strict=True):
        for part, style, fill, said in (("synthesis", "o-", "full", ""), ("as_drawn", "o:", "none", " as drawn")):
            for system, colour in zip(NAMES, ("#3b6ea5", "#5f9ed1", "#a3567a"), strict=True):
                names = [name for name, mark in marks.items() if mark["system"] == system]
                points = sorted((marks[name]["minutes"], found[part][name][score]) for name in names)
                if points:
                    look = {"color": colour, "fillstyle": fill, "label": NAMES[system] + said}
                    axes.plot(*zip(*points, strict=True), style, **look)
            look = {"markersize": 11, "fillstyle": fill, "label": "this pair" + said}
            axes.plot(pair_minutes, found[part]["student"][score], "*k", **look)
        axes.set(xlabel="minutes of one processor", ylabel=label, xlim=(0, None))
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize="small")
    figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """What the docstring of this file shows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the experiment's")
    parser.add_argument("system", choices=SYSTEMS, nargs="?")
    parser.add_argument("--cpu-minutes", type=float, nargs="+", default=[5, 15, 30, 45], help="when to leave clips")
    parser.add_argument("--mel-first", type=float, default=0.5, help="share of them by the mel loss alone")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, nargs=2, help="of either part, to repeat a training; else as many as fit")
    parser.add_argument("--out", type=Path, help="where to; FOLDER/same_hours/SYSTEM by default")
    parser.add_argument("--plot", type=Path, nargs="?", const=Path(__file__).with_suffix(".png"), help="draw this")
    parser.add_argument("--pair-minutes", type=float, default=45, help="what the pair took")
    given = parser.parse_args(arguments)
    try:
        if given.system:
            out = given.out or given.folder / "same_hours" / given.system
            train(given.folder, given.system, given.cpu_minutes, out, given.mel_first, given.seed, given.steps)
        if given.plot:
            plot(given.folder / "metrics.json", given.plot, given.pair_minutes)
    except UserError as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
