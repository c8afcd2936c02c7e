"""The terms: zero where both models agree, right against brute force elsewhere."""

from __future__ import annotations

import pytest
import torch

from prunus.distill.terms import apart, detected, logits_in, raw_predictions, share_apart, softened
from prunus.errors import InputError


def heads(seed: int, bins: int = 16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.randn(2, 4 * bins, 10, generator=generator)
    return {"boxes": boxes, "scores": 3 * torch.randn(2, 3, 10, generator=generator) - 3}


@pytest.mark.parametrize("temperature", [1.0, 2.0, 8.0])
def test_softened_classes_are_the_divergence_times_the_squared_temperature(temperature) -> None:
    own, theirs = torch.randn(6, 5), torch.randn(6, 5)
    p, q = ((t / temperature).softmax(-1) for t in (own, theirs))
    expected = (q * (q / p).log()).sum(-1).mean() * temperature**2
    assert softened(own, theirs, temperature).item() == pytest.approx(expected.item(), rel=1e-4)
    assert softened(theirs + 3, theirs, temperature).item() == pytest.approx(0, abs=1e-5)


def test_maps_of_classes_have_their_classes_in_dim_1() -> None:
    own, theirs = torch.randn(2, 5, 4, 3), torch.randn(2, 5, 4, 3)
    flat = softened(own.movedim(1, -1).reshape(-1, 5), theirs.movedim(1, -1).reshape(-1, 5), 2.0)
    assert torch.allclose(softened(own, theirs, 2.0), flat)
    assert torch.allclose(softened(own.movedim(1, -1), theirs.movedim(1, -1), 2.0, dim=-1), flat)


def test_features_are_compared_as_shares_of_the_dense_variance() -> None:
    dense = torch.randn(50, 7) * 4 + 10
    mean = dense.mean().expand_as(dense)
    assert apart(dense, dense).item() == 0
    assert apart(dense, torch.zeros(50, 7)).item() == 0
    assert apart(mean, dense).item() == pytest.approx(1, rel=1e-4)
    assert share_apart([[mean], [dense]], [[dense], [dense]]) == pytest.approx(0.5, rel=1e-4)
    assert share_apart([[mean[:, :3]]], [[dense]]) is None


@pytest.mark.parametrize("bins", [16, 1])
def test_equal_heads_have_no_distance_and_others_are_drawn_to_them(bins) -> None:
    dense, own = heads(0, bins), {key: t.requires_grad_() for key, t in heads(1, bins).items()}
    assert detected(dense, dense).item() == pytest.approx(0, abs=1e-5)
    optimizer = torch.optim.Adam(own.values(), 0.1)
    first = detected(own, dense).item()
    for _ in range(100):
        optimizer.zero_grad()
        loss = detected(own, dense)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05 * first


def test_boxes_count_where_the_dense_model_is_confident_and_false_detections_count_everywhere() -> None:
    dense = heads(0)
    dense["scores"][:] = -20.0
    dense["scores"][:, 0, 3] = 5.0
    elsewhere = {**dense, "boxes": dense["boxes"].clone()}
    elsewhere["boxes"][:, 0, 7] += 3
    there = {**dense, "boxes": dense["boxes"].clone()}
    there["boxes"][:, 0, 3] += 3
    assert detected(elsewhere, dense) < 1e-3 < detected(there, dense)
    false = {**dense, "scores": dense["scores"].clone()}
    false["scores"][:, 1, 7] = 5.0
    assert detected(false, dense) > 1


def test_predictions_are_found_in_what_detectors_return() -> None:
    raw = heads(0)
    assert [found is raw for found in raw_predictions((torch.zeros(1), raw))] == [True]
    assert len(raw_predictions({"one2many": raw, "one2one": heads(1)})) == 2
    with pytest.raises(InputError, match="pass pick="):
        raw_predictions(torch.zeros(2, 3))
    with pytest.raises(InputError, match="boxes have shape"):
        detected({**raw, "boxes": raw["boxes"][:, :32]}, raw)


def test_logits_are_found_in_what_models_return() -> None:
    x = torch.randn(2, 3)
    assert logits_in(x) is x
    assert logits_in({"loss": torch.zeros(()), "logits": x}) is x
    assert logits_in((torch.zeros(2, dtype=torch.long), x)) is x
    with pytest.raises(InputError, match="pick="):
        logits_in(3)
    with pytest.raises(InputError, match="pass pick="):
        softened(x, x[:, :2], 2.0)
