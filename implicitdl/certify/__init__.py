"""What a model may answer over a region of inputs: bounds that are proved, and attacks on them.

    bounds, Bounds                     lower <= y(u) <= upper for every u of a region
    margins                            the same for y_label - y_j, pair by pair
    certify_accuracy, Report           clean, attacked and certified accuracy of a classifier
    robust_radius                      the largest radius proved and the smallest attack found
    sensitivity                        S with |y(u) - y(u0)| <= S |u - u0|
    fgsm, pgd, sparse_attack,          attacks, with exact gradients through the equilibrium
    relaxation_attack, minimise
    robust_loss, sensitivity_penalty,  training for certificates
    lipschitz_penalty

All bounds are about the exact equilibrium: solver error is part of them, rounding goes outward, and
a method that does not apply to a model raises.

Reference: El Ghaoui, Gu, Travacca, Askari, Tsai (2021), section 4; Jafarpour, Davydov, Proskurnikov,
Bullo (2021); Pabbaraju, Winston, Kolter (2021); Wei, Kolter (2022); Zhang et al. (2018).
"""

from ._bounds import Bounds, bounds
from ._sensitivity import sensitivity
from .accuracy import Report, certify_accuracy, margins, robust_radius
from .attacks import Attack, fgsm, minimise, pgd, relaxation_attack, sparse_attack
from .training import lipschitz_penalty, robust_loss, sensitivity_penalty, worst_margins

__all__ = [
    "Attack",
    "Bounds",
    "Report",
    "bounds",
    "certify_accuracy",
    "fgsm",
    "lipschitz_penalty",
    "margins",
    "minimise",
    "pgd",
    "relaxation_attack",
    "robust_loss",
    "robust_radius",
    "sensitivity",
    "sensitivity_penalty",
    "sparse_attack",
    "worst_margins",
]
