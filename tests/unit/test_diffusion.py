"""Noise paths, training times and loss weights, against formulas and against diffusers' schedulers."""

import math
import pickle
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from gtl.config.objectives import Timesteps
from gtl.diffusion.path import NoisePath, RectifiedFlow, VariancePreserving, make_scheduler, path_of
from gtl.diffusion.timesteps import draw_times, shift_times
from gtl.diffusion.weighting import check_min_snr, min_snr
from gtl.types import UserError

SD: dict[str, Any] = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "skip_prk_steps": True,
}
BETAS = {key: SD[key] for key in ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps")}
T = torch.tensor([0, 1, 500, 999])


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, 2, 2, generator=rng), torch.randn(4, 3, 2, 2, generator=rng)


def vp(prediction: str = "epsilon", **config: Any) -> VariancePreserving:
    path = path_of({**SD, "prediction_type": prediction, **config})
    assert isinstance(path, VariancePreserving)
    return path


def test_add_noise_and_velocity_are_those_of_ddpm(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    clean, noise = pair
    ddpm = DDPMScheduler(**BETAS)
    path = vp("v_prediction")
    assert torch.equal(path.add_noise(clean, noise, T), ddpm.add_noise(clean, noise, T))
    assert torch.equal(path.target(clean, noise, T), ddpm.get_velocity(clean, noise, T))


def test_targets_of_noise_and_clean_data(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    clean, noise = pair
    assert torch.equal(vp("epsilon").target(clean, noise, T), noise)
    assert torch.equal(vp("sample").target(clean, noise, T), clean)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_the_table_is_that_of_the_models_scheduler(schedule: str, zero_snr: bool) -> None:
    config = {**BETAS, "beta_schedule": schedule, "rescale_betas_zero_snr": zero_snr}
    path = path_of({"_class_name": "DDIMScheduler", **config})
    assert isinstance(path, VariancePreserving)
    assert torch.equal(path.alphas_cumprod, DDPMScheduler(**config).alphas_cumprod)
    assert (path.snr(torch.tensor([999])).item() == 0) == zero_snr


def test_a_key_that_is_not_there_has_the_schedulers_own_default() -> None:
    path = path_of({"_class_name": "LCMScheduler"})
    assert isinstance(path, VariancePreserving)
    assert path.prediction == "epsilon"
    assert torch.equal(path.alphas_cumprod, DDPMScheduler(**BETAS).alphas_cumprod)
    plain = path_of({"_class_name": "DDPMScheduler"})
    assert isinstance(plain, VariancePreserving)
    assert not torch.equal(plain.alphas_cumprod, path.alphas_cumprod)


def test_a_sampler_that_bends_its_own_table_gives_the_exact_one() -> None:
    path = path_of({"_class_name": "EulerDiscreteScheduler", **BETAS, "rescale_betas_zero_snr": True})
    assert isinstance(path, VariancePreserving)
    assert path.alphas_cumprod[-1].item() == 0.0


def test_steps_have_equal_shares() -> None:
    u = torch.tensor([0.0, 0.0009, 0.001, 0.5, 0.9999, 1.0])
    assert vp().time(u).tolist() == [0, 0, 1, 500, 999, 999]
    assert vp().time(u[3]).shape == ()
    assert RectifiedFlow().time(u[:4]).tolist() == pytest.approx([0.0, 0.9, 1.0, 500.0])


@pytest.mark.parametrize(
    "path", [vp("epsilon"), vp("v_prediction"), vp("sample"), RectifiedFlow()], ids=lambda path: path.prediction
)
def test_denoised_undoes_the_target(path: NoisePath, pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    clean, noise = (tensor.double() for tensor in pair)
    t = torch.tensor([1, 100, 500, 900])
    noisy = path.add_noise(clean, noise, t)
    assert noisy.dtype == torch.float64
    torch.testing.assert_close(path.denoised(noisy, path.target(clean, noise, t), t), clean, rtol=0, atol=1e-6)


def test_flow_is_that_of_the_flow_matching_scheduler(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    clean, noise = pair
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    t = scheduler.timesteps[[0, 10, 500, 999]]
    path = path_of({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
    assert isinstance(path, RectifiedFlow) and path.shift == 3.0
    torch.testing.assert_close(path.add_noise(clean, noise, t), scheduler.scale_noise(clean, t, noise))
    assert torch.equal(path.target(clean, noise, t), noise - clean)
    assert path.snr(torch.tensor([250.0, 500.0])).tolist() == [9.0, 1.0]


def test_a_flow_that_a_diffusion_sampler_is_told_of_is_one() -> None:
    sampler = {"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "flow_prediction"}
    path = path_of({**sampler, "use_flow_sigmas": True, "flow_shift": 3.0})
    assert isinstance(path, RectifiedFlow) and path.shift == 3.0 and path.num_train_timesteps == 1000
    with pytest.raises(UserError, match="^scheduler_config.json: prediction_type: 'flow_prediction': "):
        path_of(sampler)


def test_a_shift_that_depends_on_size_is_that_of_the_greatest() -> None:
    flux = {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True, "max_shift": 1.15}
    assert path_of(flux).shift == pytest.approx(math.exp(1.15))
    assert path_of({**flux, "time_shift_type": "linear"}).shift == 1.15


def test_a_path_travels() -> None:
    path = vp("v_prediction")
    path.snr(T)
    copy = pickle.loads(pickle.dumps(path))
    assert copy.prediction == "v_prediction" and torch.equal(copy.snr(T), path.snr(T))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**SD, "prediction_type": "score"}, "prediction_type: 'score': epsilon, v_prediction and sample are"),
        ({"_class_name": "EDMEulerScheduler"}, "_class_name: 'EDMEulerScheduler': has no table of betas"),
        ({"_class_name": "MyScheduler"}, "_class_name: 'MyScheduler': diffusers"),
        ({"_class_name": "UNet2DModel"}, "_class_name: 'UNet2DModel': diffusers"),
        ({}, "_class_name: 'None': diffusers"),
    ],
)
def test_an_unknown_path_is_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        path_of(config)
    assert str(caught.value).startswith(f"scheduler_config.json: {message}")


def test_a_scheduler_is_fresh_each_time() -> None:
    first, second = make_scheduler(SD), make_scheduler(SD)
    first.set_timesteps(3)
    assert type(first).__name__ == "PNDMScheduler" and second.num_inference_steps is None


def numbers(config: Timesteps, seed: int = 0, path: NoisePath | None = None) -> torch.Tensor:
    return draw_times(config, 5, torch.Generator().manual_seed(seed), path or RectifiedFlow())


def test_distributions_of_times() -> None:
    rng = torch.Generator().manual_seed(0)
    uniform, normal = torch.rand(5, generator=rng), torch.randn(5, generator=rng)
    assert torch.equal(numbers(Timesteps()), uniform)
    config = Timesteps(distribution="logit_normal", mean=0.5, std=2.0)
    assert torch.equal(numbers(config), 1 / (1 + (-(0.5 + 2 * normal)).exp()))
    assert torch.equal(numbers(Timesteps(shift=3.0)), 3 * uniform / (1 + 2 * uniform))


def test_what_follows_does_not_depend_on_the_distribution() -> None:
    following = []
    for distribution in ("uniform", "logit_normal"):
        rng = torch.Generator().manual_seed(0)
        draw_times(Timesteps(distribution=distribution), 1, rng, RectifiedFlow())
        following.append(torch.rand((), generator=rng).item())
    assert following[0] == following[1]


def test_the_models_own_shift() -> None:
    assert torch.equal(numbers(Timesteps(shift="model"), path=RectifiedFlow(3.0)), numbers(Timesteps(shift=3.0)))
    assert torch.equal(numbers(Timesteps(shift="model"), path=vp()), numbers(Timesteps()))


def test_shift_keeps_the_ends() -> None:
    assert shift_times(torch.tensor([0.0, 0.25, 0.5, 1.0]), 3.0).tolist() == [0.0, 0.5, 0.75, 1.0]


def test_min_snr_weights() -> None:
    alphas = torch.tensor([0.9, 0.5, 0.0])  # SNR 9, 1, 0
    t = torch.arange(3)
    expected = {"epsilon": [5 / 9, 1, 1], "v_prediction": [5 / 10, 1 / 2, 0], "sample": [5, 1, 0]}
    for prediction, weights in expected.items():
        path = VariancePreserving(alphas, prediction)  # type: ignore[arg-type]
        assert min_snr(path, t, 5.0).tolist() == pytest.approx(weights, rel=1e-6)


def test_min_snr_counts_the_same_on_clean_data(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Equal mistakes in x_0 cost the same, whatever the network predicts."""
    clean, noise = (tensor.double() for tensor in pair)
    t = torch.tensor([100, 300, 500, 800])
    costs = []
    for prediction in ("epsilon", "v_prediction", "sample"):
        path = vp(prediction)
        path.alphas_cumprod = path.alphas_cumprod.double()
        wrong = clean + 0.1
        noisy = path.add_noise(clean, noise, t)
        alpha = path.alphas_cumprod[t].view(-1, 1, 1, 1)
        signal, sigma = alpha**0.5, (1 - alpha) ** 0.5
        implied = path.target(wrong, (noisy - signal * wrong) / sigma, t)
        error = (implied - path.target(clean, noise, t)).square().flatten(1).mean(1)
        costs.append(min_snr(path, t, 5.0) * error)
    torch.testing.assert_close(costs[0], costs[2])
    torch.testing.assert_close(costs[1], costs[2])


def test_min_snr_refuses_flow() -> None:
    with pytest.raises(UserError, match="^objective.min_snr_gamma: .*flow matching"):
        check_min_snr(RectifiedFlow())
    with pytest.raises(UserError, match="^objective.min_snr_gamma: "):
        min_snr(RectifiedFlow(), torch.tensor([500.0]), 5.0)
