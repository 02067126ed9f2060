"""Hybrid optimizers for deep networks, and the experiments of the report that studied them.

>>> import hybrid_lib as hl
>>> model = hl.resnet18(num_classes=10, in_channels=1, width=4)
>>> optimizer = hl.padam_sgd(model.parameters(), lr=0.01, lambdas=(0.5, 0.5))

Optimizers: :class:`Hybrid` with :mod:`hybrid_lib.rules`; :func:`sgd`, :func:`adam`, :func:`atmo`,
:func:`padam`, :func:`padam_sgd`, :func:`adahessian`, :func:`adasgd`; :func:`hessian_diagonal`.
Experiments: :data:`EXPERIMENTS`, :func:`run`, :class:`History`. Figures are in
:mod:`hybrid_lib.plots`, whole studies in :mod:`hybrid_lib.study`.
"""

import torch

if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 6):
    raise ImportError(f"hybrid_lib needs torch 2.6 or newer, here is {torch.__version__}")

from hybrid_lib import rules, schedules
from hybrid_lib.compiling import CannotCompile
from hybrid_lib.curvature import hessian_diagonal
from hybrid_lib.experiments import EXPERIMENTS, Experiment
from hybrid_lib.history import History
from hybrid_lib.hybrid import Hybrid, adahessian, adam, adasgd, atmo, padam, padam_sgd, sgd
from hybrid_lib.models import resnet18
from hybrid_lib.train import run

__all__ = [
    "EXPERIMENTS",
    "CannotCompile",
    "Experiment",
    "History",
    "Hybrid",
    "adahessian",
    "adam",
    "adasgd",
    "atmo",
    "hessian_diagonal",
    "padam",
    "padam_sgd",
    "resnet18",
    "rules",
    "run",
    "schedules",
    "sgd",
]
