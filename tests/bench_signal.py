"""How many images an epoch does stage 2 need? The signal in its gradient, and which step's noise decides a reward.

    python tests/bench.py --signal                                                  the classroom, 5 to 10 minutes
    python tests/bench.py --signal --model sd35 --distilled DIR --prompts FILE --rewards geneval=1,clipscore=1

takes rtdmd.py's own flags, and runs its `main` for `--epochs` epochs in which no optimiser steps: each gradient is of
stage 2's first step, and is split by term. Of E gradients g_e of one term, each of a whole epoch:

    norm     root of mean |g_e|^2, times the term's weight                        how far it pulls
    signal   (|sum g_e|^2 - sum |g_e|^2) / (E (E - 1)) over mean |g_e|^2          unbiased share of |E g|^2, 1 at most
    images   images an epoch x (1 - signal) / signal                              at so many, signal equals noise

The signal's standard error (jackknife over epochs) stands behind it: where it is as large, take more epochs. `images`
is the gradient noise scale (arXiv 1812.06162). Fewer images an epoch cost as many more epochs; more bring little.

The second table: of captions' pictures, the share of a reward's variance that is between walks which part after a step
(intraclass correlation), less that of the step before; unbiased too, so that a small one may be negative. What a step
does not decide its policy gradient cannot teach. Of the flags only those of networks, rewards and prompts count there.
"""

import contextlib
import gc
import io
import math
import tempfile
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist

import models
import rewards
import rtdmd

CAPTIONS = 12  # of each task type, in the second table


def parse_args(argv):
    """rtdmd.py's arguments; the classroom has stage 1's adapters at hand, and 20 epochs tell enough."""
    given = " ".join(argv)
    argv += [] if "--epochs" in given else ["--epochs", "20"]
    argv += [] if "--distilled" in given else ["--distilled", str(models.CLASSROOM / "adapters" / "acdmd")]
    args = rtdmd.parse_args(argv)
    if args.epochs < 3:
        raise SystemExit(f"bench.py: error: --epochs {args.epochs}: --signal compares epochs, and needs 3 at least")
    return args


def share_of_signal(gradients):
    """(norm, signal, its standard error) of gradients [E, P]; signal is unbiased, so it may fall below 0."""
    n, square, along = len(gradients), gradients.square().sum(1), gradients @ gradients.sum(0)  # g_e sum g
    total = along.sum()  # |sum g|^2
    share = (total - square.sum()) / ((n - 1) * square.sum())
    others = square.sum() - square  # and the same without each epoch
    without = (total - 2 * along + square - others) / ((n - 2) * others)
    return square.mean().sqrt().item(), share.item(), ((n - 1) * without.var(correction=0)).sqrt().item()


def needed(images, signal):
    """Images an epoch at which signal equals noise, from the signal's share at `images` an epoch."""
    return images * (1 - signal) / signal


def intraclass(values):
    """Share of variance between groups of values [captions, walks, continuations], averaged over captions; unbiased."""
    n = values.shape[2]
    within = values.var(2).mean()
    between = values.mean(2).var(1).mean() - within / n
    return (between / (between + within)).item() if between + within > 0 else math.nan


def run_without_steps(args, last_step):
    """({term: its gradients [E, P], weighed as in the loss}, backbone, scorers) of rtdmd.main without optimiser steps.

    Each term calls the generator's network with gradient once a micro-batch, and what comes until the next such call is
    its own. last_step: the name of the last step's.
    """
    seen, gradients, own = SimpleNamespace(), {}, {}  # own: {term: its gradient of this epoch, so far}
    velocity, score = models.Backbone.velocity, rewards.Scorers.score

    def take():
        if own:
            parts = [(p, p.grad) for p in models.adapter_parameters(seen.backbone.student, "rl")]
            own[seen.term] += torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in parts])
            for p, _ in parts:
                p.grad = None

    def watched_velocity(backbone, role, x, sigma, *rest):
        if role == "generator" and torch.is_grad_enabled():
            seen.backbone = backbone
            take()
            sigmas = backbone.sigmas()
            j = sigmas.index(sigma)
            seen.term = last_step if j == len(sigmas) - 2 else f"policy, step to {sigmas[j + 1]:.2f}"
            own.setdefault(seen.term, 0)
        return velocity(backbone, role, x, sigma, *rest)

    def watched_score(scorers, *rest):
        seen.scorers = scorers
        return score(scorers, *rest)

    def no_step(optimizer, decay, world_size, skip_nonfinite):
        take()
        for term, gradient in own.items():
            if world_size > 1:
                dist.all_reduce(gradient)
            gradients.setdefault(term, []).append(gradient / world_size)
        own.clear()
        optimizer.zero_grad()  # the fake score's
        return 0.0

    watch = mock.patch.object
    with watch(models.Backbone, "velocity", watched_velocity), watch(rewards.Scorers, "score", watched_score):
        with watch(rtdmd, "step_optimizer", no_step), contextlib.redirect_stdout(io.StringIO()):
            rtdmd.main(args)
    return {term: torch.stack(of_term) for term, of_term in gradients.items()}, seen.backbone, seen.scorers


def split_gradients(args, world_size=1):
    """({term: its gradients [E, P]}, backbone, scorers). Leash and reward share a backward, so they have a run each."""
    found, networks, quiet = {}, (), dict(sample_every=0, save_every=args.epochs, eval_every=0, wandb=False)
    without_reward = dict(bp_weight=0.0), "leash (dm_weight)"
    reward_alone = dict(policy_weight=0.0, dm_weight=0.0), "back-propagation (bp_weight)"
    for off, last_step in (without_reward, reward_alone):
        with tempfile.TemporaryDirectory() as folder:  # the run writes to the first process's
            own = SimpleNamespace(**vars(args) | quiet | off | {"out": models.gather([folder], world_size)[0]})
            if own.policy_weight or own.dm_weight or own.bp_weight:
                networks = ()  # of the run before, gone before the next ones load
                gc.collect()
                gradients, *networks = run_without_steps(own, last_step)
                found |= gradients
    return found, *networks


@torch.no_grad()
def parted(backbone, scorers, prompts, steps, eta, walks=4, continuations=8):
    """{reward: [prompts, walks, continuations]}: of each prompt so many walks of `steps` steps, each continued so many
    times with noise of its own."""
    shape, device, scores, sigmas = backbone.latent_shape, backbone.device, [], backbone.sigmas()
    for i, (text, metadata) in enumerate(prompts):
        n = walks * continuations
        own = models.Noise(("parted", i, steps), range(n), shape, device)
        shared = models.Noise(("parted", i, steps, "shared"), [k // continuations for k in range(n)], shape, device)
        x, cond = shared.normal("start"), backbone.encode([text] * n)
        for j, sigma in enumerate(sigmas[:-1]):
            v = backbone.velocity("generator", x, sigma, cond)
            x = models.cps_step(x, v, sigma, sigmas[j + 1], eta, (shared if j < steps else own).normal("step", j))
        scores.append(scorers.score(backbone.decode(x), [text] * n, [metadata] * n))
    return {name: torch.stack([s[name].view(walks, continuations) for s in scores]) for name in scores[0]}


def print_deciding(backbone, scorers, pairs, tags, eta):
    """The second table: a row a reward and task type, a column a step."""
    names = ["start", *(f"step to {s:.2f}" for s in backbone.sigmas()[1:-1])]
    shares = {}  # (reward, tag) -> cumulative shares
    for steps in models.tqdm(range(len(names)), "which step decides"):
        scores = parted(backbone, scorers, pairs, steps, eta)
        for name, values in scores.items():
            for tag in dict.fromkeys(["all", *tags]):
                rows = [i for i, t in enumerate(tags) if tag in ("all", t)]
                shares.setdefault((name, tag), []).append(intraclass(values[rows]))
    print("| reward | captions | " + " | ".join(names) + " |\n" + "|---" * (len(names) + 2) + "|")
    for (name, tag), cumulative in shares.items():
        own = [b - a for a, b in zip([0.0, *cumulative], cumulative, strict=False)]
        print(f"| {name} | {tag} | " + " | ".join(f"{share:.2f}" for share in own) + " |")


def print_tables(args, found, n_images, backbone, scorers):
    print(f"{args.epochs} epochs of {n_images} images, group size {args.group_size}, rewards {args.rewards}")
    print("| term | norm | signal | images |\n|---|---|---|---|")
    for term, gradients in found.items():
        norm, share, error = share_of_signal(gradients)
        images = f"{needed(n_images, share):.0f}" if share > 0 else "not seen"
        print(f"| {term} | {norm:.1e} | {share:+.3f} ± {error:.3f} | {images} |")
    print("\nWhich step's noise decides a reward (share of variance):\n")
    pairs = rewards.read_prompts(args.prompts) if args.prompts else rewards.classroom_prompts(**rtdmd.WEAK_TASKS)
    tasks = {}
    for pair in rewards.pick_prompts(pairs, len(pairs), models.seeded(args.seed, "which step decides")):
        tasks.setdefault(pair[1].get("tag", "all"), []).append(pair)
    pairs = [pair for of_task in tasks.values() for pair in of_task[:CAPTIONS]]
    print_deciding(backbone, scorers, pairs, [pair[1].get("tag", "all") for pair in pairs], args.eta)


def main(args):
    rank, world_size, _ = models.setup_distributed(args.device)
    found, backbone, scorers = split_gradients(args, world_size)
    n_images = args.batch_size * args.batches * world_size
    with contextlib.redirect_stdout(io.StringIO()) if rank else contextlib.nullcontext():
        print_tables(args, found, n_images, backbone, scorers)
