"""Chapter 6: the worst law near the data, proved from above and attacked from below."""

import time

import torch
from torch import nn
from torch.nn import functional

from .. import dro, plot
from .._train import accuracy
from ..layers import ImplicitLayer
from .classifier import many, threads
from .report import Context, Section, table

_STATES, _GAMMA = 20, 2.0
_SHOWN = 0.1  # the radius of the table
# Steps of the ascent: in training, and of each try of an attack.
_INNER, _ATTACK = 3, 10
_TRAINING = 4_000  # images used at most


def chapter(context: Context) -> Section:
    """Train a smooth implicit classifier with and without worst-case images, and certify both.

    Args:
        context: what the user asked for.

    Returns:
        The section.
    """
    data = context.data
    large = many(data)
    epochs = context.epochs or (10 if context.quick else 12)
    count = 60 if context.quick else 150
    u, labels = data.test_images[:count], data.test_labels[:count]
    several = [0.0, 0.1, 0.2] if context.quick else [0.0, 0.03, 0.06, 0.1, 0.2]
    radii = torch.tensor(several, dtype=torch.float64)
    above, below = {}, {}
    rows = [("", "test accuracy", "loss", "attacked", "proved", "smoothness", "time")]
    with threads(None if large else 1):
        for name, gamma in (("plain", None), ("WRM", _GAMMA)):
            began = time.perf_counter()
            model = _fit(context, name, gamma, epochs)
            training = dro.WassersteinTraining(model, gamma=1.0)
            proof = training.certificate((u, labels), radius=_SHOWN)
            above[name] = torch.tensor([proof.at(float(r)) for r in radii]).double()
            found = [proof.nominal]
            for r in radii[1:].tolist():
                # A smaller ball's law is in the larger ball, too.
                mean = float(training.attack((u, labels), r, steps=_ATTACK).losses.mean())
                found.append(max(mean, found[-1]))
            below[name] = torch.tensor(found).double()
            at = int((radii - _SHOWN).abs().argmin())
            rows.append(
                (
                    f"{name} training",
                    f"{100 * accuracy(model, data.test_images, data.test_labels):.2f} %",
                    f"{proof.nominal:.3f}",
                    f"{found[at]:.3f}",
                    f"{above[name][at]:.3f}" if proof.is_certificate else "not proved",
                    f"{proof.L_zz:.3g}",
                    f"{time.perf_counter() - began:.1f} s",
                )
            )
    section = Section(title="The worst law within a Wasserstein distance of the test images")
    section.add(
        "models",
        f"implicit, x = elu(A x + B u + b), {_STATES} states, {epochs} epoch{'s' * (epochs > 1)}; "
        "WRM trains at worst-case images",
        f"{len(u)} test images, pixels from 0 to 1; loss in nats",
    )
    section.add(f"radius {_SHOWN}", *table(rows))
    gap = min(float((above[name] - below[name]).min()) for name in above)
    place = "below its bound" if gap >= 0 else "above its bound: an error, please report it"
    section.add("check", f"the attack that comes closest ends {abs(gap):.2g} {place}")
    figure = plot.certificate(radii, above, below, unit="2-norm of the pixels, root mean square")
    section.pictures.append(plot.save(figure, context.out / "certificate.png"))
    return section


def _fit(context: Context, name: str, gamma: float | None, epochs: int) -> nn.Module:
    """AdamW on the loss, or on the loss at the worst images for this multiplier."""
    data = context.data
    images, labels = data.train_images[:_TRAINING], data.train_labels[:_TRAINING]
    torch.manual_seed(context.seed)
    model = ImplicitLayer(data.features, data.classes, _STATES, activation="elu", direct=False)
    batch, rate = (256, 1e-2) if context.quick else (128, 5e-3)
    training = dro.WassersteinTraining(model, gamma=gamma or 1.0, steps=_INNER)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    generator = torch.Generator().manual_seed(context.seed)
    with context.progress(epochs, name) as bar:
        for _ in range(epochs):
            for rows in torch.randperm(len(images), generator=generator).split(batch):
                if gamma is None:
                    loss = functional.cross_entropy(model(images[rows]), labels[rows])
                else:
                    loss = training(images[rows], labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            bar.update()
    return model
