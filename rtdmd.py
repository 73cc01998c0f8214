"""Stage 2, RTDMD: reinforce the distilled 4-step generator on image rewards.

Reward-tilted distribution matching, section 3 and appendices G-I of "Reinforcing Few-step Generators via Reward-Tilted
Distribution Matching" (arXiv 2605.26108). KL(p_theta || p_psi exp(beta r) / Z) = distribution matching - beta E[r] +
const. The leash is stage 1's L_G, weighed by dm_weight in place of 1 / beta. The reward's gradient has two parts,
policy_weight's and bp_weight's, because the last of four steps is deterministic. An epoch:

1. Choose 2 of the 3 stochastic steps (SubGRPO).
2. Sample groups of K images a prompt, 4 CPS steps. Steps not chosen share one noise per prompt.
3. Reward every image; advantage = reward less its group's mean, over the global deviation.
4. Fake score: one optimiser step of L_fake on the finished samples (s = 0).
5. Generator, one optimiser step on the mean of
      chosen steps:  max(-A ratio, -A clip(ratio))                                  policy gradient
      last step:     dm_weight L_G + bp_weight relu(margin - R(decode(x0_hat)))     leash, and the reward's own gradient
6. EMA of the trainable adapter.

Stage 1's adapters stay, frozen, under fresh ones: generator = [distilled, rl], fake score = [fake, fake_rl].

    python rtdmd.py --distilled out/classroom/acdmd/final                the classroom, minutes on a laptop CPU
    torchrun --nproc_per_node=8 rtdmd.py --model sd35 --distilled DIR --prompts FILE --rewards clipscore=1,geneval=1

Writes to --out: args.json, log.jsonl, samples/, step_NNNNNN/ and final/ with the adapters rl, rl_ema and fake_rl.
`sample.py --lora DIR/generator_ema --lora OUT/final/rl_ema` shows the result.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import models
import rewards
from models import cps_log_prob, cps_step, per_sample, seeded, step_optimizer

DELTA_MAX = 200  # largest step back of L_cons, in timesteps; paper: 200
PUBLISHED = "clipscore=1,hpsv2=1,pickscore=1,geneval=1"
PRESETS = {
    "sd3": dict(group_size=16, batch_size=2, batches=16),
    "sd35": dict(group_size=24, batch_size=9, batches=16),
    "flux1": dict(group_size=24, batch_size=3, batches=16, lr_fake=1e-6, gamma=0.0),
    "flux2-4b": dict(group_size=24, batch_size=6, batches=16, lr_fake=1e-6),
    "flux2-9b": dict(group_size=24, batch_size=3, batches=16, lr_fake=1e-6, gamma=0.0),
    "classroom": dict(
        guidance_scale=2.5,
        rewards="geneval_strict=0.6,geneval=0.4,clipscore=0.2",
        reward_dir=models.CLASSROOM,
        group_size=12,
        batch_size=48,
        batches=4,
        epochs=250,
        lr=1e-3,
        lr_fake=1e-3,
        lr_decay=0.5,
        init_std=1 / 32,
        dm_weight=0.01,
        bp_weight=0.1,
        consistency_batch=8,
        ema_every=2,
        dtype="float32",
        out=Path("out/classroom/rtdmd"),
        distilled=Path("out/classroom/acdmd/final"),
        sample_every=50,
        save_every=50,
    ),
}

# how often the classroom's own prompts show a task type that stage 1 leaves weak; the others come once
WEAK_TASKS = {"counting": 2, "two_object": 2, "position": 2, "color_attr": 2}


def parse_args(argv=None):
    options = dict(usage=argparse.SUPPRESS, formatter_class=models.Help, allow_abbrev=False)
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], **options)
    add = p.add_argument
    add("--model", default="classroom", choices=PRESETS, help="backbone; picks the preset that other flags override")
    add("--weights", help="diffusers pipeline folder or hub id in place of the published one")
    add("--generator_weights", help="the same for the generator alone (FLUX.2: its step-distilled release)")
    add("--resolution", type=int, help="pixels a side (default: the backbone's)")
    add("--distilled", type=Path, help="stage 1's final/ folder: its generator_ema and fake adapters are the start")
    add("--prompts", type=Path, help=".jsonl with GenEval metadata (or .txt); the classroom makes its own")
    add("--rewards", default=PUBLISHED, help="name=weight,...; the differentiable ones also back-propagate")
    add("--reward_dir", type=Path, help="folder with reward weights that are not taken from the hub")
    add("--reward_batch_size", type=int, help="images a scorer takes at once (default: --batch_size)")
    add("--offload_rewards", action="store_true", help="scorers wait on the CPU while they do not score")
    add("--out", type=Path, default=Path("out/rtdmd"), help="run folder")
    add("--resume", type=Path, help="run folder or step_NNNNNN folder to go on from")
    add("--seed", type=int, default=0, help="covers prompts, noise, chosen steps and the adapters' initial weights")
    add("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of the networks; formulas are float32")
    add("--checkpointing", default="auto", choices=["auto", "on", "off"], help="of activations; auto: if memory asks")
    add("--shard", default="none", choices=models.SHARD_MODES, help="of the frozen base, by FSDP2; hybrid: in a node")
    add("--offload_frozen", action="store_true", help="the frozen base waits in host memory, block by block")
    add("--offload_encoders", action="store_true", help="text encoders wait on the CPU while they do not encode")
    add("--compile", action="store_true", help="torch.compile, block by block")
    add("--wandb", action="store_true", help="log to Weights & Biases too")
    add("--epochs", type=int, default=1000, help="sample, score, one optimiser step of each network")
    add("--group_size", type=int, default=24, help="K, images per prompt; paper: 16 or 24")
    add("--batch_size", type=int, default=9, help="images of a micro-batch")
    add("--batches", type=int, default=16, help="micro-batches an epoch and process; paper: 16")
    add("--lr", type=float, default=3e-6, help="learning rate of the generator (weight decay 1e-4)")
    add("--lr_fake", type=float, default=3e-5, help="learning rate of the fake score")
    add("--lr_decay", type=float, default=0.0, help="share of the run over which both fall to 0 at its end; paper: 0")
    add("--init_std", type=float, default=1.0, help="std of the fresh adapters' A; the published rates belong to 1")
    add("--guidance_scale", type=float, help="classifier-free guidance of the teacher in L_G; 1 or less: none")
    add("--eta", type=float, default=0.9, help="CPS stochasticity; paper: 0.9")
    add("--n_chosen", type=int, default=2, choices=[1, 2, 3], help="SubGRPO: trained stochastic steps; 3: ablation")
    add("--clip_range", type=float, default=1e-5, help="of the policy ratio; paper: 1e-5")
    add("--policy_weight", type=float, default=1.0, help="weight of the policy gradient; 0: ablation")
    add("--dm_weight", type=float, default=1e-3, help="weight of L_G; paper: 1e-3; 0: ablation without leash")
    add("--bp_weight", type=float, default=1e-4, help="weight of reward back-propagation; paper: 1e-4; 0: ablation")
    add("--reward_margin", type=float, default=3.0, help="back-propagation is mean(relu(margin - R)); paper: 3")
    add("--gamma", type=float, default=0.01, help="weight of L_cons in L_fake; paper: 0.01")
    add("--consistency_batch", type=int, help="L_cons on so many samples of each micro-batch (default: all)")
    add("--ema_every", type=int, default=8, help="optimiser steps between EMA updates; paper: 8, decay at most 0.9")
    add("--skip_nonfinite", type=int, default=0, help="gradients in a row that may be not finite and are skipped")
    add("--sample_every", type=int, default=100, help="epochs between sample grids; 0: none")
    add("--save_every", type=int, default=50, help="epochs between checkpoints")
    argv = sys.argv[1:] if argv is None else argv
    known, _ = p.parse_known_args([word for word in argv if word not in ("-h", "--help")])
    p.set_defaults(**{"guidance_scale": models.BACKBONES[known.model]["guidance"], **PRESETS[known.model]})
    args = p.parse_args(argv)
    for name, value in vars(args).items():
        least = -math.inf if name == "reward_margin" else 0
        if isinstance(value, float) and not (math.isfinite(value) and value >= least):
            p.error(f"--{name} {value}: must be a finite number" + (", at least 0" if least == 0 else ""))
    if args.resume and args.out == p.get_default("out"):  # a run goes on in its own folder
        args.out = args.resume.parent if (args.resume / "state.pt").is_file() else args.resume
    counts = "epochs group_size batch_size batches ema_every save_every consistency_batch resolution reward_batch_size"
    for name, least in {**dict.fromkeys(counts.split(), 1), "sample_every": 0, "skip_nonfinite": 0, "seed": 0}.items():
        if getattr(args, name) is not None and getattr(args, name) < least:
            p.error(f"--{name} {getattr(args, name)}: must be at least {least}")
    if not 0 < args.eta <= 1:
        p.error(f"--eta {args.eta}: the policy gradient needs noise; allowed is above 0 to 1, the paper uses 0.9")
    if args.prompts is None and args.model != "classroom":
        p.error(f"--model {args.model} needs --prompts FILE (.jsonl with GenEval metadata, or .txt)")
    if args.distilled is None:
        p.error("--distilled DIR is missing: the final/ folder of an acdmd.py run")
    for name in ("generator_ema", "fake"):
        if not (args.distilled / name).is_dir():
            final = args.distilled / "final"
            hint = f"give {final}" if final.is_dir() else "run acdmd.py first and give its final/ folder"
            p.error(f"--distilled {args.distilled} has no {name}: {hint}")
    if not 0 <= args.lr_decay <= 1:
        p.error(f"--lr_decay {args.lr_decay}: a share of the run, 0 to 1")
    try:
        args.rewards = rewards.parse_weights(args.rewards)
    except models.UserError as error:
        p.error(str(error))
    if not (args.policy_weight or args.dm_weight or args.bp_weight):
        p.error("--policy_weight, --dm_weight and --bp_weight are all 0: nothing would train")
    if args.bp_weight and not any(rewards.SCORERS[name].differentiable for name in args.rewards):
        p.error("--bp_weight needs a differentiable reward such as clipscore in --rewards; or give --bp_weight 0")
    return args


# ---------------------------------------------------------------------------------------------------------------
# reinforcement learning: advantages, policy loss, SubGRPO


def group_advantages(rewards, prompts, weights):
    """Advantages [N] over the global batch. rewards: {scorer: [N]}; prompts: N texts, equal texts are one group.

        A = sum over scorers of w (r - mean of its prompt's group) / (std + 1e-4),    then (A - mean) / (std + 1e-4)

    Both std are over all N images (population, float64). A group of one takes the global mean in place of its own.
    """
    _, group = np.unique(prompts, return_inverse=True)
    size = np.bincount(group)
    total = np.zeros(len(prompts))
    for name, weight in weights.items():
        r = np.asarray(rewards[name], dtype=np.float64)
        mean = np.where(size == 1, r.mean(), np.bincount(group, r) / size)
        total += weight * (r - mean[group]) / (r.std() + 1e-4)
    return torch.from_numpy((total - total.mean()) / (total.std() + 1e-4)).float()


def informative(rewards, prompts, weights):
    """Bool [N]: does some weighted scorer tell the images of this one's group apart? A group of one always counts.

    NOTE(paper): the release looks for advantages of exactly 0, which standardising over the whole batch leaves nowhere.
    """
    _, group = np.unique(prompts, return_inverse=True)
    varies = np.bincount(group) == 1
    for name, weight in weights.items():
        r = np.asarray(rewards[name], dtype=np.float64)
        low, high = np.full(len(varies), np.inf), np.full(len(varies), -np.inf)
        np.minimum.at(low, group, r), np.maximum.at(high, group, r)
        varies |= (high > low) & (weight != 0)
    return torch.from_numpy(varies[group])


def policy_loss(log_prob, old_log_prob, advantages, clip_range=1e-5, max_advantage=5.0):
    """PPO's clipped loss mean(max(-A ratio, -A clip(ratio, 1 -+ clip_range))), ratio = exp(logp - logp_old).

    Advantages count up to +-max_advantage.
    """
    advantages = advantages.clamp(-max_advantage, max_advantage)
    ratio = (log_prob - old_log_prob).exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)).mean()


def choose_steps(epoch, seed, candidates=(0, 1, 2), n=2):
    """SubGRPO: the n stochastic steps trained in this epoch, sorted; the same on every rank."""
    order = torch.randperm(len(candidates), generator=seeded(seed, epoch, "chosen steps"))
    return sorted(candidates[i] for i in order[:n].tolist())


def shared_noise(prompts, step, epoch, seed, shape):
    """[B, *shape] on the CPU: one noise per prompt, the same for its whole group on whatever rank.

    It takes the variance of the steps that are not trained out of the group's advantages (App. H).
    """
    noise = {p: torch.randn(shape, generator=seeded(seed, epoch, step, "shared", p)) for p in dict.fromkeys(prompts)}
    return torch.stack([noise[p] for p in prompts])


# ---------------------------------------------------------------------------------------------------------------
# stage 1's losses at s = 0, for stage 2 matches finished samples only: x_t = (1-t) x0 + t z, and a step back to s is
# x0_hat. Written out so that this file reads alone; tests pin them to acdmd.py's


def fake_score_loss(v_fake, x0, noise, sigma_t, max_weight=10.0):
    """L_ac at s = 0: flow matching, mean(w t^2 (v_phi - (z - x0))^2) with w = clamp(1/t^2, 0, max_weight)."""
    sigma_t = per_sample(sigma_t, x0)  # sigma_ts is t here
    weight = (1 / sigma_t**2).clamp(0, max_weight)
    return (weight * (sigma_t * (v_fake - (noise - x0))).square()).mean()


def consistency_loss(predict, x_t, sigma_t, v_t, delta, eta, noise_1, noise_2):
    """L_cons: two-sample estimate of |E[h(x', t')] - h(x_t, t)|^2, h(x, sigma) = x - sigma v_phi. As acdmd.py's."""
    sigma_t = per_sample(sigma_t, x_t)
    sigma_back = (sigma_t - per_sample(delta, x_t) / 1000).clamp(min=0)
    x_back = torch.cat([cps_step(x_t, v_t.detach(), sigma_t, sigma_back, eta, z) for z in (noise_1, noise_2)])
    sigma_back = torch.cat([sigma_back, sigma_back])
    h_1, h_2 = (x_back - sigma_back * predict(x_back, sigma_back.flatten())).chunk(2)
    h_t = x_t - sigma_t * v_t
    return ((h_1 - h_t) * (h_2 - h_t)).mean()


def distribution_matching_loss(x0, x0_fake, x0_teacher):
    """L_G at s = 0; its gradient is g / numel, g = (x0^phi - x0^psi) / mean|x0 - x0^psi|."""
    with torch.no_grad():
        scale = (x0 - x0_teacher).abs().flatten(1).mean(1)
        scale = per_sample(scale, x0)
        # NOTE(paper): the release makes every NaN 0; here only what a zero normaliser gives, so that an error shows
        g = torch.where(scale == 0, 0.0, (x0_fake - x0_teacher) / scale)
    return 0.5 * (x0 - (x0 - g).detach()).square().mean()


# ---------------------------------------------------------------------------------------------------------------
# functions that call the networks


def noised(backbone, x0, indices, key):
    """(x_t, sigma_t, noise): x0 taken to t, 1000 t ~ U(10, 1000) clamped to [20, 980]."""
    u = models.draw(torch.rand, (), indices, *key, "t", device=x0.device)
    sigma_t = ((1000 - 10) * u + 10).clamp(20, 980) / 1000
    noise = models.draw(torch.randn, backbone.latent_shape, indices, *key, "z", device=x0.device)
    t = per_sample(sigma_t, x0)
    return (1 - t) * x0 + t * noise, sigma_t, noise


@torch.no_grad()
def sample(backbone, scorers, prompts, metadata, sigmas, chosen, args, indices, epoch):
    """Rollouts of a micro-batch, on the CPU: states [B, 5, C, H, W], log-probabilities {j: [B]}, rewards {name: [B]}"""
    cond, shape, device = backbone.encode(prompts), backbone.latent_shape, backbone.device
    x = models.draw(torch.randn, shape, indices, args.seed, epoch, "start", device=device)
    states, log_probs = [x], {}
    for j in range(len(models.FEW_STEPS)):
        if j in chosen:
            noise = models.draw(torch.randn, shape, indices, args.seed, epoch, "step", j, device=device)
        else:  # not used by the last step, which is deterministic
            noise = models.to_device(shared_noise(prompts, j, epoch, args.seed, shape), device)
        v = backbone.velocity(x, sigmas[j], cond)
        x_next = cps_step(x, v, sigmas[j], sigmas[j + 1], args.eta, noise)
        if j in chosen:
            log_probs[j] = cps_log_prob(x_next, x, v, sigmas[j], sigmas[j + 1], args.eta)
        x = x_next
        states.append(x)
    scores = scorers.score(backbone.decode(x), prompts, metadata)
    return torch.stack(states, 1).cpu(), {j: log_prob.cpu() for j, log_prob in log_probs.items()}, scores


def fake_loss(backbone, cond, x0, args, indices, key):
    """(L_ac, L_cons) on finished samples."""
    x_t, sigma_t, noise = noised(backbone, x0, indices, key)
    v_t = backbone.velocity(x_t, sigma_t, cond, role="fake")
    loss_ac = fake_score_loss(v_t, x0, noise, sigma_t)
    if args.gamma == 0:
        return loss_ac, torch.zeros_like(loss_ac)
    n = args.consistency_batch or len(x0)
    shape, device = backbone.latent_shape, x0.device
    delta = models.draw(torch.rand, (), indices[:n], *key, "delta", device=device)
    delta = 1 + (delta * DELTA_MAX).floor()  # uniform on 1 .. DELTA_MAX
    noises = (models.draw(torch.randn, shape, indices[:n], *key, name, device=device) for name in ("z1", "z2"))
    cond_twice = {name: torch.cat([c[:n], c[:n]]) for name, c in cond.items()}

    def predict(x, sigma):  # both transitions as one batch of 2n
        return backbone.velocity(x, sigma, cond_twice, role="fake")

    return loss_ac, consistency_loss(predict, x_t[:n], sigma_t[:n], v_t[:n], delta, args.eta, *noises)


def policy_gradient(backbone, prompts, sigmas, states, old_log_prob, advantages, weight, args):
    """Accumulate the gradient of weight x policy loss, step by step, so that one step's graph lives at a time.

    states: [B, 5, C, H, W] of `sample`; old_log_prob: {chosen step j: [B]}; advantages: [B]. Returns means over the
    steps of the loss, |ratio - 1| and the share of clipped samples.
    """
    cond, device, means = backbone.encode(prompts), backbone.device, {}
    for j, old in old_log_prob.items():
        x, x_next, old, advantage = (
            models.to_device(t, device) for t in (states[:, j], states[:, j + 1], old, advantages)
        )
        log_prob = cps_log_prob(x_next, x, backbone.velocity(x, sigmas[j], cond), sigmas[j], sigmas[j + 1], args.eta)
        loss = policy_loss(log_prob, old, advantage, args.clip_range)
        (weight * loss).backward()
        drift = ((log_prob.detach() - old).exp() - 1).abs()
        clipped = (drift > args.clip_range).float().mean()
        values = {"loss/policy": loss, "ratio_drift": drift.mean(), "clip_fraction": clipped}
        add_to(means, values, len(old_log_prob))
    return means


def last_step_gradients(backbone, scorers, prompts, cond, uncond, x0, args, indices, key):
    """Gradients of both last-step terms with respect to x0, and their values: (g_dm, g_bp, L_G, hinge).

    Taken at x0, so that the reward model's and the VAE's activations are gone before the transformer's backward begins.
    """
    x0 = x0.detach().requires_grad_()
    loss_dm = loss_bp = torch.zeros((), device=x0.device)
    g_dm = g_bp = torch.zeros_like(x0)
    if args.dm_weight:
        with torch.no_grad():
            x_t, sigma_t, _ = noised(backbone, x0, indices, key)
            v_teacher = backbone.velocity(x_t, sigma_t, cond, args.guidance_scale, uncond, role="teacher")
            v_fake = backbone.velocity(x_t, sigma_t, cond, role="fake")
            x0_teacher, x0_fake = (cps_step(x_t, v, sigma_t, 0.0) for v in (v_teacher, v_fake))
        loss_dm = distribution_matching_loss(x0, x0_fake, x0_teacher)
        g_dm = args.dm_weight * torch.autograd.grad(loss_dm, x0)[0]
    if args.bp_weight:
        reward = scorers.differentiable(backbone.decode(x0), prompts)
        loss_bp = torch.relu(args.reward_margin - reward).mean()
        g_bp = args.bp_weight * torch.autograd.grad(loss_bp, x0)[0]
    return g_dm, g_bp, loss_dm.detach(), loss_bp.detach()


def pick_prompts(pairs, n, g):
    """n (prompt, metadata) pairs with distinct texts, in random order."""
    picked = {}
    for i in torch.randperm(len(pairs), generator=g).tolist():
        picked.setdefault(pairs[i][0], pairs[i])
        if len(picked) == n:
            break
    return list(picked.values())


def main(args):
    # set-up, models, optimisers
    rank, world_size, device = models.setup_distributed(args.device)
    state = models.check_run(args, __file__)
    start = state["step"] if state else 0
    if start > args.epochs:
        raise models.UserError(f"--epochs {args.epochs}: the run is at {start} already")
    if start == args.epochs and (args.out / "final").is_dir():
        if rank == 0:
            print(f"nothing left to train: {args.out}/final is the run's end, step {start}")
        return
    per_rank = args.batch_size * args.batches
    n_images = per_rank * world_size
    if n_images % args.group_size:
        fits = max(k for k in range(1, args.group_size) if n_images % k == 0)
        raise models.UserError(
            f"{world_size} processes x batch {args.batch_size} x {args.batches} batches = {n_images} images do not "
            f"split into groups of {args.group_size}: try --group_size {fits}"
        )
    n_groups = n_images // args.group_size
    stop = models.StopSignal()
    pairs = rewards.read_prompts(args.prompts) if args.prompts else rewards.classroom_prompts(**WEAK_TASKS)
    rewards.check_prompts(pairs, args.rewards, args.reward_dir)
    distinct = len({prompt for prompt, _ in pairs})
    if distinct < n_groups:
        raise models.UserError(
            f"an epoch needs {n_groups} distinct prompts, the file has {distinct}: lower --batches or --batch_size"
        )
    # are they whole, known before the models load, and the same as when the run began?
    distilled = [models.fingerprint(args.distilled / name) for name in ("generator_ema", "fake")]
    if state and state.get("distilled", distilled) != distilled:
        raise models.UserError(f"--distilled {args.distilled}: not the adapters that this run began with")
    size = args.reward_batch_size or args.batch_size
    scorers = rewards.load_scorers(args.rewards, device, args.reward_dir, size, args.offload_rewards)
    dtype = getattr(torch, args.dtype)
    placement = dict(shard_mode=args.shard, offload_frozen=args.offload_frozen)
    backbone = models.load(
        args.model, args.weights, args.generator_weights, device, dtype, args.resolution, **placement
    )
    backbone.offload_encoders = args.offload_encoders
    backbone.roles |= {"generator": ("distilled", "rl"), "fake": ("fake", "fake_rl"), "ema": ("distilled", "rl_ema")}
    models.load_adapter(backbone.student, "distilled", args.distilled / "generator_ema")
    models.load_adapter(backbone.transformer, "fake", args.distilled / "fake")
    lora_rank = len(models.adapter_parameters(backbone.student, "distilled")[0])
    # adapter -> the transformer that holds it: one and the same, but for FLUX.2
    home = {"rl": backbone.student, "rl_ema": backbone.student, "fake_rl": backbone.transformer}
    if state:
        models.load_checkpoint(state, home)
    else:
        for name, network in home.items():
            init = seeded(args.seed, "init", name.removesuffix("_ema"))
            trainable = not name.endswith("_ema")
            models.add_adapter(network, name, lora_rank, 2 * lora_rank, args.init_std, init, trainable)
    generator, average, fake = (models.adapter_parameters(network, name) for name, network in home.items())
    optimizer = torch.optim.AdamW(generator, lr=args.lr, weight_decay=1e-4, fused=device.type == "cuda")
    optimizer_fake = torch.optim.AdamW(fake, lr=args.lr_fake, weight_decay=0.0, fused=device.type == "cuda")
    ema = models.EMA(generator, average, 0.9, args.ema_every, warmup=True)
    if state:
        optimizer.load_state_dict(state["optimizer"])
        optimizer_fake.load_state_dict(state["optimizer_fake"])
    samples = args.batch_size + 2 * (args.consistency_batch or args.batch_size)  # of the fake score's step
    models.set_up_blocks(backbone, args.checkpointing, samples, args.compile)

    sigmas = backbone.sigmas(models.FEW_STEPS)
    uncond = backbone.encode([""])
    last = len(models.FEW_STEPS) - 1
    say = print if rank == 0 else lambda *_: None
    say(f"{args.model}: {sum(p.numel() for p in generator) / 1e6:.2f} M trainable in each of generator and fake score")
    say(f"{n_groups} prompts x {args.group_size} = {n_images} images an epoch, {args.epochs} epochs")
    say(f"rewards {args.rewards}, sigmas {[round(s, 4) for s in sigmas]}, writing to {args.out}")
    log = models.RunLog(rank, args, state)

    def checkpoint(step, final=False):
        if rank == 0:
            state = {"optimizer": optimizer.state_dict(), "optimizer_fake": optimizer_fake.state_dict()}
            state |= {"skipped": (patience.in_a_row, patience.total), "distilled": distilled}
            models.save_checkpoint(args.out, step, home, state, args, __file__, final=final)

    patience = models.Patience(args.skip_nonfinite, args.out, *(state or {}).get("skipped", ()))
    bar = tqdm(range(start, args.epochs), "RTDMD", initial=start, total=args.epochs, disable=rank > 0)
    for epoch in bar:
        began = time.perf_counter()
        lr_scale = min(1.0, (args.epochs - epoch) / (args.lr_decay * args.epochs)) if args.lr_decay else 1.0
        picked = pick_prompts(pairs, n_groups, seeded(args.seed, epoch, "prompts"))
        all_prompts = [prompt for prompt, _ in picked for _ in range(args.group_size)]
        mine = range(rank * per_rank, (rank + 1) * per_rank)  # images are numbered over all ranks; groups may span them
        prompts = all_prompts[mine.start : mine.stop]
        metadata = [picked[i // args.group_size][1] for i in mine]

        # 1) choose steps
        chosen = choose_steps(epoch, args.seed, tuple(range(last)), args.n_chosen)

        # 2) sample, 3) reward
        parts = []
        for b in range(0, per_rank, args.batch_size):
            if stop.agreed(world_size):  # nothing of this epoch has been learned yet, and its draws come back
                checkpoint(epoch)
                say(f"\nstopped after epoch {epoch}; go on with the same command and --resume {args.out}")
                return
            part = slice(b, b + args.batch_size)
            texts, facts = prompts[part], metadata[part]
            parts.append(sample(backbone, scorers, texts, facts, sigmas, chosen, args, mine[part], epoch))
        states = torch.cat([s for s, _, _ in parts])
        old_log_prob = {j: torch.cat([logp[j] for _, logp, _ in parts]) for j in chosen}
        scores = {name: torch.cat([r[name] for _, _, r in parts]) for name in args.rewards}
        scores = {name: torch.tensor(models.gather(r.tolist(), world_size)) for name, r in scores.items()}
        advantages = group_advantages(scores, all_prompts, args.rewards)[mine.start : mine.stop]
        n_signal = int(informative(scores, all_prompts, args.rewards).sum())
        sampled = time.perf_counter()

        # 4) fake score, on the finished samples
        sums = {}
        if args.dm_weight:  # NOTE(paper): the release trains it also where nobody reads it
            for b in range(0, per_rank, args.batch_size):
                part = slice(b, b + args.batch_size)
                x0 = models.to_device(states[part, -1], device)
                cond = backbone.encode(prompts[part])
                loss_ac, loss_cons = fake_loss(backbone, cond, x0, args, mine[part], (args.seed, epoch, "fake"))
                ((loss_ac + args.gamma * loss_cons) / args.batches).backward()
                add_to(sums, {"loss/ac": loss_ac, "loss/cons": loss_cons}, args.batches)
            norm = step_optimizer(optimizer_fake, lr_scale * args.lr_fake, world_size, args.skip_nonfinite > 0)
            sums["grad_norm/fake"] = norm
            sums = {} if patience.skipped(norm, epoch + 1, "grad_norm/fake") else sums
        taken = dict(sums)

        # 5) generator
        order = torch.randperm(per_rank, generator=seeded(args.seed, epoch, rank, "order"))
        steps = len(chosen) + 1  # the loss is a mean over images and these steps
        for part in order.split(args.batch_size) if args.policy_weight else ():
            # chosen steps: policy gradient. Images of a group without signal have advantage 0 and do not count
            share = len(part) * world_size / max(1, n_signal)  # ranks are averaged later
            texts, old = [prompts[i] for i in part], {j: old_log_prob[j][part] for j in chosen}
            weight = args.policy_weight * share / steps
            values = policy_gradient(backbone, texts, sigmas, states[part], old, advantages[part], weight, args)
            add_to(sums, values, args.batches)
        if args.policy_weight:
            models.average_gradients(generator, world_size)  # for this norm; an average stays what it is below
            sums["grad_norm/policy"] = torch.nn.utils.get_total_norm([p.grad for p in generator])
        for part in order.split(args.batch_size) if args.dm_weight or args.bp_weight else ():
            # last step: leash and reward back-propagation
            texts, x = [prompts[i] for i in part], models.to_device(states[part, last], device)
            cond = backbone.encode(texts)
            x0 = cps_step(x, backbone.velocity(x, sigmas[last], cond), sigmas[last], 0.0)
            indices, key = [mine[i] for i in part], (args.seed, epoch, "generator")
            g_dm, g_bp, loss_dm, loss_bp = last_step_gradients(
                backbone, scorers, texts, cond, uncond, x0, args, indices, key
            )
            x0.backward((g_dm + g_bp) / (args.batches * steps))  # chain rule: from dL/dx0 through the transformer
            add_to(sums, {"loss/dm": loss_dm, "loss/bp": loss_bp}, args.batches)
            for name, g in (("grad_x0/dm", g_dm), ("grad_x0/bp", g_bp)):  # times B: of one image
                add_to(sums, {name: len(x0) * g.flatten(1).norm(dim=1).mean()}, args.batches)
        norm = step_optimizer(optimizer, lr_scale * args.lr, world_size, args.skip_nonfinite > 0)
        sums["grad_norm/generator"] = norm
        sums = taken if patience.skipped(norm, epoch + 1, "grad_norm/generator") else sums

        # 6) EMA
        ema.update(epoch + 1)  # NOTE(paper): the release updates it once a micro-batch

        # log, sample, save
        row = models.rows_over_ranks([sums], world_size)[0]
        models.check_finite(row, epoch + 1, args.out)
        row |= {f"reward/{name}": r.mean().item() for name, r in scores.items()}
        seconds = time.perf_counter() - began
        pace = models.speed(backbone, seconds, 1, n_images)
        pace["sampling_share"] = (sampled - began) / seconds
        log.write(step=epoch + 1, **row, lr=lr_scale * args.lr, skipped=patience.total, **pace)
        bar.set_postfix({name: f"{r.mean().item():.3f}" for name, r in scores.items()})
        stopped = stop.agreed(world_size)
        if args.sample_every and ((epoch + 1) % args.sample_every == 0 or epoch == 0):
            shown = [prompt for prompt, _ in pairs[:16]]
            models.sample_grid(backbone, shown, sigmas, args, rank, f"epoch_{epoch + 1:06d}.png")
        if (epoch + 1) % args.save_every == 0 or epoch + 1 == args.epochs or stopped:
            checkpoint(epoch + 1)
        if stopped:
            say(f"\nstopped after epoch {epoch + 1}; go on with the same command and --resume {args.out}")
            return
    checkpoint(args.epochs, final=True)
    say(f"done: {args.out}/final/rl_ema")


def add_to(sums, values, count):
    """Accumulate means of detached scalars without leaving the device."""
    for name, value in values.items():
        sums[name] = sums.get(name, 0) + value.detach() / count


if __name__ == "__main__":
    models.run(main, parse_args())
