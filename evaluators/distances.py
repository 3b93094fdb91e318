"""How far apart two sets of pictures are, and how many different ones a set has, in any feature space.

    fid     |mu_x - mu_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^(1/2))            Frechet distance of two Gaussians
    kid     unbiased MMD^2 under (<x, y> / d + 1)^3                        0 in the mean for equal distributions
    cmmd    1000 MMD^2 under exp(-|x - y|^2 / (2 10^2)), rows of length 1  biased, never below 0
    vendi   exp(H(eigenvalues of K / n)), K the cosines                    1 for n copies, n for n orthogonal ones

Features come from any scorer that has them (`features`), one row per picture; numbers of different feature extractors
cannot be compared, so say whose they are. The published FID and KID are of an Inception network, the published
CMMD of CLIP ViT-L/14 at 336 pixels. FID's bias falls with 1/n: use KID below ten thousand pictures.

All in float64.

Sources: Heusel et al. 1706.08500; Binkowski et al. 1801.01401; Jayasumana et al. 2401.09603; Friedman and Dieng
2210.02410.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn import functional

from evaluators.diversity import ImageFeatures
from mmalign.errors import UserError
from mmalign.progress import progress

BATCH = 256
ROWS = 1024  # of a kernel matrix at once
BANDWIDTH, CMMD_SCALE = 10.0, 1000.0

Kernel = Callable[[Tensor, Tensor], Tensor]


def features(space: ImageFeatures, images: Sequence[Image.Image]) -> Float[Tensor, "images width"]:
    """Where pictures lie in a scorer's feature space, in batches."""
    starts = progress(range(0, len(images), BATCH), "features")
    return torch.cat([space.image_features(images[start : start + BATCH]).double() for start in starts])


# --------------------------------------------------------------------------------------------------- two sets


def fid(x: Float[Tensor, "n width"], y: Float[Tensor, "m other"]) -> float:
    """Frechet distance of the Gaussians with the sets' means and (unbiased) covariances.

    tr (S_x S_y)^(1/2) is the sum of the roots of the eigenvalues of A S_y A with A = S_x^(1/2): that matrix is
    symmetric, so its eigenvalues are real.

    Raises:
        UserError: a set of fewer than two.
    """
    _check(x, y)
    x, y = x.double(), y.double()
    sx, sy = torch.cov(x.T).reshape(x.shape[1], -1), torch.cov(y.T).reshape(y.shape[1], -1)
    values, vectors = torch.linalg.eigh(sx)
    root = (vectors * _roots(values)) @ vectors.T
    middle = root @ sy @ root
    cross = _roots(torch.linalg.eigvalsh((middle + middle.T) / 2)).sum()
    distance = (x.mean(0) - y.mean(0)).square().sum() + sx.trace() + sy.trace() - 2 * cross
    return float(distance.clamp_min(0))


def _roots(values: Float[Tensor, " width"]) -> Float[Tensor, " width"]:
    """Square roots of eigenvalues; what is rounding is 0, for the root of 1e-16 is 1e-8."""
    rounding = values.max() * len(values) * torch.finfo(values.dtype).eps
    return values.where(values > rounding, torch.zeros_like(values)).sqrt()


@dataclass(frozen=True, kw_only=True, slots=True)
class Kid:
    """KID over random subsets: its mean and the standard deviation between them."""

    mean: float
    std: float


def kid(
    x: Float[Tensor, "n width"],
    y: Float[Tensor, "m other"],
    *,
    subsets: int = 100,
    size: int = 1000,
    seed: int = 0,
) -> Kid:
    """Unbiased MMD^2 of random subsets, drawn without replacement.

    Args:
        subsets: how many.
        size: of each, from either set; of a smaller set all.

    Raises:
        UserError: a set of fewer than two.
    """
    _check(x, y)
    x, y = x.double(), y.double()
    size = min(size, len(x), len(y))
    if size == len(x) == len(y):
        subsets = 1  # they would all be the same
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(subsets):
        rows, columns = (generator.choice(len(s), size, replace=False) for s in (x, y))
        values.append(mmd2(x[torch.from_numpy(rows)], y[torch.from_numpy(columns)], polynomial, unbiased=True))
    return Kid(mean=float(np.mean(values)), std=float(np.std(values)))


def cmmd(x: Float[Tensor, "n width"], y: Float[Tensor, "m other"]) -> float:
    """CMMD, of rows that are brought to length 1.

    Raises:
        UserError: a set of fewer than two.
    """
    _check(x, y)
    x, y = functional.normalize(x.double(), dim=-1), functional.normalize(y.double(), dim=-1)
    return CMMD_SCALE * max(0.0, mmd2(x, y, gaussian, unbiased=False))


def mmd2(x: Float[Tensor, "n width"], y: Float[Tensor, "m width"], kernel: Kernel, *, unbiased: bool) -> float:
    """Squared maximum mean discrepancy: mean k(x, x') + mean k(y, y') - 2 mean k(x, y).

    Args:
        unbiased: pairs of a row with itself are left out, so the mean over draws is exact and single values may be
            negative; otherwise they count, and the value is never below 0 but for rounding.
    """
    within = sum(_mean(s, s, kernel, without_diagonal=unbiased) for s in (x, y))
    return within - 2 * _mean(x, y, kernel, without_diagonal=False)


def polynomial(x: Float[Tensor, "n width"], y: Float[Tensor, "m width"]) -> Float[Tensor, "n m"]:
    """KID's kernel: (<x, y> / width + 1)^3."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def gaussian(x: Float[Tensor, "n width"], y: Float[Tensor, "m width"]) -> Float[Tensor, "n m"]:
    """CMMD's kernel: exp(-|x - y|^2 / (2 BANDWIDTH^2)).

    Distances are of unit vectors, so the kernel hardly leaves 1 and differences are in the last digits: one by one,
    not through a matrix product.
    """
    squared = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()
    return torch.exp(-squared / (2 * BANDWIDTH**2))


def _mean(x: Tensor, y: Tensor, kernel: Kernel, *, without_diagonal: bool) -> float:
    total = 0.0
    for start in range(0, len(x), ROWS):  # a kernel matrix of 30,000 pictures would be 7 GB
        part = kernel(x[start : start + ROWS], y)
        total += float(part.sum())
        if without_diagonal:
            total -= float(part.diagonal(offset=start).sum())
    return total / (len(x) * (len(y) - without_diagonal))


# ------------------------------------------------------------------------------------------------------ one set


def vendi(x: Float[Tensor, "images width"]) -> float:
    """Vendi score: how many different pictures there are, by cosines.

    The eigenvalues of K / n are those of X^T X / n, whichever is smaller, for X with rows of length 1.

    Raises:
        UserError: there is no picture.
    """
    if not len(x):
        raise UserError("a Vendi score needs a picture")
    x = functional.normalize(x.double(), dim=-1)
    gram = (x @ x.T if len(x) <= x.shape[1] else x.T @ x) / len(x)
    values = torch.linalg.eigvalsh(gram).clamp_min(0)
    return float(torch.special.entr(values).sum().exp())


def _check(x: Tensor, y: Tensor) -> None:
    for name, s in (("first", x), ("second", y)):
        if len(s) < 2:
            raise UserError(f"the {name} set has {len(s)} pictures, a distance of sets needs two")
        if not bool(s.isfinite().all()):
            raise UserError(f"the {name} set has features that are not finite")
    if x.shape[1] != y.shape[1]:
        cause = f"features of {x.shape[1]} and of {y.shape[1]} numbers are of different extractors"
        raise UserError(cause)
