"""Experiments follow Tables I and II, every setting is checked, and schedules are as documented.

The tables are repeated here as the report prints them, and compared with the optimizers that the
experiments build, not with the fields that were typed in.
"""

import csv
import hashlib
import math
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from hybrid_lib.optim import rules, schedules
from hybrid_lib.training.experiments import EXPERIMENTS, Experiment, error_messages
from hybrid_lib.training.tasks import image_model

ROOT = Path(__file__).parents[2]
BETAS = (0.9, 0.999)
HALVES = (0.5, 0.5)

# name: label, lr, momentum, weight decay, betas, batch size; milestones or cosine, epochs, weights.
# None: "-" in the report. PADAM-SGD's betas and weights are blank there; these are the code's.
TABLES = {
    "sgd": ("SGD", 0.01, 0.95, 0.0005, None, 256, None, 350, None),
    "adam": ("Adam", 0.001, None, 0.0005, BETAS, 256, None, 350, None),
    "atmo": ("ATMO", 0.01, 0.95, 0.0005, BETAS, 256, None, 350, HALVES),
    "dyn_atmo": ("Dyn. ATMO", 0.001, 0.95, 0.0005, BETAS, 256, "cosine", 350, "dynamic"),
    "padam_sgd": ("PADAM-SGD", 0.01, 0.9, 0.025, BETAS, 128, (100, 150), 200, HALVES),
    "dyn_padam_sgd": ("Dyn. PADAM-SGD", 0.01, 0.9, 0.025, BETAS, 128, (100, 150), 200, "dynamic"),
    "adahessian": ("AdaHessian", 0.15, None, 0.0005, BETAS, 256, (80, 120), 160, None),
    "adasgd": ("AdaSGD", 0.1, 0.95, 0.0005, BETAS, 256, (100, 140, 180), 200, "dynamic"),
}
TABLE_III = {
    "sgd": 0.8539, "adam": 0.8370, "atmo": 0.8270, "dyn_atmo": 0.8680, "padam_sgd": 0.8997,
    "dyn_padam_sgd": 0.8973, "adahessian": 0.8372, "adasgd": 0.8771,
}  # fmt: skip
# Where the released code decays: L2 in the adaptive rule, L2 in SGD, decoupled.
DECAY = {
    "sgd": (None, 5e-4, 0), "adam": (5e-4, None, 0), "atmo": (5e-4, 5e-4, 0),
    "dyn_atmo": (5e-4, 5e-4, 0), "padam_sgd": (0.025, 0.025, 0), "dyn_padam_sgd": (0.025, 0.025, 0),
    "adahessian": (None, None, 5e-4), "adasgd": (None, 5e-4, 0), "padam": (5e-4, None, 0),
}  # fmt: skip
every_row = pytest.mark.parametrize("name", TABLES)
every_name = pytest.mark.parametrize("name", EXPERIMENTS)


def built_group(e: Experiment) -> dict:
    """The only parameter group of the experiment's optimizer."""
    (group,) = e.build_optimizer([torch.zeros(3, requires_grad=True)]).param_groups
    return group


def split(group: dict):
    """(adaptive rule or None, SGD or None)."""
    sgd = [r for r in group["rules"] if isinstance(r, rules.SGD)]
    adaptive = [r for r in group["rules"] if not isinstance(r, rules.SGD)]
    assert group["rules"] == tuple(adaptive + sgd), "lambdas are (adaptive, SGD)"
    return (adaptive or [None])[0], (sgd or [None])[0]


# --- Tables I and II. ---


@every_row
def test_experiments_follow_tables_one_and_two(name):
    label, lr, momentum, decay, betas, batch_size, lr_schedule, epochs, weights = TABLES[name]
    e, group = EXPERIMENTS[name], built_group(EXPERIMENTS[name])
    adaptive, sgd = split(group)
    assert (e.label, group["lr"], e.batch_size, e.epochs) == (label, lr, batch_size, epochs)
    assert (sgd and sgd.momentum) == momentum
    assert (adaptive and adaptive.betas) == betas
    assert decay in (*DECAY[name],)
    if lr_schedule in (None, "cosine"):
        assert e.lr_schedule == (lr_schedule or "constant")
    else:
        assert (e.lr_schedule, e.lr_milestones, e.lr_gamma) == ("multistep", lr_schedule, 0.1)
    if weights == "dynamic":
        assert (e.lambda_schedule, e.lambda_start, e.lambda_end) == ("linear", (1, 0), (0, 1))
    elif weights is not None:
        assert (e.lambda_schedule, group["lambdas"]) == ("constant", weights)


@every_name
def test_weight_decay_acts_where_it_does_in_the_released_code(name):
    group = built_group(EXPERIMENTS[name])
    adaptive, sgd = split(group)
    l2 = [getattr(r, "weight_decay", None) for r in (adaptive, sgd)]
    assert (*l2, group["decoupled_weight_decay"]) == DECAY[name]


@every_name
def test_settings_that_the_tables_omit_are_as_released(name):
    e, (adaptive, sgd) = EXPERIMENTS[name], split(built_group(EXPERIMENTS[name]))
    assert (e.dataset, e.width, e.stem, e.augment) == ("cifar10", 64, "cifar", False)
    assert (e.protocol, e.precision, e.hessian_samples, e.hessian_every) == (
        "clean", "float32", 1, 1)  # fmt: skip
    assert sgd is None or (sgd.dampening, sgd.nesterov) == (0, False)
    if isinstance(adaptive, rules.AdaHessian):
        assert (adaptive.hessian_power, adaptive.spatial_average) == (1, None)
    if isinstance(adaptive, rules.Padam):
        assert (adaptive.partial, adaptive.bias_correction) == (1 / 8, "released")
        assert adaptive.amsgrad == (name == "padam")  # Algorithm 1 has the maximum


def test_custom_experiments_are_labelled_by_their_name():
    for name in ("sgd-large", "adam-sgd"):
        assert replace(EXPERIMENTS["sgd"], name=name).label == name


# --- Values: frozen, checked, readable from text. ---


def test_settings_are_read_from_text():
    e = replace(
        EXPERIMENTS["adasgd"], lr="1e-3", epochs="7", augment="false", betas="0.8 0.9",
        lr_milestones="3, 5", lambda_start="0.25,0.75", spatial_average="8", train_limit=None,
    )  # fmt: skip
    assert (e.lr, e.epochs, e.augment, e.betas) == (0.001, 7, False, (0.8, 0.9))
    assert (e.lr_milestones, e.lambda_start, e.spatial_average) == ((3, 5), (0.25, 0.75), 8)


nan, inf = math.nan, math.inf
BAD = [
    *[("epochs", bad) for bad in (0, -1, 2.5, nan, "many", None)],
    *[("lr", bad) for bad in (0, -1, nan, inf, "fast", None)],
    *[("batch_size", bad) for bad in (0, -8, 1.5)],
    *[(limit, bad) for limit in ("train_limit", "test_limit") for bad in (0, -1)],
    *[(f, bad) for f in ("width", "hessian_samples", "hessian_every", "lambda_epochs") for bad in
      (0, -1)],
    *[("seed", bad) for bad in (-1, 2**63, 1.5)],
    *[("optimizer", bad) for bad in ("adamm", "dyn_atmo", "", "__class__")],
    *[("dataset", bad) for bad in ("cifar", "", 3, "folder:")],
    *[("lr_schedule", bad) for bad in ("warmup", "", None)],
    *[("lambda_schedule", bad) for bad in ("ramp", "Linear", None)],
    ("lambda_direction", "backwards"),
    *[("protocol", bad) for bad in ("dirty", "", None)],
    ("stem", "resnet"), ("precision", "fp8"), ("augment", "maybe"), ("lr_gamma", 0),
    *[("name", bad) for bad in
      ("../x", "/abs", "", ".", "..", ".hidden", "a b", "a/b", "a\\b", "a\n", "ä", "-x", "x" * 81)],
    *[(f, bad) for f in ("momentum", "dampening", "weight_decay", "eps") for bad in (-1, nan, inf)],
    ("dampening", 2), ("weight_decay_in", "adam"), ("lr_milestones", (5, 3)),
    ("spatial_average", 0), ("spatial_average", "rows"),
    *[("restart_epoch", bad) for bad in (1, 351)],
    *[("lambda_start", bad) for bad in
      ((-0.5, 1), (nan, 1), (inf, 1), 0.5, ("a", "b"))],
    ("lambda_end", (0, -1)), *[("betas", bad) for bad in ((0.9, 1.0), (0.9,), (-0.1, 0.9))],
    *[("lr_milestones", bad) for bad in ((0, 5), ("x",))],
]  # fmt: skip


@pytest.mark.parametrize(("field", "bad"), BAD, ids=[f"{f}={b!r:.20}" for f, b in BAD])
def test_a_bad_value_is_refused_with_its_field_and_value(field, bad):
    with pytest.raises(ValidationError) as caught:
        replace(EXPERIMENTS["atmo"], **{field: bad})
    lines = error_messages(caught.value)
    whole = f"{field}={bad!r}"
    items = [f"{field}={item!r}" for item in bad] if isinstance(bad, tuple) else []
    assert any(line.startswith((whole, *items)) for line in lines), lines
    assert not any("\n" in line for line in lines)


CONFLICTS = [  # the experiment, what is changed, the line that refuses it
    ("atmo", {"batch_size": 256, "train_limit": 255}, r"batch_size=256 .*train_limit=255"),
    ("atmo", {"lr_schedule": "multistep"}, r"lr_milestones=\(\).*'multistep'"),
    ("atmo", {"lr_milestones": (5,)}, r"lr_milestones=\(5,\).*'constant'"),
    ("atmo", {"lr_schedule": "multistep", "lr_milestones": (5, 5)}, r"=\(5, 5\).*increase"),
    ("atmo", {"nesterov": True, "dampening": 0.5}, r"nesterov=True.*dampening=0.5"),
    ("atmo", {"nesterov": True, "momentum": 0}, r"nesterov=True.*momentum=0"),
    ("atmo", {"learning_rate": 0.1}, r"learning_rate.*[Uu]nexpected"),
    ("atmo", {"lambda_rate": 2.0}, "lambda_rate.*'constant'"),
    ("dyn_atmo", {"lambda_schedule": "exponential", "lambda_steepness": 40}, "lambda_steepness"),
    ("dyn_atmo", {"protocol": "released", "lambda_schedule": "step"}, "lambda_schedule='step'"),
    ("atmo", {"train_limit": 300, "validation_limit": 50}, "=256 is larger than.*300 - .*=50"),
    ("atmo", {"protocol": "released", "validation_limit": 50}, "test_mode='eval'"),
    *[("atmo", {"lambda_start": bad}, "lambda_start=.*one weight each for Adam, SGD")
      for bad in ((1,), (1, 0, 0))],
    ("atmo", {"lambda_end": (1,)}, "lambda_end=.*one weight each for Adam, SGD"),
    ("atmo", {"optimizer": "adam+padam+sgd"}, "lambda_start=.*for Adam, Padam, SGD"),
    ("atmo", {"lambda_schedule": "swats"}, "lambda_schedule='swats' with optimizer='atmo'"),
    ("atmo", {"lambda_per": "tensor"}, "lambda_per='tensor'.*hedge or swats"),
    ("atmo", {"lambda_schedule": "hedge", "lambda_tolerance": 1}, "lambda_tolerance: 'hedge' has"),
    ("adasgd", {"precision": "float16"}, "float16.*use bfloat16"),
    ("sgd", {"lr_warmup": 350}, "lr_warmup=350: must be less than epochs=350"),
    # Settings that the optimizer does not have, or that nothing would use.
    *[(name, {field: value}, f"^{field}={re.escape(repr(value))}: {name} has ")
      for name, field, value in [
        ("sgd", "betas", (0.9, 0.99)), ("sgd", "eps", 1e-3), ("sgd", "amsgrad", True),
        ("sgd", "weight_decay_in", "sgd"), ("adam", "momentum", 0.9), ("adam", "nesterov", True),
        ("adam", "hessian_power", 1.0), ("atmo", "partial", 0.25),
        ("padam_sgd", "spatial_average", "kernel"), ("adahessian", "amsgrad", True),
        ("adahessian", "bias_correction", "none"), ("adam", "lambda_schedule", "linear"),
        ("adam", "lambda_start", (0.2, 0.8)), ("sgd", "lambda_end", (0.5, 0.5)),
        ("adahessian", "lambda_epochs", 5), ("sgd", "lambda_direction", "released"),
        ("sgd", "merge", "sum"), ("sgd", "hessian_every", 10), ("atmo", "hessian_fraction", 0.5),
        ("padam_sgd", "hessian_samples", 2)]],
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "message"), CONFLICTS)
def test_conflicting_settings_are_refused(name, changes, message):
    with pytest.raises(ValidationError) as caught:
        replace(EXPERIMENTS[name], **changes)
    (line,) = error_messages(caught.value)
    assert re.search(message, line)


def test_all_faults_are_reported_at_once_and_each_once():
    with pytest.raises(ValidationError) as caught:
        replace(EXPERIMENTS["atmo"], epochs=0, lr=nan, stem="x", lambda_start=(-1, -1))
    lines = error_messages(caught.value)
    assert sorted(line.split("=")[0] for line in lines) == ["epochs", "lambda_start", "lr", "stem"]


# --- Learning rates. ---


@pytest.mark.parametrize("epochs", [2, 7, 350])
@every_name
def test_learning_rates_follow_the_formula(name, epochs):
    """Equation 1 of the report; a tenth after each milestone, counted in finished epochs."""
    e = EXPERIMENTS[name].scaled(epochs)
    by_hand = [e.lr * 0.1 ** sum(m <= epoch for m in e.lr_milestones) for epoch in range(epochs)]
    if e.lr_schedule == "cosine":
        by_hand = [e.lr / 2 * (1 + math.cos(t / epochs * math.pi)) for t in range(epochs)]
    assert e.learning_rates() == pytest.approx(by_hand, rel=1e-6, abs=1e-9)


def test_a_warm_up_rises_linearly_to_the_rate_and_changes_no_later_rate():
    e = replace(EXPERIMENTS["padam_sgd"], lr_warmup=3)
    rates, plain = e.learning_rates(), EXPERIMENTS["padam_sgd"].learning_rates()
    assert rates[:3] == pytest.approx([e.lr / 4, e.lr / 2, e.lr * 3 / 4])
    assert rates[3:] == plain[3:]
    assert [replace(e, lr_warmup=w).scaled(20).lr_warmup for w in (100, 199)] == [10, 19]
    e = replace(EXPERIMENTS["sgd"].scaled(6), lr_warmup=1, restart_epoch=4)
    assert e.learning_rates() == pytest.approx([e.lr * f for f in (0.5, 1, 1, 0.5, 1, 1)])


# --- Weights (adaptive, SGD) of every row under both protocols, epochs counted from 1. ---


HORIZONS = {"dyn_atmo": 350, "dyn_padam_sgd": 100, "adasgd": 200}


@pytest.mark.parametrize("protocol", ["clean", "released"])
@every_name
def test_weights_of_every_epoch_follow_the_protocol(name, protocol):
    """Clean goes from the adaptive rule to SGD. Released jumps to almost all SGD and then returns,
    except for AdaSGD, whose own scheduler goes as the report says."""
    e = replace(EXPERIMENTS[name], protocol=protocol)
    assert built_group(e)["lambdas"] == e.lambdas()(0)
    for epoch in range(e.epochs):
        done = min(epoch / HORIZONS.get(name, 1), 1)
        weights = {"atmo": HALVES, "padam_sgd": HALVES}.get(name, (1,))
        if name in HORIZONS:
            backwards = protocol == "released" and name != "adasgd" and epoch > 0
            weights = (done, 1 - done) if backwards else (1 - done, done)
        assert e.lambdas()(epoch) == pytest.approx(weights, abs=1e-12)


@pytest.mark.parametrize("name", ["dyn_atmo", "dyn_padam_sgd", "adasgd"])
@pytest.mark.parametrize("protocol", ["clean", "released"])
def test_the_direction_can_be_chosen_independently_of_the_protocol(name, protocol):
    e = replace(EXPERIMENTS[name], protocol=protocol)
    assert replace(e, lambda_direction="report").lambdas()(1)[1] < 0.02
    assert replace(e, lambda_direction="released").lambdas()(1)[1] > 0.98


def test_a_shape_s_own_setting_is_passed_to_it():
    steep = replace(EXPERIMENTS["adasgd"], lambda_schedule="sigmoid", lambda_steepness=40.0)
    assert steep.lambdas() == schedules.Sigmoid((1, 0), (0, 1), 200, steepness=40.0)


# --- Shorter and longer runs. ---


@pytest.mark.parametrize(
    ("name", "epochs", "milestones", "horizon"),
    [
        ("padam_sgd", 20, (10, 15), None), ("dyn_padam_sgd", 20, (10, 15), 10),
        ("dyn_padam_sgd", 400, (200, 300), 200), ("adahessian", 16, (8, 12), None),
        ("adasgd", 10, (5, 7, 9), None), ("dyn_atmo", 35, (), None), ("adasgd", 2, (1, 2), None),
        ("dyn_padam_sgd", 1, (1,), 1), ("adahessian", 160, (80, 120), None),
    ],
)  # fmt: skip
def test_scaled_keeps_milestones_and_horizon_at_their_shares(name, epochs, milestones, horizon):
    e = EXPERIMENTS[name]
    short = e.scaled(epochs)
    ours = short.epochs, short.lr_milestones, short.lambda_epochs
    assert ours == (epochs, milestones, horizon)
    for share in (0, 0.2, 0.4, 0.8) if epochs > 9 else ():  # as at the same share of the long run
        long_epoch, short_epoch = round(e.epochs * share), round(epochs * share)
        assert short.lambdas()(short_epoch) == pytest.approx(e.lambdas()(long_epoch))
        rate = e.learning_rates()[long_epoch]
        assert short.learning_rates()[short_epoch] == pytest.approx(rate, rel=1e-6)


# --- Weights of the network. ---


def test_initial_weights_depend_on_the_seed_alone_even_in_several_threads():
    def initial(seed=5):
        model = image_model(replace(EXPERIMENTS["sgd"], width=8, seed=seed), 10, 1)
        return torch.nn.utils.parameters_to_vector(model.parameters())

    before, alone = torch.random.get_rng_state(), initial()
    assert torch.random.get_rng_state().equal(before)
    assert not initial(6).equal(alone)
    with ThreadPoolExecutor(8) as threads:
        assert all(w.equal(alone) for w in threads.map(initial, [5] * 40))


# --- The report's numbers. ---


def table(name: str, folder: Path = ROOT / "data" / "paper") -> list[dict]:
    with open(folder / name, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_table_three_is_as_printed_in_the_report():
    rows = {row["optimizer"]: float(row["test_accuracy"]) for row in table("table3.csv")}
    assert rows == TABLE_III
    assert list(rows) == list(TABLES)


def test_the_authors_runs_are_as_published():
    runs, milestones = (ROOT / "data" / "paper" / f"{name}.csv" for name in ("runs", "milestones"))
    text = runs.read_text("utf-8") + milestones.read_text("utf-8")
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "243cdfe82c3e660e"
    finals = {row["optimizer"]: float(row["final_test_accuracy"]) for row in table("runs.csv")}
    assert finals == TABLE_III


def test_the_padam_experiment_follows_padam_s_own_paper():
    e = EXPERIMENTS["padam"]
    assert (e.lr, e.weight_decay, e.batch_size, e.epochs) == (0.1, 5e-4, 128, 200)
    assert (e.lr_milestones, e.lr_gamma, e.partial) == ((100, 150), 0.1, None)


def test_scaled_keeps_a_restart_at_its_share_of_the_run():
    whole = replace(EXPERIMENTS["adahessian"], restart_epoch=146)
    assert [whole.scaled(epochs).restart_epoch for epochs in (160, 16, 2, 1)] == [146, 15, 2, None]
