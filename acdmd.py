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

Writes to --out: args.json, log.jsonl, samples/, step_NNNNNN/ (the two newest) and final/ with the adapters generator,
generator_ema and fake. final/generator_ema is the result; rtdmd.py goes on from final/.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import models
import rewards
from models import cps_step, renoise, seeded, step_optimizer

PRESETS = {  # published settings of each backbone, and measured ones of the classroom
    "sd3": dict(lr=3e-5, lr_fake=3e-5),
    "sd35": dict(lr=3e-5, lr_fake=3e-5),
    "flux1": dict(lr=3e-5, lr_fake=3e-5),
    "flux2-4b": dict(lr=1e-6, lr_fake=1e-6),
    "flux2-9b": dict(lr=1e-6, lr_fake=1e-6),
    "classroom": dict(
        guidance_scale=2.5,
        lr=1e-3,
        lr_fake=1e-3,
        batch_size=32,
        steps=800,
        fake_update_ratio=2,
        consistency_batch=8,
        lr_decay=0.3,
        dtype="float32",
        out=Path("out/classroom/acdmd"),
        sample_every=200,
        save_every=200,
    ),
}


def parse_args(argv=None):
    options = dict(usage=argparse.SUPPRESS, formatter_class=models.Help, allow_abbrev=False)
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], **options)
    add = p.add_argument
    add("--model", default="classroom", choices=PRESETS, help="backbone; picks the preset that other flags override")
    add("--weights", help="diffusers pipeline folder or hub id in place of the published one")
    add("--generator_weights", help="the same for the generator alone (FLUX.2: its step-distilled release)")
    add("--resolution", type=int, help="pixels a side (default: the backbone's)")
    add("--prompts", type=Path, help=".txt, .jsonl or .json; the classroom makes its own. Paper: Pick-a-Pic captions")
    add("--out", type=Path, default=Path("out/acdmd"), help="run folder")
    add("--resume", type=Path, help="run folder or step_NNNNNN folder to go on from")
    add("--seed", type=int, default=0, help="covers prompts, noise, k, t, delta and the adapters' initial weights")
    add("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of the networks; formulas are float32")
    add("--checkpointing", default="auto", choices=["auto", "on", "off"], help="of activations; auto: if memory asks")
    add("--shard", default="none", choices=models.SHARD_MODES, help="of the frozen base, by FSDP2; hybrid: in a node")
    add("--offload_frozen", action="store_true", help="the frozen base waits in host memory, block by block")
    add("--offload_encoders", action="store_true", help="text encoders wait on the CPU while they do not encode")
    add("--compile", action="store_true", help="torch.compile, block by block")
    add("--wandb", action="store_true", help="log to Weights & Biases too")
    add("--steps", type=int, default=5000, help="iterations: fake-score updates")
    add("--batch_size", type=int, default=9, help="images a process; paper: 9 on each of 8 GPUs")
    add("--lr", type=float, default=3e-5, help="learning rate of the generator")
    add("--lr_fake", type=float, default=3e-5, help="learning rate of the fake score")
    add("--lr_decay", type=float, default=0.0, help="share of the run over which both fall to 0 at its end; paper: 0")
    add("--fake_update_ratio", type=int, default=10, help="fake-score updates per generator update (TTUR); paper: 10")
    add("--rank", type=int, default=32, help="LoRA rank; alpha is twice that. Paper: 32")
    add("--guidance_scale", type=float, help="classifier-free guidance of the teacher in L_G; 1 or less: none")
    add("--eta", type=float, default=0.9, help="CPS stochasticity, 0 ODE to 1 full re-noising; paper: 0.9")
    add("--gamma", type=float, default=0.01, help="weight of L_cons; paper: 0.01. 0: ablation without consistency")
    add("--delta_max", type=int, default=200, help="L_cons: largest step back in time, in timesteps; paper: 200")
    add("--consistency_batch", type=int, help="L_cons on so many samples of each process's batch (default: all)")
    add("--plain_dmd", action="store_true", help="ablation: match x0_hat of every step at s = 0, no sub-intervals")
    add("--ema_decay", type=float, default=0.99, help="paper: 0.99, every iteration")
    add("--log_every", type=int, default=10, help="iterations whose log lines are written together: one device sync")
    add("--skip_nonfinite", type=int, default=0, help="gradients in a row that may be not finite and are skipped")
    add("--sample_every", type=int, default=500, help="iterations between sample grids; 0: none")
    add("--save_every", type=int, default=500, help="iterations between checkpoints")
    argv = sys.argv[1:] if argv is None else argv
    known, _ = p.parse_known_args([word for word in argv if word not in ("-h", "--help")])
    p.set_defaults(**{"guidance_scale": models.BACKBONES[known.model]["guidance"], **PRESETS[known.model]})
    args = p.parse_args(argv)
    for name, value in vars(args).items():
        if isinstance(value, float) and not 0 <= value < math.inf:
            p.error(f"--{name} {value}: must be a finite number, at least 0")
    if args.resume and args.out == p.get_default("out"):  # a run goes on in its own folder
        args.out = args.resume.parent if (args.resume / "state.pt").is_file() else args.resume
    counts = "steps batch_size fake_update_ratio rank delta_max log_every save_every consistency_batch resolution"
    for name, least in {**dict.fromkeys(counts.split(), 1), "sample_every": 0, "skip_nonfinite": 0, "seed": 0}.items():
        if getattr(args, name) is not None and getattr(args, name) < least:
            p.error(f"--{name} {getattr(args, name)}: must be at least {least}")
    if not 0 <= args.eta <= 1:
        p.error(f"--eta {args.eta}: allowed is 0 (ODE) to 1 (full re-noising); the paper uses 0.9")
    if args.ema_decay > 1:
        p.error(f"--ema_decay {args.ema_decay}: allowed is 0 (no average) to 1 (no change)")
    if not 0 <= args.lr_decay <= 1:
        p.error(f"--lr_decay {args.lr_decay}: a share of the run, 0 to 1")
    if args.prompts is None and args.model != "classroom":
        p.error(f"--model {args.model} needs --prompts FILE (.txt, .jsonl or .json)")
    return args


# ---------------------------------------------------------------------------------------------------------------
# the losses: tensors in, tensors out, float32


def fake_score_loss(v_fake, target, sigma_ts, max_weight=10.0):
    """L_ac = mean(w (sigma_ts v_phi - sigma_ts v*)^2), w = clamp(1/sigma_ts^2, 0, max_weight). target is sigma_ts v*.

    v_fake, target: [B, C, H, W]; sigma_ts: [B] or [B, 1, 1, 1]. Ambient denoising score matching, App. D; see renoise.
    """
    sigma_ts = models.per_sample(sigma_ts, target)
    weight = (1 / sigma_ts**2).clamp(0, max_weight)
    return (weight * (sigma_ts * v_fake - target).square()).mean()


def consistency_loss(predict, x_t, sigma_t, v_t, delta, eta, noise_1, noise_2):
    """L_cons = mean((h(x'_1, t') - h(x_t, t)) (h(x'_2, t') - h(x_t, t))),   h(x, sigma) = x - sigma v_phi(x, sigma).

    The optimal fake score is self-consistent: averaged over its own transition t -> t', h does not move (App. E).
    The square of that average needs two independent transitions x'_1, x'_2; one alone would add its variance (App. F).
    t' may lie below s, where L_ac gives a sample no target.

    predict(x, sigma) -> v_phi, called once on both transitions, [2B, C, H, W]; v_t = v_phi(x_t, sigma_t) with gradient;
    delta: [B] integer timesteps to go back. Gradients flow through the three h, not through the transitions.
    """
    sigma_t = models.per_sample(sigma_t, x_t).expand(len(x_t), 1, 1, 1)
    sigma_back = (sigma_t - models.per_sample(delta, x_t) / 1000).clamp(min=0)
    x_1, x_2 = (cps_step(x_t, v_t.detach(), sigma_t, sigma_back, eta, z) for z in (noise_1, noise_2))
    v_1, v_2 = predict(torch.cat([x_1, x_2]), torch.cat([sigma_back, sigma_back]).flatten()).float().chunk(2)
    h_t, h_1, h_2 = x_t - sigma_t * v_t, x_1 - sigma_back * v_1, x_2 - sigma_back * v_2
    return ((h_1 - h_t) * (h_2 - h_t)).mean()


def distribution_matching_loss(x_s, x_s_fake, x_s_teacher):
    """L_G = mean((x_s - stopgrad(x_s - g))^2) / 2, so that dL_G/dx_s = g / numel with

        g = (x_s^phi - x_s^psi) / mean|x_s - x_s^psi|     (mean per sample; a zero normaliser gives that sample g = 0)

    x_s: the generator's sample, with gradient; x_s_fake, x_s_teacher: where fake score and teacher take x_t back to s.
    """
    with torch.no_grad():
        scale = (x_s - x_s_teacher).abs().flatten(1).mean(1)
        scale = models.per_sample(scale, x_s)
        # NOTE(paper): the release makes every NaN 0; here only what a zero normaliser gives, so that an error shows
        g = torch.where(scale == 0, 0.0, (x_s_fake - x_s_teacher) / scale)
    return 0.5 * (x_s - (x_s - g).detach()).square().mean()


def draw_t(u, sigma_s):
    """t as a noise level: 1000 t ~ U(1000 s + 10, 1000), clamped to [20, 980]. u: uniform draws [B]."""
    low = 1000 * sigma_s + 10
    return ((1000 - low) * u + low).clamp(20, 980) / 1000


# ---------------------------------------------------------------------------------------------------------------
# functions that call the networks


def rollout(backbone, cond, sigmas, k, args, indices, key, grad=False):
    """Walk k CPS steps of the generator from noise, with gradient in the k-th only: (x_s, s). Appendix B.

    With --plain_dmd the k-th step jumps to 0 instead: x_s = x0_hat and s = 0, as in DMD2 (App. K). indices, key: which
    samples of the global batch these are, and what for; all noise of a sample follows from the two (models.draw).
    """
    shape, device = backbone.latent_shape, backbone.device
    x = models.draw(torch.randn, shape, indices, *key, "start", device=device)
    for j in range(k):
        last = j == k - 1
        sigma_next = 0.0 if last and args.plain_dmd else sigmas[j + 1]
        noise = models.draw(torch.randn, shape, indices, *key, "step", j, device=device)  # unused by a step to 0
        with torch.set_grad_enabled(grad and last):
            v = backbone.velocity(x, sigmas[j], cond, role="generator")
            x = cps_step(x, v, sigmas[j], sigma_next, args.eta, noise)
    return x, sigma_next


def fake_losses(backbone, cond, x_s, sigma_s, args, indices, key):
    """(L_ac, L_cons) on one batch of rollouts."""
    shape, device = backbone.latent_shape, backbone.device
    noise = models.draw(torch.randn, shape, indices, *key, "z", device=device)
    sigma_t = draw_t(models.draw(torch.rand, (), indices, *key, "t", device=device), sigma_s)
    x_t, target, sigma_ts = renoise(x_s, sigma_s, sigma_t, noise)
    v_t = backbone.velocity(x_t, sigma_t, cond, role="fake")
    loss_ac = fake_score_loss(v_t, target, sigma_ts)
    if args.gamma == 0:
        return loss_ac, torch.zeros_like(loss_ac)
    n = args.consistency_batch or len(x_s)
    delta = models.draw(torch.rand, (), indices[:n], *key, "delta", device=device)
    delta = 1 + (delta * args.delta_max).floor()  # uniform on 1 .. delta_max
    noise_1, noise_2 = (
        models.draw(torch.randn, shape, indices[:n], *key, name, device=device) for name in ("z1", "z2")
    )
    cond_twice = {name: torch.cat([c[:n], c[:n]]) for name, c in cond.items()}

    def predict(x, sigma):  # both transitions as one batch of 2n
        return backbone.velocity(x, sigma, cond_twice, role="fake")

    return loss_ac, consistency_loss(predict, x_t[:n], sigma_t[:n], v_t[:n], delta, args.eta, noise_1, noise_2)


def generator_loss(backbone, cond, uncond, x_s, sigma_s, args, indices, key):
    """L_G: re-noise x_s to t, walk back to s once with the guided teacher and once with the fake score.

    Both walks share x_t and their noise, so what is left of their difference is that of the two scores.
    """
    shape, device = backbone.latent_shape, backbone.device
    with torch.no_grad():
        noise, back = (models.draw(torch.randn, shape, indices, *key, name, device=device) for name in ("z", "back"))
        sigma_t = draw_t(models.draw(torch.rand, (), indices, *key, "t", device=device), sigma_s)
        x_t, _, _ = renoise(x_s, sigma_s, sigma_t, noise)
        v_teacher = backbone.velocity(x_t, sigma_t, cond, args.guidance_scale, uncond, role="teacher")
        v_fake = backbone.velocity(x_t, sigma_t, cond, role="fake")
        x_s_teacher = cps_step(x_t, v_teacher, sigma_t, sigma_s, args.eta, back)
        x_s_fake = cps_step(x_t, v_fake, sigma_t, sigma_s, args.eta, back)
    return distribution_matching_loss(x_s, x_s_fake, x_s_teacher)


def main(args):
    # set-up, models, optimisers
    rank, world_size, device = models.setup_distributed(args.device)
    state = models.check_run(args, __file__)
    start = state["step"] if state else 0
    if start > args.steps:
        raise models.UserError(f"--steps {args.steps}: the run is at {start} already")
    if start == args.steps and (args.out / "final").is_dir():
        if rank == 0:
            print(f"nothing left to train: {args.out}/final is the run's end, step {start}")
        return
    stop = models.StopSignal()
    pairs = rewards.read_prompts(args.prompts) if args.prompts else rewards.classroom_prompts()
    prompts = [prompt for prompt, _ in pairs]
    dtype = getattr(torch, args.dtype)
    placement = dict(shard_mode=args.shard, offload_frozen=args.offload_frozen)
    backbone = models.load(
        args.model, args.weights, args.generator_weights, device, dtype, args.resolution, **placement
    )
    backbone.offload_encoders = args.offload_encoders
    backbone.roles |= {"generator": ("generator",), "fake": ("fake",), "ema": ("generator_ema",)}
    # adapter -> the transformer that holds it: one and the same, but for FLUX.2
    home = {"generator": backbone.student, "generator_ema": backbone.student, "fake": backbone.transformer}
    if state:
        models.load_checkpoint(state, home)
    else:
        for name, network in home.items():
            init = seeded(args.seed, "init", name.removesuffix("_ema"))
            models.add_adapter(network, name, args.rank, 2 * args.rank, generator=init, trainable="ema" not in name)
    generator, average, fake = (models.adapter_parameters(network, name) for name, network in home.items())
    optimizer = torch.optim.AdamW(generator, lr=args.lr, weight_decay=0.0, fused=device.type == "cuda")
    optimizer_fake = torch.optim.AdamW(fake, lr=args.lr_fake, weight_decay=0.0, fused=device.type == "cuda")
    ema = models.EMA(generator, average, args.ema_decay)
    if state:
        optimizer.load_state_dict(state["optimizer"])
        optimizer_fake.load_state_dict(state["optimizer_fake"])
    samples = args.batch_size + 2 * (args.consistency_batch or args.batch_size)  # of the fake score's step
    models.set_up_blocks(backbone, args.checkpointing, samples, args.compile)

    sigmas = backbone.sigmas(models.FEW_STEPS)
    uncond = backbone.encode([""])
    batch = args.batch_size * world_size
    indices = range(rank * args.batch_size, (rank + 1) * args.batch_size)  # samples are numbered over all ranks
    say = print if rank == 0 else lambda *_: None
    total = sum(p.numel() for network in backbone.networks() for p in network.parameters())
    say(f"{args.model} on {device}: {total / 1e6:.2f} M parameters with all adapters")
    say(f"{sum(p.numel() for p in generator) / 1e6:.2f} M trainable in each of generator and fake score")
    say(
        f"{batch} images an iteration, {args.steps} iterations, "
        f"{args.steps // args.fake_update_ratio} generator updates"
    )
    say(f"sigmas {[round(s, 4) for s in sigmas]}, eta {args.eta}, {len(prompts)} prompts, writing to {args.out}")
    log = models.RunLog(rank, args, state)

    def checkpoint(step, final=False):
        if rank == 0:
            state = {"optimizer": optimizer.state_dict(), "optimizer_fake": optimizer_fake.state_dict()}
            state["skipped"] = (patience.in_a_row, patience.total)
            models.save_checkpoint(args.out, step, home, state, args, __file__, final=final)

    def batch_for(step, use):
        """Text embeddings of this rank's prompts and the shared k. Fake score and generator draw their own."""
        g = seeded(args.seed, step, use)
        k = int(torch.randint(1, len(models.FEW_STEPS) + 1, (1,), generator=g))
        picks = torch.randint(len(prompts), (batch,), generator=g)[indices.start : indices.stop]
        return backbone.encode([prompts[i] for i in picks]), k, (args.seed, step, use)

    patience = models.Patience(args.skip_nonfinite, args.out, *(state or {}).get("skipped", ()))
    pending, shown, last_log = [], {}, time.perf_counter()  # rows of the log whose values are still on the device
    bar = tqdm(range(start, args.steps), "AC-DMD", initial=start, total=args.steps, disable=rank > 0)
    for step in bar:
        lr_scale = min(1.0, (args.steps - step) / (args.lr_decay * args.steps)) if args.lr_decay else 1.0

        # 1) rollout, 2) fake score
        cond, k, key = batch_for(step, "fake")
        x_s, sigma_s = rollout(backbone, cond, sigmas, k, args, indices, key)
        loss_ac, loss_cons = fake_losses(backbone, cond, x_s, sigma_s, args, indices, key)
        (loss_ac + args.gamma * loss_cons).backward()
        norm = step_optimizer(optimizer_fake, lr_scale * args.lr_fake, world_size, args.skip_nonfinite > 0)
        row = {f"loss/ac_k{k}": loss_ac, "loss/cons": loss_cons, "grad_norm/fake": norm}
        row = {} if patience.skipped(norm, step + 1, "grad_norm/fake") else row

        # 3) generator, on a rollout of its own
        if (step + 1) % args.fake_update_ratio == 0:
            cond, k, key = batch_for(step, "generator")
            x_s, sigma_s = rollout(backbone, cond, sigmas, k, args, indices, key, grad=True)
            loss = generator_loss(backbone, cond, uncond, x_s, sigma_s, args, indices, key)
            loss.backward()
            norm = step_optimizer(optimizer, lr_scale * args.lr, world_size, args.skip_nonfinite > 0)
            if not patience.skipped(norm, step + 1, "grad_norm/generator"):
                row |= {f"loss/generator_k{k}": loss, "grad_norm/generator": norm}

        # 4) EMA
        ema.update(step)

        # log, sample, save
        facts = {"step": step + 1, "lr": lr_scale * args.lr, "skipped": patience.total}
        pending.append((facts, {name: value.detach() for name, value in row.items()}))
        stopped = stop.agreed(world_size)
        saving = (step + 1) % args.save_every == 0 or step + 1 == args.steps or stopped
        if saving or (step + 1) % args.log_every == 0:
            rows = models.rows_over_ranks([row for _, row in pending], world_size)
            pace = models.speed(backbone, time.perf_counter() - last_log, len(rows), batch * len(rows))
            last_log = time.perf_counter()
            for (facts, _), row in zip(pending, rows, strict=True):
                models.check_finite(row, facts["step"], args.out)
                log.write(**facts, **row, **pace)
                shown |= {name: f"{v:.3g}" for name, v in row.items() if name in ("grad_norm/generator", "loss/cons")}
            bar.set_postfix(shown)
            pending = []
        paused = time.perf_counter()
        if args.sample_every and ((step + 1) % args.sample_every == 0 or step == 0):
            models.sample_grid(backbone, prompts[:16], sigmas, args, rank, f"step_{step + 1:06d}.png")
        if saving:
            checkpoint(step + 1)
        if stopped:
            say(f"\nstopped after step {step + 1}; go on with the same command and --resume {args.out}")
            return
        last_log += time.perf_counter() - paused  # grids and checkpoints are no part of the training's pace
    checkpoint(args.steps, final=True)
    say(f"done: {args.out}/final/generator_ema")


if __name__ == "__main__":
    models.run(main, parse_args())
