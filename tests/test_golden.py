"""Every formula against numbers made with the authors' code; golden/index.json says what each tensor is."""

import json
import math
import os
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
)
from safetensors.torch import load_file

import acdmd
import models
import rtdmd
from acdmd import renoise
from models import cps_mean, cps_step, lora_modules
from rewards import geneval_check
from rtdmd import cps_log_prob

GOLDEN = Path(os.environ.get("GOLDEN") or Path(__file__).parent / "golden")
TOPICS = json.loads((GOLDEN / "index.json").read_text())["topics"]
GENEVAL = json.loads((GOLDEN / "geneval.json").read_text())


@cache
def tensors(topic):
    return load_file(GOLDEN / TOPICS[topic]["file"])


# A function per topic: inputs x, settings p and expected tensors of a case -> the same tensors made by our code.


def schedules(x, p, want):
    config = vars(p).get("scheduler_config") or {"shift": p.shift}

    def sigmas(**changes):
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(config | changes)
        return models.few_step_sigmas(scheduler, p.raw_steps, vars(p).get("image_tokens"), p.family)

    got = {"sigmas": sigmas(), "timesteps": [1000 * s for s in sigmas()[:-1]]}
    if "mu" in want:  # what the exponential shift adds to the logit
        plain, raw = sigmas(shift_terminal=None)[1], p.raw_steps[1] / 1000
        got["mu"] = math.log(plain / (1 - plain)) - math.log(raw / (1 - raw))
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in got.items()}


def cps(x, p, want):
    if "states" not in want:
        step = x["x"], x["v"], x["sigma"], x["sigma_next"], p.eta
        return {"x_next": cps_step(*step, x["z"]), "mean": cps_mean(*step)}
    states = [x["x_start"]]
    for sigma, sigma_next, v, z in zip(p.sigmas, p.sigmas[1:], x["v"], x["z"], strict=False):
        states.append(cps_step(states[-1], v, sigma, sigma_next, p.eta, z))
    return {"states": torch.stack(states)}


def renoised(x, p, want):
    x_t, target, sigma_ts = renoise(x["x_s"], x["s"], x["t"], x["z"])
    weight = [acdmd.fake_score_loss(1 / s, torch.zeros_like(s), s) for s in sigma_ts.split(1)]  # mean(w (s / s - 0)^2)
    return {"x_t": x_t, "sigma_ts": sigma_ts.flatten(), "scaled_target": target, "weight": torch.stack(weight)}


def log_prob(x, p, want):
    v, sigmas = x["v"].requires_grad_(), torch.tensor(p.sigmas)
    levels = sigmas[p.step], sigmas[[j + 1 for j in p.step]], p.eta
    logp = cps_log_prob(x["x_next"], x["x"], v, *levels)
    (grad,) = torch.autograd.grad((x["weights"] * logp).sum(), v)
    return {"mean": cps_mean(x["x"], v, *levels), "logp": logp, "grad_v": grad}


def ppo(x, p, want):
    v, j = x["v"].requires_grad_(), p.step
    logp = cps_log_prob(x["x_next"], x["x"], v, p.sigmas[j], p.sigmas[j + 1], p.eta)
    loss = rtdmd.policy_loss(logp, x["logp_old"], x["advantage"], p.clip_range, p.adv_clip)
    minus_one = -torch.ones_like(x["advantage"])
    ratio = rtdmd.policy_loss(logp, x["logp_old"], minus_one, clip_range=1e3)  # unclipped: the mean ratio
    return {"logp": logp, "loss": loss, "ratio_mean": ratio, "grad_v": torch.autograd.grad(loss, v)[0]}


def advantages(x, p, want):
    rewards = {name.removeprefix("reward_"): r for name, r in x.items() if name.startswith("reward_")}
    weights = vars(p).get("weights") or dict.fromkeys(rewards, 1.0)
    order = sorted(range(len(p.prompts)), key=lambda i: p.prompts[i])  # groups may be interleaved there
    n_groups = len(set(p.prompts))
    grouped = {name: r[order].view(n_groups, -1) for name, r in rewards.items()}
    got = torch.empty(len(order))
    got[order] = rtdmd.group_advantages(grouped, weights).flatten()
    return {"advantage": got}


def ema(x, p, want):
    parameter, rows = torch.zeros_like(x["start"]), []
    average = models.EMA([parameter], [x["start"]], p.decay, p.every, warmup=p.kind == "stage2")
    for n, value in zip(p.n_of_call, x["values"], strict=True):
        parameter.copy_(value)
        average.update(n)
        rows.append(x["start"].clone())
    return {"average": torch.stack(rows)}


def lora_merge(x, p, want):
    base = {path: x[f"{path}/W"] for path in want}
    attn = torch.nn.ModuleDict()
    for path, W in base.items():
        attn[path.removeprefix("transformer_blocks.0.attn.")] = linear = torch.nn.Linear(*W.shape[::-1], bias=False)
        linear.weight.data.copy_(W)
    model = torch.nn.ModuleDict({"transformer_blocks": torch.nn.ModuleList([torch.nn.ModuleDict({"attn": attn})])})
    models.prepare_for_lora(model, models.SD3.lora_targets)
    marks = ["", "2"] if "rank2" in vars(p) else [""]
    for mark in marks:
        rank = vars(p)[f"rank{mark}"]
        models.add_adapter(model, f"lora{mark}", rank)
        for path, m in lora_modules(model).items():
            m.lora_A[f"lora{mark}"].data.copy_(x[f"{path}/A{mark}"])
            m.lora_B[f"lora{mark}"].data.copy_(x[f"{path}/B{mark}"] * (p.alpha / rank / models.LORA_SCALE))
    effective = lambda: {path: m(torch.eye(m.base.in_features)).T for path, m in lora_modules(model).items()}  # noqa: E731
    assert all(torch.equal(W, base[path]) for path, W in effective().items())  # all adapters off
    with models.adapters(model, *[f"lora{mark}" for mark in marks]):
        return effective()


def toy(M, b):
    """v(x, sigma) = tanh(M x + sigma b)"""
    mix = lambda x: torch.einsum("ij,bjhw->bihw", M, x)  # noqa: E731
    return lambda x, sigma: torch.tanh(mix(x) + sigma.view(-1, 1, 1, 1) * b.view(1, -1, 1, 1))


class ToyVAE(torch.nn.Module):
    config, dtype = SimpleNamespace(scaling_factor=1.5305, shift_factor=0.0609), torch.float32

    def __init__(self, W, c):
        super().__init__()
        self.W, self.c = W, c.view(1, -1, 1, 1)

    def decode(self, z):
        return SimpleNamespace(sample=torch.einsum("ij,bjhw->bihw", self.W, z) + self.c)


def weights(topic, name):
    """State dict of one weight set of a topic's file."""
    start = f"weights/{name}/"
    return {key.removeprefix(start): value for key, value in tensors(topic).items() if key.startswith(start)}


def tiny_sd3(topic, p, vae=None, roles=("generator", "fake")):
    """models.SD3 around a tiny transformer with the golden weights of a case: base and, for roles, LoRA."""
    names = [vars(p).get("weights", "").removeprefix("weights/"), f"{p.case}_base", "sd3_base", "sd3"]
    base = next(name for name in names if name and weights(topic, name))
    config = TOPICS[topic]["sd3_config"] | vars(p).get("config_overrides", {})
    transformer = SD3Transformer2DModel(**config)
    transformer.load_state_dict(weights(topic, base))
    pipe = SimpleNamespace(transformer=transformer, vae=vae or torch.nn.Identity(), scheduler=None, vae_scale_factor=1)
    backbone = models.SD3(pipe, resolution=config["sample_size"], text_tokens=0)
    for role in roles:
        assert p.lora_alpha == models.LORA_SCALE * p.lora_rank
        models.add_adapter(transformer, role, p.lora_rank)
        backbone.roles[role] = (role,)
        parameters = lora_tensors(backbone, role)
        golden = weights(topic, f"{base.removesuffix('_base')}_{role}_lora")
        assert parameters.keys() == golden.keys()
        for name, parameter in parameters.items():
            parameter.data.copy_(golden[name])
    return backbone


def lora_tensors(backbone, role):
    modules, keys = lora_modules(backbone.transformer), ("lora_A", "lora_B")
    return {f"{path}.{key}.weight": getattr(m, key)[role] for path, m in modules.items() for key in keys}


def predictor(backbone, x, role, rows=slice(None), guidance=1.0):
    """predict(x, sigma) of a role under the embeddings of a case; twice as many x run as two batches side by side."""
    names = "encoder_hidden_states", "pooled_projections"
    cond = dict(zip(names, (x["prompt_embeds"][rows], x["pooled"][rows]), strict=True))
    uncond = dict(zip(names, (x["uncond_embeds"], x["uncond_pooled"]), strict=True)) if guidance > 1 else None

    def predict(x, sigma):
        fitted = {name: torch.cat([c] * (len(x) // len(c))) for name, c in cond.items()}
        return backbone.velocity(role, x, sigma, fitted, guidance, uncond)

    return predict


def gradients(loss, parameters, group):
    """{group/name: dloss/dparameter}"""
    grads = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
    return {f"{group}/{name}": grad for name, grad in zip(parameters, grads, strict=True)}


def norm(grads):
    return torch.cat([g.flatten() for g in grads.values()]).norm()


def predict(x, p, want):
    if "vae_latents" in want:
        params = (case.get("params", {}) for case in TOPICS["predict"]["cases"])
        backbone = tiny_flux(SimpleNamespace(**next(q for q in params if q.get("family") == "flux2")))
        mean, var = torch.zeros(x["x"].shape[1]), torch.ones(x["x"].shape[1])  # of a VAE that leaves the numbers alone
        bn, config = SimpleNamespace(running_mean=mean, running_var=var), SimpleNamespace(batch_norm_eps=0.0)
        backbone.vae = SimpleNamespace(bn=bn, config=config)
        return {"vae_latents": backbone.vae_latents(x["x"])}
    if p.family == "sd3":
        backbone = tiny_sd3("predict", p, roles=())
        return {"v": predictor(backbone, x, "teacher", guidance=p.guidance)(x["x"], x["t"] / 1000)}
    backbone = tiny_flux(p)
    handed = []
    backbone.transformer.register_forward_pre_hook(lambda _, args, kwargs: handed.append(kwargs), with_kwargs=True)
    names = {"encoder_hidden_states": "embeds", "pooled_projections": "pooled"}
    cond, uncond = (
        {name: x[start + end] for name, end in names.items() if start + end in x}
        for start in ("prompt_" if "prompt_embeds" in x else "", "uncond_")
    )
    if "pooled" in x:
        cond["pooled_projections"] = x["pooled"]
    v = backbone.velocity("teacher", x["x"], x["t"] / 1000, cond, p.guidance, uncond)
    (call,) = handed
    assert len(call["hidden_states"]) == len(v) * p.forward_passes  # two passes of the release are one batch here
    half = lambda value: value[: len(v)]  # noqa: E731
    got = {"v": v, "tokens": half(call["hidden_states"]), "time": half(call["timestep"])}
    got |= {name: call[name] if call[name].ndim == 2 else half(call[name]) for name in ("img_ids", "txt_ids")}
    return got | ({"guidance": call["guidance"]} if "guidance" in want else {})


def tiny_flux(p):
    """models.Flux1 or Flux2 around a tiny transformer with the golden weights."""
    cls, network, pipeline = {
        "flux1": (models.Flux1, FluxTransformer2DModel, FluxPipeline),
        "flux2": (models.Flux2, Flux2Transformer2DModel, Flux2KleinPipeline),
    }[p.family]
    config = TOPICS["predict"][f"{p.family}_config"] | vars(p).get("config_overrides", {})
    config |= {"guidance_embeds": p.guidance_embeds} if p.family == "flux1" else {}
    transformer = network(**config)
    transformer.load_state_dict(weights("predict", p.weights.removeprefix("weights/")))
    names = "_pack_latents _unpack_latents _unpatchify_latents _prepare_latent_image_ids _prepare_latent_ids".split()
    names.append("_prepare_text_ids")
    pipe = SimpleNamespace(**{name: getattr(pipeline, name) for name in names if hasattr(pipeline, name)})
    pipe.transformer, pipe.vae, pipe.scheduler, pipe.vae_scale_factor = transformer, torch.nn.Identity(), None, 1
    return cls(pipe, resolution=8, text_tokens=0)


def rollout(predict, x, p):
    """x_s after p.k steps, gradients only in the last."""
    state = x["x_start"]
    for j in range(p.k):
        with torch.set_grad_enabled(j == p.k - 1):
            state = cps_step(state, predict(state, p.sigmas[j]), p.sigmas[j], p.sigmas[j + 1], p.eta, x["rollout_z"][j])
    return state


def fake_losses(stage, x_s, s, x, p, predict):
    """L_fake and everything on the way to it; stage: the script with the losses."""
    sigma_t = acdmd.draw_t(x["u"], s)
    x_t, target, sigma_ts = renoise(x_s, s, sigma_t, x["z"])
    v, calls = predict(x_t, sigma_t), []

    def recorded(x, sigma):
        calls.append((x, sigma.flatten(), predict(x, sigma)))
        return calls[-1][2]

    loss_ac = stage.fake_score_loss(*((v, target, sigma_ts) if stage is acdmd else (v, x_s, x["z"], sigma_t)))
    loss_cons = stage.consistency_loss(recorded, x_t, sigma_t, v, x["delta"], p.eta, x["z1"], x["z2"])
    (x_1, x_2), (t_1, t_2), (v_1, v_2) = (torch.cat(parts).chunk(2) for parts in zip(*calls, strict=True))
    assert torch.equal(t_1, t_2)
    got = {"t": sigma_t, "x_t": x_t, "sigma_ts": sigma_ts.flatten(), "scaled_target": target, "v_fake": v}
    got |= {"x_prime_1": x_1, "x_prime_2": x_2, "t_prime": t_1, "v_fake_prime_1": v_1, "v_fake_prime_2": v_2}
    return got | {"loss": loss_ac + p.gamma * loss_cons, "loss_ac": loss_ac, "loss_cons": loss_cons}


def fake_loss(x, p, want):
    if p.network == "toy":
        parameters, x_s = {"M": x["M"].requires_grad_(), "b": x["b"].requires_grad_()}, x["x_s"]
        predict = toy(**parameters)
    else:
        backbone = tiny_sd3("fake_loss", p)
        parameters, predict = lora_tensors(backbone, "fake"), predictor(backbone, x, "fake")
        x_s = rollout(predictor(backbone, x, "generator"), x, p).detach()
    got = fake_losses(acdmd, x_s, p.s, x, p, predict) | ({"x_s": x_s} if "x_s" in want else {})
    grads = gradients(got["loss"], parameters, "grad")
    return got | grads | {"grad_norm": norm(grads)} | gradients(got["loss_cons"], parameters, "grad_cons")


def dm_loss(x, p, want):
    x_s = x["x_s"].requires_grad_()
    losses = [stage.distribution_matching_loss(x_s, x["x_s_fake"], x["x_s_teacher"]) for stage in (acdmd, rtdmd)]
    grads = [torch.autograd.grad(loss, x_s)[0] for loss in losses]
    assert torch.equal(*losses) and torch.equal(*grads)
    return {"loss": losses[0], "grad_x_s": grads[0]}


def generator_losses(stage, x_s, s, x, p, teacher, fake):
    """L_G and everything on the way to it."""
    sigma_t = acdmd.draw_t(x["u"], s)
    with torch.no_grad():
        x_t, _, _ = renoise(x_s, s, sigma_t, x["z"])
        got = {"v_teacher": teacher(x_t, sigma_t), "v_fake": fake(x_t, sigma_t), "x_t": x_t, "t": sigma_t}
        for role in ("teacher", "fake"):
            got[f"x_s_{role}"] = cps_step(x_t, got[f"v_{role}"], sigma_t, s, p.eta, x["z_trans"])
    return got | {"loss": stage.distribution_matching_loss(x_s, got["x_s_fake"], got["x_s_teacher"])}


def generator_loss(x, p, want):
    if p.network == "toy":
        networks = [toy(x[f"M_{name}"], x[f"b_{name}"]) for name in ("teacher", "fake")]
        got = generator_losses(acdmd, x["x_s"].requires_grad_(), p.s, x, p, *networks)
        del got["v_teacher"], got["v_fake"]
        return got | {"grad_x_s": torch.autograd.grad(got["loss"], x["x_s"])[0]}
    backbone = tiny_sd3("generator_loss", p)
    x_s = rollout(predictor(backbone, x, "generator"), x, p)
    networks = predictor(backbone, x, "teacher", guidance=p.guidance), predictor(backbone, x, "fake")
    got = generator_losses(acdmd, x_s, p.s, x, p, *networks) | {"x_s": x_s}
    grads = gradients(got["loss"], lora_tensors(backbone, "generator"), "grad")
    return got | grads | {"grad_norm": norm(grads)}


def stage2_epoch(x, p, want):
    backbone = tiny_sd3("stage2_epoch", p, ToyVAE(x["vae_W"], x["vae_c"]))
    got = sampled(x, p, backbone) | advantages(x, p, want)
    draws = {name.removeprefix("fake_"): value for name, value in x.items() if name.startswith("fake_")}
    fake = fake_losses(rtdmd, want["latents"][:, -1], 0.0, draws, p, predictor(backbone, x, "fake"))
    got |= {f"fake_{name}": fake[name] for name in ("loss", "loss_ac", "loss_cons")}
    got |= gradients(fake["loss"], lora_tensors(backbone, "fake"), "fake_grad")

    parts, batches = [], zip(*(x[name].chunk(p.micro_batches) for name in ("order", "gen_u", "gen_z")), strict=True)
    for rows, u, z in batches:
        parts.append(micro_batch(x, p, want, backbone, rows, {"u": u, "z": z, "z_trans": torch.zeros_like(z)}))
    got["bp_reward"] = torch.cat([part.pop("R") for part in parts])
    losses = {name: sum(part[name] for part in parts) / p.micro_batches for name in parts[0]}
    got |= {f"{name}_loss_mean": loss for name, loss in losses.items()}
    got["policy_loss_mean"] = losses["policy"] / len(p.chosen_steps)
    got["last_step_loss_mean"] = losses["dm"] + losses["reward"]
    losses[""] = sum(losses.values())
    for name, loss in losses.items():
        loss, group = loss / (len(p.chosen_steps) + 1), f"gen_grad_{name}".removesuffix("_")
        got |= gradients(loss, lora_tensors(backbone, "generator"), group)
    return got


@torch.no_grad()
def sampled(x, p, backbone):
    """The states, velocities, log-probabilities and images of the epoch."""
    predict, latents, v, logp = predictor(backbone, x, "generator"), [x["x_start"]], [], []
    for j, (sigma, sigma_next) in enumerate(zip(p.sigmas, p.sigmas[1:], strict=False)):
        v.append(predict(latents[-1], sigma))
        latents.append(cps_step(latents[-1], v[-1], sigma, sigma_next, p.eta, x["noise"][:, j]))
        logp.append(cps_log_prob(latents[-1], latents[-2], v[-1], sigma, sigma_next, p.eta))
    got = {"latents": torch.stack(latents, 1), "v": torch.stack(v, 1), "logp": torch.stack(logp, 1)}
    return got | {"images": backbone.decode(latents[-1])}


def micro_batch(x, p, want, backbone, rows, draws):
    """The three weighted losses of one micro-batch, and its rewards R, from the golden states and advantages."""
    generator, fake = (predictor(backbone, x, role, rows) for role in ("generator", "fake"))
    latents, logp, policy = want["latents"][rows], want["logp"][rows], 0
    for j in p.chosen_steps:
        v = generator(latents[:, j], p.sigmas[j])
        step = latents[:, j + 1], latents[:, j], v, p.sigmas[j], p.sigmas[j + 1], p.eta
        policy = policy + rtdmd.policy_loss(cps_log_prob(*step), logp[:, j], want["advantage"][rows])
    x0 = cps_step(latents[:, -2], generator(latents[:, -2], p.sigmas[-2]), p.sigmas[-2], 0.0)
    teacher = predictor(backbone, x, "teacher", rows, p.guidance)
    matching = generator_losses(rtdmd, x0, 0.0, draws, p, teacher, fake)["loss"]
    images = backbone.decode(x0)
    R = images.mean((2, 3)) @ torch.tensor([3.5, 2.5, -1.0]) + 2 * images.square().mean((1, 2, 3)) + p.reward_offset
    hinge = (p.reward_margin - R).relu().mean()
    return {"policy": policy, "dm": p.dm_weight * matching, "reward": p.reward_weight * hinge, "R": R}


FORMULAS = dict(schedules=schedules, cps=cps, renoise=renoised, logp=log_prob, ppo=ppo, advantages=advantages, ema=ema)
FORMULAS |= dict(lora_merge=lora_merge, predict=predict, fake_loss=fake_loss, dm_loss=dm_loss)
FORMULAS |= dict(generator_loss=generator_loss, stage2_epoch=stage2_epoch)
CASES = [case for topic in FORMULAS for case in TOPICS[topic]["cases"]]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_golden(case):
    topic = case["id"].split("/")[0]
    x, want = ({name: tensors(topic)[key].clone() for name, key in case[io].items()} for io in ("inputs", "expected"))
    p = SimpleNamespace(**case.get("params", {}), case=case["id"].split("/")[1])
    got = FORMULAS[topic](x, p, want)
    off, special = {}, case.get("tolerance_by", {})
    assert got.keys() == want.keys()
    for name, expected in want.items():
        tolerance = special.get(name, special.get(name.split("/")[0], case["tolerance"]))
        value, expected = got[name].detach().double(), expected.double()
        assert value.shape == expected.shape, name
        error, allowed = (value - expected).abs(), tolerance["atol"] + tolerance["rtol"] * expected.abs()
        if not (error <= allowed).all():
            off[name] = f"{(error - allowed).max():.3g} beyond the allowed error"
    assert not off


@pytest.mark.parametrize("case", GENEVAL["cases"], ids=lambda case: case["metadata"]["tag"])
def test_geneval(case):
    got = geneval_check(case["detections"], case["metadata"])
    assert abs(got["graded"] - case["graded"]) <= GENEVAL["tolerance"]["atol"]
    assert (got["strict"], got["correct"]) == (case["strict"], case["benchmark_correct"])
