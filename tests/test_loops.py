"""What the loops of both stages do with the formulas: weights, roles, order of updates, averages."""

from pathlib import Path

import pytest
import torch

import acdmd
import models
import rewards
import rtdmd

ROOT = Path(__file__).parent.parent
STAGE_1 = "--batch_size 4 --consistency_batch 2 --rank 4 --steps 4 --fake_update_ratio 2 --gamma 0.5 --ema_decay 0.9"
STAGE_2 = "--epochs 3 --batch_size 4 --batches 2 --group_size 4 --gamma 0.5 --ema_every 2"
STAGE_2 += f" --dm_weight 0.01 --bp_weight 0.01 --sample_every 0 --distilled {ROOT}/classroom/adapters/acdmd"


def gradient(loss, parameters):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, retain_graph=True)])


def close(got, want):
    assert want.abs().max() > 0 and (got - want).abs().max() <= 1e-4 * want.abs().max()


def weights_of(folder, adapter):
    tensors = models.load_file(folder / adapter / models.LORA_FILE)
    return torch.cat([value.flatten() for name, value in sorted(tensors.items()) if "lora_B" in name])


def test_an_iteration_of_stage_1(tmp_path, monkeypatch):
    """L_ac + gamma L_cons moves the fake score every time, L_G the generator every second time."""
    updates, wanted, step = [], {}, acdmd.step_optimizer
    fake_losses, generator_loss = acdmd.fake_losses, acdmd.generator_loss

    def spied_fake(backbone, *args):
        loss_ac, loss_cons = fake_losses(backbone, *args)
        wanted["fake"] = models.adapter_parameters(backbone.transformer, "fake")
        wanted["fake_gradient"] = gradient(loss_ac + 0.5 * loss_cons, wanted["fake"])
        return loss_ac, loss_cons

    def spied_generator(backbone, *args):
        loss = generator_loss(backbone, *args)
        wanted["generator"] = models.adapter_parameters(backbone.transformer, "generator")
        wanted["generator_gradient"] = gradient(loss, wanted["generator"])
        return loss

    def spied_step(optimizer, *args):
        parameters = optimizer.param_groups[0]["params"]
        updates.append("fake" if parameters[0] is wanted["fake"][0] else "generator")
        assert all(a is b for a, b in zip(parameters, wanted[updates[-1]], strict=True))
        close(torch.cat([p.grad.flatten() for p in parameters]), wanted[f"{updates[-1]}_gradient"])
        return step(optimizer, *args)

    monkeypatch.setattr(acdmd, "fake_losses", spied_fake)
    monkeypatch.setattr(acdmd, "generator_loss", spied_generator)
    monkeypatch.setattr(acdmd, "step_optimizer", spied_step)
    flags = f"{STAGE_1} --sample_every 0 --save_every 1 --out {tmp_path}".split()
    acdmd.main(acdmd.parse_args(flags))
    assert updates == ["fake", "fake", "generator"] * 2
    # B began as 0, and moved in iterations 2 and 4; the average follows every iteration
    three, four = tmp_path / "step_000003", tmp_path / "step_000004"
    moved = weights_of(three, "generator")
    close(weights_of(three, "generator_ema"), (0.1 + 0.9 * 0.1) * moved)  # of iterations 2 and 3
    close(weights_of(four, "generator_ema"), 0.9 * 0.19 * moved + 0.1 * weights_of(four, "generator"))


def test_the_teacher_of_the_matching_loss_is_guided_and_the_fake_score_is_not():
    backbone = models.load("classroom")
    models.load_adapter(backbone.transformer, "fake", ROOT / "classroom/adapters/acdmd/fake")
    backbone.roles["fake"] = ("fake",)
    args, key, rows = acdmd.parse_args(["--guidance_scale", "2.5"]), (0,), range(2)
    cond, uncond = backbone.encode(["a circle", "a red cross"]), backbone.encode([""])
    x_s, s = acdmd.rollout(backbone, cond, backbone.sigmas(), 2, args, rows, key)
    got = acdmd.generator_loss(backbone, cond, uncond, x_s, s, args, rows, key)

    shape = backbone.latent_shape
    noise, back = (models.draw(torch.randn, shape, rows, *key, name) for name in ("z", "back"))
    t = acdmd.draw_t(models.draw(torch.rand, (), rows, *key, "t"), s)
    with torch.no_grad():
        x_t = models.renoise(x_s, s, t, noise)[0]
        both = {name: value.expand_as(cond[name]) for name, value in uncond.items()}
        v_c, v_u = (backbone.velocity(x_t, t, c, role="teacher") for c in (cond, both))
        v_fake = backbone.velocity(x_t, t, cond, role="fake")
        walks = (models.cps_step(x_t, v, t, s, args.eta, back) for v in (v_fake, v_u + 2.5 * (v_c - v_u)))
        torch.testing.assert_close(got, acdmd.distribution_matching_loss(x_s, *walks))


def test_steps_back_in_time_are_1_to_delta_max(monkeypatch):
    backbone, seen = models.load("classroom"), []
    monkeypatch.setattr(acdmd, "consistency_loss", lambda *args: seen.append(args[4]) or torch.zeros(()))
    monkeypatch.setattr(rtdmd, "consistency_loss", lambda *args: seen.append(args[4]) or torch.zeros(()))
    monkeypatch.setattr(backbone, "velocity", lambda x, *args, **kwargs: x)
    monkeypatch.setattr(rtdmd, "DELTA_MAX", 3)
    one, two = acdmd.parse_args(["--delta_max", "3"]), rtdmd.parse_args(STAGE_2.split())
    one.consistency_batch = two.consistency_batch = None
    cond, x = backbone.encode(["a circle"] * 64), torch.zeros(64, *backbone.latent_shape)
    acdmd.fake_losses(backbone, cond, x, 0.5, one, range(64), (0,))
    rtdmd.fake_loss(backbone, cond, x, two, range(64), (0,))
    assert all(delta.unique().tolist() == [1, 2, 3] for delta in seen) and len(seen) == 2


def test_an_epoch_of_stage_2(tmp_path, monkeypatch):
    """The gradients that micro-batches and single steps add up are those of the whole loss, written down at once."""
    args = rtdmd.parse_args(f"{STAGE_2} --save_every 1 --out {tmp_path}".split())
    seen, updates = {}, []
    sample, step = rtdmd.sample, rtdmd.step_optimizer

    def spied_sample(backbone, scorers, prompts, metadata, sigmas, chosen, args, indices, epoch):
        rollouts = sample(backbone, scorers, prompts, metadata, sigmas, chosen, args, indices, epoch)
        if indices[0] == 0:
            seen.update(backbone=backbone, scorers=scorers, sigmas=sigmas, chosen=chosen, epoch=epoch, parts=[])
        seen["parts"].append((prompts, *rollouts))
        return rollouts

    def whole_losses():
        backbone, sigmas, rows = seen["backbone"], seen["sigmas"], range(8)
        backbone.roles |= {"whole": ("distilled", "rl"), "whole_fake": ("fake", "fake_rl")}
        prompts = [p for texts, *_ in seen["parts"] for p in texts]
        states = torch.cat([part[1] for part in seen["parts"]])
        scores = {name: torch.cat([part[3][name] for part in seen["parts"]]) for name in args.rewards}
        advantages = rtdmd.group_advantages(scores, prompts, args.rewards)
        cond, uncond, key = backbone.encode(prompts), backbone.encode([""]), (args.seed, seen["epoch"])

        loss_ac, loss_cons = rtdmd.fake_loss(backbone, cond, states[:, -1], args, rows, (*key, "fake"))
        yield loss_ac + 0.5 * loss_cons

        terms = []
        for j in seen["chosen"]:
            v = backbone.velocity(states[:, j], sigmas[j], cond, role="whole")
            log_prob = models.cps_log_prob(states[:, j + 1], states[:, j], v, sigmas[j], sigmas[j + 1], args.eta)
            terms.append(rtdmd.policy_loss(log_prob, log_prob.detach(), advantages))
        v = backbone.velocity(states[:, 3], sigmas[3], cond, role="whole")
        x0 = states[:, 3] - sigmas[3] * v
        with torch.no_grad():
            x_t, t, _ = rtdmd.noised(backbone, x0, rows, (*key, "generator"))
            v_teacher = backbone.velocity(x_t, t, cond, args.guidance_scale, uncond, role="teacher")
            v_fake = backbone.velocity(x_t, t, cond, role="whole_fake")
            x0_fake, x0_teacher = (x_t - models.per_sample(t, x_t) * v for v in (v_fake, v_teacher))
        reward = seen["scorers"].differentiable(backbone.decode(x0), prompts)
        matching = rtdmd.distribution_matching_loss(x0, x0_fake, x0_teacher)
        last = 0.01 * matching + 0.01 * torch.relu(args.reward_margin - reward).mean()
        yield (sum(terms) + last) / 3

    def spied_step(optimizer, *rest):
        updates.append("generator" if updates[-1:] == ["fake"] else "fake")
        parameters = optimizer.param_groups[0]["params"]
        losses = dict(zip(("fake", "generator"), whole_losses(), strict=True))
        close(torch.cat([p.grad.flatten() for p in parameters]), gradient(losses[updates[-1]], parameters))
        return step(optimizer, *rest)

    monkeypatch.setattr(rtdmd, "sample", spied_sample)
    monkeypatch.setattr(rtdmd, "step_optimizer", spied_step)
    rtdmd.main(args)
    assert updates == ["fake", "generator"] * 3
    # the average begins with the first epoch, at a decay of 2/11, and goes on every second one, at 4/13
    two, three = tmp_path / "step_000002", tmp_path / "step_000003"
    first = weights_of(two, "rl_ema")
    close(weights_of(three, "rl_ema"), 4 / 13 * first + 9 / 13 * weights_of(three, "rl"))
    again = rtdmd.parse_args(f"{STAGE_2} --save_every 1 --out {tmp_path}/again".split())
    again.epochs = 1
    monkeypatch.setattr(rtdmd, "step_optimizer", step)
    rtdmd.main(again)
    close(weights_of(tmp_path / "again/final", "rl_ema"), 9 / 11 * weights_of(tmp_path / "again/final", "rl"))


def test_an_optimiser_step_clips_the_norm_at_1():
    p = torch.nn.Parameter(torch.zeros(2))
    for gradient, moved in (([3.0, 4.0], [-0.6, -0.8]), ([0.3, 0.4], [-0.3, -0.4])):
        p.data.zero_()
        p.grad = torch.tensor(gradient)
        norm = models.step_optimizer(torch.optim.SGD([p], lr=7.0), 1.0, 1)
        assert norm.item() == pytest.approx(sum(g * g for g in gradient) ** 0.5) and p.grad is None
        assert p.tolist() == pytest.approx(moved, rel=1e-5)


def test_scores_see_pictures_of_8_bits_and_gradients_do_not():
    scorers = rewards.load_scorers({"clipscore": 1.0}, "cpu", models.CLASSROOM)
    images = torch.randint(256, (2, 3, 64, 64), generator=models.seeded(0)) / 255
    near, prompts = (images + 0.4 / 255 * torch.rand(images.shape)).clamp(max=1), ["a circle", "a cross"]
    assert torch.equal(scorers.score(images, prompts)["clipscore"], scorers.score(near, prompts)["clipscore"])
    assert not torch.equal(scorers.differentiable(images, prompts), scorers.differentiable(near, prompts))
