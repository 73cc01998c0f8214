"""Speed and memory of both stages at published size: ms, images/s, MFU and peak GB of their six parts.

    python tests/bench.py                                               the classroom, on a CPU
    python tests/bench.py --model sd35 --random_weights                 one GPU; nothing is downloaded
    python tests/bench.py --model flux1 --random_weights --batch_size 4 --compile
    python tests/bench.py --plan                                        will it fit? No GPU and no weights are needed
    python tests/bench.py --signal --distilled DIR                      how many images an epoch? See bench_signal.py

Stage 1: a fake-score step (rollout of k = 2, L_ac and L_cons) and a generator step (rollout, teacher with guidance,
L_G). Stage 2: a rollout with decoding, and the updates by one micro-batch (fake score; policy, two chosen steps; last
step with the leash).
MFU: matrix products and attention of the forwards, as torch counts them, a backward as one forward more (the frozen
base needs no weight gradients), over the device's dense bf16 peak. A recomputed forward is not counted.

--plan runs the same parts on fake tensors, which have shapes and no numbers, and adds up what is alive at once (a
minute or two a model). What kernels need inside, fragments and the CUDA context (1 to 2 GB) come on top: the largest
batch leaves 10%.
"""

import argparse
import json
import math
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import diffusers
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import bench_rewards  # noqa: E402
import bench_signal  # noqa: E402

import acdmd  # noqa: E402
import models  # noqa: E402
import rewards  # noqa: E402
import rtdmd  # noqa: E402

SD3 = dict(sample_size=128, attention_head_dim=64, joint_attention_dim=4096, caption_projection_dim=1536)
SD3 |= dict(pooled_projection_dim=2048, in_channels=16, out_channels=16, patch_size=2, num_layers=24)
SD3 |= dict(num_attention_heads=24)
PUBLISHED = {  # model -> numbers of its transformer (sana, prx: as diffusers' scripts/convert_*_to_diffusers.py say)
    "sana": dict(num_attention_heads=36, num_layers=28, num_cross_attention_heads=16, cross_attention_head_dim=72)
    | dict(cross_attention_dim=1152, sample_size=16),
    "prx": {},
    "sd3": SD3 | dict(pos_embed_max_size=192),
    "sd35": SD3 | dict(pos_embed_max_size=384, qk_norm="rms_norm", dual_attention_layers=tuple(range(13))),
    "flux1": dict(guidance_embeds=True),
    "flux2-4b": dict(num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680)
    | dict(guidance_embeds=False),
    "flux2-9b": dict(num_layers=8, num_single_layers=24, num_attention_heads=32, joint_attention_dim=12288)
    | dict(guidance_embeds=False),
}
TEXT = {"sana": 300, "prx": 256, "sd3": 205, "flux1": 512, "flux2": 512}  # tokens; SD3: 77 of CLIP and 128 of T5
DEEP = dict(attention_head_dim=32, upsample_block_type="interpolate", downsample_block_type="conv")  # SANA's DC-AE
DEEP |= {f"{side}_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3 for side in ("encoder", "decoder")}
DEEP |= {f"{side}_qkv_multiscales": ((), (), (), (5,), (5,), (5,)) for side in ("encoder", "decoder")}


def random_backbone(model, device, dtype, resolution=None):
    """models.Backbone of a published architecture with random weights, and dummy embeddings of one prompt."""
    spec = models.BACKBONES[model]
    family = spec["family"]
    cls = getattr(diffusers, family.network_class)
    with torch.device("meta"):
        networks = [cls(**PUBLISHED[model]) for _ in range(2 if "student" in spec else 1)]
    for i, network in enumerate(networks):
        networks[i] = network.to(dtype).to_empty(device=device)
        for name, p in networks[i].named_parameters():
            torch.nn.init.ones_(p) if "norm" in name and p.ndim == 1 else torch.nn.init.normal_(p, std=0.02)
        for b in networks[i].buffers():  # position tables: any numbers do
            torch.nn.init.normal_(b) if b.is_floating_point() else b.zero_()
    wide = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2)
    wide |= dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    if family is models.Flux2:
        vae = diffusers.AutoencoderKLFlux2()
    elif family is models.Sana:
        vae = diffusers.AutoencoderDC(**DEEP, scaling_factor=0.41407)
    else:
        vae = diffusers.AutoencoderKL(
            **wide,
            latent_channels=16,
            scaling_factor=0.36,
            shift_factor=0.12,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    dynamic = family in (models.Flux1, models.Flux2)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=dynamic, base_shift=0.5, max_shift=1.15, max_image_seq_len=4096
    )
    pipeline = getattr(diffusers, family.pipeline)
    names = "_pack_latents _unpack_latents _prepare_latent_image_ids _prepare_latent_ids _prepare_text_ids".split()
    pipe = SimpleNamespace(**{n: getattr(pipeline, n) for n in [*names, "_unpatchify_latents"] if hasattr(pipeline, n)})
    pipe.transformer, pipe.vae, pipe.scheduler = networks[0], vae.to(dtype), scheduler
    pipe.vae_scale_factor = getattr(vae, "spatial_compression_ratio", 8)
    student = networks[1] if len(networks) > 1 else None
    backbone = family(pipe, resolution or spec["resolution"], spec["text_tokens"], device, dtype, student)
    models.shard(backbone)
    config = networks[0].config
    width = next(config[n] for n in ("joint_attention_dim", "caption_channels", "context_in_dim") if n in config)
    cond = {"encoder_hidden_states": torch.randn(TEXT[family.family], width)}
    if "pooled_projection_dim" in config:
        cond["pooled_projections"] = torch.randn(config.pooled_projection_dim)
    if family in (models.Sana, models.PRX):
        mask = "encoder_attention_mask" if family is models.Sana else "attention_mask"
        cond[mask] = torch.ones(TEXT[family.family])
    backbone._embeddings = {prompt: {k: v.to(dtype) for k, v in cond.items()} for prompt in ("", "a prompt")}
    return backbone


def steps_of(backbone, optimizers, n, one, sigmas, scorers=None):
    """{part: function that runs it once on n images}, from the stages' own functions. one: stage 1's settings."""
    cond, device = backbone.encode(["a prompt"] * n), backbone.device
    noise, levels = models.Noise((0,), range(n), backbone.latent_shape, device), sigmas[:3]
    n_cons = one.consistency_batch or n

    def fake_step():
        x_s = acdmd.rollout(backbone, cond, levels, one.eta, noise)
        sigma_t = acdmd.draw_t(noise.uniform("t"), levels[-1])
        x_t, target, sigma_ts = acdmd.renoise(x_s, levels[-1], sigma_t, noise.normal("z"))
        v_fake = backbone.velocity("fake", x_t, sigma_t, cond)
        loss_ac = acdmd.fake_score_loss(v_fake, target, sigma_ts)
        point = x_t, sigma_t, v_fake
        loss_cons = acdmd.consistency(backbone, cond, point, noise[:n_cons], one.eta, one.delta_max)
        (loss_ac + one.gamma * loss_cons).backward()
        models.step_optimizer(optimizers["fake"], 1.0, 1)

    def generator_step():
        x_s = acdmd.rollout(backbone, cond, levels, one.eta, noise, grad=True)
        _, g = rtdmd.matching_gradient(backbone, cond, x_s, noise, one.guidance_scale)
        x_s.backward(g)
        models.step_optimizer(optimizers["generator"], 1.0, 1)

    def rollout_step():
        with torch.no_grad():
            backbone.decode(models.sample_latents(backbone, ["a prompt"] * n, sigmas, 0.9))

    states = torch.randn(n, 5, *backbone.latent_shape, device=device)

    def fake_update_step():
        x0 = states[:, -1]
        x_t, sigma_t, z = rtdmd.noised(x0, noise)
        v_fake = backbone.velocity("fake", x_t, sigma_t, cond)
        loss_ac = rtdmd.fake_score_loss(v_fake, x0, z, sigma_t)
        loss_cons = rtdmd.consistency(backbone, cond, (x_t, sigma_t, v_fake), noise[:n_cons], one.eta)
        (loss_ac + one.gamma * loss_cons).backward()
        models.step_optimizer(optimizers["fake"], 1.0, 1)

    def policy_step():
        for j in (0, 1):
            v = backbone.velocity("generator", states[:, j], sigmas[j], cond)
            step = states[:, j + 1], states[:, j], v, sigmas[j], sigmas[j + 1], one.eta
            ones = torch.ones(n, device=device)
            rtdmd.policy_loss(rtdmd.cps_log_prob(*step), -ones, ones).backward()
        optimizers["generator"].zero_grad()

    def last_step():
        v = backbone.velocity("generator", states[:, 3], sigmas[3], cond)
        x0_hat = models.cps_step(states[:, 3], v, sigmas[3], 0.0)
        _, g = rtdmd.matching_gradient(backbone, cond, x0_hat, noise, one.guidance_scale)
        if scorers:
            g += rtdmd.reward_gradient(backbone, scorers, ["a prompt"] * n, {"a prompt": {}}, x0_hat, 3.0)[1]
        x0_hat.backward(g)
        models.step_optimizer(optimizers["generator"], 1.0, 1)

    return {
        "stage 1, fake score": fake_step,
        "stage 1, generator": generator_step,
        "stage 2, rollout": rollout_step,
        "stage 2, fake score": fake_update_step,
        "stage 2, policy": policy_step,
        "stage 2, last step": last_step,
    }


def measure(step, backbone, images, repeat):
    """models.speed of `repeat` calls after two to warm up."""
    cuda = backbone.device.type == "cuda"
    step(), step()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    backbone.evaluations, start = 0, time.perf_counter()
    for _ in range(repeat):
        step()
    if cuda:
        torch.cuda.synchronize()
    return models.speed(backbone, time.perf_counter() - start, repeat, images * repeat)


# ---------------------------------------------------------------------------------------------------------------
# --plan


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors alive, `now` and at the `peak`; those of `known` modules aside."""

    def __init__(self, *known):
        super().__init__()
        self.now = self.peak = 0
        tensors = [t for module in known for t in (*module.parameters(), *module.buffers())]
        self.seen = {t.untyped_storage()._cdata for t in tensors}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return out

    def count(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.seen:
            self.seen.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.gone, key, size)

    def gone(self, key, size):
        self.seen.discard(key)
        self.now -= size


class NoOptimizer:
    """Clears gradients like an optimiser; Adam would read its step count, and fake tensors have no numbers."""

    def __init__(self, parameters):
        self.param_groups = [{"params": parameters}]

    def step(self):
        pass

    def zero_grad(self):
        for p in self.param_groups[0]["params"]:
            p.grad = None


class Differentiable:
    """The preset's differentiable rewards at published size, their weights on the meta device."""

    def __init__(self):
        files = bench_rewards.RandomWeights()
        files.device = "meta"
        self.scorers = [cls(files, "cpu") for cls in (rewards.CLIPScore, rewards.HPSv2, rewards.PickScore)]
        self.weights = {scorer.columns[0]: 1.0 for scorer in self.scorers}
        self.offload, self.call = False, lambda scorer, images, prompts, about: scorer(images, prompts)

    def differentiable(self, images, prompts, about):
        return rewards.Scorers.differentiable(self, images, prompts, about)


def make_fake(module):
    """Put fake tensors on the CPU in place of a meta module's parameters and buffers."""
    for m in module.modules():
        for name, p in m._parameters.items():
            if p is not None:
                m._parameters[name] = torch.nn.Parameter(torch.empty(p.shape, dtype=p.dtype), requires_grad=False)
        for name, b in m._buffers.items():
            if b is not None:
                m._buffers[name] = torch.empty(b.shape, dtype=b.dtype)


def size_of(*modules):
    return sum(p.numel() * p.element_size() for module in modules for p in module.parameters())


def peaks(backbone, n, one, scorers, checkpointing=False, only=""):
    """{part: (bytes alive at its peak beside weights and adapters, evaluations)} of n images, on fake tensors."""
    known = [*backbone.networks(), backbone.vae, *(scorers.scorers if scorers else ())]
    sigmas = backbone.sigmas()
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in known:
            make_fake(module)
        backbone.device, optimizers = torch.device("cpu"), {}
        for name, network in (("generator", backbone.student), ("fake", backbone.transformer)):
            network.lora_switch.device = backbone.device
            optimizers[name] = NoOptimizer(models.add_adapter(network, name, 32))
            backbone.roles[name] = (name,)
        models.set_up_blocks(backbone, "on" if checkpointing else "off", n, compiled=False)
        _ = backbone.uncond, backbone.flops
        found = {}
        for part, step in steps_of(backbone, optimizers, n, one, sigmas, scorers).items():
            if only not in part:
                continue
            backbone.evaluations = 0
            with LiveBytes(*known) as live:
                step()
            found[part] = live.peak, backbone.evaluations
    return found


# GB in bf16 of what encodes the text, from the published parameter counts: CLIP L .124, CLIP G .695, T5-XXL 4.762,
# Qwen3 4B 4.022 and 8B 8.191, Gemma 2 2B (SANA's) and T5Gemma 2B's encoder (PRX's) 2.614 billion
ENCODERS = {"sana": 5.23, "prx": 5.23, "sd3": 11.16, "sd35": 11.16, "flux1": 9.77, "flux2-4b": 8.04, "flux2-9b": 16.38}
# GB in fp32 of clipscore, hpsv2, pickscore and geneval's detector, the published set
REWARDS = [4 * billions for billions in (0.428, 0.986, 0.986, 0.069)]
GPUS = {"sana": 8, "prx": 8, "sd3": 16, "sd35": 8, "flux1": 32, "flux2-4b": 16, "flux2-9b": 32}  # stage 2's; 1: 8


def plan(model, args):
    """Rows of the plan, one a stage: {term: GB}, "sum", "batch", the "largest" batch that fits, GPU "hours" in all."""
    one, two = acdmd.parse_args(["--model", model, "--prompts", __file__]), rtdmd.PRESETS[model]
    resolution = args.resolution or models.BACKBONES[model]["resolution"]
    splits = args.offload_frozen or args.shard != "none"  # then auto is on
    open_ways = (False, True) if args.checkpointing == "auto" and not splits else (args.checkpointing != "off",)
    found = {}
    for checkpointing in open_ways:
        backbone = random_backbone(model, "meta", torch.bfloat16, resolution)
        for network in backbone.networks() if args.frozen_dtype else ():
            models.store_in_8_bits(network)
        found[checkpointing] = peaks(backbone, 1, one, Differentiable(), checkpointing)
    adapter = adapter_bytes(backbone) / 2 / 1e9  # of generator or fake score, fp32; as large are its gradients
    frozen = size_of(*backbone.networks()) / 1e9 - 2 * adapter
    blocks = 2 * max(size_of(m) for network in backbone.networks() for m in models.blocks(network)) / 1e9
    if splits:  # this process's share, and two blocks on their way
        frozen = blocks + (0 if args.offload_frozen else frozen / args.gpus)
    rows = []
    for stage, batch in ((1, one.batch_size), (2, two["batch_size"])):
        batch = args.batch_size or batch
        row = {"frozen": frozen, "vae": size_of(backbone.vae) / 1e9}
        row["encoders"] = 0.0 if args.offload_encoders else ENCODERS[model]
        row["rewards"] = (max(REWARDS) if args.offload_rewards else sum(REWARDS)) if stage == 2 else 0.0
        # weights and two moments of generator and fake score, the EMA; in stage 2 those of stage 1 below them
        row["adapters"] = adapter * (2 * 3 + 1 + (2 if stage == 2 else 0))
        images = two["batch_size"] * two["batches"] * (stage == 2)  # an epoch's, whose latents stay on the GPU
        row["adapters"] += images * 5 * 4 * math.prod(backbone.latent_shape) / 1e9
        fixed = sum(row.values())
        parts = {part.split(", ")[1]: part for part in found[open_ways[0]] if f"stage {stage}" in part}

        def alive(n, recompute, parts=parts):
            """(GB at the peak with micro-batches of n, the part it is in)"""
            last = min(n, args.last_step_batch or n)
            sizes = {part: last if part == "last step" else n for part in parts}
            peak = {part: found[recompute][long][0] / 1e9 for part, long in parts.items()}
            return max((adapter + sizes[part] * (peak[part] - adapter), part) for part in parts)

        # auto, as models.needs_checkpointing: do the activations take over 70% of what is free?
        row["checkpointing"] = open_ways[0] or (True in found and alive(batch, False)[0] > 0.7 * (args.gb - fixed))
        row["activations"], row["in"] = alive(batch, row["checkpointing"])
        fits = (n for n in range(1, 1025) if any(fixed + alive(n, how)[0] <= 0.9 * args.gb for how in found))
        largest = max(fits, default=0)
        work = {part: found[row["checkpointing"]][long][1] for part, long in parts.items()}
        if stage == 1:
            images = one.steps * one.batch_size * 8
            each = work["fake score"] + work["generator"] / one.fake_update_ratio
        else:
            images, each = 1000 * two["batch_size"] * two["batches"] * GPUS[model], sum(work.values())
        row |= {"sum": fixed + row["activations"], "batch": batch, "largest": largest}
        rows.append(row | {"hours": images * each * backbone.flops / (args.mfu * args.peak * 3600)})
    return rows


def adapter_bytes(backbone):
    names = ("generator", "fake")
    modules = [m for network in backbone.networks() for m in models.lora_modules(network).values()]
    return sum(4 * p[n].numel() for m in modules for p in (m.lora_A, m.lora_B) for n in names if n in p)


def print_plan(args):
    terms = ["frozen", "vae", "encoders", "rewards", "adapters", "activations"]
    head = ["model", "stage", *terms, "sum", "batch", "largest that fits", "hours"]
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    models.quiet_libraries()
    for model in [args.model] if args.model != "classroom" else PUBLISHED:
        print(f"{model} ...", end="\r", file=sys.stderr, flush=True)
        for stage, row in enumerate(plan(model, args), 1):
            cells = [model, str(stage), *(f"{row[term]:.1f}" for term in terms), f"**{row['sum']:.1f}**"]
            cells[-2] += f" ({row['in']}{', checkpointing' if row['checkpointing'] else ''})"
            cells += [str(row["batch"]), str(row["largest"]), f"{row['hours']:.0f}"]
            print("| " + " | ".join(cells) + " |", flush=True)
    print(f"Predicted, GB, for a GPU of {args.gb:g} GB and batches of one GPU. The largest leaves 10% for kernels and")
    print("fragments and may need checkpointing. Rewards: clipscore, hpsv2, pickscore, geneval.")
    print(f"Hours: GPUs times hours of the published run, at an assumed {args.mfu:.0%} of {args.peak:.3g} FLOP/s.")


def main(args):
    _, _, device = models.setup_distributed(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if args.random_weights:
        backbone = random_backbone(args.model, device, dtype, args.resolution)
    else:
        backbone = models.load(args.model, device=device, dtype=dtype, resolution=args.resolution)
    one = acdmd.parse_args(["--model", args.model, "--prompts", __file__][: 2 if args.model == "classroom" else 4])
    n = args.batch_size or one.batch_size
    networks = {"generator": backbone.student, "fake": backbone.transformer}
    optimizers = {}
    for name, network in networks.items():
        parameters = models.add_adapter(network, name, 32, generator=models.seeded(name))
        optimizers[name] = torch.optim.AdamW(parameters, lr=1e-5, fused=device.type == "cuda")
        backbone.roles[name] = (name,)
    models.set_up_blocks(backbone, args.checkpointing, n + 2 * (one.consistency_batch or n), args.compile)
    parts = steps_of(backbone, optimizers, n, one, backbone.sigmas())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    total = sum(p.numel() for network in backbone.networks() for p in network.parameters())
    print(f"{args.model} on {name}, torch {torch.__version__}, {dtype}, batch {n}")
    print(f"{total / 1e6:.1f} M parameters, {backbone.flops / 1e9:.3g} GFLOP a forward")
    print(f"{'part':22}{'ms':>10}{'images/s':>10}{'MFU':>8}{'peak GB':>9}")
    for part, step in parts.items():
        row = measure(step, backbone, n, args.repeat)
        more = f"{row['mfu']:8.1%}" if "mfu" in row else f"{'-':>8}"
        more += f"{row['peak_gb']:9.1f}" if "peak_gb" in row else f"{'-':>9}"
        print(f"{part:22}{1000 * row['seconds']:10.1f}{row['images_per_s']:10.2f}{more}", flush=True)
        if args.out:
            with args.out.open("a") as file:
                print(
                    json.dumps(
                        {"model": args.model, "device": name, "batch": n, "compile": args.compile, "part": part} | row
                    ),
                    file=file,
                )


if __name__ == "__main__":
    if "--signal" in sys.argv:
        models.run(bench_signal.main, bench_signal.parse_args([word for word in sys.argv[1:] if word != "--signal"]))
        raise SystemExit
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", default="classroom", choices=models.BACKBONES)
    parser.add_argument(
        "--random_weights", action="store_true", help="and dummy embeddings, in place of published ones"
    )
    parser.add_argument("--resolution", type=models.at_least(1), help="pixels a side (default: the backbone's)")
    parser.add_argument("--batch_size", type=models.at_least(1), help="images (default: stage 1's preset)")
    parser.add_argument("--repeat", type=models.at_least(1), default=5, help="timed calls of each part")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--checkpointing", default="auto", choices=["auto", "on", "off"], help="as in the stages")
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=models.path, help=".jsonl to append the rows to")
    parser.add_argument("--plan", action="store_true", help="predict memory and hours (default: of all published)")
    add = parser.add_argument_group("of --plan").add_argument
    of_plan = [
        add("--gb", type=models.between(1), default=80.0, help="memory of a GPU"),
        add("--gpus", type=models.at_least(1), default=1, help="that --shard shards over"),
        add("--shard", default="none", choices=models.SHARD_MODES, help="as in the stages"),
        add("--offload_frozen", action="store_true", help="as in the stages"),
        add("--offload_encoders", action="store_true", help="as in the stages"),
        add("--offload_rewards", action="store_true", help="as in rtdmd.py"),
        add("--last_step_batch", type=models.at_least(1), help="as in rtdmd.py"),
        add("--frozen_dtype", choices=["float8_e4m3fn"], help="as in the stages"),
        add("--mfu", type=models.between(0.01, 1), default=0.35, help="assumed share of the peak"),
        add("--peak", type=models.between(1e9), default=989e12, help="FLOP/s, an H100's in bf16"),
    ]
    args = parser.parse_args()
    given = [flag.option_strings[0] for flag in of_plan if getattr(args, flag.dest) != flag.default]
    if given and not args.plan:
        parser.error(f"{', '.join(given)}: only of a plan; give --plan too")
    if args.random_weights and args.model == "classroom":
        parser.error("--random_weights: the classroom has weights; leave the flag out")
    if args.model != "classroom" and not args.random_weights and not args.plan:
        parser.error(f"--model {args.model}: give --random_weights to measure on this device, or --plan to predict")
    models.run(print_plan if args.plan else main, args)
