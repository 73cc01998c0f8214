"""Pictures and reward tables from any adapter stack.

    python sample.py --prompt "a red circle above a blue square"                                   base model, 4 steps
    python sample.py --lora out/classroom/acdmd/final/generator_ema                                distilled
    python sample.py --lora .../acdmd/final/generator_ema --lora .../rtdmd/final/rl_ema --eval clipscore=1,geneval=1
    python sample.py --steps 28                                                                    guided teacher

--steps 4 walks the few-step schedule with CPS; any other number is the pipeline's own schedule, Euler and guided.
Writes to --out: 00000.png, ... , grid.png and metadata.json (settings, prompts and, with --eval, every score).
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import models
import rewards


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = p.add_argument
    add("--model", default="classroom", choices=models.BACKBONES, help="backbone")
    add("--weights", help="diffusers pipeline folder or hub id in place of the published one")
    add("--resolution", type=int, help="pixels a side (default: the backbone's)")
    add("--lora", action="append", default=[], type=Path, help="adapter folder; repeat to stack, applied in order")
    add("--prompt", action="append", default=[], help="a prompt; repeatable")
    add("--prompts", type=Path, help=".txt, .jsonl or .json; default: the classroom's held-out captions")
    add("--n", type=int, help="images: the first n prompts (classroom default 48, else all of the file)")
    add("--steps", type=int, default=4, help="4: few-step CPS; another number: the pipeline's schedule, Euler")
    add("--eta", type=float, help="CPS stochasticity (default 0.9 at 4 steps, else 0)")
    add("--guidance_scale", type=float, help="default 1 at 4 steps, else the teacher's")
    add("--eval", help="rewards to report, name=weight,...: for example clipscore=1,geneval=1")
    add("--reward_dir", type=Path, help="folder with reward weights that are not taken from the hub")
    add("--out", type=Path, default=Path("out/samples"), help="folder for pictures and metadata.json")
    add("--seed", type=int, default=0, help="image i depends on (seed, i) alone, not on the batch")
    add("--batch_size", type=int, default=50, help="images at once")
    add("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    args = p.parse_args(argv)
    few = args.steps == len(models.FEW_STEPS)
    for name in ("n", "batch_size", "resolution"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            p.error(f"--{name} {getattr(args, name)}: must be at least 1")
    if args.steps < 1:
        p.error(f"--steps {args.steps}: must be at least 1; 4 is the few-step schedule")
    if args.eta is None:
        args.eta = 0.9 if few else 0.0
    if not 0 <= args.eta <= 1:
        p.error(f"--eta {args.eta}: allowed is 0 (ODE) to 1 (full re-noising)")
    if args.guidance_scale is None:
        args.guidance_scale = 1.0 if few else models.BACKBONES[args.model]["guidance"]
    if args.prompt and args.prompts:
        p.error("give --prompt or --prompts, not both")
    if not (args.prompt or args.prompts) and args.model != "classroom":
        p.error(f"--model {args.model} needs --prompts FILE or --prompt TEXT")
    if args.reward_dir is None and args.model == "classroom":
        args.reward_dir = models.CLASSROOM
    try:
        args.eval = rewards.parse_weights(args.eval) if args.eval else {}
    except models.UserError as error:
        p.error(str(error))
    return args


def generate(backbone, prompts, sigmas, eta=0.9, guidance_scale=1.0, seed=0, batch_size=50, role="generator"):
    """Images [N, 3, H, W] in [0, 1] on the CPU; image i depends on (seed, i) and its prompt alone."""
    images = []
    for b in tqdm(range(0, len(prompts), batch_size), "images", unit="batch", leave=False):
        part = slice(b, b + batch_size)
        indices = range(len(prompts))[part]
        latents = models.sample_latents(backbone, prompts[part], sigmas, eta, guidance_scale, seed, indices, role)
        with torch.no_grad():
            images.append(backbone.decode(latents).cpu())
    return torch.cat(images)


def bootstrap_error(values, n=1000, seed=0):
    """Standard error of the mean by bootstrap over prompts."""
    values = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(len(values), size=(n, len(values)))
    return float(values[picks].mean(1).std())


def summarize(scores, weights, metadata):
    """Mean, standard error and per-task means of every column, and the weighted mean of the columns."""
    tags = [m.get("tag") for m in metadata]
    table = {}
    for name, values in scores.items():
        values = np.asarray(values)
        tasks = {t: float(values[[x == t for x in tags]].mean()) for t in dict.fromkeys(tags) if t}
        table[name] = {"mean": float(values.mean()), "error": bootstrap_error(values), "tasks": tasks}
    total = sum(weights.values())
    weighted = sum(w * table[name]["mean"] for name, w in weights.items()) / total if total else None
    return {"rewards": table, "weighted_mean": weighted}


def report(summary):
    """The summary as an aligned text table."""
    tasks = list(next(iter(summary["rewards"].values()))["tasks"])
    head = f"{'reward':16}{'mean':>8}{'+-':>7}" + "".join(f"{t:>15}" for t in tasks)
    lines = [head]
    for name, row in summary["rewards"].items():
        cells = "".join(f"{row['tasks'][t]:15.3f}" for t in tasks)
        lines.append(f"{name:16}{row['mean']:8.3f}{row['error']:7.3f}{cells}")
    return "\n".join([*lines, f"{'weighted mean':16}{summary['weighted_mean']:8.3f}"])


def main(args):
    _, _, device = models.setup_distributed(args.device)
    if args.prompt:
        pairs = [(prompt, {"prompt": prompt}) for prompt in args.prompt]
    elif args.prompts:
        pairs = rewards.read_prompts(args.prompts)[: args.n]
    else:
        from classroom.shapes import sample_prompts

        pairs = [(m["prompt"], m) for m in sample_prompts(args.n or 48, args.seed, "heldout")]
    rewards.check_prompts(pairs, args.eval)
    prompts, metadata = [prompt for prompt, _ in pairs], [m for _, m in pairs]
    dtype = torch.bfloat16 if device.type == "cuda" and args.model != "classroom" else torch.float32
    backbone = models.load(args.model, args.weights, device, dtype, args.resolution)
    for i, folder in enumerate(args.lora):
        models.load_adapter(backbone.transformer, f"lora_{i}", folder)
    backbone.roles["generator"] = tuple(f"lora_{i}" for i in range(len(args.lora)))
    sigmas = backbone.sigmas(models.FEW_STEPS if args.steps == len(models.FEW_STEPS) else args.steps)
    start = time.perf_counter()
    images = generate(backbone, prompts, sigmas, args.eta, args.guidance_scale, args.seed, args.batch_size)
    ms = 1000 * (time.perf_counter() - start) / len(prompts)

    args.out.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        models.save_grid(image[None], args.out / f"{i:05d}.png", 1, gap=0)
    columns = min(8, len(images))
    models.save_grid(images[: columns * 8], args.out / "grid.png", columns)
    settings = {
        key: str(v) if isinstance(v, Path) else [str(x) for x in v] if key == "lora" else v
        for key, v in vars(args).items()
    }
    result = {"settings": settings, "nfe": (len(sigmas) - 1) * (1 + (args.guidance_scale > 1)), "ms_per_image": ms}
    entries = [dict(m) for m in metadata]
    if args.eval:
        weights = dict(args.eval)
        if "geneval" in weights:
            weights.setdefault("geneval_strict", 0.0)  # reported beside the graded score, without weight
        scorers = rewards.load_scorers(weights, device, args.reward_dir)
        parts = [slice(b, b + args.batch_size) for b in range(0, len(prompts), args.batch_size)]
        rows = [scorers.score(images[part], prompts[part], metadata[part]) for part in parts]
        scores = {name: torch.cat([r[name] for r in rows]).tolist() for name in weights}
        result |= summarize(scores, weights, metadata)
        for i, entry in enumerate(entries):
            entry["scores"] = {name: values[i] for name, values in scores.items()}
        print(report(result))
    (args.out / "metadata.json").write_text(json.dumps({**result, "images": entries}, indent=1) + "\n")
    print(f"{len(images)} images, {result['nfe']} NFE, {ms:.0f} ms an image: {args.out}/grid.png, metadata.json")


if __name__ == "__main__":
    models.run(main, parse_args())
