"""The optimizers compute what the original ones computed.

Every recorded trajectory in ``golden/`` is replayed step by step by the real constructors, with the
gradient and Hessian diagonal that autograd derives from the loss. A wrong sign, order, power or
bias correction leaves the recorded path. The released schedules of λ are replayed too.
"""

import json
from pathlib import Path

import pytest
import torch
from optimizers import assert_close

from hybrid_lib.optim import methods, schedules
from hybrid_lib.optim.curvature import hessian_diagonal

GOLDEN = Path(__file__).parent / "golden"
TRAJECTORIES = sorted(path.stem for path in GOLDEN.glob("*.json") if "schedules" not in path.stem)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}  # met by the originals themselves


def load(name):
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


SCHEDULES = load("lambda_schedules")


def test_all_recordings_are_present():
    assert len(TRAJECTORIES) == 25
    assert len(SCHEDULES["rows"]) == 12


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", TRAJECTORIES)
def test_the_recorded_trajectory_is_reproduced(name, dtype):
    case = load(name)
    shapes, start, loss_at = (
        dense(case, dtype) if "A" in case["problem"] else separable(case, dtype)
    )
    params = {k: tensor(start[k], shapes[k], dtype).requires_grad_() for k in shapes}
    optimizer = build(case["family"], case["hyper"], params.values())

    assert len(case["params_after_step"]) == case["steps"]
    for step, expected in enumerate(case["params_after_step"]):
        set_rates(optimizer, case, step)
        diag = differentiate(loss_at(step, params), params, case, step)
        refresh = step % case["hyper"].get("update_each", 1) == 0
        optimizer.step(hess_diag=diag if refresh else None)
        for k, p in params.items():
            ours, theirs = p.detach(), tensor(expected[k], shapes[k], dtype)
            assert (ours - theirs).abs().max() <= TOLERANCE[dtype], (step + 1, k)


@pytest.mark.parametrize("row", SCHEDULES["rows"], ids=lambda row: row["kind"].split()[0])
def test_the_released_schedule_is_reproduced(row):
    def pair(driven):  # in our order: (adaptive, SGD)
        other = 1 - driven
        return (driven, other) if row["drives"] == "lambda_adaptive" else (other, driven)

    start, end, epochs = pair(row["start"]), pair(row["end"]), row["horizon"]
    first = (row["initial"]["lambda_ad"], row["initial"]["lambda_sgd"])
    ours = [schedules.Released(start, end, epochs, first)]
    if start == first:  # no jump after the first epoch, so a plain ramp does as well
        ours.append(schedules.Linear(start, end, epochs))

    adaptive, sgd = (SCHEDULES["lambda_order"].index(k) for k in ("lambda_adaptive", "lambda_sgd"))
    for schedule in ours:
        for epoch, used in enumerate(row["lambda_used_in_epoch"]):
            assert schedule(epoch) == pytest.approx((used[adaptive], used[sgd]), abs=1e-12), epoch


def tensor(flat, shape, dtype):
    return torch.tensor(flat, dtype=torch.float64).reshape(shape).to(dtype)


def separable(case, dtype):
    """Loss = sum of a (x-c)^2 / 2 + b (x-c)^4 / 4 + l_t x over all entries."""
    tensors = case["problem"]["tensors"]
    shapes = {k: t["shape"] for k, t in tensors.items()}
    a, b, c = (
        {k: tensor(t[letter], t["shape"], dtype) for k, t in tensors.items()} for letter in "abc"
    )
    linear = case["problem"].get("linear_per_step")

    def loss_at(step, params):
        total = 0.0
        for k, x in params.items():
            total = total + (a[k] * (x - c[k]) ** 2 / 2 + b[k] * (x - c[k]) ** 4 / 4).sum()
            if linear:
                total = total + (tensor(linear[step][k], shapes[k], dtype) * x).sum()
        return total

    return shapes, {k: t["x0"] for k, t in tensors.items()}, loss_at


def dense(case, dtype):
    """Loss = (x-c)^T A (x-c) / 2 + sum of b (x-c)^4 / 4 over all tensors laid end to end."""
    problem, layout = case["problem"], case["problem"]["layout"]
    A, b, c = (torch.tensor(problem[letter], dtype=dtype) for letter in "Abc")

    def loss_at(step, params):
        x = torch.cat([params[k].flatten() for k in layout]) - c
        return x @ A @ x / 2 + (b * x**4).sum() / 4

    start = {k: problem["x0"][slice(*part["slice"])] for k, part in layout.items()}
    return {k: part["shape"] for k, part in layout.items()}, start, loss_at


def differentiate(loss, params, case, step):
    """Set the gradients and return D, from the recorded probes where there are any."""
    params = list(params.values())
    if "probes_per_step" not in case:
        grads, diag = hessian_diagonal(loss, params)
    else:
        grads = torch.autograd.grad(loss, params, create_graph=True)
        probes = case["probes_per_step"][step]
        diag = [torch.zeros_like(p) for p in params]
        for probe in probes:
            ends = torch.tensor([p.numel() for p in params]).cumsum(0).tolist()[:-1]
            parts = torch.tensor(probe, dtype=params[0].dtype).tensor_split(ends)
            zs = [z.reshape(p.shape) for z, p in zip(parts, params)]
            Hz = torch.autograd.grad(grads, params, zs, retain_graph=True)
            diag = [D + z * h / len(probes) for D, z, h in zip(diag, zs, Hz)]
    for p, g in zip(params, grads):
        p.grad = g.detach()
    return diag


def build(family, hyper, params):
    """The constructor of a recording's family, its hyper-parameters translated to our names."""
    kept = "lr betas eps weight_decay momentum dampening nesterov amsgrad partial hessian_power"
    ours = {k: hyper[k] for k in kept.split() if k in hyper}
    if family == "adahessian_ag":
        averages = {None: "kernel", (-1, -1, -1, -1): "auto"}
        blocks = hyper.get("spatial_average_block_size")
        ours["spatial_average"] = averages[blocks and tuple(blocks)]
    elif hyper.get("average_conv_kernel"):
        ours["spatial_average"] = "kernel"
    name = "adahessian" if family.startswith("adahessian") else family
    return getattr(methods, name)(list(params), **ours)


def set_rates(optimizer, case, step):
    (group,) = optimizer.param_groups
    if case.get("lr_per_step"):
        (group["lr"],) = case["lr_per_step"][step]
    if case.get("lambda_per_step"):
        (weights,) = case["lambda_per_step"][step]
        order = case["lambda_order"]
        group["lambdas"] = tuple(weights[order.index(k)] for k in ("lambda_adaptive", "lambda_sgd"))


STATES = torch.load(GOLDEN / "states-0.1.pt", weights_only=True)


@pytest.mark.parametrize("how", [{}, {"foreach": True}], ids=["loop", "foreach"])
@pytest.mark.parametrize("name", STATES)
def test_a_state_saved_by_version_0_1_continues(name, how):
    """Saved after three steps; weights recorded after three more, by that version's own code."""
    saved = STATES[name]
    params = [torch.nn.Parameter(w.clone()) for w in saved["at_3"]]
    optimizer = getattr(methods, name)(params, lr=0.77, **how)
    optimizer.load_state_dict(saved["state_dict"])
    for step in range(3, 6):
        draw = torch.Generator().manual_seed(100 + step)
        normal = [torch.randn(p.shape, generator=draw, dtype=p.dtype) for p in 2 * params]
        for p, g in zip(params, normal):
            p.grad = g
        optimizer.step(hess_diag=normal[len(params) :])
    assert_close([p.detach() for p in params], saved["at_6"])
