"""Densities on the test split: what is measured of which clip, and how clips are weighed."""

from pathlib import Path

import pytest
import torch

from tests.test_audio import corpus
from wavedistill.audio import LogMel
from wavedistill.config import Recipe
from wavedistill.data import dequantise, random_stream, read_samples
from wavedistill.experiment import Experiment
from wavedistill.losses import monte_carlo_kl, negative_log_likelihood
from wavedistill.models import build
from wavedistill.stages.evaluate import DEQUANTISE, DRAW, densities


def test_a_likelihood_is_that_of_every_sample_dequantised(tmp_path: Path, tiny: Recipe) -> None:
    """The mean over all samples of the split, of which a longer clip has more, given its own log-mel; and another's."""
    experiment = Experiment(tiny, tmp_path, torch.device("cpu"))
    clips = corpus(experiment.audio, tiny, [20, 60]).utterances
    teacher, student = (build(kind, tiny, 0).requires_grad_(False) for kind in ("teacher", "student"))
    generator = torch.Generator().manual_seed(0)
    for network in (*teacher.networks, *student.networks):
        network.head.weight.copy_(0.3 * torch.randn(network.head.weight.shape, generator=generator))
    found = densities(experiment, teacher, student, clips)

    waves = [read_samples(experiment.audio, clip)[None] for clip in clips]
    mels = [LogMel(tiny.audio).of_file(wave, teacher.margin) for wave in waves]
    noisy = [dequantise(wave, [random_stream(tiny.seed, DEQUANTISE, i)]) for i, wave in enumerate(waves)]
    assert all(not torch.equal(a, b) for a, b in zip(waves, noisy, strict=True))

    def mean(values: list[torch.Tensor]) -> float:
        return sum(float(value) * wave.shape[1] for value, wave in zip(values, waves, strict=True)) / 16000

    own = [negative_log_likelihood(teacher(mel), wave) for mel, wave in zip(mels, noisy, strict=True)]
    assert abs(own[0] - own[1]) > 1e-3, "so that the weights matter"
    assert found["teacher_nll_nats_per_sample"] == pytest.approx(mean(own), abs=1e-7)
    others = [mels[1][..., : mels[0].shape[-1]], mels[0].repeat(1, 1, 4)[..., : mels[1].shape[-1]]]
    swapped = [
        negative_log_likelihood(teacher.synthesised(teacher.residual(other), mel), wave)
        for mel, other, wave in zip(mels, others, noisy, strict=True)
    ]
    assert found["teacher_nll_shuffled_conditioning"] == pytest.approx(mean(swapped), abs=1e-7)
    assert found["test_seconds"] == 1
    q, kls = build("student", tiny, tiny.seed), []
    for i, (mel, wave) in enumerate(zip(mels, waves, strict=True)):
        z = q.base.noise((1, wave.shape[1]), random_stream(tiny.seed, DRAW, i))
        kls.append(monte_carlo_kl(q.residual(mel), teacher.residual(mel), z)[0].detach())
    assert found["student_kl_before_training"] == pytest.approx(mean(kls), rel=1e-4)
    assert found["student_kl_nats_per_sample"] > 1.2 * found["student_kl_before_training"], "this one is another"
