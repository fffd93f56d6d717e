"""Training and fitting for the worst distribution near the data, with certificates.

    cvar, chi_square, kl, maximin, GroupDRO          risks of a vector of per-sample losses
    CVaR, ChiSquare, KL, Risk                        the same with proofs from both sides
    group_means, reweighted                          means of groups, the baseline of group DRO
    WassersteinClassifier, WassersteinRegressor      linear models in closed form (scikit-learn)
    MomentClassifier, MomentRegressor                where only means and covariances are known
    WassersteinTraining, smoothness, OutputLoss      training of any module, with certificates

Reference: Shafieezadeh-Abadeh, Kuhn, Mohajerin Esfahani (2019); Sinha, Namkoong, Duchi (2018);
Sagawa, Koh, Hashimoto, Liang (2020); Calafiore, El Ghaoui (2006).
"""

import importlib
from typing import Any

from .groups import GroupDRO, group_means, maximin, reweighted
from .risks import KL, ChiSquare, CVaR, Reweighting, Risk, chi_square, cvar, kl
from .smoothness import OutputLoss, Smoothness, smoothness
from .wrm import Certificate, WassersteinTraining, Worst

__all__ = [
    "KL",
    "CVaR",
    "Certificate",
    "ChiSquare",
    "GroupDRO",
    "MomentClassifier",
    "MomentRegressor",
    "OutputLoss",
    "Reweighting",
    "Risk",
    "Smoothness",
    "WassersteinClassifier",
    "WassersteinRegressor",
    "WassersteinTraining",
    "Worst",
    "chi_square",
    "cvar",
    "group_means",
    "kl",
    "maximin",
    "reweighted",
    "smoothness",
]

_LATER = {
    "WassersteinClassifier": "estimators",
    "WassersteinRegressor": "estimators",
    "MomentClassifier": "moments",
    "MomentRegressor": "moments",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:  # scikit-learn is imported once one of these is asked for
        return getattr(importlib.import_module(f".{_LATER[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
