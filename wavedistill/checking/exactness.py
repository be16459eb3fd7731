"""A small pair of models, and whether each of its directions and samplers agrees with the others on this machine."""

from typing import NamedTuple

import torch
from torch import Tensor

from wavedistill.models.kinds import build
from wavedistill.models.waveform import WaveformModel
from wavedistill.recipe.loading import load_recipe
from wavedistill.recipe.recipe import Recipe
from wavedistill.sampling import sequential, streaming
from wavedistill.speech.conditioning import Conditioning
from wavedistill.speech.heard import Heard
from wavedistill.tools.random import random_stream
from wavedistill.vocoder.vocoder import Vocoder

FRAMES = 40
"""Of the sound that a student draws whole and as a stream."""
STEPS = 120
"""That samplers one step at a time are compared over."""
CLOSE = 1e-3
"""Of the largest sample; rounding of float32 comes to a hundredth of it, a wrong equation to its thousandfold."""
HEAD_STD = 0.02
"""Of the last layers' weights, which start at zero, where every network says the same."""


class Untrained(NamedTuple):
    """A model of the recipe tiny, with weights drawn by chance."""

    name: str
    recipe: Recipe
    model: WaveformModel


def pair(device: torch.device) -> dict[str, Untrained]:
    """The teacher and the student of the recipe tiny, by their names."""
    recipe, found = load_recipe("tiny"), {}
    for name in recipe.models:
        model, generator = build(recipe, name, recipe.seed), random_stream(recipe.seed)
        for net in model.networks:
            net.head.weight.data.normal_(0, HEAD_STD, generator=generator)
        found[name] = Untrained(name, recipe, model.to(device).eval().requires_grad_(False))
    return found


def voice_of(untrained: Untrained) -> Vocoder:
    """The model as a person uses it, as if it had heard anything."""
    bands = untrained.recipe.audio.n_mels
    heard = Heard(mel_mean=(-5.0,) * bands, mel_std=(2.0,) * bands, f0_low=None, f0_high=None)
    return Vocoder(untrained.name, untrained.recipe, heard, untrained.model)


@torch.inference_mode()
def compared(device: torch.device) -> str:
    """How far apart what must be equal is, in words.

    Raises:
        ArithmeticError: if something is further apart than rounding explains.
    """
    models = pair(device)
    (_, recipe, teacher), (_, _, student) = models["teacher"], models["student"]
    hop = recipe.audio.hop_length
    # Level and slope of speech; what it says is of no matter.
    slope = torch.linspace(-3, -7, recipe.audio.n_mels)[:, None] + 0.5 * torch.randn(
        recipe.audio.n_mels, FRAMES + 2 * student.margin, generator=random_stream(1)
    )
    whole = Conditioning(slope[None].to(device), student.margin)
    short = whole.block(0, -(-STEPS // hop))
    noise = student.base.noise((1, FRAMES * hop), random_stream(2)).to(device)
    few = teacher.base.noise((1, STEPS), random_stream(3)).to(device)

    density, drawn = teacher(short), student(whole)
    naive = sequential.sample(density, few, sequential.naive)
    fast = sequential.sample(density, few)
    one_pass, ladj = drawn.to_x(noise)
    blocks = streaming.stream(student, [Conditioning(whole.mel, 0)], streaming.slices(noise))
    back, log_prob = sequential.invert(student(short), one_pass[:, :STEPS])
    distances = {
        "teacher there and back": _apart(density.to_z(fast)[0], few),
        "fastest sampler and naive": _apart(fast, naive),
        "student there and back": _apart(back, noise[:, :STEPS]),
        "student's two densities": _apart(log_prob, (student.base.log_prob(noise) - ladj)[:, :STEPS]),
        "stream and one pass": _apart(torch.cat(list(blocks), 1), one_pass),
    }
    if wrong := [f"{what} differ by {distance:.1g}" for what, distance in distances.items() if not distance < CLOSE]:
        raise ArithmeticError("; ".join(wrong) + f", which should be below {CLOSE:g}")
    return ", ".join(f"{what} {distance:.0e}" for what, distance in distances.items())


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())
