"""What 02_optimizers.ipynb says of the merge."""

import pytest
import torch

from hybrid_lib.optim import methods
from hybrid_lib.widgets import anatomy


def test_recording_changes_nothing():
    def trained(watched):
        w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        optimizer = methods.atmo([w], lr=0.1)
        if watched:
            anatomy.record(optimizer.param_groups[0])
        for _ in range(5):
            w.grad = (w**3).detach()
            optimizer.step()
        return w.detach()

    assert torch.equal(trained(watched=True), trained(watched=False))


def test_bias_correction_scales_the_whole_step():
    atmo = anatomy.step_sizes(methods.atmo, [1, 10, 44])
    assert atmo.tolist() == pytest.approx([5.5, 1.27, 1.005], rel=5e-3)
    padam_sgd = anatomy.step_sizes(methods.padam_sgd, [1, 100, 391, 3000])
    assert padam_sgd.tolist() == pytest.approx([0.66, 0.65, 0.78, 0.99], abs=6e-3)


def test_the_second_moment_of_adahessian_tracks_rows():
    table = anatomy.what_v_tracks(anatomy.logistic_regression(), n_probes=200)
    assert (table["tracked"] / table["row"]).median() == pytest.approx(1, abs=0.05)
    assert (table["tracked"] / table["diagonal"]).median() > 3


def test_one_probe_is_nearly_noise_and_many_are_not():
    cosines = anatomy.probe_cosines(anatomy.logistic_regression(), 256)
    assert cosines[1] < 0.1
    assert cosines[32] > 0.5
