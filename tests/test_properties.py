"""Properties of the shared formulas for any shape, dtype, batch, group size and schedule (hypothesis)."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

import acdmd
import models
import rtdmd

settings.register_profile("quick", max_examples=40, deadline=None)
settings.load_profile("quick")

SHAPES = st.tuples(*(st.integers(1, n) for n in (4, 5, 7, 9)))  # B, C, H, W; odd sizes too
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
LEVELS = st.floats(0.01, 0.99)
SEEDS = st.integers(0, 2**31)


def randn(shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@given(SHAPES, DTYPES, LEVELS, LEVELS, st.floats(0, 1), SEEDS)
def test_a_cps_step_of_exact_velocity_lands_on_the_marginal(shape, dtype, sigma, other, eta, seed):
    """With v = eps - x0 the mean is (1-s') x0 + s' cos(eta pi/2) eps and the noise's weight s' sin; always float32."""
    x0, eps, z = (randn(shape, seed + i) for i in range(3))
    x, v = ((1 - sigma) * x0 + sigma * eps).to(dtype), (eps - x0).to(dtype)
    got = models.cps_step(x, v, sigma, other, eta, z)
    angle = eta * math.pi / 2
    want = (1 - other) * x0 + other * (math.cos(angle) * eps + math.sin(angle) * z)
    assert got.dtype == torch.float32 and got.shape == shape
    rough = {torch.bfloat16: 0.1, torch.float16: 0.02}.get(dtype, 1e-4)
    torch.testing.assert_close(got, want, rtol=0, atol=rough)


@given(SHAPES, LEVELS, SEEDS)
def test_log_prob_is_the_negative_mean_square_and_largest_at_the_mean(shape, sigma, seed):
    x, v, z = (randn(shape, seed + i) for i in range(3))
    mean = models.cps_mean(x, v, sigma, sigma / 2, 0.9)
    at_mean, away = (rtdmd.cps_log_prob(y, x, v, sigma, sigma / 2, 0.9) for y in (mean, mean + z))
    assert at_mean.shape == (shape[0],) and (at_mean.abs() < 1e-10).all()
    torch.testing.assert_close(away, -z.square().flatten(1).mean(1), rtol=1e-4, atol=1e-5)


@given(SHAPES, st.floats(0, 0.95), st.floats(0.02, 1), SEEDS)
def test_renoising_keeps_the_level(shape, sigma_s, share, seed):
    """x_t = a x_s + sigma_ts z has the coefficients of level t: a (1-s) = 1-t and a^2 s^2 + sigma_ts^2 = t^2."""
    sigma_t = sigma_s + share * (0.99 - sigma_s)
    x_s, z = randn(shape, seed), randn(shape, seed + 1)
    x_t, target, sigma_ts = acdmd.renoise(x_s, sigma_s, sigma_t, z)
    a = (1 - sigma_t) / (1 - sigma_s)
    assert x_t.shape == target.shape == shape and torch.isfinite(target).all()
    torch.testing.assert_close(
        (a * sigma_s) ** 2 + sigma_ts.double() ** 2, torch.full_like(sigma_ts, sigma_t**2).double(), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(x_t, a * x_s + sigma_ts * z, rtol=1e-5, atol=1e-5)


@given(
    st.lists(st.integers(1, 1000), min_size=1, max_size=8, unique=True),
    st.sampled_from(["sd3", "flux1", "flux2", "sana", "prx"]),
    st.booleans(),
    st.integers(16, 8192),
)
def test_few_step_schedules_fall_to_0(steps, family, dynamic, tokens):
    config = dict(shift=3.0, base_shift=0.5, max_shift=1.15, max_image_seq_len=4096, use_dynamic_shifting=dynamic)
    steps = sorted(steps, reverse=True)
    sigmas = models.few_step_sigmas(FlowMatchEulerDiscreteScheduler(**config), steps, tokens, family)
    assert len(sigmas) == len(steps) + 1 and sigmas[-1] == 0.0
    assert all(a > b for a, b in zip(sigmas, sigmas[1:], strict=False)) and sigmas[0] <= 1
    if steps[0] == 1000:
        assert sigmas[0] == pytest.approx(1)
    if not dynamic:  # as FLUX.1-schnell's: the shift is what the scheduler says, whatever the family
        assert sigmas[:-1] == pytest.approx([3 * s / (1000 + 2 * s) for s in steps])


REWARDS = st.tuples(st.integers(1, 6), st.integers(1, 5), SEEDS)  # groups, images of each


@given(REWARDS, st.floats(-100, 100), st.permutations(range(6)))
def test_advantages_are_centred_and_blind_to_what_a_prompt_is_worth(sizes, shift, order):
    """Mean 0, no group favoured; the order of groups and a constant on all rewards change nothing."""
    G, K, seed = sizes
    rewards = {"a": randn((G, K), seed), "b": randn((G, K), seed + 1)}
    weights = {"a": 1.0, "b": 0.5}
    A = rtdmd.group_advantages(rewards, weights)
    assert A.dtype == torch.float32 and A.shape == (G, K) and A.mean().abs() < 1e-4 and torch.isfinite(A).all()
    order = [i for i in order if i < G]
    mixed = rtdmd.group_advantages({k: r[order] for k, r in rewards.items()}, weights)
    torch.testing.assert_close(mixed, A[order], rtol=1e-5, atol=1e-5)
    if K > 1:
        assert (A.mean(1).abs() < 1e-3).all()
        moved = {k: r.double() + shift for k, r in rewards.items()}  # of all prompts: the global deviation stays
        torch.testing.assert_close(rtdmd.group_advantages(moved, weights), A, rtol=1e-3, atol=1e-3)


@given(REWARDS)
def test_groups_without_signal_are_found(sizes):
    G, K, seed = sizes
    flat = randn((G,), seed) > 0
    rewards = {"a": torch.where(flat[:, None], torch.ones(G, K), randn((G, K), seed + 1)), "b": randn((G, K), seed)}
    assert rtdmd.has_signal(rewards, {"a": 1.0, "b": 0.0}).tolist() == [K == 1 or not f for f in flat.tolist()]


@given(SHAPES, SEEDS, st.floats(1e-3, 10))
def test_the_generator_moves_along_g_whatever_the_scale(shape, seed, scale):
    """dL_G/dx_s = g / numel; scaling sample, teacher and fake score together leaves g alone."""
    x, fake, teacher = (randn(shape, seed + i) for i in range(3))
    grads = []
    for c in (1.0, scale):
        x_s = (c * x).requires_grad_()
        loss = acdmd.distribution_matching_loss(x_s, c * fake, c * teacher)
        grads.append(torch.autograd.grad(loss, x_s)[0])
    norm = (x - teacher).abs().flatten(1).mean(1).view(-1, 1, 1, 1)
    torch.testing.assert_close(grads[0], (fake - teacher) / norm / x.numel(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-5)


@given(st.integers(0, 10**6), SEEDS, st.integers(1, 3))
def test_chosen_steps(epoch, seed, n):
    chosen = rtdmd.choose_steps(epoch, seed, n=n)
    assert chosen == sorted(set(chosen)) and len(chosen) == n and set(chosen) <= {0, 1, 2}
    assert chosen == rtdmd.choose_steps(epoch, seed, n=n)


@given(st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=6), st.integers(0, 3), SEEDS)
def test_shared_noise_is_one_per_prompt_step_and_epoch(prompts, step, seed):
    noise = rtdmd.shared_noise(prompts, step, 5, seed, (2, 3))
    for i, p in enumerate(prompts):
        for j, q in enumerate(prompts):
            assert torch.equal(noise[i], noise[j]) == (p == q)
    assert not torch.equal(noise, rtdmd.shared_noise(prompts, step + 1, 5, seed, (2, 3)))
    assert not torch.equal(noise, rtdmd.shared_noise(prompts, step, 6, seed, (2, 3)))


@given(st.integers(1, 40), st.integers(1, 5), SEEDS)
def test_samples_draw_the_same_however_the_batch_is_split(n, ranks, seed):
    whole = models.Noise((seed,), range(n), (2, 2), "cpu").normal("z")
    parts = [models.Noise((seed,), list(range(n))[r::ranks], (2, 2), "cpu").normal("z") for r in range(min(n, ranks))]
    for r, part in enumerate(parts):
        assert torch.equal(part, whole[r::ranks])
