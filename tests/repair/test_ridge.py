"""Moments add up, and ridge regression towards a weight is what it says."""

from __future__ import annotations

import torch

from prunus.repair.moments import Moments, Sums
from prunus.repair.ridge import error_of, refit


def moments_of(x: torch.Tensor, y: torch.Tensor, parts: int = 1) -> Moments:
    sums = Sums()
    for a, b in zip(x.chunk(parts, 1), y.chunk(parts, 1), strict=True):
        sums.add(a, b)
    found = sums.moments()
    assert found is not None
    return found


def rows(n: int = 400, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, n, 5, generator=generator) + 100
    y = x @ torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(9)) + 3
    return x, y + torch.randn(2, n, 3, generator=generator)


def test_moments_are_those_of_all_rows_far_from_zero() -> None:
    x, y = rows()
    found = moments_of(x, y, parts=7)
    assert found.count == 400
    for g in range(2):
        both = torch.cat((x[g], y[g]), 1).double().T
        expected = torch.cov(both, correction=0)
        assert torch.allclose(found.cov[g], expected[:5, :5], atol=1e-4)
        assert torch.allclose(found.cross[g], expected[5:, :5], atol=1e-4)
        assert torch.allclose(found.var_y[g], expected.diagonal()[5:], atol=1e-4)
        assert torch.allclose(found.mean_x[g], x[g].double().mean(0))


def test_rows_that_are_not_finite_give_no_moments() -> None:
    sums = Sums()
    sums.add(torch.full((1, 4, 2), float("inf")), torch.zeros(1, 4, 1))
    assert sums.moments() is None
    assert Sums().moments() is None


def test_the_error_is_that_of_the_rows() -> None:
    x, y = rows()
    weight, bias = torch.randn(2, 3, 5), torch.randn(2, 3)
    gaps = y - x @ weight.transpose(1, 2) - bias.unsqueeze(1)
    variance = (y - y.mean(1, keepdim=True)).double().square().sum()
    expected = float(gaps.double().square().sum() / variance)
    assert abs(error_of(weight.double(), bias.double(), moments_of(x, y)) / expected - 1) < 1e-4


def test_one_ridge_solves_the_penalised_problem() -> None:
    x, y = rows()
    fit, held = moments_of(x, y), moments_of(*rows(seed=1))
    start = torch.randn(2, 3, 5, dtype=torch.float64)
    found = refit(start, torch.zeros(2, 3), fit, held, [0.1], free_bias=True)
    assert found.ridge == 0.1
    assert found.after < found.before
    for g in range(2):
        gap = found.weight[g] @ fit.cov[g] - fit.cross[g]
        pull = 0.1 * fit.cov[g].diagonal().mean() * (found.weight[g] - start[g])
        assert torch.allclose(gap + pull, torch.zeros(3, 5, dtype=torch.float64), atol=1e-5)
        assert torch.allclose(found.bias[g], fit.mean_y[g] - found.weight[g] @ fit.mean_x[g])


def test_without_a_bias_the_line_goes_through_the_origin() -> None:
    x = torch.randn(1, 300, 2) + 5
    y = x @ torch.tensor([[[2.0], [-1.0]]])
    found = refit(torch.zeros(1, 1, 2), None, moments_of(x, y), moments_of(x, y), [1e-8], free_bias=False)
    assert torch.allclose(found.weight, torch.tensor([[[2.0, -1.0]]], dtype=torch.float64), atol=1e-4)
    assert float(found.bias.abs().sum()) == 0


def test_a_right_weight_stays() -> None:
    x, y = rows()
    fit = moments_of(x, y)
    best = refit(torch.zeros(2, 3, 5), None, fit, fit, [1e-6], free_bias=True)
    again = refit(best.weight, best.bias, moments_of(*rows(20, seed=3)), fit, [1e-4, 1e-1], free_bias=True)
    assert again.after == again.before
    assert torch.equal(again.weight, best.weight)


def test_the_ridge_with_the_least_error_on_other_rows_is_taken() -> None:
    x, y = rows(8)
    fit, held = moments_of(x, y), moments_of(*rows(seed=1))
    ridges = [1e-6, 1e-4, 1e-2, 1.0, 100.0]
    found = refit(torch.zeros(2, 3, 5), None, fit, held, ridges, free_bias=True)
    alone = [refit(torch.zeros(2, 3, 5), None, fit, held, [r], free_bias=True).after for r in ridges]
    assert abs(found.after - min(alone)) < 1e-12


def test_constant_inputs_change_no_weight() -> None:
    x = torch.ones(1, 50, 3)
    fit = moments_of(x, torch.randn(1, 50, 2))
    found = refit(torch.ones(1, 2, 3), torch.zeros(1, 2), fit, fit, [1e-3], free_bias=True)
    assert torch.equal(found.weight, torch.ones(1, 2, 3, dtype=torch.float64))
