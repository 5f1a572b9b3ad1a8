# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch

from diffusers_lsep.interpolants import get_interpolant


TIMES = torch.linspace(0, 1, 11, dtype=torch.float64)


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
def test_ends_are_data_and_noise(path_type):
    path = get_interpolant(path_type)
    assert (path.alpha(0.0), path.sigma(0.0)) == (1, 0)
    assert path.alpha(1.0) == pytest.approx(0, abs=1e-15) and path.sigma(1.0) == 1


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
def test_derivatives_are_those_of_alpha_and_sigma(path_type):
    path = get_interpolant(path_type)
    t = TIMES.clone().requires_grad_()
    for function, derivative in ((path.alpha, path.d_alpha), (path.sigma, path.d_sigma)):
        (expected,) = torch.autograd.grad(function(t).sum(), t)
        torch.testing.assert_close(derivative(TIMES) + torch.zeros_like(TIMES), expected)
        assert derivative(0.3) == pytest.approx(float(derivative(torch.tensor(0.3, dtype=torch.float64))))


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
def test_data_and_noise_follow_from_the_velocity(path_type):
    path = get_interpolant(path_type)
    data, noise = torch.randn(2, 11, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = TIMES[:, None]
    sample, velocity = path.interpolate(data, noise, t), path.velocity(data, noise, t)
    torch.testing.assert_close(path.predict_original_sample(velocity, sample, t), data)
    torch.testing.assert_close(path.predict_noise(velocity, sample, t), noise)


def test_cosine_path_keeps_the_variance():
    path = get_interpolant("cosine")
    torch.testing.assert_close(path.alpha(TIMES) ** 2 + path.sigma(TIMES) ** 2, torch.ones_like(TIMES))
    assert path.alpha(0.5) == pytest.approx(math.sqrt(0.5))


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
def test_time_of_ratio_inverts_sigma_over_alpha(path_type):
    path = get_interpolant(path_type)
    t = TIMES[:-1]
    torch.testing.assert_close(path.time_of_ratio(path.sigma(t) / path.alpha(t)), t)


def test_unknown_path_is_refused():
    with pytest.raises(ValueError, match=r"`path_type` has to be one of \['linear', 'cosine'\], but is 'vp'"):
        get_interpolant("vp")
