"""The conditioner: exact causality, receptive field, one-step form, alignment of features."""

import shutil

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tests.conftest import noise, small_flow, small_wavenet
from wavedistill.models.compiling import compile_networks
from wavedistill.networks.encoder import MelEncoder
from wavedistill.networks.wavenet import WaveNet, WaveNetState
from wavedistill.sampling.blocks import SPAN, Blocks, BlocksByTorch, CompiledBlocks

LENGTH = 41


@pytest.mark.parametrize("at", [0, 1, 17, LENGTH - 1])
def test_perturbing_an_input_changes_no_parameter_at_or_before_it(at: int) -> None:
    """Bit for bit, and the next parameter does change."""
    flow, context = small_flow("x"), (noise(2, 11, 3),)
    x = noise(2, LENGTH)
    changed = x.clone()
    changed[:, at] += 1.0
    before, after = (torch.stack(flow.step_parameters(v, context)) for v in (x, changed))
    assert torch.equal(before[..., : at + 1], after[..., : at + 1])
    if at + 1 < LENGTH:
        assert (before[..., at + 1] != after[..., at + 1]).all()


@pytest.mark.parametrize("kernel_size", [2, 3])
@pytest.mark.parametrize(("squeeze", "border"), [(1, 0), (4, 0), (4, 3)])
def test_receptive_field_is_exact(kernel_size: int, squeeze: int, border: int) -> None:
    """The last output of a group depends on exactly `receptive_field` inputs before it, but for those of the group."""
    net = small_wavenet(kernel_size=kernel_size, feature_channels=None, repeat=squeeze, squeeze=squeeze, border=border)
    groups = 1 + (kernel_size - 1) * (1 + 2 + 4 + 1)
    assert net.receptive_field == squeeze * groups + squeeze - 1
    last = border + squeeze * (groups + 3) - 1
    x = noise(1, last + 5).requires_grad_()
    net(x)[0, last].sum().backward()
    assert x.grad is not None
    (seen,) = x.grad[0].nonzero(as_tuple=True)
    assert seen.tolist() == list(range(last - net.receptive_field, last))


def test_a_squeezed_networks_outputs_are_its_groups_and_before_them_its_bias() -> None:
    net = small_wavenet(squeeze=4, border=3)
    x, features = noise(1, 24), noise(1, 6, 3)
    before = net(x, features)
    torch.testing.assert_close(before[0, :3, 1], net.head.bias[5:8], rtol=0, atol=0)
    x[:, 10] += 1  # the last of the group from 7 to 10
    changed = (net(x, features) != before).all(-1)[0]
    assert not changed[:11].any()
    assert changed[11:15].all()


@pytest.mark.parametrize("kernel_size", [2, 3])
@pytest.mark.parametrize("conditional", [True, False])
@torch.no_grad()
def test_steps_equal_the_whole_sequence_from_the_first_sample_on(kernel_size: int, conditional: bool) -> None:
    """State starts at zero, as the whole sequence is padded; feeding zeros to warm it up would differ."""
    net = small_wavenet(kernel_size=kernel_size, **({} if conditional else {"feature_channels": None, "repeat": 1}))
    features = noise(2, 11, 3) if conditional else None
    x = noise(2, LENGTH)
    state, projected = WaveNetState(net, 2, LENGTH), net.project(features)
    steps = []
    for t in range(LENGTH):
        previous = x[:, t - 1] if t else torch.zeros(2).double()
        steps.append(net.step(previous, state, None if projected is None else projected[t // net.repeat]))
    torch.testing.assert_close(torch.stack(steps, 1), net(x, features), rtol=0, atol=1e-12)


@pytest.mark.parametrize("by", [CompiledBlocks, BlocksByTorch])
@pytest.mark.parametrize("kernel_size", [2, 3])
@pytest.mark.parametrize(("squeeze", "border"), [(1, 0), (4, 0), (4, 3), (2, 1)])
@torch.no_grad()
def test_blocks_equal_the_whole_sequence(by: Blocks, kernel_size: int, squeeze: int, border: int) -> None:
    """Shorter and longer than the past of the layers; the last one ends where it likes."""
    net = small_wavenet(kernel_size=kernel_size, source_channels=2, squeeze=squeeze, border=border)
    x, features, source = noise(2, LENGTH), noise(2, 11, 3), noise(2, LENGTH + border, 2, seed=1)
    net_of, blocks = by(net, 2, 16), []
    for begin, end in ((0, 4), (4, 20), (20, 36), (36, 40), (40, 41)):
        own = features[:, begin // net.repeat : -(-end // net.repeat)]
        blocks.append(net_of(x[:, begin:end], own, source[:, begin : end + border]))
    torch.testing.assert_close(torch.cat(blocks, 1), net(x, features, source), rtol=0, atol=1e-12)


@pytest.mark.parametrize("channels", [8, 20, 32])
@pytest.mark.parametrize(("squeeze", "conditional"), [(1, False), (10, False), (10, True)])
@torch.no_grad()
def test_compiled_blocks_of_any_width_are_the_networks_to_rounding(
    channels: int, squeeze: int, conditional: bool
) -> None:
    """Many spans of groups and a part of one, in float32."""
    told = {"feature_channels": 3, "repeat": 50} if conditional else {"feature_channels": None, "repeat": squeeze}
    net = small_wavenet(channels=channels, skip_channels=24, squeeze=squeeze, border=squeeze // 3, **told).float()
    length = 50 * (3 * SPAN + 7) // (50 // squeeze)
    x = noise(1, length).float()
    features = noise(1, -(-length // 50), 3).float() if conditional else None
    expected = net(x, features)
    torch.testing.assert_close(CompiledBlocks(net, 1, length + 50)(x, features), expected, rtol=0, atol=1e-5)
    if conditional:
        with pytest.raises(ValueError, match="needs features"):
            CompiledBlocks(net, 1, length)(x)
        for room, told_of in ((length - 50, features), (length + 50, features[:, 1:])):
            with pytest.raises(ValueError, match="longer than its room or its features"):
                CompiledBlocks(net, 1, room)(x, told_of)


def test_each_feature_governs_exactly_its_own_samples() -> None:
    """Feature k first acts on sample k * repeat, and not before."""
    net, x = small_wavenet(), noise(1, LENGTH)
    features = noise(1, 11, 3)
    changed = features.clone()
    changed[:, 6] += 1
    same = (net(x, features) == net(x, changed)).all(-1)[0]
    assert same[: 6 * net.repeat].all()
    assert not same[6 * net.repeat : 7 * net.repeat].any()


def test_last_layer_starts_at_zero() -> None:
    """So that a flow built on the network starts where its caller chose."""
    net = WaveNet(layers=2, dilation_cycle=2, kernel_size=2, channels=4, skip_channels=4, out_channels=2)
    assert not net(noise(1, LENGTH).float()).any()


def test_a_conditional_network_says_that_it_needs_features() -> None:
    with pytest.raises(ValueError, match="needs features"):
        small_wavenet()(noise(1, LENGTH))


def test_encoder_gives_a_crop_the_features_of_the_whole() -> None:
    """Neither padding nor upsampling lets the border of a crop in."""
    encoder = MelEncoder(n_mels=5, channels=3, context=2, upsample=(4, 2, 7)).double()
    mel = noise(1, 5, 30)
    whole, crop = encoder(mel), encoder(mel[..., 6:21])
    assert whole.shape == (1, 26 * 8, 3)
    torch.testing.assert_close(crop, whole[:, 6 * 8 : 17 * 8], rtol=0, atol=1e-12)


def test_source_is_seen_at_its_own_time_and_the_past_only_before() -> None:
    net, x, source = small_wavenet(source_channels=2), noise(1, LENGTH), noise(1, LENGTH, 2, seed=1)
    changed = source.clone()
    changed[:, 17] += 1
    features = noise(1, 11, 3)
    same = (net(x, features, source) == net(x, features, changed)).all(-1)[0]
    assert same[:17].all()
    assert not same[17]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize(("squeeze", "border"), [(1, 0), (4, 3)])
def test_a_compiled_network_has_the_values_and_gradients_of_the_plain_one(squeeze: int, border: int) -> None:
    plain, compiled = (small_wavenet(layers=2, source_channels=2, squeeze=squeeze, border=border) for _ in range(2))
    model = nn.Sequential(compiled)
    compile_networks(model)
    inputs = noise(2, LENGTH), noise(2, 11, 3), noise(2, LENGTH + border, 2, seed=1)
    outputs = [net(*inputs) for net in (plain, compiled)]
    torch.testing.assert_close(*outputs)
    for out in outputs:
        out.square().sum().backward()
    torch.testing.assert_close(plain.input.weight.grad, compiled.input.weight.grad)
    assert list(plain.state_dict()) == list(compiled.state_dict())


def test_flops_are_those_that_torch_counts() -> None:
    net, length = small_wavenet(source_channels=2), 48
    # Torch leaves out what is done in place; here, from the shapes.
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, **kwargs: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter, torch.no_grad():
        net(noise(1, length), noise(1, length // net.repeat, 3), noise(1, length, 2))
    assert net.flops_per_sample * length == counter.get_total_flops()


@pytest.mark.parametrize("kernel_size", [2, 3])
@torch.no_grad()
def test_it_is_the_stack_of_the_paper(kernel_size: int) -> None:
    """Convolutions of torch, tanh and sigmoid, each where van den Oord et al. put it; every layer's skip counts."""
    net, repeat = small_wavenet(kernel_size=kernel_size, source_channels=2), 4
    x, features, source = noise(2, 40), noise(2, 10, 3), noise(2, 40, 2, seed=1)
    before = torch.cat([torch.zeros(2, 1).double(), x[:, :-1]], 1)
    h = (torch.cat([before[..., None], source], -1) @ net.input.weight.T + net.input.bias).mT  # (B, C, T)
    context = (features @ net.context.weight.T + net.context.bias).repeat_interleave(repeat, 1).mT
    skips = torch.zeros(2, 5, 40).double()
    for i, (gates, outputs, own) in enumerate(zip(net.gates, net.outputs, context.chunk(4, 1), strict=True)):
        taps = gates.weight.view(12, kernel_size, 6).mT  # of a convolution: (out, in, taps), the oldest first
        padded = nn.functional.pad(h, ((kernel_size - 1) * net.dilations[i], 0))
        filtered, gate = (nn.functional.conv1d(padded, taps, gates.bias, dilation=net.dilations[i]) + own).chunk(2, 1)
        out = nn.functional.conv1d(filtered.tanh() * gate.sigmoid(), outputs.weight[..., None], outputs.bias)
        skips += out[:, :5]
        if i < 3:
            h = h + out[:, 5:]
    hidden = ((skips / 2).relu().mT @ net.hidden.weight.T + net.hidden.bias).relu()
    torch.testing.assert_close(net(x, features, source), hidden @ net.head.weight.T + net.head.bias)
