"""What models are told: frames with others around them, cut and joined, and that of another place."""

import pytest
import torch

from tests.conftest import noise, small_mel, small_model
from wavedistill.speech.conditioning import Conditioning

TOLD = Conditioning(noise(2, 3, 10), 2, noise(2, 10, seed=1))


def test_frames_are_those_inside() -> None:
    assert TOLD.frames == 6
    inner = TOLD.within(0)
    assert inner.frames == 6
    assert torch.equal(inner.mel, TOLD.mel[..., 2:8])
    assert torch.equal(inner.f0, TOLD.f0[..., 2:8])
    assert TOLD.within(2) is TOLD
    with pytest.raises(ValueError, match="3 frames around are needed, and there are 2"):
        TOLD.within(3)


def test_a_block_has_its_own_surroundings_and_blocks_join() -> None:
    block = TOLD.block(1, 3)
    assert block.frames == 3
    assert torch.equal(block.mel, TOLD.mel[..., 1:8])
    assert torch.equal(TOLD.block(1, 3, 1).mel, TOLD.mel[..., 2:7])
    inner = TOLD.within(0)
    joined = inner.block(0, 2).followed_by(inner.block(2, 4))
    assert torch.equal(joined.mel, inner.mel)
    assert torch.equal(joined.f0, inner.f0)
    assert inner.followed_by(inner.mel_alone()).f0 is None


def test_elsewhere_is_half_the_length_away() -> None:
    other = TOLD.elsewhere()
    assert torch.equal(other.mel, TOLD.mel.roll(5, -1))
    assert torch.equal(other.f0, TOLD.f0.roll(5, -1))
    assert (other.margin, other.frames) == (TOLD.margin, TOLD.frames)


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_a_model_takes_what_it_needs_of_what_is_around(kind: str) -> None:
    """More frames around change nothing, and too few are refused."""
    model, wide = small_model(kind), small_mel(1, 20)
    wide = Conditioning(wide.mel, 9)
    narrow = wide.within(model.margin)
    x = noise(1, wide.frames * 8)
    densities = []
    for told in (wide, narrow):
        density = model(told)
        densities.append(density.log_prob(x) if kind == "teacher" else density.rsample_and_log_prob(x)[1])
    torch.testing.assert_close(*densities)
    with pytest.raises(ValueError, match="frames around are needed"):
        model(wide.within(1))
