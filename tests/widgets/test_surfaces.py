"""The surfaces are what their docstrings say: minima are minima, derivatives are derivatives."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.functional import hessian, jacobian

from hybrid_lib.widgets.surfaces import SURFACES

each = pytest.mark.parametrize("surface", SURFACES.values(), ids=SURFACES)
coordinates = st.floats(-4, 4)


def at(*point):
    return torch.tensor(point, dtype=torch.float64)


@each
def test_minima_have_value_0_no_slope_and_lie_in_a_bowl(surface):
    for minimum in surface.minima:
        point = at(*minimum)
        assert surface(point).item() == pytest.approx(0, abs=1e-9)
        assert jacobian(surface, point).abs().max() < 1e-3
        assert torch.linalg.eigvalsh(hessian(surface, point)).min() > 0


@each
def test_nothing_on_the_map_is_lower_than_the_minima(surface):
    _, _, heights = surface.grid(201)
    assert heights.min() >= 0


@each
def test_start_and_minima_are_on_the_map_which_is_a_square(surface):
    (x0, x1), (y0, y1) = surface.bounds
    assert x1 - x0 == pytest.approx(y1 - y0)
    for x, y in (surface.start, *surface.minima):
        assert x0 < x < x1
        assert y0 < y < y1


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
    assert SURFACES[name](at(*point)).item() == pytest.approx(height)


def test_the_saddle_has_one_between_its_basins():
    saddle = SURFACES["saddle"]
    assert jacobian(saddle, at(0, 0)).abs().max() == 0
    low, high = torch.linalg.eigvalsh(hessian(saddle, at(0, 0)))
    assert low < 0 < high


@each
@settings(max_examples=30, deadline=None)  # the first call works out the formulas
@given(x=coordinates, y=coordinates)
def test_formulas_of_the_slopes_are_autograds(surface, x, y):
    gradients, diagonals = surface.slopes(np.array([[x, y], [y, x]]))
    for point, gradient, diagonal in zip(([x, y], [y, x]), gradients, diagonals):
        point = at(*point)
        near = {"rel": 1e-9, "abs": 1e-9}
        assert gradient == pytest.approx(jacobian(surface, point).numpy(), **near)
        assert diagonal == pytest.approx(hessian(surface, point).diagonal().numpy(), **near)


@each
@pytest.mark.parametrize("shape", [(2,), (3, 2), (4, 3, 2), (0, 2)])
def test_the_last_dimension_goes(surface, shape):
    assert surface(torch.zeros(shape)).shape == shape[:-1]


@pytest.mark.parametrize("shape", [(), (3,), (2, 1)])
def test_other_shapes_are_refused_with_what_was_given(shape):
    with pytest.raises(ValueError, match=str(shape).replace("(", r"\(").replace(")", r"\)")):
        SURFACES["beale"](torch.zeros(shape))


@each
def test_a_surface_is_a_value_and_may_be_moved_to(surface):
    moved = dataclasses.replace(surface, start=(0.0, 0.0))
    assert moved.start == (0.0, 0.0)
    assert math.isfinite(moved(torch.tensor(moved.start)))
