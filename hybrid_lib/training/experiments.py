"""Experiments: all settings that determine a run's numbers, and Tables I and II as code.

An :class:`Experiment` is a frozen dataclass of scalars that validates itself. Vary one with
:func:`dataclasses.replace`, which validates the copy:

>>> from dataclasses import replace
>>> replace(EXPERIMENTS["atmo"], dataset="digits", epochs=5, train_limit=300).epochs
5
"""

from __future__ import annotations

import builtins
import dataclasses
import difflib
from collections.abc import Iterable
from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from hybrid_lib.optim import methods, schedules
from hybrid_lib.optim.controllers import CONTROLLERS
from hybrid_lib.optim.hybrid import Hybrid
from hybrid_lib.training import data


def _numbers(value):
    """Split text such as "0.5, 0.5" or "100 150", as command lines and papermill pass it."""
    return value.replace(",", " ").split() if isinstance(value, str) else value


Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Pair = Annotated[tuple[NotNegative, NotNegative], BeforeValidator(_numbers)]
Weights = Annotated[tuple[NotNegative, ...], BeforeValidator(_numbers)]
Block = Annotated[str | int | None, BeforeValidator(lambda v: int(v) if str(v).isdigit() else v)]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Experiment:
    """One training run, apart from the machine it runs on.

    Optimizer settings that are None take the optimizer's own default
    (:data:`hybrid_lib.optim.methods.METHODS`). Settings that it does not have are refused.

    Raises:
        pydantic.ValidationError: a ValueError that lists every setting outside its range.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)]
    optimizer: str  # a method, or rules joined by +, as in adam+lion+sgd
    dataset: str = "cifar10"  # see training.data.load
    train_limit: Count | None = None  # number of images to keep, class-balanced; None: all
    test_limit: Count | None = None
    # Number of training images to set aside, class-balanced. Choices are then made on these, which
    # leaves the test set for what was chosen. None, as in the report: no validation set.
    validation_limit: Count | None = None
    augment: bool = False  # random shifts and mirror images; the report has none
    width: Count = 64  # of resnet18's first stage, or of the transformer for text
    stem: Literal["cifar", "imagenet"] = "cifar"
    epochs: Count
    batch_size: Count = 256  # the last batch of an epoch may be smaller, none is dropped
    lr: Positive
    lr_schedule: Literal["constant", "cosine", "multistep"] = "constant"  # cosine: equation 1, to 0
    lr_milestones: Annotated[tuple[Count, ...], BeforeValidator(_numbers)] = ()  # in epochs
    lr_gamma: Positive = 0.1  # factor on the rate at each milestone
    # Epochs of linear warm-up of the rate, repeated after restart_epoch. The report has none.
    lr_warmup: Annotated[int, Field(ge=0)] = 0
    # Before this epoch the optimizer and its rate start afresh and only the network's weights stay,
    # as happened to the report's AdaHessian at epoch 146.
    restart_epoch: Count | None = None
    momentum: NotNegative | None = None
    dampening: NotNegative | None = None
    nesterov: bool | None = None
    weight_decay: NotNegative | None = None
    weight_decay_in: Literal["both", "sgd"] | None = None
    betas: Pair | None = None
    eps: NotNegative | None = None
    amsgrad: bool | None = None
    partial: Positive | None = None
    bias_correction: Literal["released", "none", "consistent"] | None = None
    hessian_power: Positive | None = None
    spatial_average: Block = None
    signed_average: bool | None = None
    merge: Literal["product", "sum", "graft"] = "product"  # product: as in the report; see Hybrid
    # The weights λ, one per rule, as in (adaptive, SGD): constant at lambda_start, a ramp from
    # lambda_start to lambda_end, or from lambda_start on set by a controller (optim.controllers).
    lambda_schedule: Literal[("constant", *schedules.SHAPES, *CONTROLLERS)] = "constant"
    lambda_start: Weights = (0.5, 0.5)
    lambda_end: Weights = (0.0, 1.0)
    lambda_epochs: Count | None = None  # horizon of the ramp; None: all epochs
    lambda_rate: Positive | None = None  # for exponential and hedge
    lambda_steepness: Positive | None = None  # for sigmoid
    lambda_share: Annotated[float, Field(ge=0, le=1)] | None = None  # for hedge
    lambda_tolerance: Positive | None = None  # for swats
    # Which layers follow the merge; the others follow the last rule alone. norms_and_head: norms,
    # biases and the last layer. matrices: all other layers, that is convolutions and matrices.
    lambda_on: Literal["all", "norms_and_head", "matrices"] = "all"
    # A controller sets λ once for the model, or per tensor: rows then hold the plain mean of these.
    lambda_per: Literal["model", "tensor"] = "model"
    # report: from start to end. released: as schedules.Released. protocol: released for ATMO and
    # PADAM-SGD under the released protocol, report everywhere else.
    lambda_direction: Literal["protocol", "report", "released"] = "protocol"
    # Probes per estimate of the Hessian diagonal, steps from one estimate to the next, and the
    # share of a batch used for it. The report has 1, 1 and 1; else another, cheaper algorithm runs.
    hessian_samples: Count = 1
    hessian_every: Count = 1
    hessian_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    # clean: inputs normalised, tests in evaluation mode. released: as the report's code ran, with
    # raw 0-255 inputs and tests in training mode, whose batches update the running statistics.
    protocol: Literal["clean", "released"] = "clean"
    test_mode: Literal["protocol", "eval", "train"] = "protocol"  # the network's mode in tests
    # tf32: NVIDIA's format, for matrix products. bfloat16, or float16 on GPUs without it: for the
    # convolutions alone. All three are coarser.
    precision: Literal["float32", "tf32", "bfloat16", "float16"] = "float32"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0  # of init, order, augmentation and probes

    @model_validator(mode="after")
    def _fits_together(self):
        data.check_name(self.dataset)
        for name in ("lambda_start", "lambda_end") if self.is_hybrid else ():
            given, rules = getattr(self, name), [rule.__name__ for rule in self.method.rules]
            if len(given) != len(rules):
                raise ValueError(f"{name}={given}: one weight each for {', '.join(rules)}")
        held = self.validation_limit or 0
        if self.train_limit is not None and self.batch_size > self.train_limit - held:
            limit = f"train_limit={self.train_limit}" + f" - validation_limit={held}" * bool(held)
            raise ValueError(f"batch_size={self.batch_size} is larger than {limit}: no full batch")
        if self.validation_limit is not None and self.tests_in_training_mode:
            ways = "needs tests in evaluation mode; set test_mode='eval', or leave it out"
            raise ValueError(f"validation_limit={self.validation_limit}: {ways}")
        if self.precision == "float16" and self.needs_hessian:
            raise ValueError("precision='float16': too narrow for second derivatives; use bfloat16")
        if any(a >= b for a, b in zip(self.lr_milestones, self.lr_milestones[1:])):
            raise ValueError(f"lr_milestones={self.lr_milestones}: must increase")
        if (self.lr_schedule == "multistep") != bool(self.lr_milestones):
            given = f"lr_milestones={self.lr_milestones} with lr_schedule={self.lr_schedule!r}"
            raise ValueError(f"{given}: 'multistep' needs milestones, others take none")
        if self.lr_warmup >= self.epochs:
            raise ValueError(f"lr_warmup={self.lr_warmup}: must be less than epochs={self.epochs}")
        if self.restart_epoch is not None and not 2 <= self.restart_epoch <= self.epochs:
            allowed = f"between 2 and epochs={self.epochs}"
            raise ValueError(f"restart_epoch={self.restart_epoch}: must lie {allowed}")
        for f in dataclasses.fields(self):
            of_hybrids = f.name.startswith(("lambda_", "merge"))
            used = self.is_hybrid if of_hybrids else self.needs_hessian or "hessian_" not in f.name
            given = getattr(self, f.name)
            if not used and given != f.default:
                raise ValueError(f"{f.name}={given!r}: {self.optimizer} has no such setting")
        if self._direction == "released" and self.lambda_schedule not in ("constant", "linear"):
            ways = "the released one is linear; choose 'linear', or lambda_direction='report'"
            raise ValueError(f"lambda_schedule={self.lambda_schedule!r}: {ways}")
        if (self.optimizer == "swats") != (self.lambda_schedule == "swats"):
            given = f"lambda_schedule={self.lambda_schedule!r} with optimizer={self.optimizer!r}"
            raise ValueError(f"{given}: use swats for both or neither")
        if self.lambda_per != "model" and self.lambda_schedule not in CONTROLLERS:
            only = " or ".join(CONTROLLERS)
            raise ValueError(f"lambda_per={self.lambda_per!r}: lambda_schedule must be {only}")
        known = {f.name for f in dataclasses.fields(self._shape)}
        for name in self._shape_settings.keys() - known:
            raise ValueError(f"lambda_{name}: {self.lambda_schedule!r} has no {name}")
        matrix, bias = torch.zeros(1, 1, requires_grad=True), torch.zeros(1, requires_grad=True)
        self.build_optimizer([("matrix", matrix), ("bias", bias)])
        return self

    @property
    def method(self) -> methods.Method:
        """The optimizer's entry in the table of methods."""
        try:
            return methods.get_method(self.optimizer)
        except ValueError as error:
            raise ValueError(f"optimizer={error}") from None

    @property
    def label(self) -> str:
        """The method's name in the report, or ``name`` for a custom experiment."""
        is_plain = self.name == self.optimizer.replace("+", "-")
        known = is_plain or self.name.removeprefix("dyn_") in methods.METHODS
        return methods.label(self.name) if known else self.name

    @property
    def is_hybrid(self) -> bool:
        """Whether rules are merged."""
        return self.method.is_hybrid

    @property
    def needs_hessian(self) -> bool:
        """Whether one of the rules is AdaHessian."""
        return self.method.needs_hessian

    @property
    def loss_scale(self) -> float:
        """Factor on the loss, divided out of the gradients: prevents underflow in float16."""
        return 2.0**13 if self.precision == "float16" else 1.0

    @property
    def tests_in_training_mode(self) -> bool:
        """Whether test batches are normalised by their own statistics."""
        by_protocol = {"clean": "eval", "released": "train"}[self.protocol]
        return (by_protocol if self.test_mode == "protocol" else self.test_mode) == "train"

    def build_optimizer(self, params, compile: bool = False) -> Hybrid:
        """The optimizer for a model's ``parameters()``, with the first epoch's weights λ.

        Merged parameters form one group (one per tensor, if ``lambda_per`` says so), those that
        ``lambda_on`` excludes another; it selects by name: pass ``named_parameters()`` then.
        """
        groups: dict[str, list] = {"merged": [], "others": []}
        named = [p if isinstance(p, tuple) else ("", p) for p in params]
        if self.lambda_on != "all" and not all(name for name, _ in named):
            raise ValueError(f"lambda_on={self.lambda_on!r} needs model.named_parameters()")
        for name, p in named:
            kind = "matrices" if p.dim() >= 2 and "head" not in name else "norms_and_head"
            groups["merged" if self.lambda_on in ("all", kind) else "others"].append(p)
        merged = groups["merged"]
        if self.lambda_per == "tensor":
            merged = [{"params": [p]} for p in merged]
        settings = {f: getattr(self, f) for f in OPTIMIZER_SETTINGS if hasattr(self, f)}
        settings = {f: value for f, value in settings.items() if value is not None}
        for f in sorted(settings.keys() - self.method.settings):
            raise ValueError(f"{f}={settings[f]!r}: {self.optimizer} has no such setting")
        if self.is_hybrid:
            settings |= {"lambdas": self.lambdas()(0), "merge": self.merge}
        if self.chooses_lambdas:
            settings["controller"] = self._shape(**self._shape_settings)
        optimizer = self.method(merged, lr=self.lr, compile=compile, **settings)
        if groups["others"]:
            last, alone = optimizer.defaults["rules"][-1], {"lambdas": (1.0,), "controller": None}
            if hasattr(last, "weight_decay"):  # the rule applies its own
                alone["decoupled_weight_decay"] = 0.0
            optimizer.add_param_group({"params": groups["others"], "rules": [last], **alone})
        return optimizer

    @property
    def chooses_lambdas(self) -> bool:
        """Whether a controller sets the weights λ during training."""
        return self.lambda_schedule in CONTROLLERS

    @property
    def _shape(self) -> type:
        """The class of the weights' schedule or controller."""
        constant = {"constant": schedules.Constant}
        return (constant | schedules.SHAPES | CONTROLLERS)[self.lambda_schedule]

    @property
    def _direction(self) -> str:
        if self.lambda_direction != "protocol":
            return self.lambda_direction
        # Only these two have the reversed scheduler; AdaSGD's own runs as the report says.
        reversed_ = self.protocol == "released" and self.optimizer in ("atmo", "padam_sgd")
        reversed_ = reversed_ and not self.chooses_lambdas
        return "released" if reversed_ else "report"

    @property
    def _shape_settings(self) -> dict:
        """Settings given for the schedule or controller, besides start, end and epochs."""
        kinds = (*schedules.SHAPES.values(), *CONTROLLERS.values())
        names = {f.name for kind in kinds for f in dataclasses.fields(kind)}
        names -= {"start", "end", "epochs"}
        given = {name: getattr(self, f"lambda_{name}", None) for name in names}
        return {name: value for name, value in given.items() if value is not None}

    def lambdas(self):
        """The weights λ as a function of the 0-based epoch; a controller starts from epoch 0's."""
        if not self.is_hybrid:
            return schedules.Constant((1.0,))
        if self.lambda_schedule == "constant" or self.chooses_lambdas:
            return schedules.Constant(self.lambda_start)
        horizon = self.lambda_epochs or self.epochs
        if self._direction == "released":
            start = self.lambda_start
            return schedules.Released(self.lambda_end, start, horizon, first=start)
        return self._shape(self.lambda_start, self.lambda_end, horizon, **self._shape_settings)

    def learning_rates(self) -> list[float]:
        """The learning rate of every epoch, from torch's own schedulers.

        Computed in advance: like λ, a function of the epoch, so resuming restores nothing.
        """
        clock = methods.METHODS["sgd"]([torch.zeros(1, requires_grad=True)], lr=self.lr)
        torchs = torch.optim.lr_scheduler
        scheduler = {
            "constant": lambda: torchs.ConstantLR(clock, factor=1.0),
            "cosine": lambda: torchs.CosineAnnealingLR(clock, self.epochs),
            "multistep": lambda: torchs.MultiStepLR(clock, [*self.lr_milestones], self.lr_gamma),
        }[self.lr_schedule]()
        rates = []
        for _ in range(self.epochs):
            rates.append(scheduler.get_last_lr()[0])
            clock.step()
            scheduler.step()
        rates = [r * min(1, (e + 1) / (self.lr_warmup + 1)) for e, r in enumerate(rates)]
        kept = (self.restart_epoch or self.epochs + 1) - 1
        return rates[:kept] + rates[: self.epochs - kept]

    def scaled(self, epochs: int) -> Experiment:
        """The same experiment in fewer or more epochs; milestones and horizon scale with them.

        >>> EXPERIMENTS["padam_sgd"].scaled(20).lr_milestones
        (10, 15)
        """
        share = epochs / self.epochs
        # On very short runs milestones would collide: keep those that still increase.
        milestones = sorted({max(1, round(m * share)) for m in self.lr_milestones})
        horizon = self.lambda_epochs and max(1, round(self.lambda_epochs * share))
        restart = epochs > 1 and self.restart_epoch and max(2, round(self.restart_epoch * share))
        return dataclasses.replace(
            self, epochs=epochs, lr_milestones=tuple(milestones), lambda_epochs=horizon,
            restart_epoch=restart or None, lr_warmup=min(round(self.lr_warmup * share), epochs - 1),
        )  # fmt: skip


OPTIMIZER_SETTINGS = set().union(*(method.settings for method in methods.METHODS.values()))


def get_experiment(name: str) -> Experiment:
    """A row of ``EXPERIMENTS``, or an experiment for another method or "RULE+RULE+…" at its own
    learning rate, with equal weights.

    Raises:
        ValueError: if ``name`` is none of these.
    """
    if name in EXPERIMENTS:
        return EXPERIMENTS[name]
    try:
        method = methods.get_method(name)
    except ValueError:
        known = list(dict.fromkeys([*EXPERIMENTS, *methods.METHODS]))
        allowed = f"{', '.join(known)}, or rules joined by +{did_you_mean(name, known)}"
        raise ValueError(f"optimizer={name!r}: must be one of {allowed}") from None
    settings = {"lr": method.defaults.get("lr", 0.01)}
    if method.is_hybrid:
        to_the_last = (*[0.0] * (len(method.rules) - 1), 1.0)
        settings |= {"lambda_start": method.lambdas, "lambda_end": to_the_last}
    if name == "swats":
        settings |= {"lambda_schedule": "swats", "merge": "sum"}
    return Experiment(name=name.replace("+", "-"), optimizer=name, epochs=200, **settings)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Suggest the most similar known name, if one is similar enough.

    >>> did_you_mean("epoch", ["epochs", "seed"])
    ' (did you mean epochs?)'
    """
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def error_messages(error: ValidationError) -> list[str]:
    """One line per error: the setting, what was given, what is allowed."""
    lines = []
    for fault in error.errors():
        message = fault["msg"].removeprefix("Value error, ")
        # Without the alternatives of a union, which pydantic names after types.
        parts = [p for p in fault["loc"] if isinstance(p, str) and not hasattr(builtins, p)]
        absent = fault["type"] == "missing" and len(fault["loc"]) == 1
        given = "" if absent else f"={fault['input']!r}"
        lines.append(f"{'.'.join(parts)}{given}: {message}" if parts else message)
    return list(dict.fromkeys(lines))


# Tables I and II, one row per method in the report's order. A comment gives the reason for each
# surprising setting; "released" refers to the code that produced Table III.
EXPERIMENTS: dict[str, Experiment] = {
    e.name: e
    for e in (
        Experiment(
            name="sgd", optimizer="sgd", lr=0.01, momentum=0.95, weight_decay=5e-4, epochs=350
        ),
        # L2 decay, as released, though the report cites the paper on decoupled decay.
        Experiment(name="adam", optimizer="adam", lr=0.001, weight_decay=5e-4, epochs=350),
        # Decay in both rules, as released; Algorithm 2 has it in SGD only (weight_decay_in="sgd").
        Experiment(
            name="atmo", optimizer="atmo", lr=0.01, momentum=0.95, weight_decay=5e-4, epochs=350
        ),
        # A tenth of ATMO's rate. Probably never dynamic when released: its log names a different
        # optimizer than the one for which the notebook steps lambda. (To follow that reading, set
        # lambda_schedule="constant", lambda_start=(1, 0).)
        Experiment(
            name="dyn_atmo", optimizer="atmo", lr=0.001, momentum=0.95, weight_decay=5e-4,
            epochs=350, lr_schedule="cosine", lambda_schedule="linear", lambda_start=(1, 0),
        ),
        # Fifty times the decay of the others. Table II leaves the weights blank; the code has one
        # half each. No AMSGrad maximum (Algorithm 1 has one), p = 1/8.
        Experiment(
            name="padam_sgd", optimizer="padam_sgd", lr=0.01, momentum=0.9, weight_decay=0.025,
            batch_size=128, epochs=200, lr_schedule="multistep", lr_milestones=(100, 150),
        ),
        # The horizon is 100 of 200 epochs; under the released protocol λ ends purely adaptive.
        Experiment(
            name="dyn_padam_sgd", optimizer="padam_sgd", lr=0.01, momentum=0.9, weight_decay=0.025,
            batch_size=128, epochs=200, lr_schedule="multistep", lr_milestones=(100, 150),
            lambda_schedule="linear", lambda_start=(1, 0), lambda_epochs=100,
        ),
        # As released: decoupled decay, and no spatial averaging although Algorithm 3 has it.
        Experiment(
            name="adahessian", optimizer="adahessian", lr=0.15, weight_decay=5e-4, epochs=160,
            lr_schedule="multistep", lr_milestones=(80, 120),
        ),
        # L2 decay in the SGD rule only, as released; Algorithm 4 has it in both.
        Experiment(
            name="adasgd", optimizer="adasgd", lr=0.1, momentum=0.95, weight_decay=5e-4, epochs=200,
            lr_schedule="multistep", lr_milestones=(100, 140, 180),
            lambda_schedule="linear", lambda_start=(1, 0),
        ),
        # Not in the tables: Algorithm 1 alone, with the rate and decay of its own paper.
        Experiment(
            name="padam", optimizer="padam", lr=0.1, weight_decay=5e-4, batch_size=128,
            epochs=200, lr_schedule="multistep", lr_milestones=(100, 150),
        ),
    )
}  # fmt: skip
PAPER_METHODS = tuple(name for name in EXPERIMENTS if name != "padam")  # rows of Table III
