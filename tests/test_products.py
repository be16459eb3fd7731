"""Products of a network's layers: the same by whichever library, and by the faster one where it may be used."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import noise
from wavedistill.networks import products
from wavedistill.networks.products import added, product

needs_onednn = pytest.mark.skipif(not products.has_onednn(), reason="torch was built without oneDNN")


class Noted(TorchDispatchMode):
    """Notes which operations are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))

    @property
    def onednn(self) -> bool:
        return any("mkldnn" in name for name in self.names)


@pytest.fixture
def large() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs, a part of a weight as a layer with several taps has it, a bias, and a total."""
    return noise(1200, 32).float(), noise(64, 64, seed=1).float()[:, 32:], noise(64).float(), noise(1200, 64).float()


@needs_onednn
@torch.no_grad()
def test_a_large_product_without_gradients_is_that_of_onednn_and_equal(large: tuple[Tensor, ...]) -> None:
    x, weight, bias, total = large
    with Noted() as noted:
        found = product(x, weight, bias), product(x, weight), added(total.clone(), x, weight)
    assert sum("mkldnn" in name for name in noted.names) == 3
    exact = x.double() @ weight.double().T
    for value, expected in zip(found, (exact + bias, exact, exact + total), strict=True):
        torch.testing.assert_close(value, expected.float(), rtol=0, atol=2e-5)


def test_products_with_gradients_in_float64_or_small_are_torchs_own(large: tuple[Tensor, ...]) -> None:
    x, weight, bias, total = large
    weight = weight.clone().requires_grad_()
    with Noted() as noted:
        found = product(x, weight, bias)
        grown = added(total.clone(), x, weight)
    assert not noted.onednn
    (found.sum() + grown.sum()).backward()
    torch.testing.assert_close(weight.grad, 2 * x.sum(0).expand(64, -1), rtol=1e-4, atol=1e-3)
    with Noted() as noted, torch.no_grad():
        product(x.double(), weight.double(), bias.double())
        product(x[:10], weight, bias)
        with torch.autocast("cpu", torch.bfloat16):
            assert product(x, weight, bias).dtype == torch.bfloat16
            assert added(product(x, weight), x, weight).dtype == torch.bfloat16
    assert not noted.onednn
