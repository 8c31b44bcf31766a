"""Orthogonalisation: singular values near 1, the same vectors, each matrix for itself."""

import pytest
import torch

from tiny_onn.optim import orthogonalize


def spread(m: int, n: int, least: float = 0.02, batch: int = 3) -> torch.Tensor:
    """Matrices whose singular values fall geometrically from 1 to ``least``."""
    generator = torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(batch, m, m, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(batch, n, n, generator=generator, dtype=torch.float64))
    k = min(m, n)
    values = torch.logspace(0, torch.tensor(least).log10().item(), k, dtype=torch.float64)
    return left[..., :k] @ torch.diag(values) @ right[..., :k].mT


@pytest.mark.parametrize("shape", [(8, 8), (8, 24), (24, 8)])
@pytest.mark.parametrize(
    ("method", "low", "high"), [("quintic", 0.65, 1.25), ("polar_express", 0.8, 1.2)]
)
def test_singular_values_land_in_the_band(shape, method, low, high):
    x = spread(*shape)
    values = torch.linalg.svdvals(orthogonalize(x, method=method))
    assert low < values.min() and values.max() < high


def test_more_rounds_of_polar_express_converge_to_the_polar_factor():
    x = spread(12, 20)
    left, _, right = torch.linalg.svd(x, full_matrices=False)
    done = orthogonalize(x, method="polar_express", steps=9)
    assert torch.dist(done, left @ right) < 1e-3


def test_float32_is_the_default_and_bfloat16_is_close():
    x = spread(16, 32).float()
    plain = orthogonalize(x)
    assert plain.dtype == torch.float32
    rough = orthogonalize(x, dtype=torch.bfloat16)
    assert rough.dtype == torch.float32
    assert (rough - plain).abs().max() < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_matrix_does_not_depend_on_its_company(dtype):
    x = torch.randn(40, 64, 96, generator=torch.Generator().manual_seed(1))
    together = orthogonalize(x, dtype=dtype)
    for i in (0, 17, 39):
        alone = orthogonalize(x[i], dtype=dtype)
        assert torch.equal(together[i], alone)


def test_zero_stays_zero_and_a_function_is_taken():
    assert orthogonalize(torch.zeros(2, 4, 6)).abs().max() == 0
    halves = orthogonalize(torch.ones(4, 6), method=lambda x: torch.full_like(x, 0.5))
    assert torch.equal(halves, torch.full((4, 6), 0.5))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"at least 2 dimensions. Got shape \(3,\)"):
        orthogonalize(torch.ones(3))
    with pytest.raises(ValueError, match="'cubic'"):
        orthogonalize(torch.ones(3, 3), method="cubic")


@pytest.mark.parametrize("scale", [1e-12, 1e-18, 1e-22, 1e-30, 1e-42])
def test_a_matrix_of_next_to_nothing_gives_nothing_wild(scale):
    torch.manual_seed(0)
    x = torch.stack([torch.randn(8, 12) * scale, torch.randn(8, 12)])
    tiny, plain = orthogonalize(x)
    assert tiny.isfinite().all() and tiny.norm() < 1.3 * 8**0.5
    assert torch.equal(plain, orthogonalize(x[1]))
