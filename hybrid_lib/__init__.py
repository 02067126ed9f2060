"""Hybrid optimizers for deep networks, and the experiments of the report that studied them.

>>> import hybrid_lib as hl
>>> model = hl.resnet18(num_classes=10, in_channels=1, width=4)
>>> optimizer = hl.padam_sgd(model.parameters(), lr=0.01, lambdas=(0.5, 0.5))

Four subpackages, each importing only from those before it: :mod:`hybrid_lib.optim` (the
optimizers; needs only torch), :mod:`hybrid_lib.training` (the training loop),
:mod:`hybrid_lib.study` (many runs and their evaluation) and :mod:`hybrid_lib.widgets`. The names
below are loaded on first use, so that an optimizer alone imports no more than it needs.
"""

import importlib

import torch

if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 6):
    raise ImportError(f"hybrid_lib needs torch 2.6 or newer; {torch.__version__} is installed")

from hybrid_lib.optim.methods import METHODS

_MODULE_OF = {
    **dict.fromkeys(METHODS, "optim.methods"),
    "CannotCompile": "optim.compiled",
    "Hybrid": "optim.hybrid",
    "controllers": "optim.controllers",
    "hessian_diagonal": "optim.curvature",
    "rules": "optim.rules",
    "schedules": "optim.schedules",
    "EXPERIMENTS": "training.experiments",
    "Experiment": "training.experiments",
    "History": "training.history",
    "look_inside": "training.inside",
    "resnet18": "training.models",
    "run": "training.loop",
}
__all__ = sorted({*_MODULE_OF, "METHODS"})


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_MODULE_OF[name]}")
    return module if _MODULE_OF[name].endswith(f".{name}") else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
