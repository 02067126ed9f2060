"""The table of methods: rules, defaults and line styles; every other list derives from it.

A method is an entry of :data:`METHODS`; its constructor, ``NAME(params, lr=…, …)``, is built from
the fields of its rules. A new rule needs a class in :mod:`hybrid_lib.optim.rules` and an entry
here; its hybrid with SGD needs another entry. Defaults are those of Table I of the report.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from hybrid_lib.optim import rules
from hybrid_lib.optim.controllers import SWATS
from hybrid_lib.optim.hybrid import Hybrid

# The four colours of Okabe and Ito with a contrast of 3:1 on white; families share a colour.
BLUE, VERMILLION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
# Arguments of Hybrid, with their defaults.
_OPTIONS = {"maximize": False, "compile": False, "foreach": None, "merge": "product",
            "controller": None}  # fmt: skip
_FIRST = ("betas", "eps", "momentum", "dampening", "nesterov")  # come first, as in torch.optim


@dataclass(frozen=True)
class Method:
    """A named optimizer: one rule, or a hybrid of several."""

    label: str  # shown in figures and tables
    rules: tuple[type, ...]  # adaptive ones first
    summary: str  # opens the constructor's docstring
    defaults: Mapping = field(default_factory=dict)  # where they differ from the rules' own
    colour: str = BLUE
    dash: str = "solid"

    @property
    def is_hybrid(self) -> bool:
        """Whether the method merges several rules."""
        return len(self.rules) > 1

    @property
    def needs_hessian(self) -> bool:
        """Whether one of its rules is AdaHessian."""
        return any(rule.needs_hessian for rule in self.rules)

    @property
    def lambdas(self) -> tuple[float, ...]:
        """Default weights: equal, unless ``defaults`` sets them."""
        return self.defaults.get("lambdas", (1 / len(self.rules),) * len(self.rules))

    @property
    def settings(self) -> dict:
        """Settings of the rules, with their defaults: momentum, partial, weight_decay, …"""
        fields = {f.name: f.default for r in reversed(self.rules) for f in dataclasses.fields(r)}
        first = {name: fields[name] for name in _FIRST if name in fields} | {"weight_decay": 0.0}
        first |= {"weight_decay_in": "both"} if self.is_hybrid else {}
        settings = first | {name: v for name, v in fields.items() if name not in first}
        return {name: self.defaults.get(name, v) for name, v in settings.items()}

    @property
    def signature(self) -> inspect.Signature:
        """The constructor's signature: ``params``, ``lr``, a hybrid's ``lambdas``, all settings."""
        arguments = {"lr": self.defaults.get("lr", 0.01)}
        if self.is_hybrid:
            arguments["lambdas"] = self.lambdas
        options = {name: self.defaults.get(name, v) for name, v in _OPTIONS.items()}
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [inspect.Parameter("params", kind)]
        for name, default in (arguments | self.settings | options).items():
            parameters.append(inspect.Parameter(name, kind, default=default))
        return inspect.Signature(parameters)

    def __call__(self, *arguments, **settings) -> Hybrid:
        """Build the optimizer; arguments as in :attr:`signature`.

        Weight decay is an L2 term in rules that have one and decoupled in the others.
        """
        bound = self.signature.bind(*arguments, **settings)
        given = {"weight_decay": 0.0, **self.defaults, **bound.arguments}
        decay, where = given["weight_decay"], given.get("weight_decay_in", "both")
        if where not in ("both", "sgd"):
            raise ValueError(f'weight_decay_in={where!r}: must be "both" or "sgd"')
        if where == "sgd" and rules.SGD not in self.rules:
            raise ValueError(f'weight_decay_in="sgd": {self.label} has no SGD; use "both"')
        rules.check_at_least_zero(weight_decay=decay)
        made, decoupled = [], 0.0
        for rule in self.rules:
            names = {f.name for f in dataclasses.fields(rule)}
            fields = {name: given[name] for name in names & given.keys()}  # else the rule's default
            rule_decay = decay if where == "both" or rule is rules.SGD else 0.0
            if "weight_decay" in names:
                fields["weight_decay"] = rule_decay
            else:
                decoupled = rule_decay
            made.append(rule(**fields))
        bound.apply_defaults()
        options = {n: v for n, v in bound.arguments.items() if n in ("lr", "lambdas", *_OPTIONS)}
        return Hybrid(given["params"], made, decoupled_weight_decay=decoupled, **options)

    def constructor(self, name: str) -> Callable[..., Hybrid]:
        """Return the function ``name(params, lr=…, …)``."""

        def construct(*arguments, **settings) -> Hybrid:
            return self(*arguments, **settings)

        rules = ", ".join(f":class:`~hybrid_lib.optim.rules.{r.__name__}`" for r in self.rules)
        weights = ", ".join(f"weight of {r.__name__}" for r in self.rules)
        weights = f"\n\n    ``lambdas`` is ({weights})." if self.is_hybrid else ""
        construct.__name__ = construct.__qualname__ = name
        construct.__doc__ = (
            f"{self.summary}{weights}\n\n    For the other arguments see {rules} and "
            ":class:`~hybrid_lib.Hybrid`.\n    "
        )
        construct.__signature__ = self.signature
        return construct


METHODS = {
    "sgd": Method(
        "SGD", (rules.SGD,),
        "SGD with momentum; takes the same steps as :class:`torch.optim.SGD`.",
        {"lr": 0.01, "momentum": 0.95, "weight_decay": 5e-4},
    ),
    "adam": Method(
        "Adam", (rules.Adam,),
        "Adam; takes the same steps as :class:`torch.optim.Adam`.",
        {"lr": 0.001, "weight_decay": 5e-4}, VERMILLION,
    ),
    "atmo": Method(
        "ATMO", (rules.Adam, rules.SGD),
        """ATMO: Adam + SGD (Algorithm 2; Landro et al. 2021).

    Algorithm 2 applies weight decay in SGD alone: ``weight_decay_in="sgd"``. The released code and
    the default apply it in both rules.""",
        {"lr": 0.01, "momentum": 0.95, "weight_decay": 5e-4}, GREEN,
    ),
    "padam": Method(
        "Padam", (rules.Padam,),
        """Padam (Algorithm 1; Chen et al. 2018).

    The report lists no settings for Padam alone; the learning rate and weight decay are
    those of Padam's paper.""",
        {"lr": 0.1, "weight_decay": 5e-4}, PURPLE, "dot",
    ),
    "padam_sgd": Method(
        "PADAM-SGD", (rules.Padam, rules.SGD),
        """PADAM-SGD: Padam + SGD, merged as in Algorithm 2.

    As in the released code: no AMSGrad maximum, p = 1/8, L2 in both rules
    (``weight_decay_in="sgd"``: in SGD alone).""",
        {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.025, "amsgrad": False}, PURPLE,
    ),
    "adahessian": Method(
        "AdaHessian", (rules.AdaHessian,),
        """AdaHessian (Algorithm 3; Yao et al. 2020).

    ``weight_decay`` is decoupled. Pass every step ``hess_diag``, computed by
    :func:`~hybrid_lib.hessian_diagonal`.""",
        {"lr": 0.15, "weight_decay": 5e-4}, VERMILLION, "dot",
    ),
    "adasgd": Method(
        "AdaSGD", (rules.AdaHessian, rules.SGD),
        """AdaSGD: AdaHessian + SGD (Algorithm 4 of the report).

    Not the AdaSGD of Wang and Wiens (2020), which is SGD with one adaptive rate for all weights.

    Weight decay is an L2 term of the SGD rule, as in the released code. Algorithm 4 decays in both
    rules: ``weight_decay_in="both"`` adds AdaHessian's own, decoupled decay.""",
        {"lr": 0.1, "momentum": 0.95, "weight_decay": 5e-4, "weight_decay_in": "sgd"},
        BLUE, "dashdot",
    ),
    "swats": Method(
        "SWATS", (rules.Adam, rules.SGD),
        """SWATS: Adam that switches to SGD (Keskar and Socher 2017); not in the report.

    A parameter group switches as a whole; for a switch per tensor, pass one group per tensor.""",
        {"lr": 0.001, "momentum": 0.9, "dampening": 0.9, "weight_decay": 0.0, "lambdas": (1.0, 0.0),
         "merge": "sum", "controller": SWATS()}, VERMILLION, "dashdot",
    ),
    "lion": Method(
        "Lion", (rules.Lion,),
        """Lion (Chen et al. 2023), with its paper's learning rate; not in the report.

    ``weight_decay`` is decoupled.""",
        {"lr": 1e-4, "weight_decay": 0.0}, GREEN, "dot",
    ),
    "lion_sgd": Method(
        "Lion-SGD", (rules.Lion, rules.SGD),
        """Lion + SGD, merged as in Algorithm 2; not in the report, and its defaults are not tuned.

    Weight decay is decoupled for Lion and an L2 term for SGD.""",
        {"lr": 1e-3, "momentum": 0.95, "weight_decay": 5e-4}, GREEN, "dashdot",
    ),
}  # fmt: skip
RULES = {name: m.rules[0] for name, m in METHODS.items() if not m.is_hybrid}
globals().update({name: method.constructor(name) for name, method in METHODS.items()})


def get_method(name: str) -> Method:
    """Return an entry of METHODS or, for rules joined by + ("RULE+RULE"), their hybrid.

    Raises:
        ValueError: if ``name`` is neither.

    >>> get_method("adam+adahessian").label
    'Adam + AdaHessian'
    """
    if name in METHODS:
        return METHODS[name]
    parts = name.split("+")
    if len(parts) < 2 or not RULES.keys() >= set(parts):
        known = f"{', '.join(METHODS)}, or rules joined by + ({', '.join(RULES)})"
        raise ValueError(f"{name!r} is not a method: must be one of {known}")
    label = " + ".join(METHODS[part].label for part in parts)
    return Method(
        label, tuple(RULES[part] for part in parts), f"{label}, merged as in Algorithm 2."
    )


def label(name: str) -> str:
    """Return the name of a method, or of its dynamic form, in figures.

    >>> label("dyn_padam_sgd"), label("adam-lion"), label("my run")
    ('Dyn. PADAM-SGD', 'Adam + Lion', 'my run')
    """
    base = name.removeprefix("dyn_")
    try:
        found = get_method(base if base in METHODS else base.replace("-", "+")).label
    except ValueError:
        return name
    return f"Dyn. {found}" if name != base else found


def look(name: str) -> tuple[str, str]:
    """Colour and dash of a method's lines; methods with dynamic weights are dashed.

    A name outside the table gets one of eight styles that no method has, the same in every figure.
    """
    base = name.removeprefix("dyn_")
    if base in METHODS:
        return METHODS[base].colour, "dash" if name != base else METHODS[base].dash
    looks = list(itertools.product((BLUE, VERMILLION, GREEN, PURPLE), ("longdash", "longdashdot")))
    return looks[zlib.crc32(name.encode("utf-8")) % len(looks)]
