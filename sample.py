"""Pictures and reward tables from any adapter stack.

    python sample.py --prompt "a red circle above a blue square"                                   the teacher
    python sample.py --lora out/classroom/acdmd/final/generator_ema                                distilled
    python sample.py --lora .../acdmd/final/generator_ema --lora .../rtdmd/final/rl_ema --eval clipscore=1,geneval=1
    python sample.py --sampler student                                                what the student began as

    torchrun --nproc_per_node=8 sample.py --model sd35 --lora ... --prompts drawbench.txt --reward_dir weights \
        --eval pickscore,hpsv2,aesthetic,imagereward

--sampler student (the default with a --lora): the few-step schedule, 4 CPS steps at eta 0.9, no guidance. --sampler
teacher (else): the pipeline's own schedule, 28 Euler steps, guided; of FLUX.2, the base's weights. --steps, --eta and
--guidance_scale change these numbers and nothing else. Pictures are 1024 pixels a side, as published (the classroom's
64, sana's and prx's 512), whatever the training's were.
Writes to --out: 00000.png, ... , scores.jsonl as they are made, then grid.png and metadata.json (settings, prompts and,
with --eval, scores). The same command goes on after a stop. Several processes give the pictures and scores of one.
"""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import models
import rewards
from classroom import shapes
from models import at_least, between


def parse_args(argv=None):
    p = models.parser(__doc__.splitlines()[0])
    add = p.add_argument
    add("--model", default="classroom", choices=models.BACKBONES, help="backbone")
    add("--weights", help="pipeline folder or hub id in place of the published one (FLUX.2's student: its own)")
    add("--resolution", type=at_least(1), help="pixels a side (default: 1024, the classroom's 64, sana and prx: 512)")
    add("--lora", action="append", default=[], type=models.path, help="adapter; repeat to stack, applied in order")
    below = dict(action="append", default=[], type=models.path)
    add("--teacher_lora", **below, help="adapter below them and of the teacher too, as in training; repeat to stack")
    add("--prompt", action="append", default=[], help="a prompt; repeatable")
    add("--prompts", type=models.path, help=".txt, .jsonl, .json, .csv or .tsv (default: classroom captions, held out)")
    add("--n_images", type=at_least(1), help="the first n prompts (classroom default 48, else all of the file)")
    add("--per_prompt", type=at_least(1), default=1, help="pictures of each prompt")
    how = "student: few CPS steps; teacher: the pipeline's own, guided (default: student with --lora, else teacher)"
    add("--sampler", choices=("student", "teacher"), help=how)
    add("--steps", type=at_least(1), help="from noise to picture (default: student 4, teacher 28)")
    add("--eta", type=between(0, 1), help="CPS stochasticity (default: student 0.9, teacher 0, which is Euler)")
    add("--guidance_scale", type=between(0), help="default: student 1, which is none; teacher the model's own")
    add("--export", type=models.path, help="write the transformer, adapters merged in, to this new folder, and stop")
    add("--export_lora", type=models.path, help="write the adapters as one to this new .safetensors file, and stop")
    add("--eval", type=rewards.parse_weights, default={}, help="rewards to report, name=weight,...: clipscore,ocr=0.5")
    add("--fd_reference", type=models.path, help="folder of pictures: Frechet distance to them in CLIP's features")
    add("--reward_dir", type=models.path, help="folder with reward weights that are not taken from the hub")
    add("--reward_batch_size", type=at_least(1), help="images a scorer takes at once (default: --batch_size)")
    add("--offload_rewards", action="store_true", help="scorers wait on the CPU while they do not score")
    add("--out", type=models.path, help="new folder (default: out/samples, out/samples_2, ...)")
    add("--seed", type=at_least(0), default=0, help="of image i's noise, and of the choice of classroom captions")
    add("--batch_size", type=at_least(1), help="images at once (default: 8 of 1024x1024, up to 50 of smaller ones)")
    add("--device", type=models.device_name, choices=["cpu", "cuda"], help="default: cuda where there is one")
    args = p.parse_args(argv)
    args.sampler = args.sampler or ("student" if args.lora else "teacher")
    facts = models.BACKBONES[args.model]
    defaults = dict(steps=28, eta=0.0, guidance_scale=facts["guidance"])
    if args.sampler == "student":
        defaults = dict(steps=4, eta=0.9, guidance_scale=1.0)
    defaults["resolution"] = facts.get("pictures", facts["resolution"])
    vars(args).update({name: value for name, value in defaults.items() if getattr(args, name) is None})
    args.batch_size = args.batch_size or min(50, max(1, 8 * 1024**2 // args.resolution**2))
    if args.prompt and args.prompts:
        p.error("give --prompt or --prompts, not both")
    if args.export and args.export.exists():
        p.error(f"--export {args.export} exists: give a new folder")
    new = args.export_lora
    if new and (not args.lora or args.export or new.suffix != ".safetensors" or new.exists()):
        p.error(f"--export_lora {new}: needs --lora, no --export, and a new file that ends in .safetensors")
    if args.reward_dir is None and args.model == "classroom":
        args.reward_dir = models.CLASSROOM
    return args


def begun(folder, call):
    """{index: entry} of what this very call has made in the folder already; None if others' files are there."""
    if not folder.exists() or folder.is_dir() and not any(folder.iterdir()):
        return {}
    if not (folder / "scores.jsonl").is_file() or (folder / "metadata.json").exists():
        return None
    rows = []
    for line in (folder / "scores.jsonl").read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # a killed process leaves a line half written
            rows.append(json.loads(line))
    return {row["index"]: row["entry"] for row in rows} if all(row["call"] == call for row in rows) else None


def choose_out(args, made_from):
    """(--out or the first default one that is free, what was begun there, a hash of the call)."""
    settings = {key: value for key, value in vars(args).items() if key != "out"}
    call = hashlib.sha256(json.dumps([settings, made_from], default=str).encode()).hexdigest()
    names = (Path(f"out/samples_{i}" if i > 1 else "out/samples") for i in itertools.count(1))
    for folder in [args.out] if args.out else names:
        if (done := begun(folder, call)) is not None:
            return folder, done, call
    raise models.UserError(f"--out {args.out} is a file or not empty: give a new folder")


def generate(
    backbone, prompts, sigmas, eta=0.9, guidance_scale=1.0, seed=0, batch_size=50, role="generator", indices=None
):
    """Images [N, 3, H, W] in [0, 1] on the CPU; image i depends on (seed, indices[i] or i) and its prompt alone."""
    indices = range(len(prompts)) if indices is None else indices
    images = []
    quiet = len(prompts) <= batch_size
    for b in tqdm(range(0, len(prompts), batch_size), f"images, {role}", unit="batch", leave=False, disable=quiet):
        part = slice(b, b + batch_size)
        latents = models.sample_latents(backbone, prompts[part], sigmas, eta, guidance_scale, seed, indices[part], role)
        images.append(models.decode_all(backbone, latents))
    return torch.cat(images)


def summarize(entries, weights):
    """Mean, standard error and per-task means of every column, and the weighted mean.

    The error is over prompts: pictures of one prompt are no independent draws, so their mean counts once.
    """
    table, prompts = {}, [e["prompt"] for e in entries]
    tags = [e.get("tag") if isinstance(e.get("tag"), str) else None for e in entries]  # a file's own may be anything
    for name in weights:
        values = np.array([e["scores"][name] for e in entries])
        tasks = {t: float(values[[x == t for x in tags]].mean()) for t in dict.fromkeys(tags) if t}
        means = rewards.prompt_means(prompts, values)
        error = float(means.std(ddof=1) / len(means) ** 0.5) if len(means) > 1 else None
        table[name] = dict(mean=float(values.mean()), error=error, n=len(values), prompts=len(means), tasks=tasks)
        if tasks:  # the benchmark's overall score: task types count alike, however many prompts they have
            table[name]["task_mean"] = float(np.mean(list(tasks.values())))
    weighted = sum(w * rewards.SCALE.get(name, 1) * table[name]["mean"] for name, w in weights.items())
    return {"rewards": table, "weighted_mean": weighted / sum(weights.values())}


def report(summary):
    """The summary as an aligned text table."""
    table = [["reward", "n", "prompts", "mean", "+-"]]
    for name, row in summary["rewards"].items():
        tasks = [("task mean", row["task_mean"]), *row["tasks"].items()] if row["tasks"] else []
        numbers = [row["mean"], row["error"], *(mean for _, mean in tasks)]
        cells = ["–" if x is None else f"{x:.3f}" for x in numbers]  # of one prompt there is no error
        table.append([name, str(row["n"]), str(row["prompts"]), *cells])
    table[0] += [task for task, _ in tasks]  # the same of all rewards
    table.append(["weighted mean", "", "", f"{summary['weighted_mean']:.3f}", *[""] * (1 + len(tasks))])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join("  ".join([f"{a:{widths[0]}}", *map(str.rjust, row, widths[1:])]).rstrip() for a, *row in table)


def prompts_of(args, columns):
    """[(prompt, metadata)] of the pictures to make; refused where a scorer of the columns needs more."""
    if args.prompt:
        pairs = [(prompt, {"prompt": prompt}) for prompt in args.prompt]
    elif args.prompts:
        pairs = rewards.read_prompts(args.prompts)
    elif args.model == "classroom":
        pairs = [(m["prompt"], m) for m in shapes.sample_prompts(args.n_images or 48, args.seed, "heldout")]
    else:
        raise models.UserError(f"--model {args.model} needs --prompts FILE or --prompt TEXT")
    if len(pairs) < (args.n_images or 0) and os.environ.get("RANK", "0") == "0":
        more = "--per_prompt gives more pictures of each"
        print(f"--n_images {args.n_images}, but the number of prompts is {len(pairs)}; {more}")
    pairs = pairs[: args.n_images]
    rewards.check_prompts(pairs, columns, args.reward_dir)
    return [pair for pair in pairs for _ in range(args.per_prompt)]


def check_writable(folder):
    """May files be made here? Known before the models load."""
    with models.named_failure(f"cannot write to {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def load(args, device, dtype):
    """One network with the adapters on it: FLUX.2's student, which has weights of its own, or its teacher, not both."""
    facts = models.BACKBONES[args.model]
    # its name as weights: left to itself, models.load takes the student's own transformer, too
    published = facts["student"] if args.sampler == "student" and "student" in facts else facts["repo"]
    place = dict(device=device, dtype=dtype, resolution=args.resolution)
    backbone = models.load(args.model, args.weights or published, **place)
    models.put_below(backbone, args.teacher_lora)
    for i, folder in enumerate(args.lora):
        models.load_adapter(backbone.transformer, f"lora_{i}", folder, any_base=True)
    backbone.roles["generator"] = tuple(f"lora_{i}" for i in range(len(args.lora)))
    return backbone


def main(args):
    rank, world_size, device = models.setup_distributed(args.device)
    stack = [*args.teacher_lora, *args.lora]
    adapters = [models.fingerprint(folder) for folder in stack]  # are they whole? Known before the models load
    for folder in args.lora:
        models.trained_over(folder, stack)
    if target := args.export or args.export_lora:
        check_writable(target.parent)
        if rank == 0:
            export_lora(stack, args) if args.export_lora else export(load(args, device, None), target)
        return
    # a model's further columns are reported beside the one asked for, without weight
    weights = {column: args.eval.get(column, 0.0) for name in args.eval for column in rewards.SCORERS[name].columns}
    pairs = prompts_of(args, weights)
    if args.fd_reference and len(pairs) < 2:
        raise models.UserError("--fd_reference compares sets of pictures: ask for 2 or more (--n_images, --per_prompt)")
    args.out, done, call = models.gather([choose_out(args, [pairs, adapters])], world_size)[0]
    check_writable(args.out)
    scorers = None
    if weights or args.fd_reference:
        size = args.reward_batch_size or args.batch_size
        scorers = rewards.load_scorers(weights, device, args.reward_dir, size, args.offload_rewards)
    mixed = device.type == "cuda" and args.model != "classroom" and models.computes_bfloat16(device)
    dtype = torch.bfloat16 if mixed else torch.float32
    if rank == 0:
        print(f"device {device}, networks in {str(dtype)[6:]}, processes: {world_size}")
    backbone = load(args, device, dtype)
    few_steps = [1000 * (1 - i / args.steps) for i in range(args.steps)]  # 4: models.FEW_STEPS
    sigmas = backbone.sigmas(few_steps if args.sampler == "student" else args.steps)

    # a batch goes to one process whole: the arithmetic does not depend on how many there are
    batches = [range(b, min(b + args.batch_size, len(pairs))) for b in range(0, len(pairs), args.batch_size)]
    batches = [batch for batch in batches if not all(i in done for i in batch)]
    reference = scorers.features_of_folder(args.fd_reference) if args.fd_reference and rank == 0 else None
    record, seconds = args.out / "scores.jsonl", 0.0
    record.touch()
    for indices in tqdm(batches[rank::world_size], "images", unit="batch", disable=rank > 0):
        prompts, metadata = map(list, zip(*(pairs[i] for i in indices), strict=True))
        begin = time.perf_counter()
        options = dict(batch_size=len(prompts), indices=indices)
        images = generate(backbone, prompts, sigmas, args.eta, args.guidance_scale, args.seed, **options)
        seconds += time.perf_counter() - begin
        scores = scorers.score(images, prompts, metadata) if weights else {}
        for j, i in enumerate(indices):
            done[i] = {**metadata[j], "scores": {name: values[j].item() for name, values in scores.items()}}
        lines = [json.dumps({"index": i, "call": call, "entry": done[i]}) + "\n" for i in indices]
        with models.named_failure(f"cannot write to {args.out}"):
            for i, image in zip(indices, images, strict=True):
                models.save_grid(image[None], args.out / f"{i:05d}.png", 1, gap=0)
            with record.open("ab", buffering=0) as file:  # one write: no process breaks a line
                file.write("".join(lines).encode())
    parts = models.gather([(done, seconds)], world_size)  # all processes' files are there from here on
    if rank > 0:
        return
    done = {i: entry for part, _ in parts for i, entry in part.items()}
    entries = [done[i] for i in sorted(done)]
    ms = 1000 * sum(part[1] for part in parts) / max(1, sum(map(len, batches)))
    nfe = (len(sigmas) - 1) * backbone.passes(args.guidance_scale)
    how = f"{args.steps} CPS steps, eta {args.eta}" if args.eta else f"{args.steps} Euler steps"
    how += f", guidance {args.guidance_scale}" if args.guidance_scale > 1 else ", no guidance"
    result = {"settings": vars(args), "ms_per_image": ms, "nfe": nfe, "sampler": how}
    if weights:
        result |= summarize(entries, weights)
        print(report(result))
    if args.fd_reference:
        fd = rewards.frechet_distance(scorers.features_of_folder(args.out), reference)
        result["fd"] = {"value": fd, "n": len(entries), "n_reference": len(reference)}
        few = " (few pictures: compare at one n only)" if min(len(entries), len(reference)) < 500 else ""
        print(f"FD {fd:.2f}: {len(entries)} pictures to {len(reference)} of {args.fd_reference}, CLIP features{few}")
    shown = torch.cat([rewards.read_picture(args.out / f"{i:05d}.png") for i in sorted(done)[:64]])
    with models.named_failure(f"cannot write to {args.out}"):
        models.save_grid(shown, args.out / "grid.png", min(8, len(shown)))
        aside = args.out / ".metadata.json.partial"  # its name says that the call is done
        aside.write_text(json.dumps({**result, "images": entries}, indent=1, default=str) + "\n")
        aside.rename(args.out / "metadata.json")
    print(f"{len(entries)} images, {how}: {nfe} NFE, {ms:.0f} ms an image; {args.out}/grid.png, metadata.json")


def export(backbone, folder):
    """Write config.json and the merged weights, as diffusers' from_pretrained reads a transformer."""
    network = backbone.transformer
    state = models.merge_adapters(network, (*backbone.below, *backbone.roles["generator"]))
    with torch.device("meta"):
        merged = type(network).from_config(network.config)
    merged.load_state_dict(state, assign=True)
    aside = folder.with_name(f".{folder.name}.partial")
    with models.named_failure(f"cannot write --export {folder}"):
        try:
            merged.save_pretrained(aside)
            models.put_in_place(aside, folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    name = type(network).__name__
    print(f'{folder}: {name}.from_pretrained("{folder}"), or transformer= of the pipeline; sample it with few steps')


def export_lora(folders, args):
    """Write the adapters as one, since B_1 A_1 + B_2 A_2 = [B_1 B_2] [A_1; A_2]; its rank is the sum of theirs."""
    stack, file = [models.read_adapter(folder)[0] for folder in folders], args.export_lora
    layers, aside = {}, file.with_name(f".{file.name}.partial")
    with models.named_failure(f"cannot write --export_lora {file}"):
        for path in sorted({path for adapter in stack for path in adapter}):
            A, B = zip(*(adapter[path] for adapter in stack if path in adapter), strict=True)
            layers[path] = torch.cat(A), torch.cat(B, 1)
        try:
            base, *others = {models.adapter_config(models.adapter_file(f)).get("revision") for f in folders}
            models.write_adapter(models.one_rank(layers), aside, None if others else base)
            models.flush(aside)
            aside.rename(file)
        finally:
            aside.unlink(missing_ok=True)
    family, readers = models.BACKBONES[args.model]["family"], "--lora and diffusers' load_lora_weights read it"
    if not family.lora_loader:
        readers = f"--lora reads it; diffusers has no LoRA loader for {family.pipeline}: give it --export's transformer"
    print(f"{file}: {len(stack)} adapters as one, as {readers}")


if __name__ == "__main__":
    models.run(main, parse_args())
