"""How many images an epoch does stage 2 need? The signal in its gradient, and which step's noise decides a reward.

    python tests/bench.py --signal                                                  the classroom, a few minutes
    python tests/bench.py --signal --model sd35 --distilled DIR --prompts FILE --rewards geneval=1,clipscore=1

takes rtdmd.py's own flags. Nothing is trained: the gradient of `--epochs` epochs is taken at stage 2's first step and
split by term. Of E gradients g_e of one term, each of a whole epoch:

    norm     root of mean |g_e|^2, times the term's weight                        how far it pulls
    signal   (|sum g_e|^2 - sum |g_e|^2) / (E (E - 1)) over mean |g_e|^2          unbiased share of |E g|^2, 1 at most
    images   images an epoch x (1 - signal) / signal                              at so many, signal equals noise

`images` is the gradient noise scale (arXiv 1812.06162). Fewer images an epoch cost proportionally more epochs; more
bring little.

The second table: of captions' pictures, the share of a reward's variance that is between walks which part after a step
(intraclass correlation), less that of the step before. What a step does not decide its policy gradient cannot teach.
"""

import math

import torch

import models
import rewards
import rtdmd

CAPTIONS = 12  # of each task type, in the second table


def parse_args(argv):
    """rtdmd.py's arguments; the classroom has stage 1's adapters at hand, and 20 epochs tell enough."""
    given = " ".join(argv)
    argv += [] if "--epochs" in given else ["--epochs", "20"]
    argv += [] if "--distilled" in given else ["--distilled", str(models.CLASSROOM / "adapters" / "acdmd")]
    return rtdmd.parse_args(argv)


def share_of_signal(gradients):
    """(norm, signal) of gradients [E, P] of as many epochs; signal is unbiased, so it may fall below 0."""
    n, square = len(gradients), gradients.square().sum(1)
    signal = (gradients.sum(0).square().sum() - square.sum()) / (n * (n - 1))
    return square.mean().sqrt().item(), (signal / square.mean()).item()


def needed(images, signal):
    """Images an epoch at which signal equals noise, from the signal's share at `images` an epoch."""
    return images * (1 - signal) / signal


def intraclass(values):
    """Share of variance between groups of values [captions, walks, continuations], averaged over captions; unbiased."""
    n = values.shape[2]
    within = values.var(2).mean()
    between = values.mean(2).var(1).mean() - within / n
    return (between / (between + within)).item() if between + within > 0 else math.nan


class Signal:
    """The classroom or a backbone with stage 1's adapters, and the draws of stage 2's first step."""

    def __init__(self, args):
        self.args = args
        device = models.setup_distributed(args.device)[2]
        dtype = getattr(torch, args.dtype)
        self.backbone = models.load(args.model, args.weights, args.generator_weights, device, dtype, args.resolution)
        models.put_below(self.backbone, args.teacher_lora)
        self.backbone.roles |= {"generator": ("distilled", "rl"), "fake": ("fake",)}
        frozen = models.load_adapter(self.backbone.student, "distilled", args.distilled / "generator_ema")
        models.load_adapter(self.backbone.transformer, "fake", args.distilled / "fake")
        init = models.seeded(args.seed, "init", "rl")
        std = dict(init_std=args.init_std, generator=init)
        self.parameters = models.add_adapter(self.backbone.student, "rl", len(frozen[0]), **std)
        self.scorers = rewards.load_scorers(args.rewards, device, args.reward_dir, args.batch_size)
        tasks = rtdmd.WEAK_TASKS
        self.pairs = rewards.read_prompts(args.prompts) if args.prompts else rewards.classroom_prompts(**tasks)
        self.sigmas = self.backbone.sigmas()

    def draw(self, epoch, prompts, chosen):
        """(states, log-probabilities, {reward: [B]}) of one picture a prompt; an epoch of stage 2, micro-batch wise."""
        parts = []
        for part in torch.arange(len(prompts)).split(self.args.batch_size):
            texts = [prompts[i][0] for i in part]
            noise = models.Noise(
                (self.args.seed, epoch), part.tolist(), self.backbone.latent_shape, self.backbone.device
            )
            x, log_prob = rtdmd.sample(self.backbone, texts, self.sigmas, chosen, self.args.eta, noise)
            with torch.no_grad():
                images = self.backbone.decode(x[:, -1])
            parts.append((x, log_prob, self.scorers.score(images, texts, [prompts[i][1] for i in part])))
        states, log_probs, scores = zip(*parts, strict=True)
        return torch.cat(states), torch.cat(log_probs), {n: torch.cat([s[n] for s in scores]) for n in scores[0]}

    def gradient(self, loss_of, n):
        """Flat gradient [P] of the mean over n images of a term; loss_of(rows) calls backward on its share."""
        for rows in torch.arange(n).split(self.args.batch_size):
            loss_of(rows, len(rows) / n)
        flat = torch.cat([p.grad.flatten() for p in self.parameters])
        for p in self.parameters:
            p.grad = None
        return flat

    @torch.no_grad()
    def parted(self, prompts, steps, walks=4, continuations=8):
        """{reward: [prompts, walks, continuations]}: of each prompt so many walks of `steps` steps, each continued so
        many times with noise of its own."""
        shape, device, scores = self.backbone.latent_shape, self.backbone.device, []
        for i, (text, metadata) in enumerate(prompts):
            n = walks * continuations
            own = models.Noise(("parted", i, steps), range(n), shape, device)
            shared = models.Noise(("parted", i, steps, "shared"), [k // continuations for k in range(n)], shape, device)
            x, cond = shared.normal("start"), self.backbone.encode([text] * n)
            for j, sigma in enumerate(self.sigmas[:-1]):
                v = self.backbone.velocity("generator", x, sigma, cond)
                z = (shared if j < steps else own).normal("step", j)
                x = models.cps_step(x, v, sigma, self.sigmas[j + 1], self.args.eta, z)
            scores.append(self.scorers.score(self.backbone.decode(x), [text] * n, [metadata] * n))
        return {name: torch.stack([s[name].view(walks, continuations) for s in scores]) for name in scores[0]}

    def epoch(self, epoch, n_images):
        """{term: its gradient [P] of one epoch, weighed as in the loss}."""
        args, K, last = self.args, self.args.group_size, len(self.sigmas) - 2
        chosen = rtdmd.choose_steps(epoch, args.seed, [j for j in range(last) if args.step_weights[j]], args.n_chosen)
        picked = rewards.pick_prompts(self.pairs, n_images // K, models.seeded(args.seed, epoch, "prompts"))
        prompts = [picked[i // K] for i in range(n_images)]
        states, old, scores = self.draw(epoch, prompts, chosen)
        grouped = {name: r.view(-1, K) for name, r in scores.items()}
        advantages = rtdmd.group_advantages(grouped, args.rewards).flatten()
        found = {}

        def inputs(rows):
            texts = [prompts[i][0] for i in rows]
            return texts, self.backbone.encode(texts), states[rows]

        for j in chosen:

            def policy(rows, share, j=j):
                _, cond, x = inputs(rows)
                v = self.backbone.velocity("generator", x[:, j], self.sigmas[j], cond)
                step = x[:, j + 1], x[:, j], v, self.sigmas[j], self.sigmas[j + 1], args.eta
                loss = rtdmd.policy_loss(rtdmd.cps_log_prob(*step), old[rows, j], advantages[rows])
                (args.policy_weight * args.step_weights[j] * share / (args.n_chosen + 1) * loss).backward()

            found[f"policy, step to {self.sigmas[j + 1]:.2f}"] = self.gradient(policy, n_images)

        def last_step(gradient_of, weight):
            def loss_of(rows, share):
                texts, cond, x = inputs(rows)
                v = self.backbone.velocity("generator", x[:, last], self.sigmas[last], cond)
                x0_hat = models.cps_step(x[:, last], v, self.sigmas[last], 0.0)
                x0_hat.backward(weight * share / (args.n_chosen + 1) * gradient_of(texts, cond, x0_hat, rows))

            return loss_of

        def leash(texts, cond, x0_hat, rows):
            key = args.seed, epoch, "generator"
            noise = models.Noise(key, rows.tolist(), self.backbone.latent_shape, self.backbone.device)
            return rtdmd.matching_gradient(self.backbone, cond, x0_hat, noise, args.guidance_scale)[1]

        def reward(texts, cond, x0_hat, rows):
            return rtdmd.reward_gradient(self.backbone, self.scorers, texts, dict(picked), x0_hat, args.reward_margin)[
                1
            ]

        n = n_images * (args.last_step_batch or args.batch_size) // args.batch_size
        found["leash (dm_weight)"] = self.gradient(last_step(leash, args.dm_weight), n)
        if args.bp_weight:
            found["back-propagation (bp_weight)"] = self.gradient(last_step(reward, args.bp_weight), n)
        return found


def print_deciding(signal, pairs, tags):
    """The second table: a row a reward and task type, a column a step."""
    names = ["start", *(f"step to {s:.2f}" for s in signal.sigmas[1:-1])]
    shares = {}  # (reward, tag) -> cumulative shares
    for steps in models.tqdm(range(len(names)), "which step decides"):
        scores = signal.parted(pairs, steps)
        for name, values in scores.items():
            for tag in dict.fromkeys(["all", *tags]):
                rows = [i for i, t in enumerate(tags) if tag in ("all", t)]
                shares.setdefault((name, tag), []).append(intraclass(values[rows]))
    print("| reward | captions | " + " | ".join(names) + " |\n" + "|---" * (len(names) + 2) + "|")
    for (name, tag), cumulative in shares.items():
        own = [b - a for a, b in zip([0.0, *cumulative], cumulative, strict=False)]
        print(f"| {name} | {tag} | " + " | ".join(f"{share:.2f}" for share in own) + " |")


def main(args):
    signal = Signal(args)
    n_images = args.batch_size * args.batches
    rewards.count_groups(signal.pairs, n_images, args.group_size)
    gradients = {}
    for epoch in models.tqdm(range(args.epochs), "epochs"):
        for term, g in signal.epoch(epoch, n_images).items():
            gradients.setdefault(term, []).append(g)
    print(f"{args.epochs} epochs of {n_images} images, group size {args.group_size}, rewards {args.rewards}")
    print("| term | norm | signal | images |\n|---|---|---|---|")
    for term, of_term in sorted(gradients.items()):
        norm, share = share_of_signal(torch.stack(of_term))
        images = f"{needed(n_images, share):.0f}" if share > 0 else "not seen"
        print(f"| {term} | {norm:.1e} | {share:+.4f} | {images} |")
    tasks = {}
    for pair in rewards.pick_prompts(signal.pairs, len(signal.pairs), models.seeded(args.seed, "which step decides")):
        tasks.setdefault(pair[1].get("tag", "all"), []).append(pair)
    pairs = [pair for of_task in tasks.values() for pair in of_task[:CAPTIONS]]
    print_deciding(signal, pairs, [pair[1].get("tag", "all") for pair in pairs])
