"""The whole paper on a laptop: distil the classroom's teacher, reinforce the student, compare them all.

    python classroom/demo.py                                             about 20 minutes on 2 cores

Runs acdmd.py and rtdmd.py (the commands are printed), then samples four generators on the same held-out prompts and the
same seeds: the teacher with 28 guided steps, the teacher with 4 steps, AC-DMD with 4, RTDMD with 4.
Writes report.md, samples.png and curves.png to --out.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that `python classroom/demo.py` finds the modules beside this folder
import acdmd  # noqa: E402
import models  # noqa: E402
import rewards  # noqa: E402
import rtdmd  # noqa: E402
from classroom import shapes  # noqa: E402
from sample import bootstrap_error, generate  # noqa: E402

COLUMNS = {"geneval_strict": 1.0, "geneval": 1.0, "clipscore": 1.0}


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    p.add_argument("--out", type=Path, default=Path("out/classroom"), help="folder of both runs and the report")
    p.add_argument("--seed", type=int, default=0, help="of both trainings; the evaluation is fixed")
    p.add_argument("--stages", nargs="+", default=["acdmd", "rtdmd", "report"], choices=["acdmd", "rtdmd", "report"])
    p.add_argument("--acdmd_steps", type=int, help="iterations of stage 1 (default: acdmd.py's)")
    p.add_argument("--rtdmd_epochs", type=int, help="epochs of stage 2 (default: rtdmd.py's)")
    p.add_argument(
        "--processes", type=int, default=min(2, os.cpu_count() or 1), choices=[1, 2], help="of each training"
    )
    p.add_argument("--n_prompts", type=int, default=600, help="held-out prompts of the comparison")
    p.add_argument("--distilled", type=Path, help="stage 1's final folder (default: --out/acdmd/final)")
    p.add_argument("--rl", type=Path, help="stage 2's final folder (default: --out/rtdmd/final)")
    args = p.parse_args(argv)
    args.distilled = args.distilled or args.out / "acdmd" / "final"
    args.rl = args.rl or args.out / "rtdmd" / "final"
    if args.n_prompts < 6:
        p.error(f"--n_prompts {args.n_prompts}: at least 6, one for each task type")
    return args


def run_stage(script, args, folder, *flags):
    """Run a stage script on `--processes` processes, showing its own progress bar. The global batch stays the same.

    A folder with checkpoints is gone on with, from where it was stopped; a finished stage has nothing left to do.
    """
    processes = args.processes
    threads = max(1, (os.cpu_count() or 1) // processes)
    flags = ["--seed", args.seed, *flags, "--out", folder]
    if list(folder.glob("step_*")):
        seed = json.loads((folder / "args.json").read_text())["seed"]
        if seed != args.seed:
            raise models.UserError(
                f"{folder} holds a run with --seed {seed}: give another --out for --seed {args.seed}"
            )
        flags += ["--resume", folder]
    if script == "acdmd.py":
        for name in ("batch_size", "consistency_batch"):
            flags += [f"--{name}", acdmd.PRESETS["classroom"][name] // processes]
    else:
        flags += ["--batches", rtdmd.PRESETS["classroom"]["batches"] // processes]
    command = [sys.executable]
    if processes > 1:  # two processes of one thread use two cores better than one process of two threads
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [str(ROOT / script), "--device", "cpu", *map(str, flags)]
    shown = f"torchrun --nproc_per_node={processes}" if processes > 1 else "python"
    print(f"\n$ {shown} {script} --device cpu " + " ".join(map(str, flags)), flush=True)
    stage = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    try:
        stage.wait()
    except KeyboardInterrupt:  # the terminal sent it to the stage too, which saves
        stage.wait()
        raise SystemExit("stopped; the same command goes on from here") from None
    if stage.returncode:
        raise models.UserError(f"{script} ended with status {stage.returncode}; its own message stands above")
    if not (folder / "final").is_dir():
        raise models.UserError(f"{script} was stopped; the same command goes on from here")


# ---------------------------------------------------------------------------------------------------------------
# comparison


def evaluate(backbone, scorers, metadata, name, role, sigmas, eta, guidance_scale):
    """One row of the table: scores of every prompt, time, and how varied the pictures are."""
    prompts = [m["prompt"] for m in metadata]
    start = time.perf_counter()
    images = generate(backbone, prompts, sigmas, eta, guidance_scale, seed=1, batch_size=60, role=role)
    ms = 1000 * (time.perf_counter() - start) / len(prompts)
    scores = {k: v.numpy() for k, v in scorers.score(images, prompts, metadata).items()}
    nfe = (len(sigmas) - 1) * backbone.passes(guidance_scale)
    entropy = color_entropy(images, metadata)
    few = shapes.sample_prompts(24, 3, "heldout")
    many = [m["prompt"] for m in few for _ in range(8)]
    groups = generate(backbone, many, sigmas, eta, guidance_scale, seed=2, batch_size=64, role=role).reshape(24, 8, -1)
    spread = torch.stack([torch.pdist(g).mean() / math.sqrt(g.shape[1]) for g in groups]).mean().item()
    facts = {"name": name, "nfe": nfe, "ms": ms, "spread": spread, "entropy": entropy}
    return {**facts, "scores": scores, "images": images}


def color_entropy(images, metadata):
    """Entropy, in units of its maximum, of the colours found where the prompt leaves them open."""
    free = [i for i, m in enumerate(metadata) if not any("color" in need for need in m["include"])]
    pixels = (images[free] * 255).round().byte().permute(0, 2, 3, 1).numpy()
    found = [d["color"] for objects in shapes.detect(pixels) for d in objects if d["score"] > 0.3]
    p = np.array([found.count(c) for c in shapes.COLORS]) / max(1, len(found))
    return float(-(p[p > 0] * np.log(p[p > 0])).sum() / math.log(len(shapes.COLORS)))


def difference(a, b, column):
    """Paired difference a - b of one column over prompts: (mean, bootstrap standard error)."""
    gap = a["scores"][column] - b["scores"][column]
    return gap.mean(), bootstrap_error(gap)


def write_report(rows, metadata, args):
    tags = np.array([m["tag"] for m in metadata])
    lines = [f"# Teacher, AC-DMD, RTDMD: {len(metadata)} held-out prompts, same seeds", ""]
    head = ["sampler", "NFE", "GenEval strict", "GenEval graded", "CLIPScore", *shapes.TASKS]
    head += ["diversity", "colour entropy", "ms/image"]
    lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [row["name"], str(row["nfe"])]
        cells += [f"{row['scores'][c].mean():.3f} ± {bootstrap_error(row['scores'][c]):.3f}" for c in COLUMNS]
        cells += [f"{row['scores']['geneval_strict'][tags == t].mean():.2f}" for t in shapes.TASKS]
        cells += [f"{row['spread']:.3f}", f"{row['entropy']:.2f}", f"{row['ms']:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "± is the standard error by bootstrap over prompts; task columns are strict. Diversity: mean pixel"]
    lines += [
        "distance of 8 pictures of one prompt. Colour entropy: of colours the prompt leaves open, 1 is uniform.",
        "",
    ]
    by_name = {row["name"].split(",")[0]: row for row in rows}
    lines += ["| paired difference | " + " | ".join(head[2:5]) + " |", "|" + "---|" * 4]
    for a, b in (("AC-DMD", "teacher 4 CPS steps"), ("RTDMD", "AC-DMD"), ("RTDMD", "teacher 28 steps guided")):
        gaps = [difference(by_name[a], by_name[b], c) for c in COLUMNS]
        lines.append(f"| {a} − {b} | " + " | ".join(f"{m:+.3f} ± {e:.3f}" for m, e in gaps) + " |")
    text = "\n".join(lines) + "\n"
    (args.out / "report.md").write_text(text)
    flat = [{k: v for k, v in row.items() if k != "images"} for row in rows]
    for row in flat:
        row["scores"] = {c: v.tolist() for c, v in row["scores"].items()}
    (args.out / "report.json").write_text(json.dumps(flat) + "\n")
    print("\n" + text)


# ---------------------------------------------------------------------------------------------------------------
# pictures


def draw_samples(rows, metadata, path, n=12, zoom=2):
    """One line of pictures a sampler, prompts as column heads: two prompts of each task type."""
    side, left, top = shapes.SIZE * zoom + 4, 150, 44
    sheet = Image.new("RGB", (left + n * side, top + len(rows) * side), "white")
    ink = ImageDraw.Draw(sheet)
    for i in range(n):
        words, half = metadata[i]["prompt"].split(), (len(metadata[i]["prompt"].split()) + 1) // 2
        ink.multiline_text((left + i * side + 2, 6), " ".join(words[:half]) + "\n" + " ".join(words[half:]), "black")
    for j, row in enumerate(rows):
        ink.multiline_text((6, top + j * side + 40), row["name"].replace(", ", "\n") + f"\n{row['nfe']} NFE", "black")
        for i in range(n):
            pixels = (row["images"][i] * 255).round().byte().permute(1, 2, 0).numpy()
            size = (shapes.SIZE * zoom,) * 2
            picture = Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)
            sheet.paste(picture, (left + i * side, top + j * side))
            good = row["scores"]["geneval_strict"][i]
            box = (left + i * side, top + j * side, left + i * side + size[0], top + j * side + size[1])
            ink.rectangle(box, outline="#2a9d4a" if good else "#d03030", width=2)
    sheet.save(path)


def draw_curves(runs, path, width=420, height=230):
    """Curves of the log files: one panel a metric, thin line the values, thick line their running mean."""
    panels = []
    for title, file, names in runs:
        log = [json.loads(line) for line in file.read_text().splitlines()]
        for name in names:
            points = [(row["step"], row[name]) for row in log if name in row]
            if len(points) > 1:
                panels.append((f"{title}: {name}", *np.array(points).T))
    columns = 4
    sheet = Image.new("RGB", (columns * width, -(-len(panels) // columns) * height), "white")
    ink = ImageDraw.Draw(sheet)
    for i, (title, x, y) in enumerate(panels):
        x0, y0 = (i % columns) * width + 64, (i // columns) * height + 30
        w, h = width - 84, height - 66
        low, high = np.quantile(y, [0.01, 0.99])
        low, high = (low, high) if high > low else (low - 1, high + 1)
        span = min(len(y), max(3, len(y) // 15))
        weight = np.convolve(np.ones_like(y), np.ones(span), "same")
        smooth = np.convolve(y, np.ones(span), "same") / weight
        px = x0 + (x - x[0]) / (x[-1] - x[0]) * w
        for values, color, thick in ((y, "#b8c7e0", 1), (smooth, "#1f4e9c", 2)):
            py = y0 + h - (np.clip(values, low, high) - low) / (high - low) * h
            ink.line(list(zip(px, py, strict=True)), fill=color, width=thick)
        ink.rectangle((x0, y0, x0 + w, y0 + h), outline="#888888")
        ink.text((x0, y0 - 18), title, "black")
        ink.text((x0 - 58, y0 - 4), f"{high:.3g}", "black"), ink.text((x0 - 58, y0 + h - 10), f"{low:.3g}", "black")
        ink.text((x0, y0 + h + 4), f"{x[0]:.0f}", "black"), ink.text((x0 + w - 30, y0 + h + 4), f"{x[-1]:.0f}", "black")
    sheet.save(path)


STAGE_1 = [f"loss/ac_k{k}" for k in (1, 2, 3, 4)] + [f"loss/generator_k{k}" for k in (1, 4)]
STAGE_1 += ["loss/cons", "grad_norm/generator"]
STAGE_2 = ["reward/geneval_strict", "reward/geneval", "reward/clipscore", "loss/dm", "loss/ac"]
STAGE_2 += ["grad_norm/policy", "grad_x0/dm", "grad_x0/bp"]


def main(args):
    start = time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    if "acdmd" in args.stages:
        more = ["--steps", args.acdmd_steps] if args.acdmd_steps else []
        run_stage("acdmd.py", args, args.out / "acdmd", *more)
    if "rtdmd" in args.stages:
        more = ["--epochs", args.rtdmd_epochs] if args.rtdmd_epochs else []
        run_stage("rtdmd.py", args, args.out / "rtdmd", "--distilled", args.distilled, *more)
    if "report" not in args.stages:
        return
    backbone = models.load("classroom")
    for name, folder in (("acdmd", args.distilled / "generator_ema"), ("rtdmd", args.rl / "rl_ema")):
        models.load_adapter(backbone.student, name, folder)
    backbone.roles |= {"acdmd": ("acdmd",), "rtdmd": ("acdmd", "rtdmd")}
    scorers = rewards.load_scorers(COLUMNS, "cpu", models.CLASSROOM)
    metadata = shapes.sample_prompts(args.n_prompts, 0, "heldout")
    few, many, guidance = backbone.sigmas(), backbone.sigmas(28), models.BACKBONES["classroom"]["guidance"]
    samplers = [
        ("teacher 28 steps guided", "teacher", many, 0.0, guidance),
        ("teacher 4 Euler steps", "teacher", few, 0.0, 1.0),
        ("teacher 4 CPS steps", "teacher", few, 0.9, 1.0),
        ("AC-DMD, 4 CPS steps", "acdmd", few, 0.9, 1.0),
        ("RTDMD, 4 CPS steps", "rtdmd", few, 0.9, 1.0),
    ]
    rows = [evaluate(backbone, scorers, metadata, *sampler) for sampler in samplers]
    write_report(rows, metadata, args)
    draw_samples([r for r in rows if "Euler" not in r["name"]], metadata, args.out / "samples.png")
    logs = [("AC-DMD", args.distilled.parent / "log.jsonl", STAGE_1), ("RTDMD", args.rl.parent / "log.jsonl", STAGE_2)]
    logs = [log for log in logs if log[1].is_file()]
    if logs:  # adapters from elsewhere may come without
        draw_curves(logs, args.out / "curves.png")
    pictures = "samples.png" + (", curves.png" if logs else "")
    print(f"{args.out}/report.md, {pictures}; {(time.perf_counter() - start) / 60:.1f} minutes in all")


if __name__ == "__main__":
    models.run(main, parse_args())
