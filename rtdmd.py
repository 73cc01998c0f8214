"""Stage 2, RTDMD: reinforce the distilled 4-step generator on image rewards.

Reward-tilted distribution matching, section 3 and appendices G-I of "Reinforcing Few-step Generators via Reward-Tilted
Distribution Matching" (arXiv 2605.26108). The target is the teacher's distribution tilted by the reward r:
    KL(p_theta || p_psi exp(beta r) / Z) = E_theta[log p_theta - log p_psi - beta r] + log Z
                                         = KL(p_theta || p_psi) - beta E_theta[r] + const
The first term is stage 1's distribution matching, L_G, here of the finished picture: the leash. A picture takes three
random steps and a deterministic one, so the gradient of E[r] has two parts: the random steps' log-probabilities times
r, and dr/dx0 through the last step. Each of the three terms has its own scale, so three weights stand for it.
An epoch:

1. Choose C = 2 of the 3 stochastic steps (SubGRPO).
2. Sample groups of K images a prompt, 4 CPS steps. Steps not chosen share one noise per prompt.
3. Reward every image; advantage = reward less its group's mean, over the global deviation.
4. Fake score: one optimiser step of L_fake on the finished samples (s = 0).
5. Generator, one optimiser step of
      L = 1/(C+1) [ policy_weight sum_j w_j L_policy,j + dm_weight L_G + bp_weight mean(relu(margin - R)) ]
   L_policy,j: clipped policy gradient of chosen step j, a mean over the groups whose rewards differ; w_j: its
   --step_weights. L_G (the leash) and R (the reward itself, differentiated) are of the last step's x0_hat.
6. EMA of the trainable adapter.

Stage 1's adapters stay, frozen, under fresh ones: generator = [distilled, rl], fake score = [fake, fake_rl].

    python rtdmd.py --distilled out/classroom/acdmd/final                the classroom, minutes on a laptop CPU
    torchrun --nproc_per_node=8 rtdmd.py --model sd35 --distilled DIR --prompts FILE --rewards clipscore=1,geneval=1

Writes to --out: args.json, log.jsonl, samples/, step_NNNNNN/ and final/ with the adapters rl, rl_ema and fake_rl.
`sample.py --lora DIR/generator_ema --lora OUT/final/rl_ema` shows the result. Stops and resumes as acdmd.py does.
"""

import math
from pathlib import Path

import torch

import models
import rewards
from models import add_to, at_least, between, cps_mean, cps_step, per_sample, seeded, step_optimizer, to_device

DELTA_MAX = 200  # largest step back of L_cons, in timesteps; paper: 200
CLIP_RANGE = 1e-5  # of the policy's ratio; paper: 1e-5
PUBLISHED = "clipscore=1,hpsv2=1,pickscore=1,geneval=1"
# The published weights, policy 1, dm 1e-3 and bp 1e-4, do not tell which term pulls hardest. An image's policy gradient
# points along its own noise, so over a batch most of it cancels; gradients of L_G are alike and add up. What counts is
# the norm of an epoch's gradient, which `tests/bench.py --signal` prints (the classroom's: classroom/README.md).
# With the published rewards R is about 1.5 (CLIPScore, HPSv2, PickScore / 26), and a hinge with margin 3 just means -R.
PRESETS = {
    "sana": dict(group_size=24, batch_size=9, batches=16),  # SD3.5's, not published for it; nor for prx
    "prx": dict(group_size=24, batch_size=9, batches=16),
    "sd3": dict(group_size=16, batch_size=2, batches=16),
    "sd35": dict(group_size=24, batch_size=9, batches=16),
    "flux1": dict(group_size=24, batch_size=3, batches=16, lr_fake=1e-6, gamma=0.0),
    "flux2-4b": dict(group_size=24, batch_size=6, batches=16, lr_fake=1e-6),
    "flux2-9b": dict(group_size=24, batch_size=3, batches=16, lr_fake=1e-6, gamma=0.0),
    "classroom": dict(
        guidance_scale=1.5,
        rewards="geneval_strict=0.6,geneval=0.4,clipscore=0.2",
        reward_dir=models.CLASSROOM,
        group_size=12,
        batch_size=48,
        batches=4,
        epochs=100,
        lr=1.5e-3,
        lr_fake=4e-3,  # faster than the generator, or the leash lags and swings: classroom/LOG.md
        lr_decay=0.5,
        init_std=1 / 32,
        step_weights=(0.0, 2.0, 1.0),  # the first step's noise decides little here: always the other two
        dm_weight=0.05,
        bp_weight=0.06,
        last_step_batch=12,
        consistency_batch=8,
        ema_every=2,
        dtype="float32",
        out=Path("out/classroom/rtdmd"),
        distilled=Path("out/classroom/acdmd/final"),
        eval_rewards="geneval_strict,clipscore",
        eval_every=50,
        sample_every=50,
        save_every=50,
    ),
}

NO_PULL = {  # what is said once, if this value is exactly 0
    "loss/bp": "every R is above --reward_margin (mean {R:.4g}), so no reward is back-propagated: raise the margin"
}

# how often the classroom's own prompts show a task type that stage 1 leaves weak; the others come once
WEAK_TASKS = {"counting": 2, "two_object": 2, "position": 2, "color_attr": 2}


def three_weights(text):
    """A flag's type: three numbers of at least 0, one a stochastic step, such as 0,2.5,1."""
    weights = tuple(map(between(0), text.split(",")))
    if len(weights) != 3 or not any(weights):
        raise models.UserError(f"{text}: must be three numbers, not all 0, such as 0,2.5,1: one a stochastic step")
    return weights


def parse_args(argv=None):
    p = models.parser(__doc__.splitlines()[0])
    add = p.add_argument
    add("--distilled", type=models.path, help="stage 1's final/ folder; with --dm_weight 0, any generator's LoRA")
    add("--prompts", type=models.path, help="prompt file, for geneval with its metadata; the classroom makes its own")
    add("--rewards", type=rewards.parse_weights, default=PUBLISHED, help="name=weight,... or own.py:function=weight")
    add("--epochs", type=at_least(1), default=1000, help="sample, score, one optimiser step of each network")
    add("--group_size", type=at_least(1), default=24, help="K, images per prompt; paper: 16 or 24")
    add("--batch_size", type=at_least(1), default=9, help="images of a micro-batch")
    add("--batches", type=at_least(1), default=16, help="micro-batches an epoch and process; paper: 16")
    add("--lr", type=between(0), default=3e-6, help="learning rate of the generator (weight decay 1e-4)")
    add("--lr_fake", type=between(0), default=3e-5, help="learning rate of the fake score")
    add("--lr_decay", type=between(0, 1), default=0.0, help="share of the run over which both fall to 0; paper: 0")
    add("--init_std", type=between(0), default=1.0, help="std of the fresh adapters' A; the published rates need 1")
    add("--guidance_scale", type=between(0), help="of the teacher, classifier-free; 1 or less: none")
    add("--eta", type=between(0, 1), default=0.9, help="CPS stochasticity, above 0; paper: 0.9")
    add("--n_chosen", type=int, default=2, choices=[1, 2, 3], help="SubGRPO: trained stochastic steps; 3: ablation")
    more = "of each stochastic step's policy gradient; 0: never chosen. Paper: 1,1,1"
    add("--step_weights", type=three_weights, default=(1.0, 1.0, 1.0), help=more)
    add("--policy_weight", type=between(0), default=1.0, help="weight of the policy gradient; 0: ablation")
    add("--dm_weight", type=between(0), default=1e-3, help="weight of L_G; paper: 1e-3; 0: ablation without leash")
    add("--bp_weight", type=between(0), default=1e-4, help="weight of reward back-propagation; paper: 1e-4")
    add("--last_step_batch", type=at_least(1), help="L_G and R: on so many images of a micro-batch (default: all)")
    add("--reward_margin", type=between(-math.inf), default=3.0, help="no gradient of R from images above it; paper: 3")
    add("--gamma", type=between(0), default=0.01, help="weight of L_cons in L_fake; paper: 0.01")
    add("--consistency_batch", type=at_least(1), help="L_cons: on so many images of a micro-batch (default: all)")
    add("--ema_every", type=at_least(1), default=8, help="optimiser steps between EMA updates (decay .9); paper: 8")
    rewards.add_reward_flags(p, "epochs")
    models.add_run_flags(p, PRESETS, "out/rtdmd", "epochs", every=100)
    args = models.parse_with_preset(p, PRESETS, argv)
    if args.eta == 0:
        p.error("--eta 0: the policy gradient needs noise; allowed is above 0 to 1, the paper uses 0.9")
    if args.n_chosen > sum(map(bool, args.step_weights)):
        more = f"is more steps than --step_weights {','.join(map('{:g}'.format, args.step_weights))} has above 0"
        p.error(f"--n_chosen {args.n_chosen} {more}: give --step_weights 1,1,1 or a smaller --n_chosen")
    if args.distilled is None:
        p.error("--distilled DIR is missing: the final/ folder of an acdmd.py run")
    for name in ("generator_ema", "fake"):
        if args.dm_weight and not (args.distilled / name).is_dir():
            near = [d for d in (args.distilled / "final", args.distilled.parent) if (d / name).is_dir()]
            hint = f"give {near[0]}" if near else "run acdmd.py first and give its final/ folder"
            p.error(f"--distilled {args.distilled} has no {name}: {hint}")
    for name in args.rewards:
        if name not in rewards.SCORERS:  # of the run that --resume names
            p.error(f"--rewards: {name} is a function of yours; give its file again: --rewards FILE.py:{name}=...")
    if not (args.policy_weight or args.dm_weight or args.bp_weight):
        p.error("--policy_weight, --dm_weight and --bp_weight are all 0: nothing would train")
    if args.bp_weight and not any(w and rewards.SCORERS[name].differentiable for name, w in args.rewards.items()):
        p.error("--bp_weight needs a differentiable reward such as clipscore in --rewards; or give --bp_weight 0")
    return args


# ---------------------------------------------------------------------------------------------------------------
# reinforcement learning: advantages, policy loss, SubGRPO


def group_advantages(scores, weights):
    """Advantages [G, K] of G groups (prompts) of K images. scores: {scorer: [G, K]}, weights: {scorer: number}.

        A = sum over scorers of w (r - mean of its group) / (std + 1e-4),    then (A - mean) / (std + 1e-4)

    Both std are over all images (population, float64). K = 1: the global mean takes the place of the group's.
    """
    A = 0.0
    for name, weight in weights.items():
        r = scores[name].double()
        mean = r.mean(1, keepdim=True) if r.shape[1] > 1 else r.mean()
        A = A + weight * (r - mean) / (r.std(correction=0) + 1e-4)
    return ((A - A.mean()) / (A.std(correction=0) + 1e-4)).float()


def has_signal(scores, weights):
    """Bool [G]: does some weighted scorer tell the images of this group apart? A group of one always counts.

    One continuous scorer tells all apart: only rewards of few values leave groups out.
    NOTE(paper): the release looks for advantages of exactly 0, which standardising over the whole batch leaves nowhere.
    """
    differs = [(r.amax(1) > r.amin(1)) | (r.shape[1] == 1) for name, r in scores.items() if weights[name]]
    return torch.stack(differs).any(0)


def policy_loss(log_prob, old_log_prob, advantages, clip_range=CLIP_RANGE, max_advantage=5.0):
    """PPO's clipped loss mean(max(-A ratio, -A clip(ratio, 1 -+ clip_range))), ratio = exp(logp - logp_old).

    An epoch has one optimiser step, so the ratio is 1 where its gradient is taken, and what runs is REINFORCE with the
    group's mean as baseline: the gradient is -A dlogp, the value, -mean(A), says nothing. The clip answers to rounding
    alone: in float32 `ratio_drift` stays near 1e-7 and `clip_fraction` at 0. A counts up to +-max_advantage.
    """
    advantages = advantages.clamp(-max_advantage, max_advantage)
    ratio = (log_prob - old_log_prob).exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)).mean()


def cps_log_prob(x_next, x, v, sigma, sigma_next, eta):
    """Log-probability of a stored step, constants dropped: -mean((x' - mu)^2) over all but the batch -> [B].

    There is no 1/(2 rho^2), rho = sigma' sin(eta pi/2): it would weigh the least noisy steps most, and the published
    settings assume this scale.
    """
    return -(x_next.float() - cps_mean(x, v, sigma, sigma_next, eta)).square().flatten(1).mean(1)


def choose_steps(epoch, seed, candidates=(0, 1, 2), n=2):
    """SubGRPO: the n stochastic steps trained in this epoch, sorted; the same on every rank."""
    order = torch.randperm(len(candidates), generator=seeded(seed, epoch, "chosen steps"))
    return sorted(candidates[i] for i in order[:n].tolist())


def shared_noise(prompts, step, epoch, seed, shape):
    """[B, *shape] on the CPU: one noise per prompt, the same for its whole group on whatever rank.

    It takes the variance of steps that are not trained out of the advantages (App. H).
    """
    noise = {p: torch.randn(shape, generator=seeded(seed, epoch, step, "shared", p)) for p in dict.fromkeys(prompts)}
    return torch.stack([noise[p] for p in prompts])


# ---------------------------------------------------------------------------------------------------------------
# stage 1's losses at s = 0, for stage 2 matches finished samples only: x_t = (1-t) x0 + t z, and a step back to s is
# x0_hat. Written out so that this file reads alone; tests pin them to acdmd.py's


def fake_score_loss(v_fake, x0, z, sigma_t, max_weight=10.0):
    """L_ac at s = 0: flow matching, mean(w t^2 (v_phi - (z - x0))^2) with w = clamp(1/t^2, 0, max_weight)."""
    sigma_ts = per_sample(sigma_t, x0)  # t itself
    weight = (1 / sigma_ts**2).clamp(0, max_weight)
    return (weight * (sigma_ts * (v_fake - (z - x0))).square()).mean()


def consistency_loss(predict, x_t, sigma_t, v_t, delta, eta, z_1, z_2):
    """L_cons: two-sample estimate of |E[h(x', t')] - h(x_t, t)|^2, h(x, sigma) = x - sigma v_phi. As acdmd.py's."""
    sigma_t = per_sample(sigma_t, x_t)
    sigma_back = (sigma_t - per_sample(delta, x_t) / 1000).clamp(min=0)
    x_1, x_2 = (cps_step(x_t, v_t.detach(), sigma_t, sigma_back, eta, z) for z in (z_1, z_2))
    v_1, v_2 = predict(torch.cat([x_1, x_2]), torch.cat([sigma_back, sigma_back]).flatten()).chunk(2)
    h_t, h_1, h_2 = x_t - sigma_t * v_t, x_1 - sigma_back * v_1, x_2 - sigma_back * v_2
    return ((h_1 - h_t) * (h_2 - h_t)).mean()


def distribution_matching_loss(x0, x0_fake, x0_teacher):
    """L_G at s = 0; its gradient is g / numel, g = (x0^phi - x0^psi) / mean|x0 - x0^psi|."""
    with torch.no_grad():
        scale = per_sample((x0 - x0_teacher).abs().flatten(1).mean(1), x0)
        g = torch.where(scale == 0, 0.0, (x0_fake - x0_teacher) / scale)
    return 0.5 * (x0 - (x0 - g).detach()).square().mean()


# ---------------------------------------------------------------------------------------------------------------
# functions that call the networks


@torch.no_grad()
def sample(backbone, prompts, sigmas, chosen, eta, noise):
    """Rollouts: states [B, 5, C, H, W] from noise to picture, and log-probabilities [B, 3], 0 where not chosen.

    noise: Noise((seed, epoch), ...), whose key is that of the shared noise too.
    """
    seed, epoch = noise.key
    last = len(sigmas) - 2
    cond, states = backbone.encode(prompts), [noise.normal("start")]
    log_probs = torch.zeros(len(prompts), last, device=backbone.device)
    for j in range(last + 1):
        z = None  # of the last step, which is deterministic
        if j in chosen:
            z = noise.normal("step", j)
        elif j < last:
            z = to_device(shared_noise(prompts, j, epoch, seed, noise.shape), backbone.device)
        v = backbone.velocity("generator", states[j], sigmas[j], cond)
        states.append(cps_step(states[j], v, sigmas[j], sigmas[j + 1], eta, z))
        if j in chosen:
            log_probs[:, j] = cps_log_prob(states[j + 1], states[j], v, sigmas[j], sigmas[j + 1], eta)
    return torch.stack(states, 1), log_probs


def noised(x0, noise):
    """(x_t, sigma_t, z): x0 taken to t, 1000 t ~ U(10, 1000) clamped to [20, 980]."""
    sigma_t, z = ((1000 - 10) * noise.uniform("t") + 10).clamp(20, 980) / 1000, noise.normal("z")
    t = per_sample(sigma_t, x0)
    return (1 - t) * x0 + t * z, sigma_t, z


def consistency(backbone, cond, point, noise, eta):
    """L_cons of the first len(noise) samples of point = (x_t, sigma_t, v_t)."""
    n = len(noise)
    x_t, sigma_t, v_t = (part[:n] for part in point)
    cond = {name: torch.cat([c[:n], c[:n]]) for name, c in cond.items()}  # both transitions as one batch of 2n
    delta = 1 + (noise.uniform("delta") * DELTA_MAX).floor()  # uniform on 1 .. DELTA_MAX
    predict = lambda x, sigma: backbone.velocity("fake", x, sigma, cond)  # noqa: E731
    return consistency_loss(predict, x_t, sigma_t, v_t, delta, eta, noise.normal("z1"), noise.normal("z2"))


def matching_gradient(backbone, cond, x0, noise, guidance_scale):
    """(L_G, its gradient at x0): where do guided teacher and fake score disagree about these samples?"""
    x0 = x0.detach().requires_grad_()
    with torch.no_grad():
        x_t, sigma_t, _ = noised(x0, noise)
        v_teacher = backbone.velocity("teacher", x_t, sigma_t, cond, guidance_scale)
        v_fake = backbone.velocity("fake", x_t, sigma_t, cond)
        x0_teacher, x0_fake = (cps_step(x_t, v, sigma_t, 0.0) for v in (v_teacher, v_fake))
    loss = distribution_matching_loss(x0, x0_fake, x0_teacher)
    return loss, torch.autograd.grad(loss, x0)[0]


def reward_gradient(backbone, scorers, prompts, about, x0, margin):
    """({"loss/bp": mean(relu(margin - R)), "R": mean(R)}, gradient of loss/bp at x0); about: {prompt: its metadata}.

    R [B]: the weighted differentiable rewards of the decoded x0. The chain stops at x0 and `main` carries it on, so
    that the activations of reward models and VAE are gone before the transformer's backward begins.
    """
    x0 = x0.detach().requires_grad_()
    images = backbone.decode(x0)
    R, dR_dimages = scorers.differentiable(images, prompts, [about[prompt] for prompt in prompts])
    dloss_dimages = per_sample(-(R < margin).float() / len(R), images) * dR_dimages
    return {"loss/bp": torch.relu(margin - R).mean(), "R": R.mean()}, torch.autograd.grad(images, x0, dloss_dimages)[0]


def of_one_image(gradient):
    """Norm of the gradient of one image's own loss, averaged: the gradient of a mean has 1 / B of it."""
    return len(gradient) * gradient.flatten(1).norm(dim=1).mean()


def main(args):
    # set-up: run folder, prompts, rewards, networks and their adapters, optimisers
    run, student = models.Run(args, "epochs", __file__, NO_PULL), args.distilled / "generator_ema"
    stage_1 = {"fake": args.distilled / "fake", "generator": student}  # role: its frozen adapter
    if not args.dm_weight:  # some generator's alone: nothing asks a fake score
        stage_1 = {"generator": student if student.is_dir() else args.distilled}
    run.pin("distilled", {role: models.fingerprint(source) for role, source in stage_1.items()})
    models.trained_over(args.distilled, args.teacher_lora)
    if run.finished:
        return
    per_rank = args.batch_size * args.batches
    pairs = rewards.read_prompts(args.prompts) if args.prompts else rewards.classroom_prompts(**WEAK_TASKS)
    rewards.check_prompts(pairs, args.rewards, args.reward_dir)
    n_groups = rewards.count_groups(pairs, per_rank * run.world_size, args.group_size)
    options = args.reward_dir, args.reward_batch_size, args.offload_rewards
    scorers = rewards.load_scorers(args.rewards, run.device, *options)
    run.heldout = rewards.HeldOut(args, run.device, scorers) if args.eval_every else None
    backbone = run.load_backbone()
    backbone.roles |= {"generator": ("distilled", "rl"), "fake": ("fake", "fake_rl"), "ema": ("distilled", "rl_ema")}
    for role, source in stage_1.items():
        A, *_ = models.load_adapter(backbone.network(role), backbone.roles[role][0], source)  # [rank, in]
    networks = {"rl": backbone.student, "rl_ema": backbone.student, "fake_rl": backbone.transformer}
    generator, average, fake = run.adapters(networks, len(A), args.init_std)  # A: the generator's, loaded last
    fused = run.device.type == "cuda"
    optimizer = torch.optim.AdamW(generator, lr=args.lr, weight_decay=1e-4, fused=fused)
    optimizer_fake = torch.optim.AdamW(fake, lr=args.lr_fake, weight_decay=0.0, fused=fused)
    ema = models.EMA(generator, average, 0.9, args.ema_every, warmup=True)
    n_cons = args.consistency_batch or args.batch_size
    in_backward = args.batch_size + (2 * n_cons if args.gamma else 0)  # samples: L_ac's, and L_cons' twice
    models.set_up_blocks(backbone, args.checkpointing, in_backward, args.compile)

    sigmas, K, C, weights = backbone.sigmas(), args.group_size, args.n_chosen, args.rewards
    last, n_images = len(sigmas) - 2, per_rank * run.world_size  # steps 0 .. last - 1 are stochastic, `last` is not
    # images are numbered over all ranks: image i is of prompt i // K, and a group may straddle ranks
    mine = range(run.rank * per_rank, (run.rank + 1) * per_rank)
    parts = torch.arange(per_rank).split(args.batch_size)
    # latents of every step and their log-probabilities; on the device, which copies to the CPU would make wait
    states = torch.empty(per_rank, len(sigmas), *backbone.latent_shape, device=run.device)
    old_log_prob = torch.empty(per_rank, last, device=run.device)
    scores = {name: torch.empty(per_rank) for name in weights}
    run.print(f"{sum(p.numel() for p in generator) / 1e6:.2f} M trainable in each of generator and fake score")
    run.print(f"{n_groups} prompts x {K} = {n_images} images an epoch, {args.epochs} epochs")
    run.print(f"rewards {args.rewards}, sigmas {[round(s, 4) for s in sigmas]}, writing to {args.out}")
    run.begin(backbone, pairs, {"generator": optimizer, "fake": optimizer_fake}, n_images)

    def select(epoch, prompts, part, *use):
        """Prompts and noise of some of this rank's images."""
        noise = models.Noise((args.seed, epoch, *use), [mine[i] for i in part], backbone.latent_shape, run.device)
        return [prompts[i] for i in part], noise

    for epoch in run.steps("RTDMD"):
        decay = models.linear_decay(epoch, args.epochs, args.lr_decay)
        row = {"lr": decay * args.lr}

        # 1) choose steps
        chosen = choose_steps(epoch, args.seed, [j for j in range(last) if args.step_weights[j]], C)
        picked = rewards.pick_prompts(pairs, n_groups, seeded(args.seed, epoch, "prompts"))
        prompts, metadata = zip(*(picked[i // K] for i in mine), strict=True)
        # text encoders run here, once for all micro-batches: the epoch's prompts, and guidance's empty one
        backbone.remember(["", *prompts])

        # 2) sample, 3) reward
        for part in parts:
            if run.interrupted(epoch):
                return
            texts, noise = select(epoch, prompts, part)
            x, log_prob = sample(backbone, texts, sigmas, chosen, args.eta, noise)  # x: [B, 5, C, H, W]
            here = to_device(part, run.device)  # the same rows, for tensors on the device
            states[here], old_log_prob[here] = x, log_prob
            with torch.no_grad():
                images = backbone.decode(x[:, -1])
            # pictures are rounded to 8 bits here, as files hold them; {name: [B]} on the CPU
            for name, score in scorers.score(images, texts, [metadata[i] for i in part]).items():
                scores[name][part] = score
        grouped = {n: torch.tensor(models.gather(r.tolist(), run.world_size)).view(-1, K) for n, r in scores.items()}
        advantages = to_device(group_advantages(grouped, weights).flatten()[mine.start : mine.stop], run.device)
        n_signal = K * int(has_signal(grouped, weights).sum())
        row |= {f"reward/{name}": r.mean().item() for name, r in grouped.items()} | {"n_signal": n_signal}
        row |= {f"group_std/{name}": r.std(1, correction=0).mean().item() for name, r in grouped.items()}

        # 4) fake score, on the finished samples
        if args.dm_weight:  # NOTE(paper): the release trains it also where nobody reads it
            for part in parts:
                texts, noise = select(epoch, prompts, part, "fake")
                cond, x0 = backbone.encode(texts), states[to_device(part, run.device), -1]
                x_t, sigma_t, z = noised(x0, noise)
                v_fake = backbone.velocity("fake", x_t, sigma_t, cond)
                loss = fake_score_loss(v_fake, x0, z, sigma_t)
                add_to(row, {"loss/ac": loss}, args.batches)
                if args.gamma:
                    loss_cons = consistency(backbone, cond, (x_t, sigma_t, v_fake), noise[:n_cons], args.eta)
                    add_to(row, {"loss/cons": loss_cons}, args.batches)
                    loss = loss + args.gamma * loss_cons
                (loss / args.batches).backward()
            row["grad_norm/fake"] = step_optimizer(optimizer_fake, decay, run.world_size, args.skip_nonfinite)

        # 5) generator: the loss L of this file's docstring, term by term
        order = torch.randperm(per_rank, generator=seeded(args.seed, epoch, run.rank, "order"))
        for part in order.split(args.batch_size):
            texts, noise = select(epoch, prompts, part, "generator")
            cond, here = backbone.encode(texts), to_device(part, run.device)
            x, old, A = states[here], old_log_prob[here], advantages[here]
            share = 1 / (args.batches * (C + 1))  # what a mean over this micro-batch weighs in L

            # chosen steps (App. G, H). A is 0 in groups without signal: n_images / n_signal leaves them out of the mean
            if args.policy_weight:
                for j in chosen:
                    v = backbone.velocity("generator", x[:, j], sigmas[j], cond)
                    log_prob = cps_log_prob(x[:, j + 1], x[:, j], v, sigmas[j], sigmas[j + 1], args.eta)
                    loss = policy_loss(log_prob, old[:, j], A)
                    # NOTE(paper): there steps weigh the same; in the classroom the last one's gradient is the largest
                    weight = args.policy_weight * args.step_weights[j]
                    (weight * share * n_images / max(1, n_signal) * loss).backward()
                    drift = ((log_prob - old[:, j]).exp() - 1).abs()
                    values = {"loss/policy": loss, "ratio_drift": drift, "clip_fraction": drift > CLIP_RANGE}
                    add_to(row, {name: value.float().mean() for name, value in values.items()}, args.batches * C)

            # last step: gradients of the leash and of the reward at x0_hat, then the chain rule through the transformer
            if args.dm_weight or args.bp_weight:
                n = args.last_step_batch or len(part)
                texts, noise, x_last, cond = texts[:n], noise[:n], x[:n, last], {k: c[:n] for k, c in cond.items()}
                v = backbone.velocity("generator", x_last, sigmas[last], cond)
                x0_hat = cps_step(x_last, v, sigmas[last], 0.0)
                g = torch.zeros_like(x0_hat)
                if args.dm_weight:
                    loss, g_dm = matching_gradient(backbone, cond, x0_hat, noise, args.guidance_scale)
                    g += args.dm_weight * g_dm
                    add_to(row, {"loss/dm": loss, "grad_x0/dm": args.dm_weight * of_one_image(g_dm)}, args.batches)
                if args.bp_weight:
                    values, g_bp = reward_gradient(backbone, scorers, texts, dict(picked), x0_hat, args.reward_margin)
                    g += args.bp_weight * g_bp
                    add_to(row, values | {"grad_x0/bp": args.bp_weight * of_one_image(g_bp)}, args.batches)
                x0_hat.backward(share * g)  # recomputed blocks take the adapters they ran with: the generator's
        row["grad_norm/generator"] = step_optimizer(optimizer, decay, run.world_size, args.skip_nonfinite)

        # 6) EMA
        ema.update(epoch + 1)  # NOTE(paper): the release updates it once a micro-batch
        run.log(epoch, row)


if __name__ == "__main__":
    models.run(main, parse_args())
