# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""The distances between two sets of features, as ADM's evaluator defines them: pure functions on arrays.

Arrays may be memory-mapped: every function walks through them in chunks, so that many features need little memory.
"""

import numpy as np
import torch


# Rows that are held in float64 at a time: 4,096 x 2,048 are 64 MiB.
CHUNK = 4096


def check_features(name: str, features: np.ndarray, minimum: int = 1) -> np.ndarray:
    """
    Refuses what is not a finite matrix of floats with enough rows.

    Args:
        name (`str`):
            The argument's name, for the message.
        features (`np.ndarray`):
            The candidate, expected `[N, D]`.
        minimum (`int`, defaults to `1`):
            The smallest acceptable `N`.

    Returns:
        `np.ndarray`: the features, not copied.

    Raises:
        `ValueError`: for another number of dimensions, another dtype, fewer rows, or NaN or infinity.
    """
    features = np.asanyarray(features)
    if features.ndim != 2 or not np.issubdtype(features.dtype, np.floating):
        raise ValueError(
            f"`{name}` has to be floating point features of shape [N, D], but is {features.dtype} of shape "
            f"{list(features.shape)}."
        )
    if len(features) < minimum:
        raise ValueError(f"`{name}` has to hold at least {minimum} rows, but holds {len(features)}.")
    for start in range(0, len(features), CHUNK):
        if not np.isfinite(features[start : start + CHUNK]).all():
            rows = np.flatnonzero(~np.isfinite(features[start : start + CHUNK]).all(axis=1))
            raise ValueError(f"`{name}` has to be finite, but row {start + rows[0]} holds NaN or infinity.")
    return features


def feature_statistics(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    Mean and unbiased covariance (divisor `N - 1`) in float64, in two passes over the features.

    Args:
        features (`np.ndarray`):
            Features `[N, D]`, `N >= 2`.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: mean `[D]` and covariance `[D, D]`.

    Raises:
        `ValueError`: if the features are not finite floats `[N, D]` with `N >= 2`.
    """
    features = check_features("features", features, minimum=2)
    count, dim = features.shape
    chunks = range(0, count, CHUNK)
    mean = sum(features[start : start + CHUNK].sum(axis=0, dtype=np.float64) for start in chunks) / count
    covariance = np.zeros((dim, dim))
    for start in chunks:
        centred = features[start : start + CHUNK].astype(np.float64) - mean
        covariance += centred.T @ centred
    return mean, covariance / (count - 1)


def _covariance_factor(name: str, sigma: np.ndarray) -> np.ndarray:
    """A square `A` with `A A^T = sigma`. Directions that `sigma` does not have are zero columns, which come first."""
    if not np.allclose(sigma, sigma.T, rtol=1e-5, atol=1e-6 * np.abs(sigma).max()):
        raise ValueError(f"`{name}` has to be a symmetric matrix.")
    variance = np.diag(sigma)
    if variance.min() < 0:
        raise ValueError(f"`{name}` has to have a non-negative diagonal, but is {variance.min():.3g}.")
    # Scaled to unit diagonal the eigenvalues of features with very different variances keep their relative accuracy
    # (those of a diagonal matrix are exact, however close to singular it is).
    scale = np.sqrt(np.where(variance > 0, variance, 1.0))
    eigenvalues, vectors = np.linalg.eigh((sigma + sigma.T) / 2 / scale[:, None] / scale)
    if eigenvalues[0] < -1e-3 * max(eigenvalues[-1], 1.0):
        raise ValueError(
            f"`{name}` has to be positive semi-definite, but has an eigenvalue of {eigenvalues[0]:.3g} (of a unit "
            "diagonal)."
        )
    # A zero eigenvalue comes out as rounding noise of either sign, and the root would turn 1e-16 into 1e-8. The noise
    # stays below 8 eps of the largest eigenvalue (4,000 random singular matrices), and where it is larger, in matrices
    # that were summed up with less care, the negative ones show it.
    noise = max(8 * np.finfo(np.float64).eps * eigenvalues[-1], -2 * eigenvalues[0])
    eigenvalues = np.where(eigenvalues > noise, eigenvalues, 0.0)
    return scale[:, None] * vectors * np.sqrt(eigenvalues)


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    r"""
    Squared Frechet distance of two Gaussians (Heusel et al. 2017, arXiv 1706.08500, equation 6):
    `|mu1 - mu2|^2 + tr(S1) + tr(S2) - 2 tr((S1^1/2 S2 S1^1/2)^1/2)`.

    With any factors `S1 = A A^T` and `S2 = B B^T` the last trace is the sum of the singular values of `A^T B`, and the
    three traces together are `min |A U - B|^2` over orthogonal `U` (Procrustes). That form takes no root of a rounded
    eigenvalue and subtracts no large numbers, so singular matrices and nearly equal Gaussians keep their accuracy,
    where `eigvalsh` of the product loses half of the digits. Everything is float64.

    Args:
        mu1 (`np.ndarray`), mu2 (`np.ndarray`):
            Means `[D]`.
        sigma1 (`np.ndarray`), sigma2 (`np.ndarray`):
            Covariances `[D, D]`, symmetric and positive semi-definite; singular ones are fine.

    Returns:
        `float`: the distance, at least 0.

    Raises:
        `ValueError`: for mismatched shapes, NaN or infinity, or a matrix that is no covariance.
    """
    arrays = {"mu1": mu1, "sigma1": sigma1, "mu2": mu2, "sigma2": sigma2}
    arrays = {name: np.asarray(array, dtype=np.float64) for name, array in arrays.items()}
    mu1, sigma1, mu2, sigma2 = arrays.values()
    for name, array in arrays.items():
        expected = mu1.shape if name.startswith("mu") else mu1.shape * 2
        if mu1.ndim != 1 or array.shape != expected or array.size == 0:
            raise ValueError(
                f"`{name}` has to be a mean [D] or a covariance [D, D], but has shape {list(array.shape)}."
            )
        if not np.isfinite(array).all():
            raise ValueError(f"`{name}` has to be finite, but holds NaN or infinity.")
    factor1, factor2 = _covariance_factor("sigma1", sigma1), _covariance_factor("sigma2", sigma2)
    # Columns that are zero in both (fewer samples than dimensions) change nothing.
    columns = slice(int(np.argmax((factor1 != 0).any(axis=0) | (factor2 != 0).any(axis=0))), None)
    factor1, factor2 = factor1[:, columns], factor2[:, columns]
    left, _, right = np.linalg.svd(factor1.T @ factor2)
    residual = factor1 @ (left @ right) - factor2
    return float(np.sum((mu1 - mu2) ** 2) + np.sum(residual**2))


def inception_score(logits: np.ndarray, split_size: int = 5000) -> float:
    """
    Inception Score (Salimans et al. 2016, arXiv 1606.03498) as ADM takes it: `exp(mean KL(p(y|x) || p(y)))` of
    contiguous splits in file order, the last one possibly shorter, averaged over the splits.

    Args:
        logits (`np.ndarray`):
            Logits `[N, classes]`; ADM uses all 1,008 of them, without bias.
        split_size (`int`, defaults to `5000`):
            Images in a split.

    Returns:
        `float`: the score, between 1 and the number of classes.

    Raises:
        `ValueError`: if the logits are not finite floats `[N, classes]`, or `split_size` is below 1.
    """
    logits = check_features("logits", logits)
    if split_size < 1:
        raise ValueError(f"`split_size` has to be at least 1, but is {split_size}.")
    scores = []
    for start in range(0, len(logits), split_size):
        log_p = torch.from_numpy(logits[start : start + split_size].astype(np.float64)).log_softmax(dim=1)
        p = log_p.exp()
        divergence = (p * (log_p - p.mean(dim=0).log())).nan_to_num_(nan=0.0).sum(dim=1)  # 0 log 0 = 0
        scores.append(divergence.mean().exp().item())
    return float(np.mean(scores))


def kernel_distance(
    samples: np.ndarray, reference: np.ndarray, num_subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> tuple[float, float]:
    """
    Kernel Inception Distance (Binkowski et al. 2018, arXiv 1801.01401): the unbiased squared MMD with the kernel
    `(x.y / D + 1)^3`, averaged over random subsets. The subsets are those of torch-fidelity with its default seed.

    Args:
        samples (`np.ndarray`):
            Features `[N, D]`.
        reference (`np.ndarray`):
            Features `[M, D]`.
        num_subsets (`int`, defaults to `100`):
            How many subsets.
        subset_size (`int`, defaults to `1000`):
            Rows drawn from either side for one subset, between 2 and `min(N, M)`.
        seed (`int`, defaults to `2020`):
            Seed of the subsets.

    Returns:
        `tuple[float, float]`: mean and standard deviation over the subsets. The mean can be slightly negative.

    Raises:
        `ValueError`: for features that are not finite floats of equal width, or a size or number out of range.
    """
    samples, reference = _check_pair(samples, reference, minimum=2)
    if not 2 <= subset_size <= min(len(samples), len(reference)):
        raise ValueError(
            f"`subset_size` has to be between 2 and the number of features (`samples` {len(samples)}, `reference` "
            f"{len(reference)}), but is {subset_size}."
        )
    if num_subsets < 1:
        raise ValueError(f"`num_subsets` has to be at least 1, but is {num_subsets}.")

    def kernel_sum(a: np.ndarray, b: np.ndarray, without_diagonal: bool) -> float:
        kernel = (a @ b.T / a.shape[1] + 1) ** 3
        return kernel.sum() - (np.trace(kernel) if without_diagonal else 0.0)

    # The legacy generator's stream is frozen for ever and it is what torch-fidelity draws from.
    rng = np.random.RandomState(seed)
    n = subset_size
    distances = []
    for _ in range(num_subsets):
        # Rows are gathered in sorted order (the sums do not care): a memory-mapped file is then read forwards.
        x = samples[np.sort(rng.choice(len(samples), n, replace=False))].astype(np.float64)
        y = reference[np.sort(rng.choice(len(reference), n, replace=False))].astype(np.float64)
        within = kernel_sum(x, x, True) + kernel_sum(y, y, True)
        distances.append(within / (n * (n - 1)) - 2 * kernel_sum(x, y, False) / n**2)
    return float(np.mean(distances)), float(np.std(distances))


def precision_recall(
    samples: np.ndarray,
    reference: np.ndarray,
    neighborhood: int = 3,
    block_size: int = 10_000,
    device: str | torch.device | None = None,
) -> tuple[float, float]:
    """
    Improved precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991) as ADM takes them: the share of samples
    inside the reference's manifold, and of the reference inside the samples'. A manifold is the union of balls around
    its features; a ball reaches to the `neighborhood`-th neighbour (the feature itself not counted).

    As in ADM, squared distances are first taken in float16: features, their squares, the two squared norms, the dot
    products and their sum are each rounded to float16 (sums accumulate in float32). At Inception's norms that is a
    resolution of about 0.25 in the squared distance, so ties are common and count as inside. A block of
    `block_size x block_size` distances of which one overflows is taken in float32 as a whole.

    Args:
        samples (`np.ndarray`):
            Features `[N, D]`.
        reference (`np.ndarray`):
            Features `[M, D]`; 10,000 in ADM's reference batches.
        neighborhood (`int`, defaults to `3`):
            Neighbours that fix a ball's radius, from 1 to `min(N, M) - 1`.
        block_size (`int`, defaults to `10000`):
            Rows and columns of distances held at a time, ADM's default; 10,000 take about 2 GB.
        device (`str` or `torch.device`, *optional*):
            Where the distances are computed; the CPU if not given.

    Returns:
        `tuple[float, float]`: precision and recall, in [0, 1].

    Raises:
        `ValueError`: for features that are not finite floats of equal width, or a number out of range.
    """
    samples, reference = _check_pair(samples, reference, minimum=2)
    if not 1 <= neighborhood < min(len(samples), len(reference)):
        raise ValueError(
            f"`neighborhood` has to be at least 1 and below the number of features (`samples` {len(samples)}, "
            f"`reference` {len(reference)}), but is {neighborhood}."
        )
    if block_size < 1:
        raise ValueError(f"`block_size` has to be at least 1, but is {block_size}.")

    def blocks(features: np.ndarray):
        for start in range(0, len(features), block_size):
            stop = min(start + block_size, len(features))
            yield slice(start, stop), torch.from_numpy(features[start:stop].astype(np.float32)).to(device)

    def radii(features: np.ndarray) -> torch.Tensor:
        result = []
        for _, rows in blocks(features):
            nearest = torch.empty(len(rows), 0, device=device)
            for _, columns in blocks(features):
                distances = _squared_distances(rows, columns).float()
                kept = min(neighborhood + 1, distances.shape[1])
                candidates = torch.cat([nearest, distances.topk(kept, largest=False).values], dim=1)
                kept = min(neighborhood + 1, candidates.shape[1])
                nearest = candidates.topk(kept, largest=False).values
            result.append(nearest[:, neighborhood])  # position 0 is the feature itself
        return torch.cat(result)

    sample_radii, reference_radii = radii(samples), radii(reference)
    sample_inside = torch.zeros(len(samples), dtype=torch.bool, device=device)
    reference_inside = torch.zeros(len(reference), dtype=torch.bool, device=device)
    for rows, reference_block in blocks(reference):
        for columns, sample_block in blocks(samples):
            distances = _squared_distances(reference_block, sample_block)
            sample_inside[columns] |= (distances <= reference_radii[rows, None]).any(dim=0)
            reference_inside[rows] |= (distances <= sample_radii[None, columns]).any(dim=1)
    return sample_inside.sum().item() / len(samples), reference_inside.sum().item() / len(reference)


def _squared_distances(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """`|rows|^2 - 2 rows.columns + |columns|^2`, at least 0: float16 if all are finite there, else float32."""
    for dtype in (torch.float16, torch.float32):
        u, v = rows.to(dtype), columns.to(dtype)
        norms_u, norms_v = ((x * x).float().sum(dim=1).to(dtype) for x in (u, v))
        distances = (u.float() @ v.float().T).to(dtype)
        distances.mul_(-2).add_(norms_u[:, None]).add_(norms_v).clamp_(min=0)
        if torch.isfinite(distances).all():
            break
    return distances


def _check_pair(samples: np.ndarray, reference: np.ndarray, minimum: int) -> tuple[np.ndarray, np.ndarray]:
    samples = check_features("samples", samples, minimum)
    reference = check_features("reference", reference, minimum)
    if samples.shape[1] != reference.shape[1]:
        raise ValueError(
            f"`samples` and `reference` have to have features of equal width, but they have {samples.shape[1]} and "
            f"{reference.shape[1]}."
        )
    return samples, reference
