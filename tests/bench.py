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

--plan runs the same parts on fake tensors, which have shapes and no numbers, and adds up what is alive at once. Blocks
of a kind are alike: it runs networks of two and of three of each kind, and multiplies. What kernels need inside,
fragments and the CUDA context (1 to 2 GB) come on top: the largest batch leaves 10%.
"""

import argparse
import functools
import json
import math
import os
import re
import sys
import time
import weakref
from concurrent.futures import ProcessPoolExecutor
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
    "prx": dict(depth=16),
    "sd3": SD3 | dict(pos_embed_max_size=192),
    "sd35": SD3 | dict(pos_embed_max_size=384, qk_norm="rms_norm", dual_attention_layers=tuple(range(13))),
    "flux1": dict(num_layers=19, num_single_layers=38, guidance_embeds=True),
    "flux2-4b": dict(num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680)
    | dict(guidance_embeds=False),
    "flux2-9b": dict(num_layers=8, num_single_layers=24, num_attention_heads=32, joint_attention_dim=12288)
    | dict(guidance_embeds=False),
}
TEXT = {"sana": 300, "prx": 256, "sd3": 205, "flux1": 512, "flux2": 512}  # tokens; SD3: 77 of CLIP and 128 of T5
DEEP = dict(attention_head_dim=32, upsample_block_type="interpolate", downsample_block_type="conv")  # SANA's DC-AE
DEEP |= {f"{side}_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3 for side in ("encoder", "decoder")}
DEEP |= {f"{side}_qkv_multiscales": ((), (), (), (5,), (5,), (5,)) for side in ("encoder", "decoder")}


def depth_of(model):
    """What a network's class calls the number of its plain blocks."""
    return "depth" if model == "prx" else "num_layers"


def kinds(model):
    """{kind of block: how many the network has}. Blocks of a kind are alike. dual: SD3.5's, with two attentions."""
    c = PUBLISHED[model]
    dual = len(c.get("dual_attention_layers", ()))
    counts = {"plain": c[depth_of(model)] - dual, "dual": dual, "single": c.get("num_single_layers", 0)}
    return {kind: n for kind, n in counts.items() if n}


def with_blocks(model, plain, dual=0, single=0):
    """Numbers of the published network with so many blocks of each kind."""
    c = PUBLISHED[model] | {depth_of(model): plain + dual}
    c |= {"dual_attention_layers": tuple(range(dual))} if dual else {}
    return c | ({"num_single_layers": single} if single else {})


def fill(module, device, dtype, done=()):
    """Random numbers in place of a meta module's parameters and buffers; any do for position tables. done: left out.

    A million numbers again and again: to draw 12 billion takes a CPU minutes. A prime million, so that no rows agree.
    """
    numbers = torch.empty(1_000_003, dtype=dtype, device=device).normal_()
    for m in (m for m in module.modules() if m not in done):
        for name, p in m._parameters.items():
            if p is not None:
                value = torch.empty(p.shape, dtype=dtype, device=device)
                if p.ndim == 1 and name == "weight":  # of a norm
                    value.fill_(1.0)
                else:
                    repeat(numbers, value).mul_(0.02)
                m._parameters[name] = torch.nn.Parameter(value, requires_grad=False)
        for name, b in m._buffers.items():
            if b is not None:
                kind = dtype if b.is_floating_point() else b.dtype
                value = torch.zeros(b.shape, dtype=kind, device=device)
                m._buffers[name] = repeat(numbers, value) if b.is_floating_point() else value


def repeat(numbers, value):
    """`value` filled in place with `numbers`, from the first again wherever they end."""
    for part in value.view(-1).split(len(numbers)) if value.device.type != "meta" else ():
        part.copy_(numbers[: len(part)])
    return value


def random_backbone(model, device, dtype, resolution=None, config=None, frozen_dtype=None, alone=False):
    """models.Backbone of a published architecture with random weights, and dummy embeddings of one prompt.

    config: numbers of its transformer in place of the published ones. frozen_dtype: turned into 8 bits block by block,
    so that the whole network never lies in memory in `dtype`. alone: without FLUX.2's second transformer.
    """
    spec = models.BACKBONES[model]
    family = spec["family"]
    cls = getattr(diffusers, family.network_class)
    with torch.device("meta"):
        count = 2 if "student" in spec and not alone else 1
        networks = [cls(**(config or PUBLISHED[model])) for _ in range(count)]
    for network in networks:
        done = set()
        for module in (*models.blocks(network), network):
            fill(module, device, dtype, done)
            done |= set(module.modules())
            if frozen_dtype and module is not network:
                alone_in = torch.nn.Module()
                alone_in.blocks = torch.nn.ModuleList([module])
                models.store_in_8_bits(alone_in)
    wide = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2)
    wide |= dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    with torch.device(device):
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


BY_HAND = ("sd3", "flux1", "flux2")


def flops_by_hand(backbone):
    """FLOP of one forward by one sample, from the widths alone: two for each multiply and add."""
    c, text, family = backbone.transformer.config, TEXT[backbone.family], backbone.family
    image, d = backbone.image_tokens, c.num_attention_heads * c.attention_head_dim
    both, n, single = image + text, c.num_layers, getattr(c, "num_single_layers", 0)
    attention = 2 * d * both**2 * (n + single)  # QK^T and its product with V
    channels = c.patch_size**2 * (c.in_channels + c.out_channels) if family == "sd3" else 2 * c.in_channels
    ends = image * channels * d + text * c.joint_attention_dim * d + (256 + d) * d + 2 * d * d  # time; last norm
    if family == "sd3":  # q, k, v, out and an MLP of 4 d are 12 d^2 a token, norms' scales and shifts 6 d^2 a sample
        dual = len(c.dual_attention_layers)
        products = (12 * n + 4 * dual) * image + 12 * (n - 1) * text + 3 * text  # the last block gives no text
        products += (6 * n + 3 * dual) + 6 * (n - 1) + 2
        attention += 2 * d * image**2 * dual
        ends += (c.pooled_projection_dim + d) * d
    elif family == "flux1":
        products = 12 * both * (n + single) + 12 * n + 3 * single
        ends += (c.pooled_projection_dim + d) * d + (256 + d) * d * c.guidance_embeds
    else:  # a gated MLP of 3 d: 9 d^2; scales and shifts are made once for all blocks
        products = 13 * both * (n + single) + 2 * 6 + 3
    return 2 * (products * d * d + attention + ends)


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
        loss_cons = acdmd.consistency(backbone, cond, point, noise[:n_cons], one.eta)
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

    def velocity_step():
        v = backbone.velocity("generator", states[:, 0], 0.5, cond)
        v.square().mean().backward()
        parameters = optimizers["generator"].param_groups[0]["params"]
        slope = torch.stack([p.grad.norm() for p in parameters]).norm()
        optimizers["generator"].zero_grad()
        return {"norm": v.detach().norm(), "grad_norm": slope}

    return {
        "velocity, generator": velocity_step,
        "stage 1, fake score": fake_step,
        "stage 1, generator": generator_step,
        "stage 2, rollout": rollout_step,
        "stage 2, fake score": fake_update_step,
        "stage 2, policy": policy_step,
        "stage 2, last step": last_step,
    }


def measure(step, backbone, images, repeat, warmup=2):
    """models.speed of `repeat` calls after `warmup`, and what the last call gave."""
    cuda = backbone.device.type == "cuda"
    for _ in range(warmup):
        step()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():  # Linux: the peak of resident memory begins anew
        Path("/proc/self/clear_refs").write_text("5")
    backbone.evaluations, start = 0, time.perf_counter()
    for _ in range(repeat):
        given = step()
    if cuda:
        torch.cuda.synchronize()
    row = models.speed(backbone, time.perf_counter() - start, repeat, images * repeat)
    return row | {name: value.item() for name, value in (given or {}).items()}


# ---------------------------------------------------------------------------------------------------------------
# --plan


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors alive, `now` and at the `peak`; those of `known` modules and their gradients aside."""

    def __init__(self, *known):
        super().__init__()
        self.now = self.peak = 0
        tensors = [t for module in known for t in (*module.parameters(), *module.buffers())]
        tensors += [t.grad for t in tensors if t.grad is not None]
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

    defaults = {"lr": 0.0}

    def __init__(self, parameters):
        self.param_groups = [{"params": parameters}]

    def step(self):
        pass

    def zero_grad(self):
        for p in self.param_groups[0]["params"]:
            p.grad = None


class Transient:
    """In place of differentiable rewards: their mean is the image's, and their gradient takes as many bytes meanwhile.

    rewards.Scorers.differentiable takes each scorer's gradient inside itself, so that nothing of theirs outlives it.
    """

    scorers = ()

    def __init__(self, size):
        self.size = size

    def differentiable(self, images, prompts, about):
        images.new_empty(len(images) * self.size // images.element_size())
        return images.mean((1, 2, 3)), torch.ones_like(images) / images[0].numel()


@functools.cache
def reward_bytes(names, resolution):
    """Bytes that scoring one image with gradient has alive at its peak: of the differentiable ones among `names`."""
    files = bench_rewards.RandomWeights()
    files.device, peak = "meta", 0
    for cls in dict.fromkeys(rewards.SCORERS[name] for name in names):
        if cls.differentiable:
            scorer = cls(files, "cpu")
            with FakeTensorMode(allow_non_fake_inputs=True):
                make_fake(scorer)
                image = torch.rand(1, 3, resolution, resolution, requires_grad=True)
                with LiveBytes(scorer) as live:
                    torch.autograd.grad(scorer(image, ["a prompt"])[cls.columns[0]].sum(), image)
            peak = max(peak, live.peak)
    return peak


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
    """Bytes of parameters and buffers: SD3.5's table of positions alone is 0.45 GB in bf16."""
    return sum(t.nbytes for module in modules for t in (*module.parameters(), *module.buffers()))


def size_of_buffers(*modules):
    return sum(b.nbytes for module in modules for b in module.buffers())


def peaks(backbone, n, one, scorers, checkpointing=False, only="", rank=32):
    """{part: (bytes alive at its peak, evaluations)} of n images, on fake tensors.

    Beside weights, adapters and their gradients, which are there as from a micro-batch before. only: a pattern that the
    part's name must match.
    """
    known = [*backbone.networks(), backbone.vae, *(scorers.scorers if scorers else ())]
    sigmas = backbone.sigmas()
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in known:
            make_fake(module)
        backbone.device, optimizers = torch.device("cpu"), {}
        for name, network in (("generator", backbone.student), ("fake", backbone.transformer)):
            network.lora_switch.device = backbone.device
            optimizers[name] = NoOptimizer(models.add_adapter(network, name, rank))
            backbone.roles[name] = (name,)
        models.set_up_blocks(backbone, "on" if checkpointing else "off", n, compiled=False)
        _ = backbone.uncond, backbone.flops
        found, latents = {}, torch.empty(n, *backbone.latent_shape)
        parts = steps_of(backbone, optimizers, n, one, sigmas, scorers)
        parts["sample, latents"] = lambda: models.sample_latents(backbone, ["a prompt"] * n, sigmas, one.eta)
        parts["sample, decoding"] = torch.no_grad()(lambda: backbone.decode(latents))
        for part, step in parts.items():
            if not re.search(only, part):
                continue
            backbone.evaluations = 0
            for p in (p for optimizer in optimizers.values() for p in optimizer.param_groups[0]["params"]):
                p.grad = torch.empty_like(p)
            with LiveBytes(*known) as live:
                step()
            found[part] = live.peak, backbone.evaluations
    return found


PARTS = {1: ("fake score", "generator"), 2: ("rollout", "fake score", "policy", "last step")}  # of each stage
KEEPS = "(score|generator|policy|last)"  # parts with gradient; the others keep nothing, so that nothing of them grows
# Counting is slow, so that of the parts with gradient GROW's are counted with a block more. Those in LIKE grow by
# as much as the one whose networks keep as much for the backward.
GROW = "stage 1|policy|last"
LIKE = {"stage 2, fake score": "stage 1, fake score", "velocity, generator": "stage 2, policy"}


def extrapolated(count, blocks):
    """count({kind: n}) -> {name: number} at `blocks`, from networks of two blocks of each kind and of one more of each.

    What `count` gives for one block more grows by that with each further block, and a name in LIKE as the one there
    does; all else stays. Two blocks and not one, since the first and the last may keep less, and with checkpointing
    the largest sets the peak.
    """
    few = dict.fromkeys(blocks, 2)
    first = count(few, False)
    total = dict(first)
    for kind, n in blocks.items():
        if n > few[kind]:
            more = count(few | {kind: few[kind] + 1}, True)
            for name in first:
                like = LIKE.get(name, name)
                total[name] += (n - few[kind]) * (more[like] - first[like] if like in more else 0)
    return total


def counted(model, args, one, resolution, checkpointing, only="stage|sample", n=None):
    """Facts of the published network and of one of n images, {name: number}: bytes, FLOP of a forward, evaluations.

    n: by default --batch_size, or 8. A little does not grow with it (adapters in the networks' precision), so that one
    image's share is right near that batch.
    """
    n = n or args.batch_size or 8
    dtype = getattr(torch, args.dtype)
    scorers = Transient(reward_bytes(tuple(args.rewards), resolution)) if args.rewards else None

    def count(blocks, more):
        backbone = random_backbone(model, "meta", dtype, resolution, with_blocks(model, **blocks))
        facts = {"loaded": size_of(*backbone.networks()), "vae": size_of(backbone.vae)}
        for network in backbone.networks() if args.frozen_dtype else ():
            models.store_in_8_bits(network)
        facts |= {"frozen": size_of(*backbone.networks()), "buffers": size_of_buffers(*backbone.networks())}
        facts["block"] = max(size_of(m) for network in backbone.networks() for m in models.blocks(network))
        pattern = GROW if more else f"{GROW}|{only}"
        for part, (size, evaluations) in peaks(backbone, n, one, scorers, checkpointing, pattern, args.rank).items():
            facts |= {part: size / n, f"{part}, evaluations": evaluations / n}
        # of generator or fake score, float32
        facts |= {"adapter": adapter_bytes(backbone) / 2, "latents": 4 * math.prod(backbone.latent_shape)}
        return facts | {"flops": backbone.flops}

    return extrapolated(count, kinds(model))


# GB in bf16 of what encodes the text, from the published parameter counts: CLIP L .124, CLIP G .695, T5-XXL 4.762,
# Qwen3 4B 4.022 and 8B 8.191, Gemma 2 2B (SANA's) and T5Gemma 2B's encoder (PRX's) 2.614 billion
ENCODERS = {"sana": 5.23, "prx": 5.23, "sd3": 11.16, "sd35": 11.16, "flux1": 9.77, "flux2-4b": 8.04, "flux2-9b": 16.38}
# GB of the scorers, which are float32, and in bf16 the two with a language model; geneval's and aesthetic's own, beside
# the CLIP that clipscore, geneval and aesthetic share
REWARDS = {"clipscore": 1.71, "hpsv2": 3.94, "pickscore": 3.94, "imagereward": 1.78, "ocr": 0.05}
REWARDS |= {"geneval": 0.28, "hpsv3": 15.4, "geneval2": 17.6}
GPUS = {"sd3": 16, "sd35": 8, "flux1": 32, "flux2-4b": 16, "flux2-9b": 32}  # of the published stage 2; of stage 1: 8


def plan(model, args):
    """Rows of the plan: the stages, the sample grid within each, sample.py.

    A row is {term: GB}, "sum", "batch", the "largest" batch that fits, GPU "hours" of the published run (or None), and
    "host": GB of host memory that all processes of a machine ask for while each loads the whole pipeline.
    """
    models.quiet_libraries()
    one, two = acdmd.parse_args(["--model", model, "--prompts", __file__]), rtdmd.PRESETS[model]
    resolution = args.resolution or models.BACKBONES[model]["resolution"]
    splits = args.offload_frozen or args.shard != "none"  # then auto is on
    open_ways = (False, True) if args.checkpointing == "auto" and not splits else (args.checkpointing != "off",)
    facts = counted(model, args, one, resolution, open_ways[0])
    found = {open_ways[0]: facts}
    if True in open_ways[1:]:
        found[True] = facts | counted(model, args, one, resolution, True, f"stage.*{KEEPS}")
    adapter, vae, frozen = facts["adapter"] / 1e9, facts["vae"] / 1e9, frozen_bytes(facts, args, args.gpus) / 1e9
    encoders = ENCODERS[model] * (2 if args.dtype == "float32" else 1)
    # GB of the encoders' weights that are on the GPU only while activations and offloaded rewards are not
    offloaded = encoders if args.offload_encoders else 0.0
    columns = {rewards.SCORERS[name].columns[0] for name in args.rewards}  # a scorer of two columns loads once
    columns |= {"clipscore"} if columns & {"geneval", "aesthetic"} else set()
    sizes = [REWARDS.get(column, 0.0) for column in columns]
    host = facts["loaded"] / 1e9 + vae + encoders
    rows = []
    for stage, batch in ((1, one.batch_size), (2, two["batch_size"])):
        batch = args.batch_size or batch
        row = {"frozen": frozen, "vae": vae, "encoders": encoders - offloaded}
        row["rewards"] = (max(sizes) if args.offload_rewards else sum(sizes)) if stage == 2 else 0.0
        # weights and two moments of generator and fake score, EMA, gradients of one; in stage 2 stage 1's below them
        row["adapters"] = adapter * (2 * 3 + 1 + 1 + (2 if stage == 2 else 0))
        images = two["batch_size"] * two["batches"] * (stage == 2)  # an epoch's, whose latents stay on the GPU
        row["adapters"] += images * 5 * facts["latents"] / 1e9
        fixed = sum(row.values())

        def alive(n, recompute, stage=stage):
            """(GB at the peak with micro-batches of n, the part it is in)"""
            last = min(n, args.last_step_batch or n)
            sizes = {part: last if part == "last step" else n for part in PARTS[stage]}
            peak = {part: found[recompute][f"stage {stage}, {part}"] / 1e9 for part in PARTS[stage]}
            return max((sizes[part] * peak[part], part) for part in PARTS[stage])

        # auto, as models.needs_checkpointing: do the activations take over 70% of what is free?
        checkpointing = open_ways[0] or (True in found and alive(batch, False)[0] > 0.7 * (args.gb - fixed))
        row["activations"], row["in"] = alive(batch, checkpointing)
        # what they need above `fixed`, in which an offloaded reward's place is free for them
        encoding = max(0.0, offloaded - row["rewards"] * args.offload_rewards)
        free = 0.9 * args.gb - fixed
        fits = (n for n in range(1, 1025) if any(max(alive(n, how)[0], encoding) <= free for how in found))
        hours, work = None, {part: facts[f"stage {stage}, {part}, evaluations"] for part in PARTS[stage]}
        if model in GPUS:
            if stage == 1:
                images = one.steps * one.batch_size * 8
                each = work["fake score"] + work["generator"] / one.fake_update_ratio
            else:
                images, each = 1000 * two["batch_size"] * two["batches"] * GPUS[model], sum(work.values())
            hours = images * each * facts["flops"] / (args.mfu * args.peak * 3600)
        row |= {"stage": str(stage), "batch": batch, "largest": max(fits, default=0), "hours": hours}
        row["checkpointing"] = checkpointing
        row["host"] = args.gpus * (host + (sum(sizes) if stage == 2 and args.offload_rewards else 0.0))
        grid = row | {"stage": f"{stage}, grid", "batch": 16, "largest": None, "hours": None, "checkpointing": False}
        grid["activations"], grid["in"] = sampling(facts, 16, resolution)
        for one_row in (row, grid):
            one_row["encoders"] += max(0.0, encoding - one_row["activations"])
            one_row["sum"] = fixed + max(one_row["activations"], encoding)
        rows += [row, grid]
    return [*rows, plan_sample(model, args, one, facts, encoders)]


def frozen_bytes(facts, args, processes):
    """Of the frozen base, in one process."""
    if args.shard == "none" and not args.offload_frozen:
        return facts["frozen"]
    # buffers, which every process has whole, what is gathered (two blocks on their way, or all of it until the backward
    # is done), and its share
    split = facts["frozen"] - facts["buffers"]
    gathered = split if args.shard == "grad" else 2 * facts["block"]
    return facts["buffers"] + gathered + (0 if args.offload_frozen else split / processes)


def sampling(facts, n, resolution):
    """(GB alive while n images are sampled and decoded as models.decode_all does, the part it is in)."""
    decoded = min(n, max(1, 8 * 512**2 // resolution**2))
    decoding = n * facts["latents"] + decoded * facts["sample, decoding"]
    return max((n * facts["sample, latents"] / 1e9, "latents"), (decoding / 1e9, "decoding"))


def plan_sample(model, args, one, facts, encoders):
    """The row of sample.py, which holds one transformer, two adapters and no rewards: at its own size and batch."""
    spec = models.BACKBONES[model]
    resolution = args.resolution or spec.get("pictures", spec["resolution"])
    batch = args.batch_size or min(50, max(1, 8 * 1024**2 // resolution**2))
    config = with_blocks(model, **dict.fromkeys(kinds(model), 1))
    backbone = random_backbone(model, "meta", getattr(torch, args.dtype), resolution, config)
    few = {part: size for part, (size, _) in peaks(backbone, 1, one, None, only="sample", rank=args.rank).items()}
    few["latents"] = 4 * math.prod(backbone.latent_shape)
    row = {"frozen": facts["loaded"] / 1e9 / len(backbone.networks()), "vae": facts["vae"] / 1e9, "encoders": encoders}
    host = args.gpus * sum(row.values())
    row |= {"rewards": 0.0, "adapters": 2 * facts["adapter"] / 1e9}
    fixed = sum(row.values())
    fits = (n for n in range(1, 1025) if fixed + sampling(few, n, resolution)[0] <= 0.9 * args.gb)
    row["activations"], row["in"] = sampling(few, batch, resolution)
    row |= {"stage": "sample.py", "sum": fixed + row["activations"], "batch": batch, "largest": max(fits, default=0)}
    return row | {"hours": None, "host": host, "checkpointing": False}


def adapter_bytes(backbone):
    names = ("generator", "fake")
    modules = [m for network in backbone.networks() for m in models.lora_modules(network).values()]
    return sum(4 * p[n].numel() for m in modules for p in (m.lora_A, m.lora_B) for n in names if n in p)


def print_plan(args):
    terms = ["frozen", "vae", "encoders", "rewards", "adapters", "activations"]
    head = ["model", "stage", *terms, "sum", "batch", "largest that fits", "hours", "host"]
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    asked = [args.model] if args.model != "classroom" else list(PUBLISHED)
    with ProcessPoolExecutor(os.cpu_count()) as processes:
        plans = (processes.map if len(asked) > 1 else map)(plan, asked, [args] * len(asked))
        for model, row in ((model, row) for model, rows in zip(asked, plans, strict=True) for row in rows):
            cells = [model, row["stage"], *(f"{row[term]:.1f}" for term in terms), f"**{row['sum']:.1f}**"]
            cells[-2] += f" ({row['in']}{', checkpointing' if row['checkpointing'] else ''})"
            cells += [str(row["batch"]), "-" if row["largest"] is None else str(row["largest"])]
            cells += ["-" if row["hours"] is None else f"{row['hours']:.0f}", f"{row['host']:.0f}"]
            print("| " + " | ".join(cells) + " |", flush=True)
    print(f"Predicted, GB, for a GPU of {args.gb:g} GB and batches of one GPU. The largest leaves 10% for kernels and")
    print(f"fragments and may need checkpointing. Rewards: {', '.join(args.rewards)}. Rank {args.rank}, {args.dtype}.")
    if args.offload_encoders:
        print("Encoders: what they need, while they encode, beyond the place of activations and offloaded rewards.")
    print(f"Hours: GPUs times hours of the published run, at an assumed {args.mfu:.0%} of {args.peak:.3g} FLOP/s.")
    print(f"Host: memory of one machine while its {args.gpus} process{'es' * (args.gpus > 1)} load.")


def predicted(args, one, n, dtype):
    """({part: GB} of this process by the plan: weights, adapters and moments, what is alive at once; FLOP counted)."""
    resolution = args.resolution or models.BACKBONES[args.model]["resolution"]
    own = {"dtype": str(dtype).removeprefix("torch."), "rewards": {}, "offload_frozen": False}
    args = SimpleNamespace(**vars(args) | own)
    facts = counted(args.model, args, one, resolution, args.checkpointing == "on", args.only, n)
    if args.only == "velocity" and "student" in models.BACKBONES[args.model]:
        facts |= {"frozen": facts["frozen"] / 2, "buffers": facts["buffers"] / 2}
    adapter, fixed = facts["adapter"], facts["vae"] + frozen_bytes(facts, args, int(os.environ.get("WORLD_SIZE", 1)))
    parts = [part for part in facts if f"{part}, evaluations" in facts]
    # two adapters, the gradients of one and, where an optimiser steps, the moments of both
    held = {part: (3 if part.startswith("velocity") else 7) * adapter for part in parts}
    sizes = {part: (fixed + held[part] + n * facts[part]) / 1e9 for part in parts}
    return sizes, facts["flops"]


def main(args):
    _, _, device = models.setup_distributed(args.device)
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    torch.manual_seed(0)
    one = acdmd.parse_args(["--model", args.model, "--prompts", __file__][: 2 if args.model == "classroom" else 4])
    n = args.batch_size or one.batch_size
    plan_of, flops = predicted(args, one, n, dtype) if args.predict else ({}, None)
    resident = memory_now()
    if args.random_weights:
        options = dict(frozen_dtype=args.frozen_dtype, alone=args.only == "velocity")
        backbone = random_backbone(args.model, device, dtype, args.resolution, **options)
        models.shard(backbone, args.shard)
    else:
        places = dict(resolution=args.resolution, mode=args.shard, frozen_dtype=args.frozen_dtype)
        backbone = models.load(args.model, device=device, dtype=dtype, **places)
    total = sum(p.numel() for network in backbone.networks() for p in network.parameters())
    if flops:  # a forward less
        backbone.flops = flops
    networks = {"generator": backbone.student, "fake": backbone.transformer}
    optimizers = {}
    for name, network in networks.items():
        parameters = models.add_adapter(network, name, args.rank, generator=models.seeded(name))
        for B in parameters[1::2]:  # 0 at first, so that A had no gradient
            torch.nn.init.normal_(B, std=0.01)
        optimizers[name] = torch.optim.AdamW(parameters, lr=1e-5, fused=device.type == "cuda")
        backbone.roles[name] = (name,)
    models.set_up_blocks(backbone, args.checkpointing, n + 2 * (one.consistency_batch or n), args.compile)
    parts = steps_of(backbone, optimizers, n, one, backbone.sigmas())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{args.model} on {name}, torch {torch.__version__}, {dtype}, base {args.frozen_dtype or dtype}, batch {n}")
    hand = (
        f", {flops_by_hand(backbone) / 1e9:.4g} by hand" if args.random_weights and backbone.family in BY_HAND else ""
    )
    print(f"{total / 1e6:.1f} M parameters, {backbone.flops / 1e9:.4g} GFLOP a forward{hand}")
    if device.type == "cpu":
        print(f"resident before any weight: {resident:.2f} GB, which is part of peak and plan")
    print(
        f"{'part':22}{'ms':>10}{'images/s':>10}{'MFU':>8}{'peak GB':>9}" + f"{'plan GB':>9}" * bool(plan_of), flush=True
    )
    for part, step in parts.items():
        if not re.search(args.only, part):
            continue
        row = measure(step, backbone, n, args.repeat, args.warmup)
        row |= {"plan_gb": plan_of[part] + (resident if device.type == "cpu" else 0)} if plan_of else {}
        more = f"{row['mfu']:8.1%}" if "mfu" in row else f"{'-':>8}"
        more += f"{row['peak_gb']:9.2f}" if "peak_gb" in row else f"{'-':>9}"
        more += f"{row['plan_gb']:9.2f}" if plan_of else ""
        more += "".join(f"  {name} {row[name]:.6g}" for name in ("norm", "grad_norm") if name in row)
        print(f"{part:22}{1000 * row['seconds']:10.1f}{row['images_per_s']:10.2f}{more}", flush=True)
        if args.out:
            facts = {"model": args.model, "device": name, "batch": n, "compile": args.compile, "part": part}
            with args.out.open("a") as file:
                print(json.dumps(facts | row), file=file)


def memory_now():
    """GB of resident memory; NaN where Linux's /proc is not."""
    file = Path("/proc/self/statm")
    return int(file.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9 if file.exists() else math.nan


def parse_args(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if "--signal" in argv:
        return bench_signal.parse_args([word for word in argv if word != "--signal"])
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", default="classroom", choices=models.BACKBONES)
    parser.add_argument(
        "--random_weights", action="store_true", help="and dummy embeddings, in place of published ones"
    )
    parser.add_argument("--resolution", type=models.at_least(1), help="pixels a side (default: the backbone's)")
    parser.add_argument("--batch_size", type=models.at_least(1), help="images (default: stage 1's preset)")
    parser.add_argument("--repeat", type=models.at_least(1), default=5, help="timed calls of each part")
    parser.add_argument("--warmup", type=models.at_least(0), default=2, help="calls before those")
    parser.add_argument("--only", default="stage", help="parts whose name has this pattern: velocity; stage 1; rollout")
    parser.add_argument("--rank", type=models.at_least(1), default=32, help="of the adapters")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="default: bfloat16, measured on a CPU float32")
    parser.add_argument("--frozen_dtype", choices=["float8_e4m3fn"], help="as in the stages")
    parser.add_argument("--shard", default="none", choices=models.SHARD_MODES, help="as in the stages")
    parser.add_argument("--predict", action="store_true", help="the plan's memory of each part beside the measured one")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--checkpointing", default="auto", choices=["auto", "on", "off"], help="as in the stages")
    parser.add_argument("--device", type=models.device_name, choices=["cpu", "cuda"])
    parser.add_argument("--out", type=models.path, help=".jsonl to append the rows to")
    parser.add_argument("--plan", action="store_true", help="predict memory and hours (default: of all published)")
    add = parser.add_argument_group("of --plan").add_argument
    of_plan = [
        add("--gb", type=models.between(1), default=80.0, help="memory of a GPU"),
        add(
            "--gpus",
            type=models.at_least(1),
            default=1,
            help="of a machine: --shard shards over them, and each process loads",
        ),
        add("--offload_frozen", action="store_true", help="as in the stages"),
        add("--offload_encoders", action="store_true", help="as in the stages"),
        add("--offload_rewards", action="store_true", help="as in rtdmd.py"),
        add("--last_step_batch", type=models.at_least(1), help="as in rtdmd.py"),
        add(
            "--rewards",
            type=rewards.parse_weights,
            default=rewards.parse_weights(rtdmd.PUBLISHED),
            help="as in rtdmd.py",
        ),
        add("--mfu", type=models.between(0.01, 1), default=0.35, help="assumed share of the peak"),
        add("--peak", type=models.between(1e9), default=989e12, help="FLOP/s, an H100's in bf16"),
    ]
    args = parser.parse_args(argv)
    given = [flag.option_strings[0] for flag in of_plan if getattr(args, flag.dest) != flag.default]
    if given and not args.plan:
        parser.error(f"{', '.join(given)}: only of a plan; give --plan too")
    if args.random_weights and args.model == "classroom":
        parser.error("--random_weights: the classroom has weights; leave the flag out")
    if args.model != "classroom" and not args.random_weights and not args.plan:
        parser.error(f"--model {args.model}: give --random_weights to measure on this device, or --plan to predict")
    if args.predict and (not args.random_weights or args.checkpointing == "auto" and args.device != "cpu"):
        parser.error("--predict: give --random_weights too, and on a GPU --checkpointing on or off")
    if args.plan:
        args.dtype = args.dtype or "bfloat16"
    return args


if __name__ == "__main__":
    args = parse_args()
    models.run(bench_signal.main if "--signal" in sys.argv else print_plan if args.plan else main, args)
