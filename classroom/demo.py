"""The whole paper on a laptop: distil the classroom's teacher, reinforce the student, compare them all.

    python classroom/demo.py                                             about 12 minutes on 2 cores

Runs acdmd.py and rtdmd.py (the commands are printed), then samples on the same held-out prompts and the same seeds: the
teacher with 28 guided steps, the teacher with 4 (Euler, and CPS as the students), AC-DMD with 4, RTDMD with 4.
Writes report.md, samples.png and curves.png to --out.

    python classroom/demo.py --stages ablations

trains each stage again without one part of the method, and writes to ablations.md what that costs: six trainings.

    python classroom/demo.py --stages frontier

trains stage 2 with several weights of the leash, and writes to frontier.md and frontier.png what rewards cost: five
trainings.
"""

import json
import math
import os
import signal
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
from sample import generate  # noqa: E402

COLUMNS = {"geneval_strict": 1.0, "geneval": 1.0, "clipscore": 1.0}
HEAD = ["GenEval strict", "GenEval graded", "CLIPScore"]
DISTANCES = ["FD", "colour TV", "cell TV"]
# folder: the stage, its flag, and what is missing then
ABLATIONS = {
    "no_consistency": ("acdmd.py", "--gamma 0", "no consistency term"),
    "plain_dmd": ("acdmd.py", "--plain_dmd", "no sub-intervals"),
    "all_steps": ("rtdmd.py", "--n_chosen 3", "all stochastic steps, no SubGRPO"),
    "no_backprop": ("rtdmd.py", "--bp_weight 0", "no reward back-propagation"),
    "no_matching": ("rtdmd.py", "--dm_weight 0", "no distribution matching"),
    "no_policy": ("rtdmd.py", "--policy_weight 0", "no policy gradient"),
}
FRONTIER = (0.01, 0.03, 0.1, 0.3, 1.0)  # --dm_weight


def parse_args(argv=None):
    p = models.parser(__doc__.splitlines()[0])
    p.add_argument("--out", type=models.path, default=Path("out/classroom"), help="folder of both runs and the report")
    p.add_argument("--seed", type=int, default=0, help="of both trainings; the evaluation is fixed")
    stages = ["acdmd", "rtdmd", "report"]
    more = "ablations: both stages without one part at a time; frontier: stage 2 with several weights of the leash"
    p.add_argument("--stages", nargs="+", default=stages, choices=[*stages, "ablations", "frontier"], help=more)
    p.add_argument("--acdmd_steps", type=models.at_least(1), help="iterations of stage 1 (default: acdmd.py's)")
    p.add_argument("--rtdmd_epochs", type=models.at_least(1), help="epochs of stage 2 (default: rtdmd.py's)")
    p.add_argument(
        "--processes", type=int, default=min(2, os.cpu_count() or 1), choices=[1, 2], help="of each training"
    )
    p.add_argument("--n_prompts", type=int, default=600, help="held-out prompts of the comparison")
    p.add_argument("--distilled", type=models.path, help="stage 1's final folder (default: --out/acdmd/final)")
    p.add_argument("--rl", type=models.path, help="stage 2's final folder (default: --out/rtdmd/final)")
    args = p.parse_args(argv)
    if args.n_prompts < 12:
        p.error(f"--n_prompts {args.n_prompts}: at least 12, two for each task type")
    if "ablations" in args.stages and (args.distilled or args.rl):
        p.error("--stages ablations compares with the runs in --out: leave out --distilled and --rl")
    args.distilled = args.distilled or args.out / "acdmd" / "final"
    args.rl = args.rl or args.out / "rtdmd" / "final"
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
        flags += ["--steps", args.acdmd_steps] if args.acdmd_steps else []
        for name in ("batch_size", "consistency_batch"):
            flags += [f"--{name}", acdmd.PRESETS["classroom"][name] // processes]
    else:
        flags += ["--epochs", args.rtdmd_epochs] if args.rtdmd_epochs else []
        flags += ["--distilled", args.distilled]
        flags += ["--batches", rtdmd.PRESETS["classroom"]["batches"] // processes]
    command = [sys.executable]
    if processes > 1:  # two processes of one thread use two cores better than one process of two threads
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [str(ROOT / script), "--device", "cpu", *map(str, flags)]
    shown = f"torchrun --nproc_per_node={processes}" if processes > 1 else "python"
    print(f"\n$ {shown} {script} --device cpu " + " ".join(map(str, flags)), flush=True)
    stage, stopped = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": str(threads)}), []
    before = signal.signal(signal.SIGTERM, lambda *_: stopped.append(1) or stage.terminate())  # passed on: it saves
    try:
        stage.wait()
    except KeyboardInterrupt:  # the terminal sent it to the stage too
        stopped.append(stage.wait())
    finally:
        signal.signal(signal.SIGTERM, before)
    if stopped:
        raise SystemExit("stopped; the same command goes on from here")
    if stage.returncode:
        raise models.UserError(f"{script} ended with status {stage.returncode}; its own message stands above")
    if not (folder / "final").is_dir():
        raise models.UserError(f"{script} was stopped; the same command goes on from here")


# ---------------------------------------------------------------------------------------------------------------
# comparison


def evaluate(scorers, metadata, name, nfe, draw):
    """One row of the table: scores of every prompt, time, how varied the pictures are, and how they are distributed.

    draw(metadata, seed) makes a picture [3, 64, 64] of each caption, [N, 3, 64, 64] in [0, 1].
    """
    start = time.perf_counter()
    images = draw(metadata, 1)
    ms = 1000 * (time.perf_counter() - start) / len(metadata)
    scores = {k: v.numpy() for k, v in scorers.score(images, [m["prompt"] for m in metadata], metadata).items()}
    few = shapes.sample_prompts(24, 3, "test")
    groups = draw([m for m in few for _ in range(8)], 2).reshape(24, 8, -1)
    spread = torch.stack([torch.pdist(g).mean() / math.sqrt(g.shape[1]) for g in groups]).mean().item()
    row = {"name": name, "nfe": nfe, "ms": ms, "spread": spread, "scores": scores, "images": images}
    return row | distribution(scorers, images, metadata)


def sampler(backbone, name, role, sigmas, eta=0.9, guidance_scale=1.0):
    """(name, NFE, draw) of a way to sample, as `evaluate` takes them."""

    def draw(metadata, seed):
        prompts = [m["prompt"] for m in metadata]
        return generate(backbone, prompts, sigmas, eta, guidance_scale, seed, batch_size=60, role=role)

    return name, (len(sigmas) - 1) * backbone.passes(guidance_scale), draw


def distribution(scorers, images, metadata):
    """What tells distributions of pictures apart: CLIP features [N, 128], and how many objects of each picture have
    each colour [N, 5], where its caption leaves the colour open, and lie in each cell [N, 16]."""
    colors, cells = np.zeros((len(images), len(shapes.COLORS))), np.zeros((len(images), shapes.GRID**2))
    for i, objects in enumerate(shapes.detect(rewards.eight_bits(images))):
        is_open = not any("color" in need for need in metadata[i]["include"])
        for d in objects:
            if d["score"] > 0.3:
                x, y = ((d["box"][a] + d["box"][a + 2]) / 2 // shapes.CELL for a in (0, 1))
                cells[i, int(y) * shapes.GRID + int(x)] += 1
                colors[i, list(shapes.COLORS).index(d["color"])] += is_open
    return {"features": scorers.features(images), "colors": colors, "cells": cells}


def truth(scorers, metadata):
    """The distribution of real scenes of these captions, and the bootstrap "draws" that all errors are taken over."""
    real = distribution(scorers, shapes.pictures(metadata, 5), metadata)
    return real | {"draws": resamples(metadata, 500)}


def distances(row, real, picks=slice(None)):
    """[Fréchet distance, total variation of open colours, of cells] between a row and real scenes of its captions.

    Total variation is half the sum of the differences between two sets of shares: 0 for the same, 1 for no overlap.
    """
    share = lambda counts: counts.sum(0) / max(1, counts.sum())  # noqa: E731
    tv = [np.abs(share(row[k][picks]) - share(real[k][picks])).sum() / 2 for k in ("colors", "cells")]
    return np.array([rewards.frechet_distance(row["features"][picks], real["features"][picks]), *tv])


def resamples(metadata, n):
    """n bootstrap draws of the pictures' indices: captions of each task type, or pictures where it has one or two."""
    rng, tasks = np.random.default_rng(0), {}
    for i, m in enumerate(metadata):
        tasks.setdefault(m["tag"], {}).setdefault(m["prompt"], []).append(i)
    units = [list(task.values()) for task in tasks.values()]
    units = [task if len(task) > 2 else [[i] for pictures in task for i in pictures] for task in units]
    drawn = lambda: [i for task in units for j in rng.integers(len(task), size=len(task)) for i in task[j]]  # noqa: E731
    return [np.array(drawn()) for _ in range(n)]


def distance_difference(a, b, real, n=50):
    """distances of a minus those of b (0 if None), and standard errors by bootstrap, the same draws for both."""
    gap = lambda picks: distances(a, real, picks) - (distances(b, real, picks) if b else 0)  # noqa: E731
    return gap(slice(None)), np.std([gap(picks) for picks in real["draws"][:n]], axis=0)


def difference(a, b, column, real):
    """Paired difference a - b (0 if None) of one column: (mean, bootstrap standard error)."""
    gap = a["scores"][column] - (b["scores"][column] if b else 0)
    return gap.mean(), np.std([gap[picks].mean() for picks in real["draws"]])


def score_table(rows, metadata, real):
    """Lines of a markdown table, one row a sampler."""
    tags = np.array([m["tag"] for m in metadata])
    head = ["sampler", "NFE", *HEAD, *DISTANCES, *shapes.TASKS, "diversity", "ms/image"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [row["name"], str(row["nfe"])]
        means = [difference(row, None, c, real) for c in COLUMNS]
        cells += [f"{mean:.3f} ± {error:.3f}" for mean, error in means]
        gaps = distance_difference(row, None, real)
        cells += [f"{d:.{k}f} ± {e:.{k}f}" for d, e, k in zip(*gaps, (2, 3, 3), strict=True)]
        cells += [f"{row['scores']['geneval_strict'][tags == t].mean():.2f}" for t in shapes.TASKS]
        cells += [f"{row['spread']:.3f}", f"{row['ms']:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def difference_table(pairs, real):
    """Lines of a markdown table of paired differences. pairs: [(label, row, row to subtract)]"""
    lines = ["| paired difference | " + " | ".join([*HEAD, *DISTANCES]) + " |", "|" + "---|" * 7]
    for label, a, b in pairs:
        gaps = [difference(a, b, c, real) for c in COLUMNS] + list(zip(*distance_difference(a, b, real), strict=True))
        lines.append(f"| {label} | " + " | ".join(f"{m:+.3f} ± {e:.3f}" for m, e in gaps) + " |")
    return lines


def write_report(rows, metadata, real, args, curves):
    lines = [f"# Teacher, AC-DMD, RTDMD: {len(metadata)} held-out prompts, same seeds", ""]
    lines += score_table(rows, metadata, real)
    lines += ["", "± is the standard error by bootstrap over captions, over pictures in tasks of one or two captions;"]
    lines += ["task columns are strict. FD: Fréchet distance of the classroom CLIP's pooled image features to as many"]
    lines += ["real scenes of the same captions. Colour TV: total variation, from theirs, of the colours that captions"]
    lines += ["leave open; cell TV: of the objects' places."]
    lines += ["Diversity: mean pixel distance of 8 pictures of one prompt."]
    by_name = {row["name"].split(",")[0]: row for row in rows}
    pairs = (("AC-DMD", "teacher 4 CPS steps"), ("RTDMD", "AC-DMD"), ("RTDMD", "teacher 28 steps guided"))
    lines += ["", *difference_table([(f"{a} − {b}", by_name[a], by_name[b]) for a, b in pairs], real)]
    lines += ["", "samples.png: a green frame where the judge finds the prompt fulfilled (strict), else a red one."]
    drawn = "curves.png: thin lines the values, within their 1% and 99% quantiles; thick ones running means."
    lines += [drawn if curves else "No curves: the adapters came without a log, or with one of fewer than two lines."]
    write_table(args.out / "report", lines, rows)


def write_ablations(rows, metadata, real, args):
    lines = [f"# Without a part of the method: {len(metadata)} held-out prompts, same seeds", ""]
    lines += score_table(rows, metadata, real)
    by_name = {row["name"]: row for row in rows}
    pairs = []
    for script, flag, missing in ABLATIONS.values():
        full = "AC-DMD" if script == "acdmd.py" else "RTDMD"
        pairs.append((f"{full} `{flag}`: {missing}", by_name[f"{full}, {missing}"], by_name[full]))
    lines += [
        "",
        "Without the part, minus the full method; one training run each:",
        "",
        *difference_table(pairs, real),
    ]
    write_table(args.out / "ablations", lines, rows)


def write_table(path, lines, rows):
    """path.md, the lines; path.json, every prompt's scores."""
    flat = [{k: row[k] for k in ("name", "nfe", "ms", "spread", "scores")} for row in rows]
    for row in flat:
        row["scores"] = {c: v.tolist() for c, v in row["scores"].items()}
    path.with_suffix(".json").write_text(json.dumps(flat) + "\n")
    text = "\n".join(lines) + "\n"
    path.with_suffix(".md").write_text(text, encoding="utf-8")
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
    """Curves of the log files: one panel a metric, thin line the values, thick line their running mean.

    runs: [(title, log file, metrics)]. Files that are not there and metrics with one value are left out; returns
    whether anything was left to draw.
    """
    panels = []
    for title, file, names in runs:
        if not file.is_file():  # adapters from elsewhere may come without
            continue
        log = [json.loads(line) for line in file.read_text().splitlines()]
        for name in names:
            points = [(row["step"], row[name]) for row in log if name in row]
            if len(points) > 1:
                panels.append((f"{title}: {name}", *np.array(points).T))
    if not panels:
        return False
    columns = 4
    sheet = Image.new("RGB", (columns * width, -(-len(panels) // columns) * height), "white")
    ink = ImageDraw.Draw(sheet)
    for i, (title, x, y) in enumerate(panels):
        x0, y0 = (i % columns) * width + 64, (i // columns) * height + 30
        w, h = width - 84, height - 66
        low, high = np.quantile(y, [0.01, 0.99])
        low, high = (low, high) if high > low else (low - 1, high + 1)
        span = max(1, min(len(y) // 3, max(3, len(y) // 15)))
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
    return True


def draw_frontier(panels, path, w=330, h=330):
    """Rewards over FD, with standard errors. panels: {title: [(label, FD, its error, reward, its error)]}, the same
    labels in each: they stand once, at the right."""
    sheet = Image.new("RGB", (len(panels) * (w + 80) + 180, h + 80), "white")
    ink, labels = ImageDraw.Draw(sheet), [label for label, *_ in next(iter(panels.values()))]
    colors = [f"hsl({320 * i // len(labels)}, 80%, 42%)" for i in range(len(labels))]

    def dot(x, y, color):
        ink.ellipse((x - 5, y - 5, x + 5, y + 5), fill=color)

    for i, (title, points) in enumerate(panels.items()):
        x0, y0 = 50 + i * (w + 80), 30
        numbers = np.array([point[1:] for point in points])
        value, error = numbers[:, ::2], numbers[:, 1::2]  # [N, 2]: FD, reward
        low, high = (value - error).min(0), (value + error).max(0)
        scale = (w, -h) / (high - low)  # pixels count downwards
        marks = list(zip((x0, y0 + h) + (value - low) * scale, error * scale, colors, strict=True))
        for (x, y), (dx, dy), color in marks:
            ink.line((x - dx, y, x + dx, y), fill=color), ink.line((x, y - dy, x, y + dy), fill=color)
        for (x, y), _, color in marks:  # over all lines
            dot(x, y, color)
        ink.rectangle((x0, y0, x0 + w, y0 + h), outline="#888888")
        for k, (fd, reward) in enumerate((low, high)):
            ink.text((x0 + k * (w - 24), y0 + h + 6), f"{fd:.2f}", "black")
            ink.text((x0 - 30, y0 + (1 - k) * (h - 10)), f"{reward:.2f}", "black")
        ink.text((x0 + w / 2 - 100, y0 + h + 22), "FD to real scenes (lower is better)", "black")
        ink.text((x0, y0 - 18), f"{title} (higher is better)", "black")
    for j, (label, color) in enumerate(zip(labels, colors, strict=True)):
        x, y = len(panels) * (w + 80) + 10, 40 + 24 * j
        dot(x, y, color), ink.text((x + 12, y - 6), label, "black")
    sheet.save(path)


STAGE_1 = [f"loss/ac_k{k}" for k in (1, 2, 3, 4)] + ["loss/generator_k4"]
STAGE_1 += ["loss/cons", "grad_norm/generator", "eval/geneval_strict", "eval/clipscore", "eval/fd"]
STAGE_2 = ["eval/geneval_strict", "eval/clipscore", "eval/fd", "reward/geneval_strict"]
STAGE_2 += ["group_std/geneval_strict", "loss/dm", "loss/ac"]
STAGE_2 += ["grad_norm/generator", "grad_x0/dm", "grad_x0/bp"]


def require(*folders):
    """Name what is missing before anything is trained or sampled."""
    for folder in folders:
        if not folder.is_dir():
            raise models.UserError(f"{folder} does not exist: run the stages acdmd and rtdmd first")


def load_adapters(folders):
    """(backbone, scorers): the classroom and its judges; folders: {adapter name: where it is}."""
    backbone = models.load("classroom")
    for name, folder in folders.items():
        models.load_adapter(backbone.student, name, folder)
    return backbone, rewards.load_scorers(COLUMNS, "cpu", models.CLASSROOM)


def compare(args, scorers, samplers):
    """(rows, metadata, real): each sampler on the same --n_prompts captions and noise, and what it is measured by."""
    metadata = shapes.sample_prompts(args.n_prompts, 0, "test")
    return [evaluate(scorers, metadata, *columns) for columns in samplers], metadata, truth(scorers, metadata)


def report(args):
    """Sample and score teacher, AC-DMD and RTDMD; write the table and the pictures. Returns the files' names."""
    folders = {"acdmd": args.distilled / "generator_ema", "rtdmd": args.rl / "rl_ema"}
    require(*folders.values())
    backbone, scorers = load_adapters(folders)
    backbone.roles |= {"acdmd": ("acdmd",), "rtdmd": ("acdmd", "rtdmd")}
    few, many, guidance = backbone.sigmas(), backbone.sigmas(28), models.BACKBONES["classroom"]["guidance"]
    samplers = [
        ("real scenes, another draw", 0, shapes.pictures),
        sampler(backbone, "teacher 28 steps guided", "teacher", many, 0.0, guidance),
        sampler(backbone, "teacher 4 Euler steps", "teacher", few, 0.0),
        sampler(backbone, "teacher 4 CPS steps", "teacher", few),
        sampler(backbone, "AC-DMD, 4 CPS steps", "acdmd", few),
        sampler(backbone, "RTDMD, 4 CPS steps", "rtdmd", few),
    ]
    rows, metadata, real = compare(args, scorers, samplers)
    draw_samples([r for r in rows[1:] if "Euler" not in r["name"]], metadata, args.out / "samples.png")
    logs = [("AC-DMD", args.distilled.parent / "log.jsonl", STAGE_1), ("RTDMD", args.rl.parent / "log.jsonl", STAGE_2)]
    curves = draw_curves(logs, args.out / "curves.png")
    write_report(rows, metadata, real, args, curves)
    return ["report.md", "samples.png"] + (["curves.png"] if curves else [])


def ablations(args):
    """Train the stages again, same seed, without one part at a time; score them all and write the table."""
    folders = {"acdmd": args.distilled / "generator_ema", "rtdmd": args.rl / "rl_ema"}
    require(*folders.values())
    for stage, length, asked in ((acdmd, "steps", args.acdmd_steps), (rtdmd, "epochs", args.rtdmd_epochs)):
        run = args.out / stage.__name__
        was = json.loads((run / "args.json").read_text())
        if was[length] != (asked or stage.PRESETS["classroom"][length]):  # like is compared with like
            raise models.UserError(f"{run} has {was[length]} {length}: add --{stage.__name__}_{length} {was[length]}")
        if was["seed"] != args.seed:
            raise models.UserError(f"{run} has seed {was['seed']}: add --seed {was['seed']}")
    roles = {"AC-DMD": ("acdmd",), "RTDMD": ("acdmd", "rtdmd")}
    for name, (script, flag, missing) in ABLATIONS.items():
        run = args.out / "ablations" / name
        run_stage(script, args, run, *flag.split(), "--eval_every", 0)
        if script == "acdmd.py":
            folders[name], roles[f"AC-DMD, {missing}"] = run / "final" / "generator_ema", (name,)
        else:
            folders[name], roles[f"RTDMD, {missing}"] = run / "final" / "rl_ema", ("acdmd", name)
    backbone, scorers = load_adapters(folders)
    backbone.roles |= roles
    samplers = [sampler(backbone, role, role, backbone.sigmas()) for role in roles]
    write_ablations(*compare(args, scorers, samplers), args)
    return ["ablations.md"]


def frontier(args):
    """Train stage 2 with several weights of the leash; write the table and the plot. Returns the files' names."""
    folders = {"acdmd": args.distilled / "generator_ema"}
    require(*folders.values())
    shipped = ROOT / "classroom" / "adapters"
    folders |= {"shipped": shipped / "acdmd" / "generator_ema", "shipped_rl": shipped / "rtdmd" / "rl_ema"}
    roles = {"AC-DMD": ("acdmd",), "classroom/adapters": ("shipped", "shipped_rl")}
    for weight in FRONTIER:
        run, name = args.out / "frontier" / f"dm_{weight}", f"--dm_weight {weight}"
        run_stage("rtdmd.py", args, run, *name.split(), "--eval_every", 0)
        rl = f"rl_{len(roles)}"
        folders[rl], roles[name] = run / "final" / "rl_ema", ("acdmd", rl)
    backbone, scorers = load_adapters(folders)
    backbone.roles |= roles
    guided = backbone.sigmas(28), 0.0, models.BACKBONES["classroom"]["guidance"]
    samplers = [sampler(backbone, "teacher 28 steps guided", "teacher", *guided)]
    samplers += [sampler(backbone, name, name, backbone.sigmas()) for name in roles]
    rows, metadata, real = compare(args, scorers, samplers)
    epochs = json.loads((run / "args.json").read_text())["epochs"]
    lines = [f"# Stage 2, {epochs} epochs, with several --dm_weight: {len(metadata)} held-out prompts, same seeds", ""]
    lines += score_table(rows, metadata, real)
    lines += ["", *difference_table([(f"{row['name']} − AC-DMD", row, rows[1]) for row in rows[2:]], real)]
    write_table(args.out / "frontier", lines, rows)
    gaps = [distance_difference(row, None, real) for row in rows]
    panels = {
        title: [
            (row["name"], fd[0], error[0], *difference(row, None, column, real))
            for row, (fd, error) in zip(rows, gaps, strict=True)
        ]
        for title, column in (("GenEval strict", "geneval_strict"), ("CLIPScore", "clipscore"))
    }
    draw_frontier(panels, args.out / "frontier.png")
    return ["frontier.md", "frontier.png"]


def main(args):
    start = time.perf_counter()
    with models.named_failure(f"cannot write to --out {args.out}"):
        args.out.mkdir(parents=True, exist_ok=True)
    if "acdmd" in args.stages:
        run_stage("acdmd.py", args, args.out / "acdmd")
    if "rtdmd" in args.stages:
        run_stage("rtdmd.py", args, args.out / "rtdmd")
    files = report(args) if "report" in args.stages else []
    files += ablations(args) if "ablations" in args.stages else []
    files += frontier(args) if "frontier" in args.stages else []
    if files:
        print(f"{args.out}/{', '.join(files)}; {(time.perf_counter() - start) / 60:.1f} minutes in all")


if __name__ == "__main__":
    models.run(main, parse_args())
