"""Closed forms: what the formulas must give where the answer is known on paper."""

import math

import pytest
import torch

import rtdmd
from acdmd import consistency_loss, distribution_matching_loss, fake_score_loss, renoise
from models import EMA, cps_mean, cps_step
from rtdmd import choose_steps, cps_log_prob, group_advantages, has_signal, policy_loss, shared_noise


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(a, b, atol=1e-6, rtol=1e-5):
    return torch.allclose(a, torch.as_tensor(b, dtype=a.dtype), atol=atol, rtol=rtol)


@pytest.mark.parametrize(("sigma", "sigma_next"), [(1.0, 0.9), (0.9, 0.75), (0.5, 0.0)])
def test_cps_eta_0_is_the_euler_step(sigma, sigma_next):
    x, v = randn(2, 4, 3, 3), randn(2, 4, 3, 3, seed=1)
    assert close(cps_step(x, v, sigma, sigma_next), x + (sigma_next - sigma) * v)


@pytest.mark.parametrize("eta", [0.0, 0.5, 0.9, 1.0])
def test_cps_preserves_coefficients(eta):
    # fed the true pair, x' = (1-s') x0 + s' (cos noise + sin z): the coefficients of level s' for every eta
    x0, noise, z = 2 + 0.5 * randn(200_000, 1, 1, 1), randn(200_000, 1, 1, 1, seed=1), randn(200_000, 1, 1, 1, seed=2)
    angle = eta * math.pi / 2
    for sigma, sigma_next in [(1.0, 0.9), (0.75, 0.5), (0.5, 0.0)]:
        x_next = cps_step((1 - sigma) * x0 + sigma * noise, noise - x0, sigma, sigma_next, eta, z)
        mixed = math.cos(angle) * noise + math.sin(angle) * z
        assert close(x_next, (1 - sigma_next) * x0 + sigma_next * mixed, atol=1e-5)
        variance = (1 - sigma_next) ** 2 * 0.5**2 + sigma_next**2  # hence the marginal of N(2, 0.5^2) at s' is kept
        assert abs(x_next.mean() - (1 - sigma_next) * 2) < 5 * math.sqrt(variance / len(x0))
        assert abs(x_next.var() / variance - 1) < 5 * math.sqrt(2 / len(x0))


def test_renoise_from_0_is_flow_matching():
    x0, noise, t = randn(4, 2, 3, 3), randn(4, 2, 3, 3, seed=1), torch.tensor([0.05, 0.3, 0.6, 0.98])
    x_t, target, sigma_ts = renoise(x0, 0.0, t, noise)
    t = t.view(-1, 1, 1, 1)
    assert close(x_t, (1 - t) * x0 + t * noise)
    assert close(sigma_ts, t)
    assert close(target, t * (noise - x0))
    v = randn(4, 2, 3, 3, seed=2)
    weight = (10 * t**2).clamp(max=1)  # the clamp at 10 only softens t < 0.316
    assert close(fake_score_loss(v, target, sigma_ts), (weight * (v - (noise - x0)).square()).mean())


@pytest.mark.parametrize(("s", "t"), [(0.0, 0.3), (0.5, 0.62), (0.5, 0.9), (0.75, 0.98), (0.9, 0.95)])
def test_ambient_target_regresses_to_the_true_velocity(s, t):
    # x0 ~ N(m, c^2): x_t ~ N((1-t) m, V), and E[noise - x0 | x_t] is a line in x_t. v* must have it as its regression.
    n, m, c = 400_000, 1.5, 0.6
    x_s = (1 - s) * (m + c * randn(n, 1, 1, 1)) + s * randn(n, 1, 1, 1, seed=1)
    x_t, target, sigma_ts = renoise(x_s, s, t, randn(n, 1, 1, 1, seed=2))
    x, v = x_t.flatten().double(), (target / sigma_ts).flatten().double()
    V = (1 - t) ** 2 * c**2 + t**2
    assert abs(x.mean() - (1 - t) * m) < 5 * math.sqrt(V / n)
    assert abs(x.var() / V - 1) < 5 * math.sqrt(2 / n)
    slope = ((x - x.mean()) * (v - v.mean())).mean() / x.var()
    at_mean = v.mean() - slope * (x.mean() - (1 - t) * m)
    residual = (v - at_mean - slope * (x - (1 - t) * m)).std() / math.sqrt(n)  # standard error of at_mean
    assert abs(at_mean - -m) < 5 * residual
    assert abs(slope - (t - (1 - t) * c**2) / V) < 5 * residual / math.sqrt(V)


def consistency_case(n, delta=150, same_noise=False):
    """L_cons for v(x, sigma) = w x at constant x_t, v_t; w, v_t, t, t'; both x'; h(x', t') - h(x_t, t) of both."""
    t, eta, w = 0.8, 0.9, torch.tensor(0.7, requires_grad=True)
    x_t, v_t = torch.full((n, 1, 2, 2), 1.3), torch.full((n, 1, 2, 2), 0.4, requires_grad=True)
    noise = randn(n, 1, 2, 2), randn(n, 1, 2, 2, seed=0 if same_noise else 1)
    draws = torch.full((n,), delta), eta, *noise
    loss = consistency_loss(lambda x, sigma: w * x, x_t, torch.full((n,), t), v_t, *draws)
    t_next = max(t - delta / 1000, 0.0)
    x_next = [cps_step(x_t, v_t.detach(), t, t_next, eta, z) for z in noise]
    return loss, w, v_t, t, t_next, x_next, [(1 - t_next * 0.7) * x - (1.3 - t * 0.4) for x in x_next]


def test_consistency_loss_is_unbiased():
    n, t, t_next, angle = 160_000, 0.8, 0.65, 0.45 * math.pi
    mean = (1 - t_next) * (1.3 - t * 0.4) + t_next * math.cos(angle) * (1.3 + (1 - t) * 0.4)
    gap = (1 - t_next * 0.7) * mean - (1.3 - t * 0.4)  # of the mean over transitions: its square is what L_cons means
    spread = (1 - t_next * 0.7) * t_next * math.sin(angle)
    error = math.sqrt((2 * gap**2 * spread**2 + spread**4) / n)
    assert abs(consistency_case(n // 4)[0] - gap**2) < 5 * error
    error = math.sqrt((4 * gap**2 * spread**2 + 2 * spread**4) / n)  # the plain square adds the variance of one sample
    assert abs(consistency_case(n // 4, same_noise=True)[0] - gap**2 - spread**2) < 5 * error < 0.1 * spread**2


def test_consistency_loss_stops_at_0():
    assert close(consistency_case(2, delta=801)[0], torch.tensor(0.0))  # x' = x0_hat = h(x_t, t)


def test_consistency_gradients_skip_the_transitions():
    loss, w, v_t, t, t_next, (x_1, x_2), (gap_1, gap_2) = consistency_case(3)
    grad_w, grad_v = torch.autograd.grad(loss, (w, v_t))
    assert close(grad_w, -t_next * (x_1 * gap_2 + x_2 * gap_1).mean())
    assert close(grad_v, t * (gap_1 + gap_2) / v_t.numel())


def test_matching_gradient_is_g():
    x_s, fake, teacher = (randn(3, 2, 4, 4, seed=seed).requires_grad_() for seed in range(3))
    loss = distribution_matching_loss(x_s, fake, teacher)
    g = (fake - teacher) / (x_s - teacher).abs().mean((1, 2, 3), keepdim=True)
    grads = torch.autograd.grad(loss, (x_s, fake, teacher), allow_unused=True)
    assert close(grads[0], g / x_s.numel(), atol=1e-7)
    assert grads[1] is None and grads[2] is None
    assert close(loss, 0.5 * g.square().mean())


def test_matching_gradient_with_zero_normaliser():
    x_s, fake, teacher = (randn(3, 2, 4, 4, seed=seed) for seed in range(3))
    teacher[:2] = x_s[:2]
    fake[0] = x_s[0]  # 0 / 0; sample 1 is x / 0
    loss = distribution_matching_loss(x_s.requires_grad_(), fake, teacher)
    (grad,) = torch.autograd.grad(loss, x_s)
    assert loss.isfinite() and (grad[:2] == 0).all()
    assert close(grad[2], (fake[2] - teacher[2]) / (x_s[2] - teacher[2]).abs().mean() / x_s.numel(), atol=1e-7)
    fake[2, 0, 0, 0] = float("nan")  # what a network that overflowed gives must not become a gradient of 0
    assert distribution_matching_loss(x_s, fake, teacher).isnan()
    assert rtdmd.distribution_matching_loss(x_s, fake, teacher).isnan()


def test_policy_gradient_at_ratio_1():
    sigma, sigma_next, eta = 0.9, 0.75, 0.9
    x, v, x_next = randn(3, 2, 4, 4), randn(3, 2, 4, 4, seed=1).requires_grad_(), randn(3, 2, 4, 4, seed=2)
    advantages = torch.tensor([1.5, -0.7, 40.0])  # the last counts as 5
    log_prob = cps_log_prob(x_next, x, v, sigma, sigma_next, eta)
    loss = policy_loss(log_prob, log_prob.detach(), advantages)
    mean_by_v = -(1 - sigma_next) * sigma + sigma_next * math.cos(eta * math.pi / 2) * (1 - sigma)
    residual = x_next - cps_mean(x, v, sigma, sigma_next, eta).detach()
    score = 2 * residual * mean_by_v / v[0].numel()  # d log_prob / dv
    A = torch.tensor([1.5, -0.7, 5.0]).view(-1, 1, 1, 1)
    assert close(torch.autograd.grad(loss, v)[0], -A * score / 3, atol=1e-8)


@pytest.mark.parametrize("advantage", [2.0, -2.0, 9.0, -9.0])
@pytest.mark.parametrize("log_ratio", [-1e-3, 0.0, 1e-3])
def test_clipping_stops_only_what_moves_further_out(advantage, log_ratio):
    log_prob = torch.tensor([log_ratio], requires_grad=True)
    loss = policy_loss(log_prob, torch.zeros(1), torch.tensor([advantage]))
    A, ratio = max(-5.0, min(5.0, advantage)), math.exp(log_ratio)
    clipped = A * log_ratio > 0
    edge = 1 + math.copysign(1e-5, log_ratio)
    assert close(loss, -A * (edge if clipped else ratio), atol=0, rtol=1e-6)
    assert close(torch.autograd.grad(loss, log_prob)[0], [0.0 if clipped else -A * ratio])


def test_group_advantages_by_hand():
    # p has 1, 3 (mean 2), q has 5, 9 (mean 7); all four have variance 8.75
    rewards = torch.tensor([[1.0, 3.0], [5.0, 9.0]])
    scaled = torch.tensor([[-1.0, 1.0], [-2.0, 2.0]]).double() / (math.sqrt(8.75) + 1e-4)  # variance 2.5 / 8.75
    want = scaled / (math.sqrt(2.5) / (math.sqrt(8.75) + 1e-4) + 1e-4)
    assert close(group_advantages({"a": rewards}, {"a": 1.0}), want)
    # a scorer that is flat within each group adds nothing but rounding, whatever its weight
    flat = {"a": rewards, "b": torch.tensor([[3.0, 3.0], [7.0, 7.0]])}
    assert has_signal(flat, {"a": 1.0, "b": 1.0}).all() and not has_signal(flat, {"a": 0.0, "b": 1.0}).any()
    assert close(group_advantages(flat, {"a": 1.0, "b": 100.0}), want)
    opposed = {"a": rewards, "b": -10 * rewards}  # each scorer in units of its own spread: weight 2 wins over 1
    assert close(group_advantages(opposed, {"a": 1.0, "b": 2.0}), -want, atol=1e-3)
    # groups of one: the global mean, 3, in place of their own; variance 3.5
    got = group_advantages({"a": torch.tensor([[1.0], [2.0], [3.0], [6.0]])}, {"a": 1.0})
    assert close(got, torch.tensor([[-2.0], [-1.0], [0.0], [3.0]]) / math.sqrt(3.5), atol=1e-3)


def test_stage_2_ema_warms_up():
    parameter, average = torch.ones(3), torch.zeros(3)
    ema, seen = EMA([parameter], [average], decay=0.9, every=8, warmup=True), {}
    for n in range(96):
        before = average.clone()
        ema.update(n)
        if not torch.equal(before, average):
            seen[n] = ((1 - average) / (1 - before))[0].item()  # the decay that was used
    assert list(seen) == list(range(7, 96, 8))
    assert seen[7] == pytest.approx(8 / 17) and seen[15] == pytest.approx(16 / 25)
    assert seen[79] == pytest.approx(80 / 89) and seen[87] == pytest.approx(0.9, rel=1e-3)


def test_choose_steps():
    picks = [choose_steps(epoch, seed=3) for epoch in range(60)]
    assert picks == [choose_steps(epoch, seed=3) for epoch in range(60)]
    assert {tuple(pick) for pick in picks} == {(0, 1), (0, 2), (1, 2)}  # sorted, and all pairs come up
    assert picks != [choose_steps(epoch, seed=4) for epoch in range(60)]
    assert choose_steps(0, 3, candidates=(1, 2, 5), n=3) == [1, 2, 5]


def test_shared_noise():
    shape, prompts = (4, 8, 8), ["a", "b", "a", "c"]
    noise = shared_noise(prompts, step=1, epoch=2, seed=3, shape=shape)
    assert noise.shape == (4, *shape) and noise.dtype == torch.float32 and noise.device.type == "cpu"
    assert torch.equal(noise[0], noise[2])
    others = [shared_noise(["a"], *key, shape)[0] for key in ((0, 2, 3), (1, 1, 3), (1, 2, 4))]
    rows = [noise[0], noise[1], noise[3], *others]
    assert all(not torch.equal(a, b) for i, a in enumerate(rows) for b in rows[:i])
    torch.manual_seed(9)  # the same on another rank: neither global state nor place in the batch matters
    assert torch.equal(shared_noise(["c"], 1, 2, 3, shape)[0], noise[3])
    assert abs(noise.mean()) < 0.2 and abs(noise.std() - 1) < 0.2
