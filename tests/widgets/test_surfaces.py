"""Minima, heights and derivatives are right, and paths are those of the optimizers."""

import itertools

import numpy as np
import pytest
import sympy
import torch
from torch.autograd.functional import hessian, jacobian

from hybrid_lib.widgets.surfaces import SURFACES, normal, settled, walk

every_surface = pytest.mark.parametrize("surface", SURFACES.values(), ids=SURFACES)


def as_tensors(surface):
    """The function alone, of a tensor (x, y), for autograd."""
    f = sympy.lambdify(["x", "y"], surface.formulas[0], modules=torch)
    return lambda xy: f(*xy)


@every_surface
def test_minima_have_value_0_no_slope_and_lie_in_a_bowl(surface):
    for x, y in surface.minima:
        height, *slope = surface.at(x, y)[:3]
        assert height == pytest.approx(0, abs=1e-9)
        assert slope == pytest.approx([0, 0], abs=1e-3)
        point = torch.tensor([x, y], dtype=torch.float64)
        assert torch.linalg.eigvalsh(hessian(as_tensors(surface), point)).min() > 0


@every_surface
def test_the_map_is_a_square_with_start_and_minima_and_nothing_lower(surface):
    (x0, x1), (y0, y1) = surface.bounds
    assert x1 - x0 == pytest.approx(y1 - y0)
    for x, y in (surface.start, *surface.minima):
        assert x0 < x < x1
        assert y0 < y < y1
    heights, *_ = surface.at(*np.meshgrid(np.linspace(x0, x1, 201), np.linspace(y0, y1, 201)))
    assert heights.min() > -1e-12


@pytest.mark.parametrize(
    ("name", "point", "height"),
    [
        ("rosenbrock", (-1.2, 1.0), 24.2),
        ("rastrigin", (0.5, 0.5), 40.5),
        ("saddle", (0.0, 0.0), 0.25),
        ("ravine", (2.0, 1.0), 27.0),
        ("beale", (0.0, 0.0), 1.5**2 + 2.25**2 + 2.625**2),
        ("himmelblau", (0.0, 0.0), 170.0),
    ],
)
def test_heights_are_those_of_the_literature(name, point, height):
    assert SURFACES[name].at(*point)[0] == pytest.approx(height)


@every_surface
def test_derivatives_are_those_of_autograd(surface):
    f = as_tensors(surface)
    for point in torch.empty(20, 2, dtype=torch.float64).uniform_(-4, 4, generator=seeded()):
        _, gx, gy, dx, dy = surface.at(*point.tolist())
        assert [gx, gy] == pytest.approx(jacobian(f, point).tolist(), rel=1e-9, abs=1e-9)
        assert [dx, dy] == pytest.approx(hessian(f, point).diagonal().tolist(), rel=1e-9, abs=1e-9)


def seeded():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize(
    ("name", "weights", "reference"),
    [
        ("atmo", (1, 0), lambda p: torch.optim.Adam(p, lr=0.005)),
        ("atmo", (0, 1), lambda p: torch.optim.SGD(p, lr=0.005, momentum=0.95)),
        ("padam_sgd", (0, 1), lambda p: torch.optim.SGD(p, lr=0.005, momentum=0.9)),
        ("adam", None, lambda p: torch.optim.Adam(p, lr=0.005)),
        ("sgd", None, lambda p: torch.optim.SGD(p, lr=0.005, momentum=0.95)),
    ],
)
def test_a_single_rule_follows_the_path_of_torch(name, weights, reference):
    f, w = as_tensors(SURFACES["saddle"]), torch.tensor([2.0, 0.01], dtype=torch.float64)
    optimizer, points = reference([w]), []
    for _ in range(60):
        points.append(w.tolist())
        w.grad = jacobian(f, w)
        optimizer.step()
    ours = walk("saddle", name, lr=0.005, weights=weights and (lambda step: weights))
    assert ours[:60, :2] == pytest.approx(np.array(points), abs=1e-10)


def test_a_path_ends_off_the_map():
    path = walk("beale", "sgd", lr=1.0)
    assert len(path) < 20
    assert np.abs(path[-1, :2] - [1.75, 0]).max() > 11 > np.abs(path[-2, :2] - [1.75, 0]).max()
    assert settled(path) is None


def test_noise_is_seeded_normal_and_can_be_absent():
    def points(**settings):
        return walk("saddle", "adam", **settings)

    assert np.array_equal(points(noise=0.5, seed=1), points(noise=0.5, seed=1))
    assert not np.array_equal(points(noise=0.5, seed=1), points(noise=0.5, seed=2))
    assert np.array_equal(points(seed=1), points(seed=2))
    drawn = np.array([list(itertools.islice(normal(seed), 1000)) for seed in range(100)])
    assert drawn.mean() == pytest.approx(0, abs=0.01)
    assert drawn.var() == pytest.approx(1, abs=0.01)
    assert np.abs(np.corrcoef(drawn) - np.eye(100)).max() < 0.2  # for neighbouring seeds too


def test_settled_is_the_step_after_the_last_loss_above_the_tolerance():
    def ends(*losses):
        return settled(np.array([(0, 0, loss) for loss in losses]))

    assert ends(1, 0.001, 0.5, 0.002, 0.001) == 3
    assert ends(0.001, 0.002) == 0
    assert ends(0.001, 0.5) is None
