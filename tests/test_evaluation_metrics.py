# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch

from diffusers_lsep.evaluation import metrics
from diffusers_lsep.evaluation.metrics import (
    feature_statistics,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def rotation(rng, dim):
    return np.linalg.qr(rng.standard_normal((dim, dim)))[0]


def rotated(q, eigenvalues):
    sigma = (q * eigenvalues) @ q.T
    return (sigma + sigma.T) / 2


class TestFeatureStatistics:
    def test_equals_numpy_over_several_chunks(self, rng, monkeypatch):
        monkeypatch.setattr(metrics, "CHUNK", 7)
        features = (rng.standard_normal((50, 5)) * 3 + 100).astype(np.float32)
        mean, covariance = feature_statistics(features)
        np.testing.assert_allclose(mean, features.astype(np.float64).mean(axis=0), rtol=1e-14)
        np.testing.assert_allclose(covariance, np.cov(features.astype(np.float64), rowvar=False), rtol=1e-12)

    def test_one_row_has_no_covariance(self):
        with pytest.raises(ValueError, match="`features` has to hold at least 2 rows, but holds 1"):
            feature_statistics(np.zeros((1, 3)))


# Spectra (S1, S2) of covariances with common axes, where the distance is the squared distance of the roots.
SPECTRA = {
    "regular": (np.linspace(0.1, 2, 24), np.linspace(3, 0.5, 24)),
    "very different scales": (np.geomspace(1e-6, 1e6, 24), np.geomspace(1e5, 1e-3, 24)),
    "both singular": (np.r_[np.zeros(20), 1, 2, 3, 4], np.r_[np.zeros(12), np.linspace(1, 2, 12)]),
    "one singular": (np.r_[np.zeros(20), 1, 2, 3, 4], np.linspace(1, 2, 24)),
    "one zero eigenvalue": (np.r_[0, np.linspace(1, 2, 23)], np.linspace(1, 2, 24)),
    "disjoint ranges": (np.r_[np.zeros(12), np.ones(12)], np.r_[np.ones(12), np.zeros(12)]),
    "nearly singular": (np.r_[np.full(12, 1e-12), np.linspace(1, 2, 12)], np.linspace(1, 3, 24)),
    "zero and regular": (np.zeros(24), np.linspace(1, 2, 24)),
    "nearly equal": (np.linspace(1, 2, 24), np.linspace(1, 2, 24) * (1 + 1e-4)),
}


class TestFrechetDistance:
    @pytest.mark.parametrize("name", SPECTRA)
    @pytest.mark.parametrize("seed", range(5))
    def test_common_axes(self, name, seed):
        rng = np.random.default_rng(seed)
        a, b = SPECTRA[name]
        q = rotation(rng, len(a))
        mu1, mu2 = rng.standard_normal((2, len(a))) * (0.01 if name == "nearly equal" else 1.0)
        expected = np.sum((mu1 - mu2) ** 2) + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
        assert frechet_distance(mu1, rotated(q, a), mu2, rotated(q, b)) == pytest.approx(expected, rel=1e-8)

    @pytest.mark.parametrize("small", [1e-30, 1e-16, 1e-14, 1e-8, 0.0])
    def test_diagonal_matrices_are_exact_however_close_to_singular(self, small):
        a, b = np.array([1.0, small, 2.0, small]), np.array([small, 3.0, 2.5, 1.0])
        expected = np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
        result = frechet_distance(np.zeros(4), np.diag(a), np.zeros(4), np.diag(b))
        assert result == pytest.approx(expected, rel=1e-13)

    @pytest.mark.parametrize("correlation", [0.5, 1 - 1e-6, 1 - 1e-12, 1.0])
    def test_two_dimensions_without_common_axes(self, correlation):
        # tr (S1 S2)^1/2 of 2 x 2 matrices is sqrt(tr(S1 S2) + 2 sqrt(det S1 det S2))
        sigma1, sigma2 = np.array([[2.0, 2 * correlation], [2 * correlation, 2.0]]), np.array([[1.0, 0.3], [0.3, 4.0]])
        determinant1 = 4 * (1 - correlation) * (1 + correlation)
        trace = np.sqrt(np.trace(sigma1 @ sigma2) + 2 * np.sqrt(determinant1 * (4 - 0.09)))
        expected = np.trace(sigma1) + np.trace(sigma2) - 2 * trace
        assert frechet_distance(np.zeros(2), sigma1, np.zeros(2), sigma2) == pytest.approx(expected, rel=1e-8)

    def test_rank_one_without_common_axes(self, rng):
        # tr (S1^1/2 S2 S1^1/2)^1/2 of S1 = u u^T is sqrt(u^T S2 u)
        u, sigma2 = rng.standard_normal(24), rotated(rotation(rng, 24), np.linspace(0.1, 3, 24))
        expected = u @ u + np.trace(sigma2) - 2 * np.sqrt(u @ sigma2 @ u)
        assert frechet_distance(u, np.outer(u, u), u, sigma2) == pytest.approx(expected, rel=1e-8)

    @pytest.mark.parametrize("rank", [24, 7])
    @pytest.mark.parametrize("step", [1.0, 1e-3, 1e-6])
    def test_known_optimal_transport(self, rng, rank, step):
        # S2 = T S1 T with a positive definite T: T is the optimal map, the distance tr((T - I) S1 (T - I))
        sigma1 = rotated(rotation(rng, 24), np.r_[np.zeros(24 - rank), np.linspace(0.5, 2, rank)])
        move = step * rotated(rotation(rng, 24), np.linspace(-0.5, 1, 24))
        transport = np.eye(24) + move
        expected = np.trace(move @ sigma1 @ move)
        result = frechet_distance(np.zeros(24), sigma1, np.zeros(24), transport @ sigma1 @ transport)
        assert result == pytest.approx(expected, rel=1e-8)

    def test_fewer_samples_than_dimensions(self, rng):
        # Two sample covariances of rank 9 in 40 dimensions that differ by a known factor
        features = rng.standard_normal((10, 40))
        mean, sigma = feature_statistics(features)
        assert frechet_distance(mean, sigma, 3 * mean, 9 * sigma) == pytest.approx(
            4 * mean @ mean + 4 * np.trace(sigma), rel=1e-8
        )

    def test_of_itself_is_zero_and_it_is_symmetric(self, rng):
        sigma1 = rotated(rotation(rng, 24), np.r_[np.zeros(10), np.linspace(0.5, 2, 14)])
        sigma2 = rotated(rotation(rng, 24), np.linspace(0.5, 2, 24))
        mu1, mu2 = rng.standard_normal((2, 24))
        assert frechet_distance(mu1, sigma1, mu1, sigma1) < 1e-25
        there = frechet_distance(mu1, sigma1, mu2, sigma2)
        assert there == pytest.approx(frechet_distance(mu2, sigma2, mu1, sigma1), rel=1e-10)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"mu2": np.zeros(4)}, r"`mu2` has to be a mean .* but has shape \[4\]"),
            ({"sigma1": np.eye(2)}, r"`sigma1` has to be a mean .* but has shape \[2, 2\]"),
            ({"sigma2": np.full((3, 3), np.nan)}, "`sigma2` has to be finite"),
            ({"sigma2": np.triu(np.ones((3, 3)))}, "`sigma2` has to be a symmetric matrix"),
            ({"sigma1": np.diag([1.0, -1.0, 1.0])}, "`sigma1` has to have a non-negative diagonal"),
            ({"sigma1": np.eye(3) * 3 - 2}, "`sigma1` has to be positive semi-definite"),
        ],
    )
    def test_errors(self, change, message):
        arguments = {"mu1": np.zeros(3), "sigma1": np.eye(3), "mu2": np.zeros(3), "sigma2": np.eye(3)}
        with pytest.raises(ValueError, match=message):
            frechet_distance(**{**arguments, **change})


class TestInceptionScore:
    def test_extremes(self):
        assert inception_score(np.zeros((30, 10))) == pytest.approx(1, rel=1e-12)
        # Certain about every image and every class equally often: as many as there are classes, 0 log 0 included
        assert inception_score(np.tile(np.eye(10) * 1e4, (3, 1))) == pytest.approx(10, rel=1e-12)

    def test_splits_are_contiguous_and_the_last_may_be_short(self):
        logits = np.repeat(np.eye(4) * 1e3, 5, axis=0)  # five images of each class in turn
        assert inception_score(logits, split_size=5) == pytest.approx(1, rel=1e-12)
        assert inception_score(logits, split_size=15) == pytest.approx((3 + 1) / 2, rel=1e-12)

    def test_equals_torch_fidelity(self, rng):
        from torch_fidelity.metric_isc import isc_features_to_metric

        logits = (rng.standard_normal((120, 1008)) * 3).astype(np.float32)
        expected = isc_features_to_metric(torch.from_numpy(logits), splits=4, shuffle=False)
        assert inception_score(logits, split_size=30) == pytest.approx(expected["inception_score_mean"], rel=1e-10)

    def test_errors(self):
        with pytest.raises(ValueError, match="`split_size` has to be at least 1, but is 0"):
            inception_score(np.zeros((3, 10)), split_size=0)
        with pytest.raises(ValueError, match="`logits` has to hold at least 1 rows, but holds 0"):
            inception_score(np.zeros((0, 10)))


class TestKernelDistance:
    @pytest.mark.parametrize(("subsets", "size"), [(1, 60), (10, 20)])
    def test_equals_torch_fidelity(self, rng, subsets, size):
        from torch_fidelity.metric_kid import kid_features_to_metric

        samples = rng.standard_normal((60, 32))
        reference = rng.standard_normal((80, 32)) + 0.2
        expected = kid_features_to_metric(
            torch.from_numpy(samples),
            torch.from_numpy(reference),
            kid_subsets=subsets,
            kid_subset_size=size,
            verbose=False,
        )
        mean, std = kernel_distance(samples, reference, num_subsets=subsets, subset_size=size)
        assert mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-9)
        assert std == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-9, abs=1e-15)

    def test_equals_the_definition(self, rng):
        x, y = rng.standard_normal((2, 6, 3))

        def kernel(a, b):
            return (a @ b / 3 + 1) ** 3

        pairs = [(i, j) for i in range(6) for j in range(6)]
        within = sum(kernel(z[i], z[j]) for z in (x, y) for i, j in pairs if i != j) / 30
        across = sum(kernel(x[i], y[j]) for i, j in pairs) / 36
        mean, _ = kernel_distance(x, y, num_subsets=1, subset_size=6)
        assert mean == pytest.approx(within - 2 * across, rel=1e-12)

    def test_errors(self):
        with pytest.raises(ValueError, match=r"`subset_size` has to be between 2 and .*, but is 1000"):
            kernel_distance(np.zeros((10, 3)), np.zeros((2000, 3)))
        with pytest.raises(ValueError, match="`num_subsets` has to be at least 1, but is 0"):
            kernel_distance(np.zeros((10, 3)), np.zeros((10, 3)), num_subsets=0, subset_size=5)
        with pytest.raises(ValueError, match="equal width, but they have 3 and 4"):
            kernel_distance(np.zeros((10, 3)), np.zeros((10, 4)), subset_size=5)


def brute_force_precision_recall(samples, reference, neighborhood, dtype):
    """Double loop over scalars of `dtype`; `sum` in float32, as the features' products are."""

    def distance(u, v):
        norm_u, norm_v = (np.float32(sum(np.float32(dtype(a) * dtype(a)) for a in x)).astype(dtype) for x in (u, v))
        dot = np.float32(sum(np.float32(dtype(a)) * np.float32(dtype(b)) for a, b in zip(u, v))).astype(dtype)
        return max(dtype(dtype(norm_u - dtype(2) * dot) + norm_v), dtype(0))

    def radii(features):
        return [sorted(distance(u, v) for v in features)[neighborhood] for u in features]

    def share_inside(points, centres, centre_radii, swap):
        inside = 0
        for p in points:
            inside += any(
                (distance(p, c) if swap else distance(c, p)) <= r for c, r in zip(centres, centre_radii, strict=True)
            )
        return inside / len(points)

    # The reference comes first in every distance: in float16 (|u|^2 - 2 u.v) + |v|^2 is not symmetric
    precision = share_inside(samples, reference, radii(reference), swap=False)
    recall = share_inside(reference, samples, radii(samples), swap=True)
    return precision, recall


class TestPrecisionRecall:
    @pytest.mark.parametrize("block_size", [100, 7])
    @pytest.mark.parametrize("neighborhood", [1, 3])
    @pytest.mark.parametrize(
        ("scale", "dtype"), [(1.0, np.float16), (1000.0, np.float32)], ids=["float16", "overflow to float32"]
    )
    def test_equals_brute_force(self, rng, block_size, neighborhood, scale, dtype):
        # Eighths with norms large enough for float16 to round distances, small enough for float32 sums to be exact
        samples = np.round((rng.standard_normal((40, 6)) * 1.2 + 4) * 8) / 8 * scale
        reference = np.round((rng.standard_normal((31, 6)) + 3) * 8) / 8 * scale
        expected = brute_force_precision_recall(samples, reference, neighborhood, dtype)
        result = precision_recall(samples, reference, neighborhood=neighborhood, block_size=block_size)
        assert result == expected
        assert 0 < expected[0] < 1 and 0 < expected[1] < 1

    def test_float16_comes_first(self):
        # Balls of radius 90; the samples are 90.02 away, which float16 rounds to 90, and the rim counts as inside
        reference = np.array([[0.0, 0.0], [0.0, 90.0]])
        samples = np.array([[0.0, -90.02], [90.02, 0.0]])
        assert precision_recall(samples, reference, neighborhood=1)[0] == 1.0
        assert precision_recall(samples * 10, reference * 10, neighborhood=1)[0] == 0.0  # float16 overflows

    def test_known_answers(self, rng):
        features = rng.standard_normal((50, 8))
        assert precision_recall(features, features) == (1.0, 1.0)
        assert precision_recall(features, features + 100) == (0.0, 0.0)
        # Samples of a single mode: precise, and the far mode is not recalled
        two_modes = np.concatenate([features, features + 30])
        precision, recall = precision_recall(features[:25], two_modes)
        assert precision == 1.0 and 0.25 <= recall <= 0.5

    def test_agrees_with_torch_fidelity_in_float32(self, rng):
        from torch_fidelity.metric_prc import prc_features_to_metric

        samples = (rng.standard_normal((200, 16)) * 400 + 30).astype(np.float32)  # overflows float16
        reference = (rng.standard_normal((150, 16)) * 400).astype(np.float32)
        expected = prc_features_to_metric(
            torch.from_numpy(samples), torch.from_numpy(reference), prc_neighborhood=3, verbose=False
        )
        assert precision_recall(samples, reference) == pytest.approx((expected["precision"], expected["recall"]))

    def test_errors(self):
        with pytest.raises(ValueError, match=r"`neighborhood` has to be at least 1 and below .*, but is 3"):
            precision_recall(np.zeros((3, 2)), np.zeros((10, 2)))
        with pytest.raises(ValueError, match="`block_size` has to be at least 1, but is 0"):
            precision_recall(np.zeros((5, 2)), np.zeros((5, 2)), block_size=0)


@pytest.mark.parametrize("function", [kernel_distance, precision_recall])
@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (np.zeros((5, 2), dtype=np.uint8), r"`reference` has to be floating point features .*, but is uint8"),
        (np.zeros(5), r"`reference` has to be floating point features of shape \[N, D\]"),
        (np.zeros((0, 2)), "`reference` has to hold at least 2 rows, but holds 0"),
        (np.array([[0.0, 1.0], [np.nan, 0.0]]), "`reference` has to be finite, but row 1 holds NaN or infinity"),
    ],
)
def test_features_that_are_refused(function, reference, message):
    with pytest.raises(ValueError, match=message):
        function(np.zeros((5, 2)), reference)
