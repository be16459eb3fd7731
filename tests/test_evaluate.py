"""Densities on the test split: what is measured of which clip, and how clips are weighed."""

from pathlib import Path

import pytest
import torch

from tests.conftest import one_draw, told
from tests.test_audio import corpus
from wavedistill.corpus.segments import dequantise
from wavedistill.evaluation.densities import DEQUANTISE, DRAW, densities, log_likelihoods
from wavedistill.evaluation.excerpts import excerpts
from wavedistill.experiment.folder import Experiment
from wavedistill.models.kinds import build
from wavedistill.recipe.recipe import Recipe
from wavedistill.speech.audio import LogMel
from wavedistill.tools.random import random_stream
from wavedistill.training.losses import negative_log_likelihood


def test_a_likelihood_is_that_of_every_sample_dequantised(tmp_path: Path, tiny: Recipe) -> None:
    """The mean over all samples of the split, of which a longer clip has more, given its own log-mel; and another's."""
    experiment = Experiment(tiny, tmp_path, torch.device("cpu"))
    clips = corpus(experiment.audio, tiny, [20, 60]).utterances
    teacher, student = (build(tiny, kind, 0).requires_grad_(False) for kind in ("teacher", "student"))
    generator = torch.Generator().manual_seed(0)
    for network in (*teacher.networks, *student.networks):
        network.head.weight.copy_(0.3 * torch.randn(network.head.weight.shape, generator=generator))
    told_of = excerpts(experiment.audio, clips, tiny.audio)
    measured = densities(tiny, {"teacher": teacher, "student": student}, {}, told_of, experiment.device)
    found = measured["models"]["teacher"]

    waves = [audio[None] for audio, _ in told_of]
    mels = [told(tiny, LogMel(tiny.audio).of_file(wave, teacher.margin)) for wave in waves]
    noisy = [dequantise(wave, [random_stream(tiny.seed, DEQUANTISE, i)]) for i, wave in enumerate(waves)]
    assert all(not torch.equal(a, b) for a, b in zip(waves, noisy, strict=True))

    def mean(values: list[torch.Tensor]) -> float:
        return sum(float(value) * wave.shape[1] for value, wave in zip(values, waves, strict=True)) / 16000

    own = [negative_log_likelihood(teacher(mel), wave) for mel, wave in zip(mels, noisy, strict=True)]
    assert abs(own[0] - own[1]) > 1e-3, "so that the weights matter"
    assert found["nll"] == pytest.approx(mean(own), abs=1e-7)
    clips = [wave[0] for wave in waves]
    likely = log_likelihoods(tiny, teacher, told_of, clips)
    assert likely == pytest.approx([-float(value) for value in own], abs=1e-6), "the recordings' own"
    louder = log_likelihoods(tiny, teacher, told_of, [1.5 * clip for clip in clips])
    assert all(a != b for a, b in zip(likely, louder, strict=True))
    first, second = (each.mel for each in mels)
    others = [second[..., : first.shape[-1]], first.repeat(1, 1, 4)[..., : second.shape[-1]]]
    swapped = [
        negative_log_likelihood(teacher.synthesised(teacher.residual(told(tiny, other)), mel), wave)
        for mel, other, wave in zip(mels, others, noisy, strict=True)
    ]
    assert found["nll_shuffled_conditioning"] == pytest.approx(mean(swapped), abs=1e-7)
    assert measured["test_seconds"] == 1
    found = measured["models"]["student"]
    assert found["kl_from"] == "teacher"
    q, kls = build(tiny, "student", tiny.seed), []
    for i, (mel, wave) in enumerate(zip(mels, waves, strict=True)):
        z = q.base.noise((1, wave.shape[1]), random_stream(tiny.seed, DRAW, i))
        kls.append(one_draw(q.residual(mel), teacher.residual(mel), z)[0].detach())
    assert found["kl_before_training"] == pytest.approx(mean(kls), rel=1e-4)
    assert found["kl"] > 1.2 * found["kl_before_training"], "this one is another"
