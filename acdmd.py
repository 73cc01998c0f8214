"""Stage 1, AC-DMD: distil a guided many-step teacher into a 4-step generator without guidance.

Ambient-consistent distribution matching, section 3 and appendices B-F of "Reinforcing Few-step Generators via
Reward-Tilted Distribution Matching" (arXiv 2605.26108). Teacher psi, generator theta and fake score phi are one frozen
transformer with different LoRA adapters. Each iteration:

1. Rollout: draw k in {1..4}, walk k CPS steps of the generator from x ~ N(0, I); x_s lies at level s = sigma_{k+1}.
2. Fake score: re-noise x_s to x_t with t in (s, 1), fit v_phi to the ambient target v* (L_ac), and keep it consistent
   along its own trajectories (L_cons):                                  L_fake = L_ac + gamma L_cons
3. Generator, every `--fake_update_ratio`-th iteration, on its own rollout: walk x_t back to s with teacher and fake
   score; their difference is the gradient:                              dL_G/dx_s ~ x_s^phi - x_s^psi
4. EMA of the generator's adapter.

    python acdmd.py                                                      the classroom, minutes on a laptop CPU
    torchrun --nproc_per_node=8 acdmd.py --model sd3 --prompts FILE      the published setting

Writes to --out: args.json, log.jsonl, samples/, step_NNNNNN/ (the two newest, and each --keep_every-th) and final/ with
the adapters generator, generator_ema and fake. final/generator_ema is the result; rtdmd.py goes on from final/.
SIGTERM and Ctrl-C finish the step, save and exit; --resume goes on exactly, to the last digit on one CPU.
"""

from pathlib import Path

import torch

import models
import rewards
from models import add_to, at_least, between, cps_step, per_sample, seeded, step_optimizer

DELTA_MAX = 200  # largest step back of L_cons, in timesteps; paper: 200
PRESETS = {  # published settings of each backbone, and measured ones of the classroom
    "sana": dict(lr=3e-5, lr_fake=3e-5),  # SD3's, not published for it; nor for prx
    "prx": dict(lr=3e-5, lr_fake=3e-5),
    "sd3": dict(lr=3e-5, lr_fake=3e-5),
    "sd35": dict(lr=3e-5, lr_fake=3e-5),
    "flux1": dict(lr=3e-5, lr_fake=3e-5),
    "flux2-4b": dict(lr=1e-6, lr_fake=1e-6),
    "flux2-9b": dict(lr=1e-6, lr_fake=1e-6),
    "classroom": dict(
        guidance_scale=1.5,
        lr=1e-3,
        lr_fake=1e-3,
        batch_size=32,
        steps=400,
        fake_update_ratio=2,
        consistency_batch=8,
        lr_decay=0.3,
        dtype="float32",
        out=Path("out/classroom/acdmd"),
        reward_dir=models.CLASSROOM,
        eval_rewards="geneval_strict,clipscore",
        eval_every=200,
        sample_every=100,
        save_every=100,
    ),
}


def parse_args(argv=None):
    p = models.parser(__doc__.splitlines()[0])
    add = p.add_argument
    add("--prompts", type=models.path, help="a prompt file; the classroom makes its own. Paper: Pick-a-Pic captions")
    add("--steps", type=at_least(1), default=5000, help="iterations: fake-score updates")
    add("--batch_size", type=at_least(1), default=9, help="images of a micro-batch; paper: 9 on each of 8 GPUs")
    add("--batches", type=at_least(1), default=1, help="micro-batches an iteration and process; with 8, one GPU has 72")
    add("--lr", type=between(0), default=3e-5, help="learning rate of the generator")
    add("--lr_fake", type=between(0), default=3e-5, help="learning rate of the fake score")
    add("--lr_decay", type=between(0, 1), default=0.0, help="share of the run over which both fall to 0; paper: 0")
    add("--fake_update_ratio", type=at_least(1), default=10, help="fake-score updates per generator update; paper: 10")
    add("--rank", type=at_least(1), default=32, help="LoRA rank; alpha is twice that. Paper: 32")
    add("--guidance_scale", type=between(0), help="of the teacher, classifier-free; 1 or less: none")
    add("--eta", type=between(0, 1), default=0.9, help="CPS stochasticity, 0 ODE to 1 full re-noising; paper: 0.9")
    add("--gamma", type=between(0), default=0.01, help="weight of L_cons; paper: 0.01. 0: ablation without it")
    add("--consistency_batch", type=at_least(1), help="L_cons: on so many images of a micro-batch (default: all)")
    add("--plain_dmd", action="store_true", help="match x0_hat at s = 0; with --eta 1 --gamma 0 DMD2 (App. K)")
    add("--ema_decay", type=between(0, 1), default=0.99, help="paper: 0.99, every iteration")
    rewards.add_reward_flags(p, "iterations")
    models.add_run_flags(p, PRESETS, "out/acdmd", "iterations", every=500)
    p.set_defaults(log_every=10)
    return models.parse_with_preset(p, PRESETS, argv)


# ---------------------------------------------------------------------------------------------------------------
# the losses: tensors in, tensors out, float32


def renoise(x_s, sigma_s, sigma_t, z):
    """Take x_s from noise level s up to t >= s; returns (x_t, sigma_ts v*, sigma_ts), the last as [B, 1, 1, 1].

        x_t = a x_s + sigma_ts z,    a = (1-t)/(1-s),    sigma_ts^2 = t^2 - a^2 s^2

    Why v* (App. D). x_s is itself noisy, so v = eps - x0 is unknown. But a regression's target needs no more than the
    right mean given x_t. The score has such a sample (1), and v is linear in the score (2), so that sample put in its
    place gives a v* with E[v* | x_t] = v at x_t (3, 4).
      1. x_t given x_s is Gaussian, so the score of p(x_t) is E[-z / sigma_ts | x_t]   (score through x_s).
      2. Rectified flow ties score and velocity: v = -(x_t + t score) / (1-t).
      3. The sample of 1 in 2, x_t = a x_s + sigma_ts z:   v* = -x_s/(1-s) + z (t/sigma_ts - sigma_ts) / (1-t).
      4. t - sigma_ts^2 = (1-t) (t + (1-t) s^2/(1-s)^2), so v* = -x_s/(1-s) + z (t + (1-t) s^2/(1-s)^2) / sigma_ts.
    sigma_ts v* is returned because it never divides by a small sigma_ts. At s = 0: v* = z - x0, plain flow matching.
    """
    x_s, z = x_s.float(), z.float()
    s, t = per_sample(sigma_s, x_s), per_sample(sigma_t, x_s)
    alpha_ts = (1 - t) / (1 - s)
    sigma_ts = (t**2 - alpha_ts**2 * s**2).clamp(min=1e-12).sqrt()
    target = -sigma_ts * x_s / (1 - s) + z * (t + (1 - t) * s**2 / (1 - s) ** 2)
    return alpha_ts * x_s + sigma_ts * z, target, sigma_ts


def fake_score_loss(v_fake, target, sigma_ts, max_weight=10.0):
    """L_ac = mean(w (sigma_ts v_phi - sigma_ts v*)^2), w = clamp(1/sigma_ts^2, 0, max_weight). target is sigma_ts v*.

    v_fake, target: [B, C, H, W]; sigma_ts: [B] or [B, 1, 1, 1]. Ambient denoising score matching, App. D; see renoise.
    """
    sigma_ts = per_sample(sigma_ts, target)
    weight = (1 / sigma_ts**2).clamp(0, max_weight)
    return (weight * (sigma_ts * v_fake - target).square()).mean()


def consistency_loss(predict, x_t, sigma_t, v_t, delta, eta, z_1, z_2):
    """L_cons = mean((h(x'_1, t') - h(x_t, t)) (h(x'_2, t') - h(x_t, t))),   h(x, sigma) = x - sigma v_phi(x, sigma).

    The optimal fake score is self-consistent: averaged over its own transition t -> t', h does not move (App. E).
    So D = E[h(x', t')] - h(x_t, t) must vanish. D^2 is estimated by the product of two independent samples of D: one
    squared would add its variance (App. F). A product may be negative, and so may a logged value.
    L_ac trains above s alone; t' may lie below it, so L_cons reaches levels there too.

    predict(x, sigma) -> v_phi, called once on both transitions, [2B, C, H, W]; v_t = v_phi(x_t, sigma_t) with gradient;
    delta: [B] integer timesteps to go back; z_1, z_2: noise of the two CPS transitions. Gradients flow through the
    three h, not through the transitions.
    """
    sigma_t = per_sample(sigma_t, x_t)
    sigma_back = (sigma_t - per_sample(delta, x_t) / 1000).clamp(min=0)
    x_1, x_2 = (cps_step(x_t, v_t.detach(), sigma_t, sigma_back, eta, z) for z in (z_1, z_2))
    v_1, v_2 = predict(torch.cat([x_1, x_2]), torch.cat([sigma_back, sigma_back]).flatten()).chunk(2)
    h_t, h_1, h_2 = x_t - sigma_t * v_t, x_1 - sigma_back * v_1, x_2 - sigma_back * v_2
    return ((h_1 - h_t) * (h_2 - h_t)).mean()


def distribution_matching_loss(x_s, x_s_fake, x_s_teacher):
    """L_G = mean((x_s - stopgrad(x_s - g))^2) / 2, so that dL_G/dx_s = g / numel with

        g = (x_s^phi - x_s^psi) / mean|x_s - x_s^psi|     (mean per sample; a zero normaliser gives that sample g = 0)

    x_s: the generator's sample, with gradient; x_s_fake, x_s_teacher: where fake score and teacher take x_t back to s.
    """
    with torch.no_grad():
        scale = per_sample((x_s - x_s_teacher).abs().flatten(1).mean(1), x_s)
        # NOTE(paper): the release makes every NaN 0; here only what a zero normaliser gives, so that an error shows
        g = torch.where(scale == 0, 0.0, (x_s_fake - x_s_teacher) / scale)
    return 0.5 * (x_s - (x_s - g).detach()).square().mean()


def draw_t(u, sigma_s):
    """t as a noise level: 1000 t ~ U(1000 s + 10, 1000), clamped to [20, 980]. u: uniform draws [B]."""
    low = 1000 * sigma_s + 10
    return ((1000 - low) * u + low).clamp(20, 980) / 1000


# ---------------------------------------------------------------------------------------------------------------
# functions that call the networks


def rollout(backbone, cond, levels, eta, noise, grad=False):
    """x_s: the generator's walk down `levels` [1, ..., s] from pure noise, gradient in the last step only (App. B)."""
    x, last = noise.normal("start"), len(levels) - 2
    for j, (sigma, sigma_next) in enumerate(zip(levels, levels[1:], strict=False)):
        with torch.set_grad_enabled(grad and j == last):
            v = backbone.velocity("generator", x, sigma, cond)
            x = cps_step(x, v, sigma, sigma_next, eta, noise.normal("step", j) if sigma_next else None)
    return x


def consistency(backbone, cond, point, noise, eta):
    """L_cons of the first len(noise) samples of point = (x_t, sigma_t, v_t)."""
    n = len(noise)
    x_t, sigma_t, v_t = (part[:n] for part in point)
    cond = {name: torch.cat([c[:n], c[:n]]) for name, c in cond.items()}  # both transitions as one batch of 2n
    delta = 1 + (noise.uniform("delta") * DELTA_MAX).floor()  # uniform on 1 .. DELTA_MAX
    predict = lambda x, sigma: backbone.velocity("fake", x, sigma, cond)  # noqa: E731
    return consistency_loss(predict, x_t, sigma_t, v_t, delta, eta, noise.normal("z1"), noise.normal("z2"))


def main(args):
    # set-up: run folder, networks and their adapters, optimisers
    run = models.Run(args, "steps", __file__)
    if run.finished:
        return
    pairs = rewards.read_prompts(args.prompts) if args.prompts else rewards.classroom_prompts()
    run.heldout = rewards.HeldOut(args, run.device) if args.eval_every else None
    backbone = run.load_backbone()
    backbone.roles |= {"generator": ("generator",), "fake": ("fake",), "ema": ("generator_ema",)}
    networks = {"generator": backbone.student, "generator_ema": backbone.student, "fake": backbone.transformer}
    generator, average, fake = run.adapters(networks, args.rank)  # lists of parameters, in this order
    fused = run.device.type == "cuda"
    optimizer = torch.optim.AdamW(generator, lr=args.lr, weight_decay=0.0, fused=fused)
    optimizer_fake = torch.optim.AdamW(fake, lr=args.lr_fake, weight_decay=0.0, fused=fused)
    ema = models.EMA(generator, average, args.ema_decay)
    n_cons = args.consistency_batch or args.batch_size
    in_backward = args.batch_size + (2 * n_cons if args.gamma else 0)  # samples: L_ac's, and L_cons' twice
    models.set_up_blocks(backbone, args.checkpointing, in_backward, args.compile)

    per_rank, sigmas = args.batch_size * args.batches, backbone.sigmas()
    if sigmas[1] >= 0.98 and not args.plain_dmd:  # FLUX beyond 1,856 pixels a side: draw_t would fall below s
        level = f"its first step ends at noise level {sigmas[1]:.3f}; the fake score is trained from there to .98"
        raise models.UserError(f"--resolution {backbone.resolution}: {level}; give a smaller one")
    batch = per_rank * run.world_size
    mine = range(run.rank * per_rank, (run.rank + 1) * per_rank)  # samples are numbered over all ranks
    parts = [mine[i : i + args.batch_size] for i in range(0, per_rank, args.batch_size)]
    run.print(f"{sum(p.numel() for p in generator) / 1e6:.2f} M trainable in each of generator and fake score")
    updates = args.steps // args.fake_update_ratio
    run.print(f"{batch} images an iteration, {args.steps} iterations, {updates} generator updates")
    run.print(f"sigmas {[round(s, 4) for s in sigmas]}, eta {args.eta}, {len(pairs)} prompts, writing to {args.out}")
    run.begin(backbone, pairs, {"generator": optimizer, "fake": optimizer_fake}, batch)

    def draw(step, network):
        """For each micro-batch: text embeddings, k steps down the noise levels to s = levels[-1], and the noise."""
        g = seeded(args.seed, step, network)
        k = int(torch.randint(1, len(sigmas), (1,), generator=g))  # the same in all micro-batches, on every rank
        picks = torch.randint(len(pairs), (batch,), generator=g).tolist()
        levels = [*sigmas[:k], 0.0 if args.plain_dmd else sigmas[k]]
        # text encoders run here, once for all micro-batches: the step's prompts, and guidance's empty one
        backbone.remember(["", *(pairs[picks[i]][0] for i in mine)])
        for part in parts:
            # .normal(name) -> [B, C, H, W], .uniform(name) -> [B]: fixed by seed, step, network, sample and name
            noise = models.Noise((args.seed, step, network), part, backbone.latent_shape, run.device)
            yield backbone.encode([pairs[picks[i]][0] for i in part]), k, levels, noise

    for step in run.steps("AC-DMD"):
        decay = models.linear_decay(step, args.steps, args.lr_decay)
        row = {"lr": decay * args.lr}

        for cond, k, levels, noise in draw(step, "fake"):
            # 1) rollout to x_s (App. B)
            x_s, s = rollout(backbone, cond, levels, args.eta, noise), levels[-1]

            # 2) fake score: fit v* at x_t (App. D), stay consistent along the way back from x_t (App. E, F)
            sigma_t = draw_t(noise.uniform("t"), s)
            x_t, target, sigma_ts = renoise(x_s, s, sigma_t, noise.normal("z"))
            v_fake = backbone.velocity("fake", x_t, sigma_t, cond)
            loss = fake_score_loss(v_fake, target, sigma_ts)
            add_to(row, {f"loss/ac_k{k}": loss}, args.batches)  # for the log, a mean over the micro-batches
            if args.gamma:
                loss_cons = consistency(backbone, cond, (x_t, sigma_t, v_fake), noise[:n_cons], args.eta)
                add_to(row, {"loss/cons": loss_cons}, args.batches)
                loss = loss + args.gamma * loss_cons
            (loss / args.batches).backward()
        # averages over ranks, clips the norm at 1, steps at decay times the rate, clears the gradients
        row["grad_norm/fake"] = step_optimizer(optimizer_fake, decay, run.world_size, args.skip_nonfinite)

        # 3) generator, on a rollout of its own: where do teacher and fake score disagree about it? (section 3)
        if (step + 1) % args.fake_update_ratio == 0:  # the fake score moves more often (TTUR)
            for cond, k, levels, noise in draw(step, "generator"):
                x_s, s = rollout(backbone, cond, levels, args.eta, noise, grad=True), levels[-1]
                with torch.no_grad():
                    sigma_t = draw_t(noise.uniform("t"), s)
                    x_t, _, _ = renoise(x_s, s, sigma_t, noise.normal("z"))
                    v_teacher = backbone.velocity("teacher", x_t, sigma_t, cond, args.guidance_scale)
                    v_fake = backbone.velocity("fake", x_t, sigma_t, cond)
                    back = noise.normal("back")  # shared, so that what differs is the scores
                    x_s_teacher = cps_step(x_t, v_teacher, sigma_t, s, args.eta, back)
                    x_s_fake = cps_step(x_t, v_fake, sigma_t, s, args.eta, back)
                loss = distribution_matching_loss(x_s, x_s_fake, x_s_teacher)
                (loss / args.batches).backward()  # recomputed blocks take the adapters they ran with: the generator's
                add_to(row, {f"loss/generator_k{k}": loss}, args.batches)
            row["grad_norm/generator"] = step_optimizer(optimizer, decay, run.world_size, args.skip_nonfinite)

        # 4) EMA, in every iteration, as the published .99 is meant, though the generator moves in every tenth alone:
        # by generator steps the decay is .99^10 = .9, an average over about the last ten
        ema.update(step + 1)
        run.log(step, row)


if __name__ == "__main__":
    models.run(main, parse_args())
