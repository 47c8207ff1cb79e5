"""Preference losses against hand-made numpy in float64, and their identities."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.special import expit, log_expit

from fifa_ray.dpo.loss import denoising_error, diffusion_dpo_loss, preference_loss

BETA = 2500.0


def drawn_errors(count: int = 6, seed: int = 0, spread: float = 4e-4) -> list[torch.Tensor]:
    """Errors like real ones: about 0.1, the policy's a few 1e-4 from the reference's."""
    rng = np.random.default_rng(seed)
    chosen, rejected = rng.uniform(0.05, 0.3, (2, count))
    shifts = rng.normal(0, spread, (2, count))
    values = (chosen + shifts[0], rejected + shifts[1], chosen, rejected)
    return [torch.tensor(v, dtype=torch.float32) for v in values]


def as_numpy(tensors: list[torch.Tensor]) -> list[np.ndarray]:
    return [t.detach().numpy().astype(np.float64) for t in tensors]


def numpy_logit(errors: list[torch.Tensor], beta: float = BETA) -> np.ndarray:
    chosen, rejected, ref_chosen, ref_rejected = as_numpy(errors)
    return -beta * ((chosen - rejected) - (ref_chosen - ref_rejected))


def test_dpo_equals_the_formula_and_the_metrics_their_meaning():
    errors = drawn_errors()
    loss, metrics = diffusion_dpo_loss(*errors, dpo_beta=BETA)
    logit = numpy_logit(errors)
    assert logit.std() > 0.5  # otherwise all losses look alike
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert loss.item() == pytest.approx(-log_expit(logit).mean(), rel=1e-4)
    assert metrics["implicit_reward_margin"].item() == pytest.approx(logit.mean(), rel=1e-3)
    assert metrics["implicit_accuracy"].item() == pytest.approx((logit > 0).mean())
    names = ("policy_error_chosen", "policy_error_rejected")
    names += ("reference_error_chosen", "reference_error_rejected")
    for name, values in zip(names, errors, strict=True):
        assert metrics[name].item() == pytest.approx(values.mean().item(), rel=1e-6)
    assert metrics["loss"].item() == loss.item()
    assert metrics["pair_weight"].item() == pytest.approx(1)
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_policy_equal_to_reference_gives_ln_2_and_half_the_accuracy(count):
    errors = drawn_errors(count)
    loss, metrics = diffusion_dpo_loss(*errors[2:], *errors[2:], dpo_beta=BETA)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-7)
    if count != 3:  # a third is not a binary number
        assert loss.item() == np.float32(math.log(2))
        assert metrics["implicit_accuracy"].item() == 0.5
    assert metrics["implicit_reward_margin"].item() == 0


def test_accuracy_counts_ties_as_a_half():
    chosen = torch.tensor([0.1, 0.1, 0.2, 0.1])
    rejected = torch.tensor([0.2, 0.1, 0.1, 0.1])
    reference = torch.full((4,), 0.1)
    _, metrics = diffusion_dpo_loss(chosen, rejected, reference, reference, dpo_beta=1.0)
    assert metrics["implicit_accuracy"].item() == (1 + 0.5 + 0 + 0.5) / 4


def salesforce_train_py(errors: list[np.ndarray], beta: float) -> float:
    """Original script: half of beta times the difference of differences."""
    win, lose, ref_win, ref_lose = errors
    return -log_expit(-0.5 * beta * ((win - lose) - (ref_win - ref_lose))).mean()


def diffusers_sd_script(errors: list[np.ndarray], beta: float) -> float:
    """Stable Diffusion example: beta itself, with the reference's difference first."""
    win, lose, ref_win, ref_lose = errors
    return -log_expit(beta * ((ref_win - ref_lose) - (win - lose))).mean()


def diffusers_sdxl_script(errors: list[np.ndarray], beta: float) -> float:
    """SDXL example: half of beta times the difference of differences."""
    win, lose, ref_win, ref_lose = errors
    return -log_expit(-0.5 * beta * ((win - ref_win) - (lose - ref_lose))).mean()


@pytest.mark.parametrize(
    ("script", "beta", "dpo_beta"),
    [
        (salesforce_train_py, 5000, 2500),
        (diffusers_sd_script, 2500, 2500),
        (diffusers_sdxl_script, 5000, 2500),
    ],
)
def test_conversions_from_what_public_scripts_call_beta(script, beta, dpo_beta):
    errors = drawn_errors(32)
    loss, _ = diffusion_dpo_loss(*errors, dpo_beta=dpo_beta)
    expected = script(as_numpy(errors), beta)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert abs(script(as_numpy(errors), 2 * beta) - expected) > 0.01  # a factor of two would show


@pytest.mark.parametrize("kind", ["dpo", "ipo", "margin_weighted"])
def test_a_step_lowers_the_chosen_images_error_and_raises_the_rejected_ones(kind):
    errors = drawn_errors()
    chosen, rejected = errors[2].clone().requires_grad_(), errors[3].clone().requires_grad_()
    margins = torch.linspace(-2, 2, 6)
    loss, _ = preference_loss(
        kind, chosen, rejected, errors[2], errors[3], dpo_beta=BETA, reward_margin=margins
    )
    loss.backward()
    assert (chosen.grad > 0).all()
    torch.testing.assert_close(chosen.grad, -rejected.grad)
    # The push of each pair: its derivative by the logit, times dpo_beta, over the number of pairs.
    push = {"dpo": np.full(6, 0.5), "ipo": np.ones(6), "margin_weighted": expit(margins.numpy())}
    np.testing.assert_allclose(chosen.grad.numpy(), push[kind] * BETA / 6, rtol=1e-5)


@pytest.mark.parametrize("anchor_weight", [0.0, 0.7])
def test_variants_equal_their_formulas(anchor_weight):
    errors = drawn_errors(16)
    margins = np.random.default_rng(1).normal(0.5, 1, 16)
    logit, chosen = numpy_logit(errors), as_numpy(errors)[0]
    expected = {
        "dpo": np.log1p(np.exp(-logit)),
        "ipo": BETA**2 * (logit / BETA - 1 / (2 * BETA)) ** 2,
        "margin_weighted": np.log1p(np.exp(margins - logit)),
        "sft": chosen,
    }
    for kind, per_pair in expected.items():
        loss, metrics = preference_loss(
            kind,
            *errors,
            dpo_beta=BETA,
            anchor_weight=anchor_weight,
            reward_margin=torch.tensor(margins),
        )
        assert loss.item() == pytest.approx((per_pair + anchor_weight * chosen).mean(), rel=1e-4)
        assert metrics["implicit_reward_margin"].item() == pytest.approx(logit.mean(), rel=1e-3)


def test_margin_0_is_dpo_and_sft_leaves_the_rejected_image_alone():
    errors = drawn_errors()
    plain, _ = diffusion_dpo_loss(*errors, dpo_beta=BETA)
    weighted, _ = preference_loss(
        "margin_weighted", *errors, dpo_beta=BETA, reward_margin=torch.zeros(6)
    )
    assert weighted.item() == plain.item()
    errors = [e.requires_grad_() for e in errors]
    preference_loss("sft", *errors, dpo_beta=BETA)[0].backward()
    assert torch.equal(errors[0].grad, torch.full((6,), 1 / 6))
    assert all(e.grad is None or not e.grad.any() for e in errors[1:])


def test_uneven_micro_batches_add_up_to_the_whole_batch():
    errors = [e.requires_grad_() for e in drawn_errors(7)]
    whole, expected = diffusion_dpo_loss(*errors, dpo_beta=BETA)
    whole.backward()
    gradient = errors[0].grad.clone()
    errors[0].grad = None
    totals: dict[str, torch.Tensor] = {}
    for rows in (slice(0, 3), slice(3, 7)):
        part = [e[rows] for e in errors]
        weight = torch.full_like(part[0], 1 / 7)
        loss, metrics = diffusion_dpo_loss(*part, dpo_beta=BETA, pair_weight=weight)
        loss.backward()
        totals = {name: totals.get(name, 0) + value for name, value in metrics.items()}
    torch.testing.assert_close(errors[0].grad, gradient)
    for name, value in expected.items():
        torch.testing.assert_close(totals[name] / totals["pair_weight"], value)


def test_pairs_of_weight_0_change_nothing():
    errors = drawn_errors(5)
    weight = torch.tensor([0.5, 0.5, 0, 0, 0])
    padded, metrics = diffusion_dpo_loss(*errors, dpo_beta=BETA, pair_weight=weight)
    alone, expected = diffusion_dpo_loss(*[e[:2] for e in errors], dpo_beta=BETA)
    torch.testing.assert_close(padded, alone)
    torch.testing.assert_close(metrics, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_errors_are_reduced_in_float32_whatever_comes_in(dtype):
    generator = torch.Generator().manual_seed(0)
    prediction = torch.randn(3, 4, 32, 32, generator=generator).to(dtype)
    target = torch.randn(3, 4, 32, 32, generator=generator)
    error = denoising_error(prediction, target)
    assert error.dtype == torch.float32
    difference = prediction.double().numpy() - target.double().numpy()
    np.testing.assert_allclose(error.numpy(), (difference**2).mean(axis=(1, 2, 3)), rtol=1e-6)
    coarse = (prediction - target.to(dtype)).square().mean(dim=(1, 2, 3))
    assert (coarse.double() - error.double()).abs().max() > 1e-5  # what reducing in dtype loses


def test_halves_are_converted_and_nothing_else():
    errors = drawn_errors()
    halves = [e.bfloat16() for e in errors]
    loss, _ = diffusion_dpo_loss(*halves, dpo_beta=BETA)
    assert loss.dtype == torch.float32
    assert loss.item() == diffusion_dpo_loss(*[h.float() for h in halves], dpo_beta=BETA)[0].item()
    with pytest.raises(ValueError, match="one value a pair"):
        diffusion_dpo_loss(*[e.long() for e in errors], dpo_beta=BETA)


def test_messages():
    errors = drawn_errors()
    with pytest.raises(ValueError, match=r"one shape \(N, ...\)"):
        denoising_error(torch.zeros(2, 4, 8, 8), torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match="one value a pair"):
        diffusion_dpo_loss(errors[0][:1], *errors[1:], dpo_beta=BETA)
    with pytest.raises(ValueError, match="dpo_beta above 0, got 0"):
        diffusion_dpo_loss(*errors, dpo_beta=0)
    with pytest.raises(ValueError, match="needs the pairs' reward_margin"):
        preference_loss("margin_weighted", *errors, dpo_beta=BETA)
    with pytest.raises(ValueError, match="unknown loss 'kto'"):
        preference_loss("kto", *errors, dpo_beta=BETA)


def test_importing_the_mathematics_loads_neither_ray_nor_models():
    code = (
        "import sys, fifa_ray.dpo.loss, fifa_ray.dpo.noising\n"
        "heavy = {'ray', 'diffusers', 'transformers', 'pydantic', 'fifa_ray.config'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
