"""What the loops of both stages do with the formulas: weights, roles, order of updates, averages."""

from pathlib import Path

import pytest
import test_scripts
import torch

import acdmd
import models
import rewards
import rtdmd

ROOT = Path(__file__).parent.parent
STAGE_1 = "--batch_size 4 --consistency_batch 2 --rank 4 --steps 4 --fake_update_ratio 2 --gamma 0.5 --ema_decay 0.9"
STAGE_2 = "--epochs 3 --batch_size 4 --batches 2 --group_size 4 --gamma 0.5 --ema_every 2"
STAGE_2 += " --step_weights 0.5,2,1 --dm_weight 0.01 --bp_weight 0.01 --sample_every 0 --eval_every 0"
STAGE_2 += f" --distilled {ROOT}/classroom/adapters/acdmd"


def gradient(loss, parameters):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, retain_graph=True)])


def close(got, want):
    assert want.abs().max() > 0 and (got - want).abs().max() <= 1e-4 * want.abs().max()


def weights_of(folder, adapter):
    tensors = models.load_file(folder / adapter / models.LORA_FILE)
    return torch.cat([value.flatten() for name, value in sorted(tensors.items()) if "lora_B" in name])


def test_an_iteration_of_stage_1(tmp_path, monkeypatch):
    """L_ac + gamma L_cons moves the fake score every time, L_G the generator every second time."""
    updates, wanted, losses, step = [], {}, {}, acdmd.step_optimizer
    run = {}

    def adapters(self, networks, *args):
        run["parameters"] = dict(zip(networks, begin(self, networks, *args), strict=True))
        return list(run["parameters"].values())

    def spied(name):
        loss_of = getattr(acdmd, name)

        def loss(*args, **kwargs):
            losses[name] = loss_of(*args, **kwargs)
            role = "generator" if name == "distribution_matching_loss" else "fake"
            wanted[role] = run["parameters"][role]
            if name != "fake_score_loss":
                whole = losses[name] if role == "generator" else losses["fake_score_loss"] + 0.5 * losses[name]
                wanted[f"{role}_gradient"] = gradient(whole, wanted[role])
            return losses[name]

        return loss

    def spied_step(optimizer, *args):
        parameters = optimizer.param_groups[0]["params"]
        updates.append("fake" if parameters[0] is wanted["fake"][0] else "generator")
        assert all(a is b for a, b in zip(parameters, wanted[updates[-1]], strict=True))
        assert optimizer.defaults["lr"] == {"fake": 1e-3, "generator": 2e-3}[updates[-1]]
        close(torch.cat([p.grad.flatten() for p in parameters]), wanted[f"{updates[-1]}_gradient"])
        return step(optimizer, *args)

    begin = models.Run.adapters
    monkeypatch.setattr(models.Run, "adapters", adapters)
    for name in ("fake_score_loss", "consistency", "distribution_matching_loss"):
        monkeypatch.setattr(acdmd, name, spied(name))
    monkeypatch.setattr(acdmd, "step_optimizer", spied_step)
    flags = f"{STAGE_1} --lr 2e-3 --sample_every 0 --eval_every 0 --save_every 1 --out {tmp_path}".split()
    acdmd.main(acdmd.parse_args(flags))
    assert updates == ["fake", "fake", "generator"] * 2
    # B began as 0, and moved in iterations 2 and 4; the average follows every iteration
    three, four = tmp_path / "step_000003", tmp_path / "step_000004"
    moved = weights_of(three, "generator")
    close(weights_of(three, "generator_ema"), (0.1 + 0.9 * 0.1) * moved)  # of iterations 2 and 3
    close(weights_of(four, "generator_ema"), 0.9 * 0.19 * moved + 0.1 * weights_of(four, "generator"))


def test_the_teacher_of_the_matching_loss_is_guided_and_the_fake_score_is_not(tmp_path, monkeypatch):
    """L_G of an iteration, written down again from what the rollout gave."""
    seen, rollout, matching = {}, acdmd.rollout, acdmd.distribution_matching_loss

    def spied_rollout(backbone, cond, levels, eta, noise, grad=False):
        x_s = rollout(backbone, cond, levels, eta, noise, grad)
        seen.update(backbone=backbone, cond=cond, s=levels[-1], noise=noise, x_s=x_s)
        return x_s

    def spied_matching(*args):
        loss = matching(*args)
        backbone, cond, noise, s = (seen[name] for name in ("backbone", "cond", "noise", "s"))
        t = acdmd.draw_t(noise.uniform("t"), s)
        with torch.no_grad():
            x_t = acdmd.renoise(seen["x_s"], s, t, noise.normal("z"))[0]
            both = {name: value.expand_as(cond[name]) for name, value in backbone.encode([""]).items()}
            v_c, v_u = (backbone.velocity("teacher", x_t, t, c) for c in (cond, both))
            v_fake, back = backbone.velocity("fake", x_t, t, cond), noise.normal("back")
            walks = (models.cps_step(x_t, v, t, s, 0.7, back) for v in (v_fake, v_u + 2.5 * (v_c - v_u)))
            torch.testing.assert_close(loss.detach(), matching(seen["x_s"], *walks))
        seen["compared"] = seen.get("compared", 0) + 1
        return loss

    monkeypatch.setattr(acdmd, "rollout", spied_rollout)
    monkeypatch.setattr(acdmd, "distribution_matching_loss", spied_matching)
    flags = f"{STAGE_1} --guidance_scale 2.5 --eta 0.7 --sample_every 0 --eval_every 0 --out {tmp_path}".split()
    acdmd.main(acdmd.parse_args(flags))
    assert seen["compared"] == 2


def test_steps_back_in_time_are_1_to_delta_max(monkeypatch):
    backbone, seen = models.load("classroom"), []
    monkeypatch.setattr(acdmd, "consistency_loss", lambda *args: seen.append(args[4]) or torch.zeros(()))
    monkeypatch.setattr(rtdmd, "consistency_loss", lambda *args: seen.append(args[4]) or torch.zeros(()))
    monkeypatch.setattr(acdmd, "DELTA_MAX", 3)
    monkeypatch.setattr(rtdmd, "DELTA_MAX", 3)
    cond, x = backbone.encode(["a circle"] * 64), torch.zeros(64, *backbone.latent_shape)
    noise, start = models.Noise((0,), range(64), backbone.latent_shape, "cpu"), (x, torch.full((64,), 0.5), x)
    acdmd.consistency(backbone, cond, start, noise, 0.9)
    rtdmd.consistency(backbone, cond, start, noise, 0.9)
    assert all(delta.unique().tolist() == [1, 2, 3] for delta in seen) and len(seen) == 2


def test_an_epoch_of_stage_2(tmp_path, monkeypatch):
    """The gradients that micro-batches and single steps add up are those of the whole loss, written down at once."""
    args = rtdmd.parse_args(f"{STAGE_2} --save_every 1 --out {tmp_path}".split())
    seen, updates = {}, []
    sample, step, advantages_ = rtdmd.sample, rtdmd.step_optimizer, rtdmd.group_advantages
    load_scorers = rewards.load_scorers

    def spied_sample(backbone, prompts, sigmas, chosen, eta, noise):
        states, log_probs = sample(backbone, prompts, sigmas, chosen, eta, noise)
        if noise.indices[0] == 0:
            seen.update(backbone=backbone, sigmas=sigmas, chosen=chosen, epoch=noise.key[1], parts=[])
        seen["parts"].append((prompts, states))
        return states, log_probs

    def spied_advantages(scores, weights):
        seen["advantages"] = advantages_(scores, weights)
        return seen["advantages"]

    def spied_scorers(*args):
        seen["scorers"] = load_scorers(*args)
        return seen["scorers"]

    def whole_losses():
        backbone, sigmas, eta = seen["backbone"], seen["sigmas"], args.eta
        backbone.roles |= {"whole": ("distilled", "rl"), "whole_fake": ("fake", "fake_rl")}
        prompts = [p for texts, _ in seen["parts"] for p in texts]
        states, advantages = torch.cat([part[1] for part in seen["parts"]]), seen["advantages"].flatten()
        cond, uncond, key = backbone.encode(prompts), backbone.encode([""]), (args.seed, seen["epoch"])
        noise = {
            use: models.Noise((*key, use), range(8), backbone.latent_shape, "cpu") for use in ("fake", "generator")
        }

        x_t, t, z = rtdmd.noised(states[:, -1], noise["fake"])
        v = backbone.velocity("whole_fake", x_t, t, cond)
        loss_ac = rtdmd.fake_score_loss(v, states[:, -1], z, t)
        yield loss_ac + 0.5 * rtdmd.consistency(backbone, cond, (x_t, t, v), noise["fake"], eta)

        terms = []
        for j in seen["chosen"]:
            v = backbone.velocity("whole", states[:, j], sigmas[j], cond)
            log_prob = rtdmd.cps_log_prob(states[:, j + 1], states[:, j], v, sigmas[j], sigmas[j + 1], eta)
            terms.append(args.step_weights[j] * rtdmd.policy_loss(log_prob, log_prob.detach(), advantages))
        v = backbone.velocity("whole", states[:, 3], sigmas[3], cond)
        x0 = states[:, 3] - sigmas[3] * v
        with torch.no_grad():
            x_t, t, _ = rtdmd.noised(x0, noise["generator"])
            v_teacher = backbone.velocity("teacher", x_t, t, cond, args.guidance_scale, uncond)
            v_fake = backbone.velocity("whole_fake", x_t, t, cond)
            x0_fake, x0_teacher = (x_t - models.per_sample(t, x_t) * v for v in (v_fake, v_teacher))
        judge = next(scorer for scorer in seen["scorers"].scorers if scorer.differentiable)
        reward = args.rewards["clipscore"] * judge(backbone.decode(x0), prompts)["clipscore"]
        matching = rtdmd.distribution_matching_loss(x0, x0_fake, x0_teacher)
        last = 0.01 * matching + 0.01 * torch.relu(args.reward_margin - reward).mean()
        yield (sum(terms) + last) / 3

    def spied_step(optimizer, *rest):
        updates.append("generator" if updates[-1:] == ["fake"] else "fake")
        parameters = optimizer.param_groups[0]["params"]
        assert optimizer.defaults["lr"] == {"fake": args.lr_fake, "generator": args.lr}[updates[-1]]
        losses = dict(zip(("fake", "generator"), whole_losses(), strict=True))
        close(torch.cat([p.grad.flatten() for p in parameters]), gradient(losses[updates[-1]], parameters))
        return step(optimizer, *rest)

    monkeypatch.setattr(rtdmd, "sample", spied_sample)
    monkeypatch.setattr(rtdmd, "group_advantages", spied_advantages)
    monkeypatch.setattr(rewards, "load_scorers", spied_scorers)
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


def test_a_step_of_weight_0_is_never_chosen(tmp_path, monkeypatch):
    seen, sample = [], rtdmd.sample
    monkeypatch.setattr(rtdmd, "sample", lambda *args: seen.append(args[3]) or sample(*args))
    rtdmd.main(rtdmd.parse_args(f"{STAGE_2} --n_chosen 1 --step_weights 0,2,1 --epochs 6 --out {tmp_path}".split()))
    assert {tuple(chosen) for chosen in seen} == {(1,), (2,)}


def test_an_optimiser_step_clips_the_norm_at_1():
    p = torch.nn.Parameter(torch.zeros(2))
    for gradient, moved in (([3.0, 4.0], [-0.6, -0.8]), ([0.3, 0.4], [-0.3, -0.4])):
        p.data.zero_()
        p.grad = torch.tensor(gradient)
        norm = models.step_optimizer(torch.optim.SGD([p], lr=4.0), 0.25, 1)
        assert norm.item() == pytest.approx(sum(g * g for g in gradient) ** 0.5) and p.grad is None
        assert p.tolist() == pytest.approx(moved, rel=1e-5)


def test_scores_see_pictures_of_8_bits_and_gradients_do_not():
    scorers = rewards.load_scorers({"clipscore": 1.0}, "cpu", models.CLASSROOM)
    images = torch.randint(256, (2, 3, 64, 64), generator=models.seeded(0)) / 255
    near, prompts = (images + 0.4 / 255 * torch.rand(images.shape)).clamp(max=1), ["a circle", "a cross"]
    assert torch.equal(scorers.score(images, prompts)["clipscore"], scorers.score(near, prompts)["clipscore"])
    assert not torch.equal(scorers.differentiable(images, prompts)[0], scorers.differentiable(near, prompts)[0])


def test_text_is_encoded_before_any_network_runs(tmp_path, monkeypatch):
    """Encoders that wait on the CPU need room on the GPU: guidance's empty prompt, too, comes before activations do."""
    velocity, encode, inside, encoded = models.Backbone.velocity, models.SD3.encode_texts, [], []

    def run(*args, **kwargs):
        inside.append(1)
        v = velocity(*args, **kwargs)
        inside.pop()
        return v

    def read(self, prompts):
        assert not inside
        encoded.extend(prompts)
        return encode(self, prompts)

    monkeypatch.setattr(models.Backbone, "velocity", run)
    monkeypatch.setattr(models.SD3, "encode_texts", read)
    test_scripts.stage_1(tmp_path / "one", "--steps", 2, "--guidance_scale", 1.5)
    assert encoded.count("") == 1
    encoded.clear()
    test_scripts.stage_2(tmp_path / "two", tmp_path / "one/final", "--epochs", 1, "--rewards", "clipscore=1")
    assert encoded.count("") == 1
