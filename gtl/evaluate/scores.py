"""Scores of generated pictures from features: tensors in, numbers out.

torchmetrics computes what it has: the Frechet distance, the inception score and the cosines of a CLIP score. Its kernel
distance is of random subsets, equally many on both sides, and not of all samples. What it has of none is every sample's
influence, from which intervals and paired differences follow; those are computed here.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from gtl.config.metrics import METRICS
from gtl.evaluate.estimate import Estimate, estimate, estimate_share
from gtl.evaluate.features import checked, checked_units
from gtl.evaluate.memorization import memorization
from gtl.evaluate.neighbours import coverage, density, precision, recall
from gtl.types import UserError

FEW = 2000
"""Samples below which a Frechet distance says more about their number than about the model."""
BLOCK = 1024
"""Rows whose kernel is in memory at once."""


def score(name: str, features: Mapping[str, Tensor]) -> Estimate:
    """A metric of `SCORES`, from whatever features there are, by the names that the table of metrics gives them.

    Raises:
        UserError: features that it needs are missing or wrong.
    """
    needs = METRICS[name].needs
    if missing := [part for part in needs if part not in features]:
        raise UserError(f"{name}: no {' and no '.join(missing)}; given are {', '.join(features) or 'no features'}")
    return SCORES[name](**{part: features[part] for part in needs})


def fid(real: Tensor, fake: Tensor) -> Estimate:
    """Frechet distance of the Gaussians with the sets' means and covariances (Heusel et al. 2017, arXiv 1706.08500).

    The value is biased upwards, by an amount that depends on the model and shrinks with the number of samples (Chong
    and Forsyth 2020, arXiv 1911.07023). The interval is about what other draws of as many samples would give. It does
    not cover that bias: values of different numbers of samples do not compare.

    Args:
        real: Features [N, D] of real images.
        fake: Features [M, D] of generated ones.

    Raises:
        UserError: fewer than 100 samples on a side, NaN or infinity, or other numbers of features.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    real, fake = checked("fid", real=real, fake=fake)
    distance = FrechetInceptionDistance(_Features(real.shape[1])).set_dtype(real.dtype)
    distance.update(real, real=True)
    distance.update(fake, real=False)
    value = max(0.0, float(distance.compute()))  # rounding of equal sets may leave it below
    shift = fake.mean(dim=0) - real.mean(dim=0)
    real, fake = real - real.mean(dim=0), fake - fake.mean(dim=0)
    of_real, of_fake = (rows.square().sum(dim=1) * len(rows) / (len(rows) - 1) for rows in (real, fake))
    real_root, fake_root = _root(_factors(real), _factors(fake))
    of_real, of_fake = of_real - real_root, of_fake - fake_root
    note = "the interval does not cover the bias of few samples"
    if min(len(real), len(fake)) < FEW:
        note = f"fewer than {FEW:,} samples: kid is the number to read; {note}"
    return estimate("fid", value, of_fake + 2 * fake @ shift, of_real - 2 * real @ shift, note=note)


class _Features(torch.nn.Identity):
    """Stands for the network where torchmetrics would extract features: they are there."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width


def _factors(centred: Tensor) -> tuple[Tensor, Tensor]:
    # Q and A with rows / sqrt(N - 1) = Q A, so that their covariance is A'A.
    q, r = torch.linalg.qr(centred)
    return q, r / (len(centred) - 1) ** 0.5


def _root(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Each row's share, on either side, in the trace of the root of the product of two covariances: their mean is it.

    For covariances A'A and B'B that trace is the sum of the singular values s of AB' = U s V', which exist for fewer
    samples than features too. Its derivative by A'A is T / 2 with A T A' = U s U', so that a row q A sqrt(N - 1) has
    the share N q U s U' q'. U and s come from the eigenvectors of the smaller of AB'BA' and BA'AB': many times faster
    than the singular vectors, and exact to half the digits of float64.
    """
    if len(first[1]) > len(second[1]):
        right, left = _root(second, first)
        return left, right
    (q, a), (p, b) = first, second
    product = a @ b.T
    squares, u = torch.linalg.eigh(product @ product.T)
    s = squares.clamp(min=0).sqrt()
    floor = s.max() * torch.finfo(s.dtype).eps + torch.finfo(s.dtype).tiny
    left = (q @ u).square() @ s
    right = (p @ (product.T @ u)).square() @ (1 / s.clamp(min=floor))  # the columns are s V
    return len(q) * left, len(p) * right


def kid(real: Tensor, fake: Tensor) -> Estimate:
    """Unbiased squared MMD with the kernel (x'y / D + 1)^3 of ALL samples (Binkowski et al. 2018, arXiv 1801.01401).

    Its mean is 0, and it is often below, where the two sets come from one distribution. There the interval is rather
    too wide, elsewhere it is exact in the limit.

    Args:
        real: Features [N, D] of real images.
        fake: Features [M, D] of generated ones.

    Raises:
        UserError: fewer than 3 samples on a side, NaN or infinity, or other numbers of features.
    """
    real, fake = checked("kid", real=real, fake=fake)
    return _mmd("kid", real, fake, lambda products: (products / real.shape[1] + 1) ** 3)


def cmmd(real: Tensor, fake: Tensor) -> Estimate:
    """1,000 times the squared MMD with a Gaussian kernel of sigma 10 on unit vectors (arXiv 2401.09603).

    Unbiased, as the paper writes it. Its code leaves the pairs of a sample with itself in, which adds about
    1,000 (1 - mean kernel) (1 / N + 1 / M): next to nothing for its 30,000 images, most of the value for a few dozen.

    Args:
        real: CLIP image embeddings [N, D] of real images, of any length.
        fake: Of generated ones, [M, D].

    Raises:
        UserError: fewer than 3 samples on a side, NaN, infinity or zeros, or other numbers of features.
    """
    real, fake = checked_units("cmmd", real=real, fake=fake)
    # |x - y|^2 / (2 * 10^2) = (1 - x'y) / 100 on unit vectors
    return _mmd("cmmd", real, fake, lambda products: torch.exp((products - 1) / 100), scale=1000)


def _mmd(metric: str, real: Tensor, fake: Tensor, kernel: Callable[[Tensor], Tensor], scale: float = 1.0) -> Estimate:
    # Influences are those of leaving a sample out, the jackknife's: (N - 1) (value - value without it).
    to_fake, to_real = _kernel_means(real, fake, kernel)
    value, influence = -2 * to_fake.mean(), []
    for own, across in ((real, to_fake), (fake, to_real)):
        number = len(own)
        alone = kernel(own.square().sum(dim=1))
        within = (_kernel_means(own, own, kernel)[0] * number - alone) / (number - 1)
        value += within.mean()
        influence.append(scale * 2 * ((number - 1) / (number - 2) * within - across))
    return estimate(metric, scale * float(value), influence[1], influence[0])


def _kernel_means(x: Tensor, y: Tensor, kernel: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Each x's mean kernel to all y, and each y's to all x; a block of rows at a time."""
    rows, columns = x.new_empty(len(x)), y.new_zeros(len(y))
    for start in range(0, len(x), BLOCK):
        block = kernel(x[start : start + BLOCK] @ y.T)
        rows[start : start + BLOCK] = block.mean(dim=1)
        columns += block.sum(dim=0)
    return rows, columns / len(x)


def inception_score(logits: Tensor) -> Estimate:
    """exp of the mean KL divergence of a picture's classes from all pictures' (Salimans et al. 2016, arXiv 1606.03498).

    Of all pictures at once. Papers give the mean of 10 groups of 5,000 each; a group of few lowers the score, so only
    values of as many pictures compare.

    Args:
        logits: A classifier's [M, C] of generated images.

    Raises:
        UserError: fewer than 100 pictures, NaN or infinity.
    """
    from torchmetrics.image.inception import InceptionScore

    (logits,) = checked("inception_score", logits=logits)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=()):  # it shuffles pictures before it groups them
        warnings.simplefilter("ignore")  # that pictures are kept, and that one group has no deviation
        groups = InceptionScore(_Features(logits.shape[1]), splits=1)
        groups.update(logits)
        value = float(groups.compute()[0])
    log_classes = logits.log_softmax(dim=1)
    log_all = log_classes.logsumexp(dim=0) - math.log(len(logits))
    divergence = (log_classes.exp() * (log_classes - log_all)).sum(dim=1)
    return estimate("inception_score", value, value * divergence, note="compares only with as many pictures")


def clip_score(image_features: Tensor, text_features: Tensor) -> Estimate:
    """Mean of 100 max(cos(picture, prompt), 0) (Hessel et al. 2021, arXiv 2104.08718, whose factor is 2.5).

    Args:
        image_features: CLIP image embeddings [M, D], of any length.
        text_features: CLIP text embeddings [M, D] of their prompts.

    Raises:
        UserError: none, other numbers of rows or features, NaN, infinity or zeros.
    """
    from torchmetrics.functional.regression import cosine_similarity

    images, texts = checked_units("clip_score", image_features=image_features, text_features=text_features)
    if len(images) != len(texts):
        raise UserError(f"clip_score: {len(images)} images and {len(texts)} texts; expected a text for each image")
    scores = 100 * cosine_similarity(images, texts, reduction="none").double().clamp(min=0)
    return estimate("clip_score", float(scores.mean()), scores)


def diversity(fake: Tensor) -> Estimate:
    """Mean cosine distance of two generated images: 0 where all are alike.

    Args:
        fake: Features [M, D]. Of images of one prompt it is the model's diversity; of many, the prompts' too.

    Raises:
        UserError: fewer than 3, NaN, infinity or zeros.
    """
    (fake,) = checked_units("diversity", fake=fake)
    number = len(fake)
    distances = 1 - (fake @ fake.sum(dim=0) - 1) / (number - 1)
    return estimate("diversity", float(distances.mean()), 2 * (number - 1) / (number - 2) * distances)


def prompt_accuracy(right: Tensor) -> Estimate:
    """Share of generated images that show what their prompts say.

    Args:
        right: [M, 1], 1 or 0 for each image.

    Raises:
        UserError: there are none.
    """
    (rows,) = checked("prompt_accuracy", right=right)
    return estimate_share("prompt_accuracy", float(rows.mean()), rows[:, 0], len(rows))


SCORES: dict[str, Callable[..., Estimate]] = {
    "fid": fid,
    "kid": kid,
    "inception_score": inception_score,
    "clip_score": clip_score,
    "cmmd": cmmd,
    "precision": precision,
    "recall": recall,
    "density": density,
    "coverage": coverage,
    "diversity": diversity,
    "prompt_accuracy": prompt_accuracy,
    "memorization": lambda **sets: memorization(**sets).rank,
}
"""Metric -> its function; what each needs is in `gtl.config.metrics`."""
