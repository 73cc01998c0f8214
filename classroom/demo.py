"""The whole paper on a laptop: distil the classroom's teacher, reinforce the student, compare them all.

    python classroom/demo.py                                             both stages and the report
    python classroom/demo.py --quick                                     the same with shorter trainings
    python classroom/demo.py --long                                      with a stage 2 of 1,800 epochs, other settings

Runs acdmd.py and rtdmd.py (the commands are printed), and after each of them samples on the same held-out captions and
the same seeds: the teacher with 28 guided steps and with 4, and with 4 steps DMD2 (shipped adapter), AC-DMD, RTDMD.
Writes report.md, samples.png, steps.gif and curves.png to --out.

    python classroom/demo.py --stages ablations                          which part does it? after the first command

trains the stages again without one part of the method each and writes ablations.md: what is lost without it.

    python classroom/demo.py --stages summary --runs out/classroom out/s1 out/s2

means over runs of several --seed: summary.md, and rewards.png, the training reward of each ablation less the control's.
"""

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

# read as torch loads. Threads that wait spin for long by default, and make pictures ten times slower beside another job
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image, ImageDraw  # noqa: E402

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
TEACHER, FEW, DMD2 = "teacher, 28 steps guided", "teacher, 4 CPS steps", "DMD2"
# folder: the full method, the ablation as the tables call it, and its flags
CONTROL = "no_reward"
ABLATIONS = {
    CONTROL: ("RTDMD", "RTDMD, no reward (the control)", "--policy_weight 0 --bp_weight 0"),
    "no_policy": ("RTDMD", "RTDMD, no policy gradient", "--policy_weight 0"),
    "no_backprop": ("RTDMD", "RTDMD, no reward back-propagation", "--bp_weight 0"),
    "no_leash": ("RTDMD", "RTDMD, no distribution matching", "--dm_weight 0"),
    "policy_alone": ("RTDMD", "RTDMD, policy gradient alone (GRPO)", "--dm_weight 0 --bp_weight 0"),
    "backprop_alone": ("RTDMD", "RTDMD, back-propagation alone (ReFL, DRaFT)", "--dm_weight 0 --policy_weight 0"),
    "all_steps": ("RTDMD", "RTDMD, all stochastic steps, alike", "--n_chosen 3 --step_weights 1,1,1"),
    "no_consistency": ("AC-DMD", "AC-DMD, no consistency term", "--gamma 0"),
    "plain_dmd": ("AC-DMD", "AC-DMD, no sub-intervals", "--plain_dmd"),
    "dmd2": ("AC-DMD", "AC-DMD, DMD2", "--plain_dmd --eta 1 --gamma 0"),
}
LENGTHS = {
    "quick": dict(out=Path("out/quick"), acdmd_steps=200, rtdmd_epochs=40, n_prompts=300),
    "long": dict(out=Path("out/long"), rtdmd_epochs=1800),
}
# --long's stage 2 has settings and shares of task types of its own; why: classroom/LOG.md
LONG, LONG_TASKS = "--bp_weight 0.4 --lr_decay 1", {"two_object": 2, "position": 3, "color_attr": 2}
PROCESSES = min(2, os.cpu_count() or 1)  # of each training: two of one thread use two cores better than one of two


def parse_args(argv=None):
    p = models.parser(__doc__.splitlines()[0])
    p.add_argument("--out", type=models.path, default=Path("out/classroom"), help="folder of both runs and the report")
    p.add_argument("--seed", type=int, default=0, help="of both trainings; the evaluation is fixed")
    stages = ["acdmd", "rtdmd", "report"]
    more = "ablations: both stages without one part at a time; summary: means over --runs"
    p.add_argument("--stages", nargs="+", default=stages, choices=[*stages, "ablations", "summary"], help=more)
    how_long = p.add_mutually_exclusive_group()
    how_long.add_argument("--quick", action="store_true", help="shorter trainings, fewer pictures: promises less")
    how_long.add_argument("--long", action="store_true", help="1,800 epochs of stage 2, with settings of its own")
    p.add_argument("--acdmd_steps", type=models.at_least(1), help="iterations of stage 1 (default: acdmd.py's)")
    p.add_argument("--rtdmd_epochs", type=models.at_least(1), help="epochs of stage 2 (default: rtdmd.py's)")
    p.add_argument("--only", nargs="+", default=list(ABLATIONS), choices=ABLATIONS, help="of the ablations")
    p.add_argument("--n_prompts", type=int, default=600, help="pictures of held-out captions that are compared")
    p.add_argument("--distilled", type=models.path, help="stage 1's final folder (default: --out/acdmd/final)")
    p.add_argument("--rl", type=models.path, help="stage 2's final folder (default: --out/rtdmd/final)")
    p.add_argument("--runs", type=models.path, nargs="+", default=[], help="of summary: --out of finished runs")
    known, _ = p.parse_known_args(argv)
    for name, settings in LENGTHS.items():
        p.set_defaults(**(settings if getattr(known, name) else {}))
    args = p.parse_args(argv)
    if args.n_prompts < 12:
        p.error(f"--n_prompts {args.n_prompts}: at least 12, two for each task type")
    if "ablations" in args.stages and (args.distilled or args.rl):
        p.error("--stages ablations compares with the runs in --out: leave out --distilled and --rl")
    if ("summary" in args.stages) != bool(args.runs):
        p.error("--stages summary and --runs belong together: give the --out folders of runs with ablations")
    args.distilled = args.distilled or args.out / "acdmd" / "final"
    args.rl = args.rl or args.out / "rtdmd" / "final"
    return args


def long_flags(out):
    """The flags of --long's own stage 2, whose prompt file is written here."""
    prompts = out / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(m) + "\n" for _, m in rewards.classroom_prompts(**LONG_TASKS)))
    return [*LONG.split(), "--prompts", prompts]


def run_stage(script, args, folder, *flags):
    """Run a stage script on PROCESSES processes, showing its own progress bar. The global batch stays the same.

    A folder with checkpoints is gone on with, from where it was stopped; a finished stage has nothing left to do.
    """
    threads = max(1, (os.cpu_count() or 1) // PROCESSES)
    flags = ["--seed", args.seed, *flags, "--out", folder]
    if list(folder.glob("step_*")):
        seed = json.loads((folder / "args.json").read_text())["seed"]
        if seed != args.seed:
            more = f"give another --out for --seed {args.seed}"
            raise models.UserError(f"{folder} holds a run with --seed {seed}: {more}")
        flags += ["--resume", folder]
    if script == "acdmd.py":
        flags += ["--steps", args.acdmd_steps] if args.acdmd_steps else []
        for name in ("batch_size", "consistency_batch"):
            flags += [f"--{name}", acdmd.PRESETS["classroom"][name] // PROCESSES]
    else:
        flags = (long_flags(args.out) if args.long else []) + flags  # before an ablation's own, which count then
        flags += ["--epochs", args.rtdmd_epochs] if args.rtdmd_epochs else []
        flags += ["--distilled", args.distilled]
        flags += ["--batches", rtdmd.PRESETS["classroom"]["batches"] // PROCESSES]
    command = [sys.executable]
    if PROCESSES > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={PROCESSES}"]
    command += [str(ROOT / script), "--device", "cpu", *map(str, flags)]
    shown = f"torchrun --nproc_per_node={PROCESSES}" if PROCESSES > 1 else "python"
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


def evaluate(scorers, metadata, real, name, nfe, draw):
    """One row of the table: scores of every prompt, and how the pictures are distributed.

    draw(metadata) makes a picture [3, 64, 64] of each caption, [N, 3, 64, 64] in [0, 1].
    """
    images = draw(metadata)
    scores = {k: v.numpy() for k, v in scorers.score(images, [m["prompt"] for m in metadata], metadata).items()}
    row = {"name": name, "nfe": nfe, "scores": scores, "images": images} | distribution(scorers, images, metadata)
    return row | {"distances": distances(row, real)}


def sampler(backbone, name, role, sigmas, eta=0.9, guidance_scale=1.0):
    """(name, NFE, draw) of a way to sample, as `evaluate` takes them."""

    def draw(metadata):
        prompts = [m["prompt"] for m in metadata]
        return generate(backbone, prompts, sigmas, eta, guidance_scale, seed=1, batch_size=60, role=role)

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
    table = [["sampler", "NFE", *HEAD, *DISTANCES, *shapes.TASKS]]
    for row in rows:
        cells = [row["name"], str(row["nfe"])]
        means = [difference(row, None, c, real) for c in COLUMNS]
        cells += [f"{mean:.3f} ± {error:.3f}" for mean, error in means]
        gaps = distance_difference(row, None, real)
        cells += [f"{d:.{k}f} ± {e:.{k}f}" for d, e, k in zip(*gaps, (2, 3, 3), strict=True)]
        cells += [f"{row['scores']['geneval_strict'][tags == t].mean():.2f}" for t in shapes.TASKS]
        table.append(cells)
    return markdown(table)


def difference_table(pairs, real):
    """Lines of a markdown table of paired differences. pairs: [(label, row, row to subtract)]"""
    table = [["paired difference", *HEAD, *DISTANCES]]
    for label, a, b in pairs:
        gaps = [difference(a, b, c, real) for c in COLUMNS] + list(zip(*distance_difference(a, b, real), strict=True))
        table.append([label, *(f"{mean:+.3f} ± {error:.3f}" for mean, error in gaps)])
    return markdown(table)


def markdown(table):
    """Lines of a table, of which the first row is the head."""
    head, *rows = ("| " + " | ".join(row) + " |" for row in table)
    return [head, "|" + "---|" * len(table[0]), *rows]


def write_table(path, lines, rows):
    """path.md, the lines; path.json, every prompt's scores."""
    flat = [{k: row[k] for k in ("name", "nfe", "distances", "scores")} for row in rows]
    path.with_suffix(".json").write_text(json.dumps(flat, default=np.ndarray.tolist) + "\n")
    text = "\n".join(lines) + "\n"
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print("\n" + text)


NOTES = """
± is the standard error by bootstrap over captions, over pictures in tasks of one or two captions;
task columns are strict. FD: Fréchet distance of the classroom CLIP's pooled image features to as many
real scenes of the same captions. Colour TV: total variation, from theirs, of the colours that captions
leave open; cell TV: of the objects' places."""


def compared_on(metadata):
    """What every sampler drew."""
    return f"{len(metadata)} pictures of {len({m['prompt'] for m in metadata})} held-out captions, same seeds"


def rising(log, name="reward/geneval_strict"):
    """Last fifth less first fifth of a column of a log: (first mean, last mean, standard error of their difference)."""
    values = np.array([row[name] for row in map(json.loads, log.read_text().splitlines()) if name in row])
    fifth = max(1, len(values) // 5)
    first, last = values[:fifth], values[-fifth:]
    return first.mean(), last.mean(), math.sqrt((first.var() + last.var()) / max(1, fifth - 1))


def shown(by_name, real, log):
    """The report's sentences: what the rewards did."""
    gain, error = difference(by_name["RTDMD"], by_name["AC-DMD"], "geneval_strict", real)
    over, over_error = difference(by_name["RTDMD"], by_name[TEACHER], "geneval_strict", real)
    lines = [f"Stage 2 raises strict GenEval by {gain:+.3f} ± {error:.3f} over AC-DMD. With 4 evaluations, less the"]
    lines += [f"guided teacher with {by_name[TEACHER]['nfe']}: {over:+.3f} ± {over_error:.3f}."]
    if log.is_file():
        first, last, error = rising(log)
        went = f"from {first:.3f} to {last:.3f} (fifths; difference ± {error:.3f})"
        lines += [f"The training reward (strict) went {went}."]
        lines += ["How much of that the rewards do: `--stages ablations`, whose control has none."]
    return lines


def write_report(rows, metadata, real, args):
    by_name = {row["name"]: row for row in rows}
    pairs = [("AC-DMD", FEW), ("AC-DMD", DMD2), ("RTDMD", "AC-DMD"), ("RTDMD", TEACHER)]
    pairs = [(a, b) for a, b in pairs if a in by_name and b in by_name]
    lines = [f"# {', '.join(by_name)}: {compared_on(metadata)}", ""]
    lines += shown(by_name, real, args.rl.parent / "log.jsonl") + [""] if "RTDMD" in by_name else []
    lines += score_table(rows, metadata, real)
    lines += ["", *difference_table([(f"{a} − {b}", by_name[a], by_name[b]) for a, b in pairs], real), NOTES]
    write_table(args.out / "report", lines, rows)


# ---------------------------------------------------------------------------------------------------------------
# pictures


def draw_samples(rows, metadata, path, n=12, columns=6, zoom=2):
    """The first n captions, in bands of `columns`; in each band one line of pictures a sampler."""
    side, left, top = shapes.SIZE * zoom + 4, 150, 44
    band = top + len(rows) * side
    sheet = Image.new("RGB", (left + columns * side, -(-n // columns) * band), "white")
    ink = ImageDraw.Draw(sheet)
    for i in range(n):
        x, y = left + i % columns * side, i // columns * band
        ink.multiline_text((x + 2, y + 6), textwrap.fill(metadata[i]["prompt"], 24), "black")
        for j, row in enumerate(rows):
            at = x, y + top + j * side
            sheet.paste(enlarged(row["images"][i], zoom), at)
            color = "#2a9d4a" if row["scores"]["geneval_strict"][i] else "#d03030"
            ink.rectangle((*at, at[0] + side - 4, at[1] + side - 4), outline=color, width=2)
            if i % columns == 0:
                ink.multiline_text((6, at[1] + 40), row["name"].replace(", ", "\n") + f"\n{row['nfe']} NFE", "black")
    sheet.save(path)


def enlarged(image, zoom):
    """[3, H, W] in [0, 1] as a PIL picture."""
    picture = Image.fromarray(rewards.eight_bits(image[None])[0])
    return picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)


@torch.no_grad()
def draw_steps(backbone, roles, metadata, path, n=6, zoom=2):
    """An animation: what each role expects the picture to be (x0_hat) after each of the four CPS steps, same noise."""
    prompts, sigmas = [m["prompt"] for m in metadata[:n]], backbone.sigmas()
    cond, noise = backbone.encode(prompts), models.Noise(("steps",), range(n), backbone.latent_shape, backbone.device)
    side, left, top = shapes.SIZE * zoom + 4, 80, 40
    frames = [Image.new("RGB", (left + n * side, top + len(roles) * side), "white") for _ in sigmas[1:]]
    for row, (name, role) in enumerate(roles.items()):
        x = noise.normal("start")
        for j, frame in enumerate(frames):
            v = backbone.velocity(role, x, sigmas[j], cond)
            images = backbone.decode(models.cps_step(x, v, sigmas[j], 0.0))
            x = models.cps_step(x, v, sigmas[j], sigmas[j + 1], 0.9, noise.normal("step", j))
            ink = ImageDraw.Draw(frame)
            ink.text((4, 4), f"step {j + 1} of {len(frames)}", "black")
            ink.text((4, top + row * side + 56), name, "black")
            for i, image in enumerate(images):
                ink.multiline_text((left + i * side + 2, 6), textwrap.fill(prompts[i], 24), "black")
                frame.paste(enlarged(image, zoom), (left + i * side, top + row * side))
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=[700, 700, 700, 2500], loop=0)


def pyplot():
    """matplotlib's pyplot, drawing to files."""
    try:
        import matplotlib
    except ImportError:
        raise models.UserError("the curves need a package: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def running_mean(y, span):
    weight = np.convolve(np.ones_like(y), np.ones(span), "same")
    return np.convolve(y, np.ones(span), "same") / weight


def draw_curves(runs, path):
    """Curves of log files, a panel a metric: thin the values, thick their running mean. Returns whether any was drawn.

    runs: [(title, log file, metrics)]. Files that are not there and metrics with one value are left out.
    """
    panels = []
    for title, file, names in runs:
        if not file.is_file():  # adapters from elsewhere may come without
            continue
        log = [json.loads(line) for line in file.read_text().splitlines()]
        for name in names:
            points = [(row["step"], row[name]) for row in log if name in row]
            if len(points) > 1:
                panels.append((f"{title}: {name}", *np.array(points, float).T))
    if not panels:
        return False
    figure, axes = pyplot().subplots(-(-len(panels) // 4), 4, figsize=(16, 2.6 * -(-len(panels) // 4)), squeeze=False)
    for axis, (title, x, y) in zip(axes.flat, panels, strict=False):
        axis.plot(x, y, color="#b8c7e0", marker="o" if len(x) < 8 else None)
        axis.plot(x, running_mean(y, max(1, min(len(y) // 3, max(3, len(y) // 15)))), color="#1f4e9c", linewidth=2)
        low, high = np.quantile(y, [0.01, 0.99])
        axis.set(title=title, ylim=(low, high) if high > low else None)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    return True


STAGE_1 = [f"loss/ac_k{k}" for k in (1, 2, 3, 4)] + ["loss/generator_k4"]
STAGE_1 += ["loss/cons", "eval/geneval_strict", "eval/fd"]
STAGE_2 = ["reward/geneval_strict", "reward/clipscore", "eval/geneval_strict", "eval/fd"]
STAGE_2 += ["group_std/geneval_strict", "grad_norm/generator", "grad_x0/dm", "grad_x0/bp"]


# ---------------------------------------------------------------------------------------------------------------
# report and ablations of one run


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


def report(args, rows=()):
    """Sample and score teacher, DMD2, AC-DMD and, where stage 2 has ended, RTDMD; write the table and the pictures.

    rows: those of an earlier report, not sampled again. Returns (names of the files, rows).
    """
    folders = {"acdmd": args.distilled / "generator_ema", "dmd2": models.CLASSROOM / "adapters/dmd2/generator_ema"}
    roles = {DMD2: ("dmd2",), "AC-DMD": ("acdmd",)}
    if args.rl.is_dir():
        folders["rtdmd"], roles["RTDMD"] = args.rl / "rl_ema", ("acdmd", "rtdmd")
    require(*folders.values())
    backbone, scorers = load_adapters(folders)
    backbone.roles |= roles
    few, many, guidance = backbone.sigmas(), backbone.sigmas(28), models.BACKBONES["classroom"]["guidance"]
    samplers = [
        ("real scenes, another draw", 0, lambda metadata: shapes.pictures(metadata, 1)),
        sampler(backbone, TEACHER, "teacher", many, 0.0, guidance),
        sampler(backbone, FEW, "teacher", few),
        sampler(backbone, DMD2, DMD2, few, eta=1.0),
        *(sampler(backbone, name, name, few) for name in roles if name != DMD2),
    ]
    metadata = shapes.sample_prompts(args.n_prompts, 0, "test")
    real, done = truth(scorers, metadata), {row["name"]: row for row in rows}
    rows = [done.get(columns[0]) or evaluate(scorers, metadata, real, *columns) for columns in samplers]
    write_report(rows, metadata, real, args)
    draw_samples([row for row in rows[1:] if row["name"] != DMD2], metadata, args.out / "samples.png")
    shown = {"teacher": "teacher"} | {name: name for name in roles if name != DMD2}
    draw_steps(backbone, shown, metadata, args.out / "steps.gif")
    logs = [("AC-DMD", args.distilled.parent / "log.jsonl", STAGE_1), ("RTDMD", args.rl.parent / "log.jsonl", STAGE_2)]
    curves = draw_curves(logs, args.out / "curves.png")
    return ["report.md", "samples.png", "steps.gif"] + (["curves.png"] if curves else []), rows


def ablations(args):
    """Train the stages again, same seed, without one part at a time; score them all and write the table."""
    folders = {"acdmd": args.distilled / "generator_ema", "rtdmd": args.rl / "rl_ema"}
    require(*folders.values())
    for stage, length, asked in ((acdmd, "steps", args.acdmd_steps), (rtdmd, "epochs", args.rtdmd_epochs)):
        run = args.out / stage.__name__
        was = json.loads((run / "args.json").read_text())
        if stage == rtdmd and bool(was["prompts"]) != args.long:
            how = "with --long: give it" if was["prompts"] else "without --long: leave it out"
            raise models.UserError(f"{run} was trained {how}")
        if was[length] != (asked or stage.PRESETS["classroom"][length]):  # like is compared with like
            raise models.UserError(f"{run} has {was[length]} {length}: add --{stage.__name__}_{length} {was[length]}")
        if was["seed"] != args.seed:
            raise models.UserError(f"{run} has seed {was['seed']}: add --seed {was['seed']}")
    roles, eta = {"AC-DMD": ("acdmd",), "RTDMD": ("acdmd", "rtdmd")}, {}
    for name in args.only:
        full, label, flags = ABLATIONS[name]
        run = args.out / "ablations" / name
        run_stage("acdmd.py" if full == "AC-DMD" else "rtdmd.py", args, run, *flags.split(), "--eval_every", 0)
        folders[name] = run / "final" / ("generator_ema" if full == "AC-DMD" else "rl_ema")
        roles[label] = (name,) if full == "AC-DMD" else ("acdmd", name)
        eta[label] = json.loads((run / "args.json").read_text())["eta"]
    backbone, scorers = load_adapters(folders)
    backbone.roles |= roles
    metadata = shapes.sample_prompts(args.n_prompts, 0, "test")
    real = truth(scorers, metadata)
    samplers = [sampler(backbone, role, role, backbone.sigmas(), eta.get(role, 0.9)) for role in roles]
    rows = [evaluate(scorers, metadata, real, *columns) for columns in samplers]
    lines = [f"# Without a part of the method: {compared_on(metadata)}", ""]
    lines += score_table(rows, metadata, real)
    by_name = {row["name"]: row for row in rows}
    chosen = [ABLATIONS[name] for name in args.only]
    pairs = [(f"{label} `{flags}`", by_name[label], by_name[full]) for full, label, flags in chosen]
    lines += ["", "Without the part, minus the full method; one training run each:", ""]
    write_table(args.out / "ablations", [*lines, *difference_table(pairs, real)], rows)
    return ["ablations.md"]


# ---------------------------------------------------------------------------------------------------------------
# summary of several runs


def summary(args):
    """Means over runs of several seeds, each with its report and ablations: the table, and the rewards' figure."""
    runs = []
    for run in args.runs:
        missing = [name for name in ("report.json", "ablations.json") if not (run / name).is_file()]
        if missing:
            how = f"run demo.py --out {run}, then --stages ablations"
            raise models.UserError(f"--runs {run} has no {missing[0]}: {how}")
        rows = [row for name in ("report", "ablations") for row in json.loads((run / f"{name}.json").read_text())]
        runs.append({row["name"]: row for row in rows})
    common = [name for name in runs[0] if all(name in run for run in runs)]
    metadata = shapes.sample_prompts(len(runs[0]["AC-DMD"]["scores"]["clipscore"]), 0, "test")
    draws = resamples(metadata, 500)
    head = ["sampler", "GenEval strict", "CLIPScore", *DISTANCES]
    lines = [f"# Means of {len(runs)} runs: " + ", ".join(map(str, args.runs)), ""]
    lines += markdown([head, *([name, *over_runs(runs, name, None, draws)] for name in common)])
    pairs = [("RTDMD", "AC-DMD"), ("RTDMD", TEACHER), ("AC-DMD", DMD2)]
    pairs += [(name, full) for full, name, _ in ABLATIONS.values() if name in common]
    gaps = [[f"{a} − {b}", *over_runs(runs, a, b, draws)] for a, b in pairs]
    lines += ["", *markdown([["paired difference", *head[1:]], *gaps])]
    lines += ["", "±: standard errors over runs and, of GenEval and CLIPScore, over captions, added as squares."]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "summary.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    return ["summary.md"] + (["rewards.png"] if draw_rewards(reward_gaps(args.runs), args.out / "rewards.png") else [])


def over_runs(runs, a, b, draws):
    """Cells "mean ± error" of row a, less row b of the same run where there is one."""
    cells, sign = [], "+" if b else ""
    for column in ("geneval_strict", "clipscore"):
        scores = lambda run, name, column=column: np.array(run[name]["scores"][column])  # noqa: E731
        gaps = np.array([scores(run, a) - (scores(run, b) if b else 0) for run in runs])
        over_captions = np.std([gaps.mean(0)[picks].mean() for picks in draws])
        cells.append((gaps.mean(), math.hypot(error_of_mean(gaps.mean(1)), over_captions)))
    gaps = np.array([np.array(r[a]["distances"]) - (np.array(r[b]["distances"]) if b else 0) for r in runs])
    cells += zip(gaps.mean(0), map(error_of_mean, gaps.T), strict=True)
    return [f"{mean:{sign}.3f} ± {error:.3f}" for mean, error in cells]


def error_of_mean(values):
    return np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def reward_gaps(runs, name="reward/geneval_strict", blocks=12):
    """{what: (images, means, errors)} of the training reward less the control's on the same prompts and noise.

    Means over runs and blocks of epochs; errors are of a block's paired differences. The control itself is left out.
    """
    variants = {"RTDMD": "rtdmd"}
    variants |= {of[1]: f"ablations/{name}" for name, of in ABLATIONS.items() if of[0] == "RTDMD" and name != CONTROL}

    def rewards_of(file):
        rows = map(json.loads, file.read_text().splitlines())
        return np.array([row[name] for row in rows if name in row])

    settings, gaps = json.loads((runs[0] / "rtdmd" / "args.json").read_text()), {}
    per_epoch = settings["batch_size"] * settings["batches"] * settings["world size"]
    for title, folder in variants.items():
        pairs = [(run / folder / "log.jsonl", run / "ablations" / CONTROL / "log.jsonl") for run in runs]
        pairs = [(rewards_of(a), rewards_of(b)) for a, b in pairs if a.is_file() and b.is_file()]
        if pairs:
            n = min(len(log) for pair in pairs for log in pair)
            gap = np.array([a[:n] - b[:n] for a, b in pairs])
            parts = [gap[:, p] for p in np.array_split(np.arange(n), min(blocks, max(1, n // 2)))]
            images = per_epoch * (np.cumsum([p.shape[1] for p in parts]) - parts[0].shape[1] / 2)
            gaps[title] = images, [p.mean() for p in parts], [p.std() / math.sqrt(max(1, p.size - 1)) for p in parts]
    return gaps


def draw_rewards(gaps, path):
    """The figure of `reward_gaps`; returns whether there was anything to draw."""
    figure, axis = pyplot().subplots(figsize=(9, 5))
    for title, (images, means, errors) in gaps.items():
        axis.errorbar(images, means, errors, label=title.removeprefix("RTDMD, "), capsize=2)
    axis.axhline(0, color="black", linewidth=1, label="the control: no reward")
    axis.set(xlabel="images", ylabel="training reward (strict GenEval) less the control's")
    axis.legend(fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1))  # above the axes
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    return bool(gaps)


def main(args):
    start, rows = time.perf_counter(), ()
    if {"report", "summary"} & set(args.stages):
        pyplot()  # is it there? Known before anything is trained
    with models.named_failure(f"cannot write to --out {args.out}"):
        args.out.mkdir(parents=True, exist_ok=True)
    files = []
    if "acdmd" in args.stages:
        run_stage("acdmd.py", args, args.out / "acdmd")
        if {"rtdmd", "report"} <= set(args.stages) and not args.rl.is_dir():  # see stage 1's result now
            files, rows = report(args)
            minutes = (time.perf_counter() - start) / 60
            print(f"{args.out}/{', '.join(files)} after {minutes:.1f} minutes; stage 2 follows")
    if "rtdmd" in args.stages:
        run_stage("rtdmd.py", args, args.out / "rtdmd")
    files = report(args, rows)[0] if "report" in args.stages else []
    files += ablations(args) if "ablations" in args.stages else []
    files += summary(args) if "summary" in args.stages else []
    if files:
        print(f"{args.out}/{', '.join(files)}; {(time.perf_counter() - start) / 60:.1f} minutes in all")


if __name__ == "__main__":
    models.run(main, parse_args())
