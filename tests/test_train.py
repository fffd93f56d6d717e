"""The recipe of the demo and the benchmarks."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from implicitdl._data import Dataset
from implicitdl._train import (
    Recipe,
    Warp,
    accuracy,
    matched_mlp,
    parameter_count,
    standardized,
    train,
)

STILL = Warp(rotation=0.0, stretch=0.0, shear=0.0, shift=0.0, elastic=0.0)


@pytest.fixture
def data() -> Dataset:
    """Small pictures of one bright column, whose place is the label."""
    parts = {}
    for part, samples in (("train", 80), ("validation", 20), ("test", 20)):
        labels = torch.arange(samples) % 4
        images = 0.3 * torch.rand(samples, 5, 4)
        images[torch.arange(samples), :, labels] += 0.7
        parts |= {f"{part}_images": images.flatten(1), f"{part}_labels": labels}
    return Dataset(name="columns", image_shape=(5, 4), classes=4, **parts)


def move(warp: Warp, picture: torch.Tensor) -> torch.Tensor:
    """The picture, warped with a fixed seed."""
    shape = tuple(picture.shape)
    generator = torch.Generator().manual_seed(0)
    return warp(picture.reshape(1, -1), warp.basis(*shape), shape, generator).view(shape)


def test_no_deformation_is_the_identity() -> None:
    picture = torch.rand(9, 6)
    torch.testing.assert_close(move(STILL, picture), picture)


def test_a_shift_moves_by_its_share_of_the_width() -> None:
    """The centre of a blob moves by no more than `shift` times the size, along both axes."""
    y, x = torch.meshgrid(torch.arange(40.0), torch.arange(40.0), indexing="ij")
    blob = torch.exp(-((x - 20) ** 2 + (y - 20) ** 2) / 20)
    moved = move(replace(STILL, shift=0.1), blob)
    for axis in (x, y):
        distance = abs(float((axis * moved).sum() / moved.sum()) - 20)
        assert 0.01 < distance <= 4.0


def test_deformations_differ_and_keep_the_range() -> None:
    images = torch.rand(16, 100)
    warp = Warp()
    basis = warp.basis(10, 10)
    generator = torch.Generator().manual_seed(0)
    first, second = (warp(images, basis, (10, 10), generator) for _ in range(2))
    assert not torch.allclose(first, second)
    assert first.min() >= 0 and first.max() <= 1


def test_the_rate_rises_then_falls_to_zero() -> None:
    recipe = Recipe(warmup=0.2)
    rates = [recipe.rate(k / 100) for k in range(101)]
    assert max(rates) == pytest.approx(1.0) and rates.index(max(rates)) == 20
    assert rates[:21] == sorted(rates[:21]) and rates[20:] == sorted(rates[20:], reverse=True)
    assert rates[-1] == pytest.approx(0.0, abs=1e-12)


def test_standardized_images_of_one_grey_stay_finite(data: Dataset) -> None:
    same = standardized(replace(data, train_images=torch.full((80, 20), 0.5)))
    assert torch.isfinite(same.test_images).all()
    images = standardized(data).train_images
    assert float(images.mean()) == pytest.approx(0.0, abs=1e-9)
    assert float(images.std(correction=0)) == pytest.approx(1.0)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("parameters", [1, 900, 9546, 97350])
def test_matched_network_has_the_nearest_number_of_parameters(depth: int, parameters: int) -> None:
    network = matched_mlp(64, 10, parameters, depth=depth)
    width = network[0].out_features
    distance = abs(parameter_count(network) - parameters)
    for other in (width - 1, width + 1):
        if other >= 1:
            count = 65 * other + (depth - 1) * (other + 1) * other + (other + 1) * 10
            assert distance <= abs(count - parameters)


def test_accuracy_counts_hits_and_leaves_the_mode_alone() -> None:
    model = nn.Identity().train()
    scores, labels = torch.eye(4), torch.tensor([0, 1, 2, 0])
    assert accuracy(model, scores, labels, batch_size=3) == 0.75
    assert model.training
    assert accuracy(model, scores[:0], labels[:0]) != accuracy(model, scores[:0], labels[:0])


def test_training_learns_and_repeats_itself(data: Dataset) -> None:
    data = standardized(data)
    histories = []
    for _ in range(2):
        torch.manual_seed(0)
        model = matched_mlp(20, 4, 500)
        histories.append(train(model, data, Recipe(epochs=30, batch_size=16, warp=STILL), seed=1))
    first, second = histories
    assert first["loss"] == second["loss"] and len(first["loss"]) == 30
    assert first["loss"][-1] < 0.2 * first["loss"][0]
    assert first["validation accuracy"][-1] > 0.9
    assert accuracy(model, data.test_images, data.test_labels) > 0.9


def test_training_never_looks_at_the_test_part(data: Dataset) -> None:
    weights = []
    for noise in (0.0, torch.nan):
        torch.manual_seed(0)
        model = matched_mlp(20, 4, 500)
        train(model, replace(data, test_images=data.test_images + noise), Recipe(epochs=2), seed=0)
        weights.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    assert torch.equal(*weights)
