"""One recipe for training a classifier of images, the same for every model that is compared."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ._data import Dataset


@dataclass(frozen=True, kw_only=True)
class Warp:
    """Random smooth deformations: every image is drawn at x + M x + s + e(x), M and s random, e a
    bicubic field through random vectors on a `knots` by `knots` lattice.

    Lengths are shares of the image's width, so that one setting serves images of every size. All
    of it is linear in the random numbers, hence one matrix product and one interpolation a batch.

    Args:
        rotation: largest angle, in degrees.
        stretch: largest change of width and of height, each on its own.
        shear: largest horizontal shift of a row, over its distance to the middle.
        shift: largest translation.
        elastic: standard deviation of the vectors of e.
        knots: vectors of e along each axis.
    """

    rotation: float = 8.0
    stretch: float = 0.1
    shear: float = 0.1
    shift: float = 0.04
    elastic: float = 0.018
    knots: int = 5

    def basis(self, height: int, width: int) -> Tensor:
        """How every coefficient moves every pixel.  # (2 * (3 + knots^2), height * width * 2)"""
        identity = torch.eye(2, 3)[None]
        grid = F.affine_grid(identity, [1, 1, height, width], align_corners=False)
        x, y = grid.view(-1, 2).unbind(1)
        lattice = torch.eye(self.knots**2).view(-1, 1, self.knots, self.knots)
        bumps = F.interpolate(lattice, (height, width), mode="bicubic", align_corners=True)
        maps = torch.stack([x, y, torch.ones_like(x), *bumps.flatten(1)])  # (3 + knots^2, pixels)
        zero = torch.zeros_like(maps)
        horizontal, vertical = torch.stack([maps, zero], 2), torch.stack([zero, maps], 2)
        return torch.cat([horizontal, vertical]).flatten(1)

    def coefficients(self, samples: int, generator: Generator) -> Tensor:
        """One random deformation a sample, as coefficients of `basis`."""
        angle, wide, high, slant, right, down = 2 * torch.rand(6, samples, generator=generator) - 1
        cos, sin = (angle := angle * math.radians(self.rotation)).cos(), angle.sin()
        wide, high, slant = 1 + self.stretch * wide, 1 + self.stretch * high, self.shear * slant
        # The grid runs from -1 to 1: a share of the width is half as many units.
        e = 2 * self.elastic * torch.randn(2, samples, self.knots**2, generator=generator)
        first = torch.stack([wide * cos, slant - sin, 2 * self.shift * right], 1)
        second = torch.stack([sin, high * cos, 2 * self.shift * down], 1)
        return torch.cat([first, e[0], second, e[1]], 1)

    def __call__(
        self, images: Tensor, basis: Tensor, shape: tuple[int, int], generator: Generator
    ) -> Tensor:
        """The images, each deformed in its own way; what comes in from outside is zero.

        Args:
            images: rows of pixels whose background is zero.  # (samples, height * width)
            basis: `self.basis(*shape)`.
            shape: (height, width).
            generator: of the random numbers.

        Returns:
            Rows of pixels.  # (samples, height * width)
        """
        grid = self.coefficients(len(images), generator) @ basis
        pictures = images.view(-1, 1, *shape)
        warped = F.grid_sample(pictures, grid.view(-1, *shape, 2), align_corners=False)
        return warped.flatten(1)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """AdamW, one cosine cycle of the learning rate, deformed images, cross entropy.

    Args:
        epochs: passes over the training images.
        batch_size: images a step.
        learning_rate: the peak, reached after `warmup`.
        weight_decay: of matrices; biases have none.
        warmup: share of the steps in which the learning rate rises.
        warp: how training images are deformed; None leaves them alone.
    """

    epochs: int = 30
    batch_size: int = 256
    learning_rate: float = 3e-3
    weight_decay: float = 1e-2
    warmup: float = 0.15
    warp: Warp | None = field(default_factory=Warp)

    def rate(self, t: float) -> float:
        """The learning rate over its peak after a share t of the steps: up a line, down a cosine."""
        if t < self.warmup:
            return t / self.warmup
        return (1 + math.cos(math.pi * min(1.0, (t - self.warmup) / (1 - self.warmup)))) / 2


def standardized(data: Dataset) -> Dataset:
    """The same images with mean 0 and variance 1 over all pixels of the training part."""
    mean = data.train_images.mean()
    std = data.train_images.std(correction=0)
    std = torch.where(std > 0, std, 1.0)  # images of one grey
    parts = ("train_images", "validation_images", "test_images")
    return replace(data, **{part: (getattr(data, part) - mean) / std for part in parts})


def parameter_count(model: nn.Module) -> int:
    """Numbers that training sets."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def matched_mlp(features: int, classes: int, parameters: int, *, depth: int = 2) -> nn.Sequential:
    """A ReLU network whose number of parameters is as close to `parameters` as its width allows.

    Args:
        features: inputs.
        classes: outputs.
        parameters: how many to match.
        depth: hidden layers, all of one width.
    """

    def count(width: int) -> int:
        hidden = (features + 1) * width + (depth - 1) * (width + 1) * width
        return hidden + (width + 1) * classes

    width = 1
    while abs(count(width + 1) - parameters) < abs(count(width) - parameters):
        width += 1
    layers: list[nn.Module] = []
    for inputs in [features] + [width] * (depth - 1):
        layers += [nn.Linear(inputs, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, classes))


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, *, batch_size: int = 2000) -> float:
    """Share of images classified as labelled; nan where there is no image."""
    if len(images) == 0:
        return math.nan
    training = model.training
    model.eval()
    hits = sum(
        int((model(u).argmax(1) == t).sum())
        for u, t in zip(images.split(batch_size), labels.split(batch_size), strict=True)
    )
    model.train(training)
    return hits / len(images)


def train(
    model: nn.Module,
    data: Dataset,
    recipe: Recipe,
    *,
    seed: int,
    validate: bool = True,
    on_epoch: Callable[[Mapping[str, list[float]]], None] | None = None,
) -> dict[str, list[float]]:
    """Train in place on the training part; the test part is not looked at.

    Args:
        model: images (samples, features) -> scores (samples, classes).
        data: standardized images.
        recipe: how.
        seed: of the order of the images and of their deformations.
        validate: measure the validation accuracy after each epoch.
        on_epoch: called after each epoch with the history so far.

    Returns:
        The history, one entry an epoch: `loss` (mean over the epoch, on deformed images),
        `validation accuracy` (a share) and `seconds` (since the start).
    """
    images, labels = data.train_images, data.train_labels
    background = images.min()
    generator = torch.Generator().manual_seed(seed)
    basis = recipe.warp.basis(*data.image_shape) if recipe.warp else None
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    vectors = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups,
        lr=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
    )
    steps = recipe.epochs * math.ceil(len(images) / recipe.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: recipe.rate((step + 0.5) / steps)
    )
    history: dict[str, list[float]] = {"loss": [], "seconds": []}
    if validate:
        history["validation accuracy"] = []
    start = time.perf_counter()
    model.train()
    for _ in range(recipe.epochs):
        total = torch.zeros(())
        for rows in torch.randperm(len(images), generator=generator).split(recipe.batch_size):
            u = images[rows]
            if recipe.warp and basis is not None:
                u = recipe.warp(u - background, basis, data.image_shape, generator) + background
            loss = F.cross_entropy(model(u), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach() * len(rows)
        history["loss"].append(float(total) / len(images))
        history["seconds"].append(time.perf_counter() - start)
        if validate:
            share = accuracy(model, data.validation_images, data.validation_labels)
            history["validation accuracy"].append(share)
        if on_epoch is not None:
            on_epoch(history)
    return history
