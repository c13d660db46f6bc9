"""Scores against closed forms, plain loops in float64; intervals against simulation."""

import inspect
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gtl.config.metrics import METRICS, metric, of_pictures
from gtl.evaluate import neighbours, scores
from gtl.evaluate.estimate import Estimate, difference, estimate, estimate_share
from gtl.evaluate.intervals import student_t, wilson
from gtl.evaluate.scores import (
    SCORES,
    clip_score,
    cmmd,
    coverage,
    density,
    diversity,
    fid,
    inception_score,
    kid,
    precision,
    recall,
    score,
)
from gtl.types import UserError

Array = np.ndarray
SETS = {
    "fid": (fid, 120, 100),
    "kid": (kid, 9, 12),
    "cmmd": (cmmd, 9, 12),
    "precision": (precision, 20, 30),
    "recall": (recall, 20, 30),
    "density": (density, 20, 30),
    "coverage": (coverage, 20, 30),
}


def normal(number: int, width: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> Tensor:
    return torch.randn(number, width, generator=torch.Generator().manual_seed(seed)) * scale + shift


def exact(number: int, mean: Tensor, covariance: Tensor, seed: int) -> Tensor:
    """Samples that have this mean and covariance, not only in expectation."""
    raw = normal(number, len(mean), seed).double()
    raw = raw - raw.mean(dim=0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(raw.T.cov()), raw.T, upper=False)
    return (torch.linalg.cholesky(covariance) @ white).T + mean


def loops_fid(real: Array, fake: Array, of_real: Array | None = None, of_fake: Array | None = None) -> float:
    """With weights of the rows, which sum to 1."""
    sets = ((real, of_real), (fake, of_fake))

    def root(matrix: Array) -> Array:
        values, vectors = np.linalg.eigh(matrix)
        return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T

    means = [np.average(rows, axis=0, weights=weights) for rows, weights in sets]
    a, b = (np.cov(x.T, aweights=w, ddof=0) * len(x) / (len(x) - 1) for x, w in sets)
    inner = np.linalg.eigvalsh(root(a) @ b @ root(a))
    shift = means[0] - means[1]
    return shift @ shift + np.trace(a) + np.trace(b) - 2 * np.sqrt(np.clip(inner, 0, None)).sum()


def loops_mmd(real: Array, fake: Array, kernel: Callable[[Array, Array], float]) -> float:
    def within(rows: Array) -> float:
        return float(np.mean([kernel(x, y) for i, x in enumerate(rows) for j, y in enumerate(rows) if i != j]))

    return within(real) + within(fake) - 2 * float(np.mean([kernel(x, y) for x in real for y in fake]))


def loops_kid(real: Array, fake: Array) -> float:
    return loops_mmd(real, fake, lambda x, y: (x @ y / len(x) + 1) ** 3)


def loops_cmmd(real: Array, fake: Array) -> float:
    real, fake = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (real, fake))
    return 1000 * loops_mmd(real, fake, lambda x, y: math.exp(-((x - y) @ (x - y)) / (2 * 10**2)))


def holds(centres: Array, points: Array, k: int) -> Array:
    table = np.zeros((len(centres), len(points)), bool)
    for i, centre in enumerate(centres):
        radius = sorted(np.linalg.norm(centre - other) for j, other in enumerate(centres) if j != i)[k - 1]
        table[i] = [np.linalg.norm(centre - point) <= radius for point in points]
    return table


LOOPS: dict[str, Callable[[Array, Array], float]] = {
    "fid": loops_fid,
    "kid": loops_kid,
    "cmmd": loops_cmmd,
    "precision": lambda real, fake: holds(real, fake, 3).any(axis=0).mean(),
    "recall": lambda real, fake: holds(fake, real, 3).any(axis=0).mean(),
    "density": lambda real, fake: holds(real, fake, 5).sum(axis=0).mean() / 5,
    "coverage": lambda real, fake: holds(real, fake, 5).any(axis=1).mean(),
}


@pytest.mark.parametrize("name", SETS)
def test_a_score_is_what_plain_loops_say(name: str) -> None:
    function, num_real, num_fake = SETS[name]
    for seed, (shift, scale) in enumerate(((0.0, 1.0), (0.4, 0.8), (-0.3, 1.3))):
        real, fake = normal(num_real, 6, seed, 0.2), normal(num_fake, 6, seed + 9, 0.2 + shift, scale)
        found = function(real, fake)
        expected = LOOPS[name](real.double().numpy(), fake.double().numpy())
        assert found.value == pytest.approx(expected, rel=1e-8)
        assert (found.metric, found.num_real, found.num_fake) == (name, num_real, num_fake)
        assert found.low is not None and found.high is not None and found.low <= found.value <= found.high


@pytest.mark.parametrize("name", ["kid", "cmmd", "recall", "coverage", "diversity"])
def test_influences_are_those_of_leaving_a_sample_out(name: str) -> None:
    function, number, other = SETS.get(name, (lambda real, fake: diversity(fake), 20, 30))
    real, fake = normal(number, 5, 0), normal(other, 5, 1, 0.3)
    whole = function(real, fake)
    parts = {"fake": (whole.fake, lambda rest: function(real, fake[rest]), other)}
    if whole.real is not None:
        parts["real"] = whole.real, lambda rest: function(real[rest], fake), number
    for influence, without, count in parts.values():
        left_out = [without([j for j in range(count) if j != i]).value for i in range(count)]
        expected = (count - 1) * (whole.value - torch.tensor(left_out, dtype=torch.float64))
        torch.testing.assert_close(influence - influence.mean(), expected - expected.mean(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("width", [5, 130], ids=["more samples than features", "fewer"])
def test_influences_of_a_frechet_distance_are_its_derivative(width: int) -> None:
    real, fake = normal(110, width, 0).double(), normal(115, width, 1, 0.3).double()
    found, sets = fid(real, fake), [real.numpy(), fake.numpy()]
    for side, influence in enumerate((found.real, found.fake)):
        assert influence is not None
        number = len(sets[side])
        for row in (0, int(influence.argmax())):
            values = []
            for step in (1e-4, -1e-4):
                weights = [np.full(len(rows), 1 / len(rows)) for rows in sets]
                weights[side] = (1 - step) * weights[side] + step * np.eye(number)[row]
                values.append(loops_fid(*sets, *weights))
            derivative = (values[0] - values[1]) / 2e-4
            assert float((influence - influence.mean())[row]) == pytest.approx(derivative, rel=1e-3, abs=1e-3)


def test_a_frechet_distance_of_known_gaussians() -> None:
    a, b = torch.tensor([4.0, 1.0, 0.25]).double(), torch.tensor([1.0, 9.0, 0.25]).double()
    mean = torch.tensor([1.0, -2.0, 0.5]).double()
    apart = fid(exact(150, torch.zeros(3).double(), a.diag(), 0), exact(400, mean, b.diag(), 1))
    assert apart.value == pytest.approx(5.25 + (2 - 1) ** 2 + (1 - 3) ** 2, rel=1e-10)
    same = exact(150, mean, a.diag(), 0)
    assert fid(same, exact(300, mean, a.diag(), 1)).value == pytest.approx(0, abs=1e-9)
    # The distance does not depend on the axes, nor on which is which.
    turn = torch.linalg.qr(normal(3, 3, 2).double())[0]
    real, fake = normal(120, 3, 3).double(), normal(150, 3, 4, 1.0, 2.0).double()
    assert fid(real @ turn, fake @ turn).value == pytest.approx(fid(real, fake).value, rel=1e-10)
    assert fid(fake, real).value == pytest.approx(fid(real, fake).value, rel=1e-10)


def test_a_frechet_distance_of_fewer_samples_than_features() -> None:
    real, fake = normal(100, 300, 0), normal(140, 300, 1, 0.1)
    found = fid(real, fake)
    rows = [(x - x.mean(dim=0)).double().numpy() / math.sqrt(len(x) - 1) for x in (real, fake)]
    shift = real.double().mean(dim=0) - fake.double().mean(dim=0)
    roots = np.linalg.svd(rows[0] @ rows[1].T, compute_uv=False).sum()
    assert found.value == pytest.approx(float(shift @ shift) + (rows[0] ** 2).sum() + (rows[1] ** 2).sum() - 2 * roots)
    assert "fewer than 2,000 samples: kid is the number to read" in found.note
    assert fid(real, real).value == pytest.approx(0, abs=1e-4 * float((rows[0] ** 2).sum()))


def test_a_kernel_distance_is_that_of_torchmetrics() -> None:
    from torchmetrics.image.kid import poly_mmd

    real, fake = normal(200, 12, 0).double(), normal(200, 12, 1, 0.2, 1.1).double()
    assert kid(real, fake).value == pytest.approx(float(poly_mmd(real, fake)), rel=1e-8)


def test_kernel_distances_of_two_points() -> None:
    at, other = torch.tensor([[3.0, 0.0]]).expand(10, 2), torch.tensor([[0.0, 2.0]]).expand(20, 2)
    assert kid(at, other).value == pytest.approx((9 / 2 + 1) ** 3 + (4 / 2 + 1) ** 3 - 2)
    assert cmmd(at, other).value == pytest.approx(1000 * (2 - 2 * math.exp(-1 / 100)))  # lengths do not count
    assert kid(at, at).value == pytest.approx(0, abs=1e-9)
    values = [kid(normal(20, 4, seed), normal(20, 4, seed + 500)).value for seed in range(200)]
    assert min(values) < 0 < max(values)
    assert abs(float(np.mean(values))) < 3 * float(np.std(values)) / math.sqrt(200)


@settings(max_examples=25, deadline=None)
@given(st.integers(3, 12), st.integers(3, 12), st.integers(1, 5), st.integers(0, 10**6))
def test_kernel_distances_of_any_size(num_real: int, num_fake: int, width: int, seed: int) -> None:
    real, fake = normal(num_real, width, seed, 0.5), normal(num_fake, width, seed + 1, -0.2)
    found, turned = kid(real, fake), kid(fake, real)
    assert found.value == pytest.approx(loops_kid(real.double().numpy(), fake.double().numpy()), rel=1e-8, abs=1e-10)
    assert found.real is not None
    torch.testing.assert_close(found.real, turned.fake)
    assert (found.low is None) == (min(num_real, num_fake) < 8)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    real, fake = normal(50, 4, 0), normal(40, 4, 1, 0.2)
    whole = [f(real, fake) for f in (kid, cmmd, precision, recall, density, coverage)]
    monkeypatch.setattr(scores, "BLOCK", 7)
    monkeypatch.setattr(neighbours, "BLOCK", 7)
    for before, f in zip(whole, (kid, cmmd, precision, recall, density, coverage), strict=True):
        after = f(real, fake)
        assert after.value == pytest.approx(before.value, rel=1e-10)
        torch.testing.assert_close(after.fake, before.fake)


def test_inception_scores_of_known_classes() -> None:
    sure = 60 * torch.nn.functional.one_hot(torch.arange(120) % 5, 5).double()
    assert inception_score(sure).value == pytest.approx(5)  # every class as often, each picture sure of one
    assert inception_score(torch.zeros(120, 5)).value == pytest.approx(1)
    logits = normal(150, 6, 0).double().numpy()
    classes = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    means = classes.mean(axis=0)
    divergences = [sum(p * math.log(p / q) for p, q in zip(row, means, strict=True)) for row in classes]
    before = torch.get_rng_state()
    found = inception_score(torch.tensor(logits))
    assert torch.equal(torch.get_rng_state(), before)
    assert found.value == pytest.approx(math.exp(np.mean(divergences)), rel=1e-10)
    influence = found.fake - found.fake.mean()
    expected = found.value * (np.array(divergences) - np.mean(divergences))
    np.testing.assert_allclose(influence.numpy(), expected, rtol=1e-8, atol=1e-12)


def test_a_clip_score_is_that_of_torchmetrics() -> None:
    from types import SimpleNamespace

    from torchmetrics.multimodal import CLIPScore

    class Given(torch.nn.Module):
        """A CLIP model to which embeddings are given in place of pictures, [1, 1, D] each."""

        config = SimpleNamespace()

        def get_image_features(self, pixels: torch.Tensor) -> torch.Tensor:
            return pixels[:, 0, 0]

    def stack(images: list[torch.Tensor], **_: object) -> dict[str, torch.Tensor]:
        return {"pixel_values": torch.stack(images)}

    images, texts = normal(40, 12, 0, 2.0), normal(40, 12, 1, 2.0)
    metric = CLIPScore(model_name_or_path=lambda: (Given(), stack))
    metric.update([one[None, None] for one in images], [one[None, None] for one in texts])
    cosines = torch.nn.functional.cosine_similarity(images, texts)
    assert cosines.min() > 0, "of others torchmetrics takes the mean first"
    assert clip_score(images, texts).value == pytest.approx(float(metric.compute()), rel=1e-6)


def test_clip_scores_are_a_mean_with_its_t_interval() -> None:
    angles = torch.tensor([0.0, 30.0, 60.0, 90.0, 120.0, 180.0, 45.0, 10.0]).deg2rad()
    images = 3 * torch.stack([angles.cos(), angles.sin()], dim=1)
    found = clip_score(images, torch.tensor([[2.0, 0.0]]).expand(8, 2))
    each = [100 * max(math.cos(angle), 0) for angle in angles.tolist()]
    assert found.value == pytest.approx(np.mean(each), rel=1e-6)
    margin = 2.364624 * np.std(each, ddof=1) / math.sqrt(8)
    assert found.high == pytest.approx(np.mean(each) + margin, rel=1e-4)
    assert clip_score(images[:1], images[:1]).facts() == {
        "metric": "clip_score", "value": pytest.approx(100), "low": None, "high": None, "num_fake": 1,
        "num_real": None, "higher_is_better": True, "note": "",
    }  # fmt: skip


def test_diversity_is_the_mean_of_all_pairs() -> None:
    assert diversity(torch.eye(9)).value == pytest.approx(1)
    assert diversity(torch.ones(9, 3) * torch.arange(1.0, 10)[:, None]).value == pytest.approx(0, abs=1e-12)
    rows = normal(12, 4, 0, 0.5).double().numpy()
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    pairs = [1 - units[i] @ units[j] for i in range(12) for j in range(i)]
    assert diversity(torch.tensor(rows)).value == pytest.approx(np.mean(pairs), rel=1e-10)


def test_images_that_are_the_real_ones_are_all_covered() -> None:
    real = normal(40, 6, 0, shift=100)  # far from 0, where distances lose digits
    assert [f(real, real).value for f in (precision, recall, coverage)] == [1, 1, 1]
    assert [f(real, real + 50).value for f in (precision, recall, density, coverage)] == [0, 0, 0, 0]
    found = precision(real, real)
    assert (found.low, found.high) == pytest.approx(wilson(40, 40, 1.959964), rel=1e-6)
    some = precision(real, torch.cat([real[:30], real[:10] + 50]))
    assert (some.value, some.low, some.high) == pytest.approx((0.75, *wilson(30, 40, 1.959964)), rel=1e-6)


RUNS = 250


def simulate(function: Callable[[Tensor, Tensor], Estimate], shift: float) -> tuple[float, float, float]:
    """How often an interval holds the mean score, and a difference's that of a twin and that of a worse model."""
    trials = []
    for seed in range(RUNS):
        real, fake, noise = (normal(n, 6, 3 * seed + i) for i, n in enumerate((120, 150, 150)))
        twin = 0.9 * fake + math.sqrt(1 - 0.81) * noise  # of one law, and paired
        trials.append([function(real, x + shift) for x in (fake, twin, 1.1 * twin)])
    mean = np.mean([first.value for first, _, _ in trials])
    held = [first.low <= mean <= first.high for first, _, _ in trials]  # type: ignore[operator]
    calm = [not difference(first, second).is_clear for first, second, _ in trials]
    apart = [difference(first, third) for first, _, third in trials]
    middle = np.mean([found.value for found in apart])
    met = [found.low <= middle <= found.high for found in apart]  # type: ignore[operator]
    return float(np.mean(held)), float(np.mean(calm)), float(np.mean(met))


@pytest.mark.parametrize(
    ("function", "shift", "is_wide"),
    [(fid, 0.0, True), (fid, 0.5, False), (kid, 0.0, True), (kid, 0.5, False), (cmmd, 0.5, False),
     (lambda real, fake: diversity(fake), 0.5, False), (lambda real, fake: inception_score(fake), 0.0, False)],
    ids=["fid alike", "fid", "kid alike", "kid", "cmmd", "diversity", "inception_score"],
)  # fmt: skip
def test_intervals_hold_as_often_as_they_say(
    function: Callable[[Tensor, Tensor], Estimate], shift: float, is_wide: bool
) -> None:
    for rate in simulate(function, shift):
        assert 0.91 <= rate and (is_wide or rate <= 0.995)  # 0.95 less three standard errors of 250 runs


@pytest.mark.parametrize("function", [precision, recall, density, coverage])
def test_intervals_hold_for_other_images_against_these_real_ones(
    function: Callable[[Tensor, Tensor], Estimate],
) -> None:
    real = normal(60, 6, 10**6)
    found = [function(real, normal(60, 6, seed, 0.3)) for seed in range(200)]
    twins = [function(real, normal(60, 6, seed + 1000, 0.3)) for seed in range(200)]
    mean = np.mean([trial.value for trial in found])
    assert np.mean([trial.low <= mean <= trial.high for trial in found]) >= 0.91  # type: ignore[operator]
    assert np.mean([difference(a, b).is_clear for a, b in zip(found, twins, strict=True)]) <= 0.09


def test_a_difference_of_means_is_a_paired_t_test() -> None:
    first, second = normal(20, 1, 0).flatten().double(), normal(20, 1, 1).flatten().double()
    second = 0.8 * first + 0.2 * second - 0.3
    a, b = (estimate("clip_score", float(x.mean()), x) for x in (first, second))
    gaps = (first - second).numpy()
    margin = student_t(19) * gaps.std(ddof=1) / math.sqrt(20)
    found = difference(a, b)
    assert (found.value, found.low, found.high) == pytest.approx(
        (gaps.mean(), gaps.mean() - margin, gaps.mean() + margin)
    )
    assert found.is_clear and found.better == 0 and difference(b, a).better == 1
    apart = difference(a, b, paired=False)
    margin = student_t(19) * math.sqrt((float(first.var()) + float(second.var())) / 20)
    assert apart.high == pytest.approx(gaps.mean() + margin) and not apart.is_clear and apart.better is None


def test_a_difference_of_shares_is_newcombes() -> None:
    # Newcombe 1998, method 10, written with the paired table: both, first only, second only, neither.
    both, one, two, none = 20, 12, 2, 16
    hits = [[1.0] * (both + one) + [0.0] * (two + none), [1.0] * both + [0.0] * one + [1.0] * two + [0.0] * none]
    first, second = (torch.tensor(h, dtype=torch.float64) for h in hits)
    found = difference(*(estimate_share("precision", float(x.mean()), x, 50, 50) for x in (first, second)))
    p, q = (both + one) / 50, (both + two) / 50
    (l1, u1), (l2, u2) = wilson(both + one, 50, 1.959964), wilson(both + two, 50, 1.959964)
    phi = (both * none - one * two) / math.sqrt((both + one) * (two + none) * (both + two) * (one + none))
    low = p - q - math.sqrt((p - l1) ** 2 - 2 * phi * (p - l1) * (u2 - q) + (u2 - q) ** 2)
    high = p - q + math.sqrt((u1 - p) ** 2 - 2 * phi * (u1 - p) * (q - l2) + (q - l2) ** 2)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-6)
    all_of_both = difference(*(estimate_share("precision", 1.0, torch.ones(10), 10) for _ in range(2)))
    assert all_of_both.low is not None and all_of_both.low < 0 and not all_of_both.is_clear


def test_pairs_make_a_comparison_sharper_and_lower_may_be_better() -> None:
    real, fake = normal(150, 6, 0), normal(150, 6, 1, 0.3)
    a, b = kid(real, fake), kid(real, fake + 0.05)
    paired, apart = difference(a, b), difference(a, b, paired=False)
    assert paired.value == apart.value == a.value - b.value < 0
    assert paired.low is not None and paired.high is not None and apart.low is not None and apart.high is not None
    assert paired.high - paired.low < 0.5 * (apart.high - apart.low)
    assert paired.better == 0 and apart.better is None
    same = difference(a, a)
    assert (same.value, same.low, same.high) == pytest.approx((0, 0, 0), abs=1e-9) and same.better is None


def test_what_does_not_go_together_is_not_compared() -> None:
    a, b = kid(normal(20, 3, 0), normal(20, 3, 1)), kid(normal(21, 3, 0), normal(20, 3, 1))
    with pytest.raises(UserError, match=r"^kid: 20 and 21 real samples; a comparison needs the same$"):
        difference(a, b)
    with pytest.raises(UserError, match=r"^clip_score: 9 and 8 samples; pairs need as many of both$"):
        difference(*(estimate("clip_score", 0.0, torch.arange(float(n))) for n in (9, 8)))
    with pytest.raises(ValueError, match="kid less cmmd"):
        difference(a, cmmd(normal(20, 3, 0), normal(20, 3, 1)))
    few = difference(*(estimate("clip_score", float(n), torch.arange(7.0)) for n in (2, 1)))
    assert (few.value, few.low, few.high, few.is_clear, few.better) == (1, None, None, False, None)


def features(name: str, short: str | None = None) -> dict[str, Tensor]:
    return {part: normal(n - (part == short), 4, i, 0.3) for i, (part, n) in enumerate(METRICS[name].needs.items())}


def test_the_table_names_every_score_and_its_arguments() -> None:
    assert list(SCORES) == of_pictures(METRICS), "all others are of held-out images, see test_held_out.py"
    for name in SCORES:
        if name != "memorization":
            wanted = [p.name for p in inspect.signature(SCORES[name]).parameters.values() if p.default is p.empty]
            assert wanted == list(METRICS[name].needs)
        assert math.isfinite(score(name, {**features(name), "other": torch.zeros(0)}).value)
    lower = {name for name, row in METRICS.items() if not row.higher_is_better}
    assert lower == {"val_loss", "fid", "kid", "cmmd", "memorization"}
    with pytest.raises(UserError, match=r"^evaluate.metrics: 'is': no such metric; there are val_loss, accuracy, "):
        metric("is")


@pytest.mark.parametrize(("name", "part"), [(name, part) for name in SCORES for part in METRICS[name].needs])
def test_bad_features_are_refused_in_one_line(name: str, part: str) -> None:
    fewest = METRICS[name].needs[part]
    good = features(name)
    poisoned = good[part].clone()
    poisoned[-1, 1] = math.nan
    for given_, message in (
        (features(name, short=part), f"{name}: {part}: {fewest - 1} rows; at least {fewest} are needed"),
        ({**good, part: torch.zeros(fewest)}, f"{name}: {part}: shape ({fewest},); expected [images, features]"),
        (
            {**good, part: poisoned},
            f"{name}: {part}: NaN or infinity in 1 of {fewest} rows, first in row {fewest - 1}; "
            "expected finite numbers",
        ),
    ):
        with pytest.raises(UserError) as caught:
            score(name, given_)
        assert str(caught.value) == message


def test_other_mistakes_are_refused_in_one_line() -> None:
    for call, message in (
        (lambda: kid(normal(5, 4, 0), normal(5, 3, 0)),
         "kid: fake: 3 features a row where real has 4; both have to come from one extractor"),
        (lambda: cmmd(normal(5, 4, 0), torch.zeros(5, 4)),
         "cmmd: fake: 5 of 5 rows are all zeros; expected a direction"),
        (lambda: clip_score(normal(5, 4, 0), normal(6, 4, 0)),
         "clip_score: 5 images and 6 texts; expected a text for each image"),
        (lambda: recall(normal(20, 4, 0), normal(9, 4, 0), k=8),
         "recall: 20 real and 9 generated images; k = 8 needs 10 of each"),
        (lambda: score("cmmd", {"fake": normal(5, 4, 0)}), "cmmd: no real; given are fake"),
    ):  # fmt: skip
        with pytest.raises(UserError) as caught:
            call()
        assert str(caught.value) == message
