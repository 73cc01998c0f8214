"""What both stages share: formulas, noise, LoRA, backbones, sampler, training step; below the banner, how a run is run.

A backbone wraps a diffusers pipeline object. Text encoding, VAE, scheduler and packing are the pipeline's own; this
file adds `velocity`, which runs the one frozen transformer as teacher, generator or fake score. A role is a list
of LoRA adapters (arXiv 2605.26108, section 3), so three networks cost one copy of the weights.

Notation of the paper: x_sigma = (1 - sigma) x0 + sigma noise, v = noise - x0, x0_hat = x - sigma v,
eps_hat = x + (1 - sigma) v. All of it is computed in float32, also where the networks run in bf16.
"""

import argparse
import contextlib
import errno
import functools
import hashlib
import importlib.util
import inspect
import json
import math
import os
import pickle
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------------------
# shared formulas (tensors in, tensors out, float32 inside)


def to_device(tensor, device):
    """tensor.to(device) that does not make the CPU wait for what the GPU has queued."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def per_sample(value, x):
    """A number or [B] tensor as float32 [B, 1, 1, 1] on x's device (as many ones as x asks for)."""
    if not isinstance(value, torch.Tensor):
        value = torch.full((), value, dtype=torch.float32, device=x.device)
    return to_device(value, x.device).float().reshape(-1, *[1] * (x.ndim - 1))


def cps_mean(x, v, sigma, sigma_next, eta=0.0):
    """Mean of one coefficient-preserving step: mu = (1 - s') x0_hat + s' cos(eta pi/2) eps_hat (App. C)."""
    x, v = x.float(), v.float()
    s, s_next = per_sample(sigma, x), per_sample(sigma_next, x)
    x0_hat, eps_hat = x - s * v, x + (1 - s) * v
    return (1 - s_next) * x0_hat + s_next * math.cos(eta * math.pi / 2) * eps_hat


def cps_step(x, v, sigma, sigma_next, eta=0.0, noise=None):
    """One step of coefficient-preserving sampling, x' = mu + s' sin(eta pi/2) z. eta 0: Euler; eta 1: full re-noising.

    x, v, noise: [B, C, H, W]; sigma, sigma_next: floats or [B], in [0, 1]. noise: needed where eta and sigma_next are
    above 0; at sigma_next = 0 the step is deterministic, x' = x0_hat. Returns float32.
    """
    mean = cps_mean(x, v, sigma, sigma_next, eta)
    if eta == 0 or isinstance(sigma_next, float) and sigma_next == 0:
        return mean
    return mean + per_sample(sigma_next, mean) * math.sin(eta * math.pi / 2) * noise.float()


FEW_STEPS = (1000, 750, 500, 250)  # raw timesteps of the four-step schedule, before the backbone's shift


def few_step_sigmas(scheduler, steps, image_tokens=None, family="sd3"):
    """Noise levels of a few-step schedule, the closing 0 included (App. K). steps: raw timesteps such as FEW_STEPS.

    The shift is the diffusers scheduler's own; where it depends on the picture's size, it is the family's `shift_mu`.
    """
    mu = None
    if scheduler.config.use_dynamic_shifting:
        own = next(cls for cls in Backbone.__subclasses__() if cls.family == family)
        mu = own.shift_mu(scheduler.config, image_tokens, len(steps))
    scheduler.set_timesteps(sigmas=[step / 1000 for step in steps], mu=mu)
    return scheduler.sigmas.tolist()


def seeded(*key):
    """A CPU generator that depends on nothing but the key, e.g. (seed, step, "order"); stable over processes."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class Noise:
    """Random numbers of a batch; row i depends on (key, name, indices[i]) alone. key: a tuple.

        noise = Noise((seed, step, "fake"), range(32), (16, 64, 64), device)
        noise.normal("z")         [32, 16, 64, 64] standard normal       noise.uniform("t")     [32] in [0, 1)
        noise[:8].normal("z")     the first 8 of those

    indices number the samples of all ranks, so a run draws the same whether one process holds the batch or several do;
    and a resumed run draws what the uninterrupted one would have: no generator has a state that could be lost.
    """

    def __init__(self, key, indices, shape, device):
        self.key, self.indices, self.shape, self.device = key, indices, shape, device

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, rows):
        return Noise(self.key, self.indices[rows], self.shape, self.device)

    def normal(self, *name):
        return self._draw(torch.randn, self.shape, name)

    def uniform(self, *name):
        return self._draw(torch.rand, (), name)

    def _draw(self, kind, shape, name):
        rows = [kind(shape, generator=seeded(*self.key, *name, int(i))) for i in self.indices]
        return to_device(torch.stack(rows), self.device)


class EMA:
    """Exponential moving average: `average` follows `parameters`.

    decay: fixed (stage 1), or with `warmup` min(decay, (1 + n) / (10 + n)) (stage 2). `update(n)` ends iteration or
    epoch n = 1, 2, ...; it acts when n + 1 is a multiple of `every`, the release's counting: of 8, first at n = 7.
    """

    def __init__(self, parameters, average, decay, every=1, warmup=False):
        self.parameters, self.average = list(parameters), list(average)
        self.decay, self.every, self.warmup = decay, every, warmup

    @torch.no_grad()
    def update(self, n):
        if (n + 1) % self.every == 0:
            decay = min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay
            torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)


# ---------------------------------------------------------------------------------------------------------------
# LoRA by hand: named adapters on one frozen base

LORA_SCALE = 2.0  # alpha / rank of every adapter; a file's own scale goes into B as it is read


class LoRALinear(nn.Module):
    """y = W x + 2 B A x summed over the active adapters. The base is frozen; A and B are float32."""

    def __init__(self, base, switch):
        super().__init__()
        self.base, self.switch = base, switch
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()

    def forward(self, x):
        device = x.device.type
        if torch.is_autocast_enabled(device):  # cast once: so that one copy is kept for the backward
            x = x.to(torch.get_autocast_dtype(device))
        rows = x.flatten(0, -2)
        y = self.base(rows)
        for name in self.switch.active:
            if name in self.lora_A:
                A, B = self.lora_A[name].to(x.dtype), self.lora_B[name].to(x.dtype)
                # in place: y, wide as it is, is read and written once and not four times, and no backward asks for it
                y = y.addmm_(F.linear(rows, A), B.t(), alpha=LORA_SCALE)
        return y.unflatten(0, x.shape[:-1])


@contextlib.contextmanager
def adapters(transformer, *names):
    """Switch on exactly these adapters. Nests; the former list comes back at the end."""
    switch = transformer.lora_switch
    missing = [name for name in names if name not in switch.known]
    if missing:
        raise UserError(f"no adapter named {missing[0]!r}; this transformer has: {', '.join(switch.known) or 'none'}")
    before, switch.active = switch.active, names
    try:
        yield
    finally:
        switch.active = before


def lora_modules(transformer):
    """{module path in the transformer as published: LoRALinear}"""
    return {name: m for name, m in transformer.named_modules() if isinstance(m, LoRALinear)}


def prepare_for_lora(transformer, targets, device=None):
    """Freeze the transformer and wrap every Linear whose path ends in one of `targets`; adapters go to `device`."""
    transformer.requires_grad_(False)
    transformer.lora_switch = SimpleNamespace(active=(), known=[], device=device)
    linears = [n for n, m in transformer.named_modules() if isinstance(m, nn.Linear)]
    taken = [path for path in linears if any(path.endswith("." + target) for target in targets)]
    if not taken:
        raise UserError(f"no linear layer of {type(transformer).__name__} ends in one of {', '.join(targets)}")
    for path in taken:
        parent, _, leaf = path.rpartition(".")
        parent = transformer.get_submodule(parent)
        base = parent.get_submodule(leaf)
        setattr(parent, leaf, LoRALinear(base, transformer.lora_switch))


def add_adapter(transformer, name, rank=32, *, init_std=None, generator=None, trainable=True):
    """Add adapter `name` to every wrapped Linear: A ~ N(0, init_std^2), default 1/rank (PEFT's "gaussian"), B = 0.

    The draws come from a CPU generator, so every rank makes the same. Returns the list of its parameters.
    """
    assert name not in transformer.lora_switch.known, name
    for module in lora_modules(transformer).values():
        out_features, in_features = module.base.weight.shape
        A = torch.randn(rank, in_features, generator=generator) * (1 / rank if init_std is None else init_std)
        B = torch.zeros(out_features, rank)
        device = transformer.lora_switch.device or module.base.weight.device
        module.lora_A[name] = nn.Parameter(A.to(device), requires_grad=trainable)
        module.lora_B[name] = nn.Parameter(B.to(device), requires_grad=trainable)
    transformer.lora_switch.known.append(name)
    return adapter_parameters(transformer, name)


def adapter_parameters(transformer, name):
    """[A_1, B_1, A_2, B_2, ...] of one adapter."""
    return [p for m in lora_modules(transformer).values() for p in (m.lora_A[name], m.lora_B[name])]


# ---------------------------------------------------------------------------------------------------------------
# backbones

ATTENTION = tuple(f"attn.{n}" for n in "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out".split())
CACHE_BYTES = 4e9  # host memory for prompt embeddings


class Backbone:
    """A diffusers pipeline, its transformer frozen and open to adapters.

        role        base weights     adapters in stage 1     in stage 2
        teacher     transformer      none                    none
        generator   student          generator               distilled, rl
        ema         student          generator_ema           distilled, rl_ema
        fake        transformer      fake                    fake, fake_rl

    `student` is `transformer`, but for FLUX.2, whose generator starts from weights of its own. The stage fills in
    `roles`, {role: names of its adapters}. A subclass a family says what differs (docs/backbones.md):
        pipeline, network_class, lora_targets               names in diffusers; ends of the paths that take adapters
        patch -> latent pixels a side of one token          shape(side) -> latent_shape, side in VAE latent pixels
        encode_texts(prompts) -> {keyword of the transformer: [B, ...]}
        predict(network, x, sigma, cond, guidance_scale) -> one forward, [B, C, H, W] in and out, packing inside
        vae_latents(latents) -> what the VAE decodes
    """

    embedded_guidance = False  # the guidance scale is an input of the network, not a second pass
    even_levels = False  # the pipeline spaces its levels evenly before the shift; else the scheduler makes its own
    lora_loader = True  # the pipeline has a load_lora_weights that fits its transformer
    package = None  # one that the pipeline needs beside ours

    def __init__(self, pipe, resolution, text_tokens, device="cpu", dtype=torch.float32, student=None):
        self.pipe, self.device, self.dtype, self.text_tokens = pipe, torch.device(device), dtype, text_tokens
        self.transformer, self.vae, self.scheduler = pipe.transformer, pipe.vae.requires_grad_(False), pipe.scheduler
        self.student = self.transformer if student is None else student
        factor = pipe.vae_scale_factor * self.patch  # pixels a side of one token
        largest = factor * getattr(self.transformer.config, "pos_embed_max_size", math.inf)
        if resolution % factor:
            near = f"{resolution - resolution % factor or factor} or {resolution - resolution % factor + factor}"
            raise UserError(f"resolution {resolution} does not divide by {factor}: try {near}")
        if resolution > largest:
            raise UserError(f"resolution {resolution}: this transformer's table of positions ends at {largest}")
        self.resolution, self.image_tokens = resolution, (resolution // factor) ** 2
        self.vae.to(device, memory_format=torch.channels_last)
        encoders = (getattr(pipe, f"text_encoder{n}", None) for n in ("", "_2", "_3"))
        self.encoders = [encoder for encoder in encoders if encoder is not None]
        self.offload_encoders = False  # text encoders wait on the CPU while they do not encode
        self.latent_shape = self.shape(resolution // pipe.vae_scale_factor)
        for network in self.networks():
            prepare_for_lora(network, self.lora_targets, self.device)
        self.roles = {"teacher": (), "generator": (), "fake": ()}
        self.below = ()  # frozen adapters under every role: --teacher_lora
        self._embeddings = {}  # prompt -> {name: its row}, on the CPU
        self._position_ids = {}
        self.evaluations = 0  # of the network by one sample since the last log line; with gradient they count twice

    def networks(self):
        """The different transformers: one, or FLUX.2's two."""
        return [self.transformer] if self.student is self.transformer else [self.transformer, self.student]

    def network(self, role):
        """The transformer a role runs on, which also holds its adapters."""
        return self.transformer if role in ("teacher", "fake") else self.student

    @torch.no_grad()
    def remember(self, prompts):
        """Encode what is new of all of a step's prompts: encoders that wait on the CPU then come to the GPU once."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._embeddings]
        if not new:
            return
        for encoder in self.encoders:
            encoder.to(self.device)
        # On a CPU one at a time: rounding depends on the neighbours in a batch, and a resumed run has others. On a GPU
        # eight, though the last digit may differ: the logits of FLUX.2's encoder are a gigabyte then.
        at_once = 1 if self.device.type == "cpu" else 8
        for part in (new[i : i + at_once] for i in range(0, len(new), at_once)):
            columns = {name: value.cpu().unbind() for name, value in self.encode_texts([*part]).items()}
            for i, prompt in enumerate(part):
                self._embeddings[prompt] = {name: column[i] for name, column in columns.items()}
        for encoder in self.encoders:
            encoder.to("cpu" if self.offload_encoders else self.device)

    def encode(self, prompts):
        """Embeddings as the transformer's own keyword arguments, each [B, ...]. Repeated prompts come from a cache."""
        self.remember(prompts)
        rows = [self._embeddings[p] for p in prompts]
        size = sum(value.nbytes for value in rows[0].values())
        while len(self._embeddings) > max(2, CACHE_BYTES / size):  # the oldest go
            del self._embeddings[next(iter(self._embeddings))]
        return {name: to_device(torch.stack([row[name] for row in rows]), self.device) for name in rows[0]}

    @functools.cached_property
    def uncond(self):
        """encode([""]), one row, for classifier-free guidance."""
        return self.encode([""])

    def velocity(self, role, x, sigma, cond, guidance_scale=1.0, uncond=None):
        """v = noise - x0 as `role` sees it, float32 [B, C, H, W]. sigma: float or [B] in [0, 1].

        guidance_scale > 1 runs unconditional and conditional as one batch of 2B: v = v_u + scale (v_c - v_u). `uncond`:
        one row for all samples or one each; by default the empty prompt. Where guidance is embedded, one pass is told
        the scale.
        """
        x, network = x.float(), self.network(role)
        sigma = per_sample(sigma, x).flatten().expand(len(x))
        guided = self.passes(guidance_scale) == 2
        if guided:
            uncond = self.uncond if uncond is None else uncond
            cond = {key: torch.cat([uncond[key].expand_as(cond[key]), cond[key]]) for key in cond}
            x, sigma = torch.cat([x, x]), torch.cat([sigma, sigma])
        self.evaluations += len(x) * (1 + torch.is_grad_enabled())  # a frozen base's backward costs one forward
        mixed = torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)
        with adapters(network, *self.below, *self.roles[role]), mixed:
            v = self.predict(network, x, sigma, cond, guidance_scale).float()
        if guided:
            v_uncond, v_cond = v.chunk(2)  # NOTE(paper): the release runs FLUX's two passes one after the other
            v = v_uncond + guidance_scale * (v_cond - v_uncond)
        return v

    def passes(self, guidance_scale):
        """Network evaluations of one guided velocity."""
        return 1 if self.embedded_guidance or guidance_scale <= 1 else 2

    @functools.cached_property
    def flops(self):
        """FLOP of one evaluation by one sample, as torch counts matrix products and attention."""
        x, cond = torch.randn(1, *self.latent_shape, device=self.device), self.encode([""])
        # torch counts the attention of GPUs, and leaves a CPU's out
        on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        attention = {on_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}  # of their shapes
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=attention) as counter:
            self.velocity("teacher", x, 0.5, cond)
        return counter.get_total_flops()

    def position_ids(self, make, shape):
        """make(a tensor of this shape) on the device, once: pipelines make them on the CPU, and copies make it wait."""
        if shape not in self._position_ids:
            self._position_ids[shape] = make(torch.empty(shape)).to(self.device)
        return self._position_ids[shape]

    def decode(self, latents):
        """Images [B, 3, H, W] in [0, 1], float32, differentiable in the latents [B, C, H, W]."""
        z = self.vae_latents(latents)
        return (self.vae.decode(z.to(self.vae.dtype)).sample.float() / 2 + 0.5).clamp(0, 1)

    @property
    def patch(self):
        return self.transformer.config.patch_size

    def shape(self, side):
        return (self.transformer.config.in_channels, side, side)

    def vae_latents(self, latents):
        return latents / self.vae.config.scaling_factor + (getattr(self.vae.config, "shift_factor", None) or 0.0)

    def sigmas(self, steps=FEW_STEPS):
        """Noise levels ending in 0.0: of few raw timesteps, or of the pipeline's own schedule of `steps` steps."""
        if isinstance(steps, int) and not self.even_levels:
            self.scheduler.set_timesteps(steps)
            return self.scheduler.sigmas.tolist()
        if isinstance(steps, int):
            steps = [1000 * (1 - i / steps) for i in range(steps)]
        return few_step_sigmas(self.scheduler, steps, self.image_tokens, self.family)

    @staticmethod
    def shift_mu(config, image_tokens, steps):
        """Of a scheduler whose shift depends on the picture's size: log of the shift, linear in the image tokens."""
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        c = config
        return calculate_shift(image_tokens, c.base_image_seq_len, c.max_image_seq_len, c.base_shift, c.max_shift)


class SD3(Backbone):
    """SD3-M, SD3.5-M and the classroom: StableDiffusion3Pipeline. Latents [16, side / 8, side / 8]."""

    family = "sd3"
    pipeline, network_class = "StableDiffusion3Pipeline", "SD3Transformer2DModel"
    lora_targets = ATTENTION

    def encode_texts(self, prompts):
        options = dict(device=self.device, max_sequence_length=self.text_tokens, do_classifier_free_guidance=False)
        embeds, _, pooled, _ = self.pipe.encode_prompt(prompts, None, None, **options)
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def predict(self, network, x, sigma, cond, guidance_scale):
        return network(hidden_states=x.to(self.dtype), timestep=1000 * sigma, **cond, return_dict=False)[0]


class Flux1(Backbone):
    """FLUX.1-dev: FluxPipeline. Latents [16, side / 8, side / 8], packed 2x2 into tokens for the transformer."""

    family = "flux1"
    pipeline, network_class = "FluxPipeline", "FluxTransformer2DModel"
    lora_targets = ATTENTION
    patch, even_levels = 2, True

    def __init__(self, pipe, *args, **kwargs):
        self.embedded_guidance = pipe.transformer.config.guidance_embeds
        super().__init__(pipe, *args, **kwargs)
        for network in self.networks():
            network.time_text_embed.register_forward_pre_hook(self.exact_levels)

    def exact_levels(self, module, args):
        """The network rounds time and guidance to bf16 under autocast, 849.1 to 848: put them back as they were."""
        return (*self.levels, args[-1])

    def shape(self, side):
        return (self.transformer.config.in_channels // 4, side, side)

    def encode_texts(self, prompts):
        embeds, pooled, _ = self.pipe.encode_prompt(prompts, device=self.device, max_sequence_length=self.text_tokens)
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def predict(self, network, x, sigma, cond, guidance_scale):
        (b, c, h, w), text = x.shape, cond["encoder_hidden_states"]
        guidance = x.new_full((b,), guidance_scale) if self.embedded_guidance else None
        self.levels = [1000 * number for number in (sigma, guidance) if number is not None]
        ids = lambda like: self.pipe._prepare_latent_image_ids(b, h // 2, w // 2, "cpu", like.dtype)  # noqa: E731
        v = network(
            hidden_states=self.pipe._pack_latents(x, b, c, h, w),
            timestep=sigma,
            guidance=guidance,
            img_ids=self.position_ids(ids, x.shape),
            txt_ids=x.new_zeros(text.shape[1], 3),
            **cond,
            return_dict=False,
        )[0]
        return self.pipe._unpack_latents(v, 8 * h, 8 * w, 8)  # sizes as in pixels of a VAE with factor 8


class Flux2(Backbone):
    """FLUX.2-klein: Flux2KleinPipeline. Latents [128, side / 16, side / 16], patchified and normalised by the VAE."""

    family = "flux2"
    pipeline, network_class = "Flux2KleinPipeline", "Flux2Transformer2DModel"
    lora_targets = (*ATTENTION, "attn.to_qkv_mlp_proj", "attn.to_out")  # the last two: single-stream blocks
    patch, even_levels = 2, True

    def shape(self, side):
        return (self.transformer.config.in_channels, side // 2, side // 2)

    def encode_texts(self, prompts):
        embeds, _ = self.pipe.encode_prompt(prompts, device=self.device, max_sequence_length=self.text_tokens)
        return {"encoder_hidden_states": embeds}

    def predict(self, network, x, sigma, cond, guidance_scale):
        (b, c, h, w), text = x.shape, cond["encoder_hidden_states"]
        v = network(  # float32 in: the network rounds its time to the dtype of hidden_states
            hidden_states=self.pipe._pack_latents(x),
            timestep=sigma,
            guidance=None,
            img_ids=self.position_ids(self.pipe._prepare_latent_ids, x.shape),
            txt_ids=self.position_ids(self.pipe._prepare_text_ids, text.shape),
            **cond,
            return_dict=False,
        )[0]
        return v.transpose(1, 2).reshape(b, c, h, w)

    def vae_latents(self, latents):
        norm = self.vae.bn
        mean, var = norm.running_mean.view(1, -1, 1, 1), norm.running_var.view(1, -1, 1, 1)
        return self.pipe._unpatchify_latents(latents * (var + self.vae.config.batch_norm_eps).sqrt() + mean)

    @staticmethod
    def shift_mu(config, image_tokens, steps):
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        return compute_empirical_mu(image_tokens, steps)


class Sana(Backbone):
    """SANA: SanaPipeline. Latents [32, side / 32, side / 32] of the DC-AE, each pixel a token."""

    family = "sana"
    pipeline, network_class = "SanaPipeline", "SanaTransformer2DModel"
    lora_targets = tuple(f"attn{i}.{name}" for i in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0"))
    even_levels = True

    def __init__(self, pipe, *args, **kwargs):
        from diffusers import FlowMatchEulerDiscreteScheduler

        if "flow_shift" in pipe.scheduler.config:  # DPM-Solver walks the same levels, but takes none of ours
            pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=pipe.scheduler.config.flow_shift)
        super().__init__(pipe, *args, **kwargs)

    def encode_texts(self, prompts):
        """As the pipeline does: prompts behind an instruction to a language model, the negative one without."""
        options = dict(device=self.device, max_sequence_length=self.text_tokens, do_classifier_free_guidance=False)
        told = inspect.signature(self.pipe.__call__).parameters["complex_human_instruction"].default
        rows = [self.pipe.encode_prompt(p, complex_human_instruction=told if p else None, **options) for p in prompts]
        embeds, masks = (torch.cat(column) for column in list(zip(*rows, strict=True))[:2])
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": masks}

    def predict(self, network, x, sigma, cond, guidance_scale):
        timestep = 1000 * sigma * network.config.timestep_scale
        return network(hidden_states=x.to(self.dtype), timestep=timestep, **cond, return_dict=False)[0]


class PRX(Backbone):
    """PRX: PRXPipeline. Latents of FLUX.1's VAE [16, side / 8, side / 8], 2x2 a token, or the DC-AE's as SANA's."""

    family = "prx"
    pipeline, network_class = "PRXPipeline", "PRXTransformer2DModel"
    lora_targets = ("attention.img_qkv_proj", "attention.txt_kv_proj", "attention.to_out.0")
    package, lora_loader = "ftfy", False  # ftfy cleans the prompts

    def encode_texts(self, prompts):
        options = dict(tokenizer_max_length=self.text_tokens, do_classifier_free_guidance=False)
        embeds, mask, *_ = self.pipe.encode_prompt(prompts, self.device, **options)
        return {"encoder_hidden_states": embeds, "attention_mask": mask}

    def predict(self, network, x, sigma, cond, guidance_scale):
        return network(hidden_states=x.to(self.dtype), timestep=sigma, **cond, return_dict=False)[0]


CLASSROOM = Path(__file__).resolve().parent / "classroom"
KLEIN = "black-forest-labs/FLUX.2-klein"
# facts of each; settings are in a stage's PRESETS. resolution: pixels a side in training; pictures: in sample.py, where
# it differs; text_tokens: length for T5, Qwen or Gemma; guidance: the teacher's scale; student: the repo that the
# generator starts from, where it differs
BACKBONES = {
    "classroom": dict(family=SD3, repo=CLASSROOM / "teacher", resolution=64, text_tokens=2, guidance=2.0),  # T5 is mute
    "sana": dict(family=Sana, repo="Efficient-Large-Model/Sana_600M_512px_diffusers", resolution=512)
    | dict(text_tokens=300, guidance=4.5),
    "prx": dict(family=PRX, repo="Photoroom/prx-512-t2i-sft", resolution=512, text_tokens=256, guidance=5.0),
    "sd3": dict(family=SD3, repo="stabilityai/stable-diffusion-3-medium-diffusers", resolution=1024)
    | dict(text_tokens=128, guidance=7.0, pictures=1024),
    "sd35": dict(family=SD3, repo="stabilityai/stable-diffusion-3.5-medium", resolution=512)
    | dict(text_tokens=128, guidance=4.5, pictures=1024),
    "flux1": dict(family=Flux1, repo="black-forest-labs/FLUX.1-dev", resolution=512, text_tokens=512, guidance=3.5)
    | dict(pictures=1024),
    "flux2-4b": dict(family=Flux2, repo=f"{KLEIN}-base-4B", resolution=512, text_tokens=512, guidance=4.0)
    | dict(pictures=1024, student=f"{KLEIN}-4B"),  # the student starts from the step-distilled release
    "flux2-9b": dict(family=Flux2, repo=f"{KLEIN}-base-9B", resolution=512, text_tokens=512, guidance=4.0)
    | dict(pictures=1024, student=f"{KLEIN}-9B"),
}


# ---------------------------------------------------------------------------------------------------------------
# sampler


@torch.no_grad()
def sample_latents(backbone, prompts, sigmas, eta=0.0, guidance_scale=1.0, seed=0, indices=None, role="generator"):
    """Latents [B, C, H, W] after walking `sigmas` (ending in 0). Image i's noise depends on (seed, indices[i])."""
    indices = range(len(prompts)) if indices is None else indices
    noise = Noise(("sample", seed), indices, backbone.latent_shape, backbone.device)
    cond, x = backbone.encode(prompts), noise.normal("start")
    for j, (sigma, sigma_next) in enumerate(zip(sigmas, sigmas[1:], strict=False)):
        v = backbone.velocity(role, x, sigma, cond, guidance_scale)
        x = cps_step(x, v, sigma, sigma_next, eta, noise.normal(j) if eta > 0 and sigma_next > 0 else None)
    return x


@torch.no_grad()
def decode_all(backbone, latents):
    """Images [B, 3, H, W] on the CPU, decoded 8 of 512x512 at a time: a VAE takes far more memory than a step."""
    n = max(1, 8 * 512**2 // backbone.resolution**2)
    return torch.cat([backbone.decode(part).cpu() for part in latents.split(n)])


# ---------------------------------------------------------------------------------------------------------------
# one training step, around the losses of a stage


def linear_decay(step, steps, share):
    """1, falling to 0 over the last `share` of the steps: what a learning rate is multiplied by."""
    return min(1.0, (steps - step) / (share * steps)) if share else 1.0


def add_to(row, values, count):
    """Accumulate means of detached scalars over `count` micro-batches, without leaving the device."""
    for name, value in values.items():
        row[name] = row.get(name, 0) + value.detach() / count


def average_gradients(parameters, world_size):
    """Mean of the gradients over ranks, in one flat all-reduce. A missing gradient counts as zero."""
    if world_size > 1:
        flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])
        dist.all_reduce(flat)
        flat /= world_size
        for p, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad = grad.view_as(p)


def step_optimizer(optimizer, decay, world_size, skip_nonfinite=False):
    """Average the gradients over ranks, clip their norm at 1, step, clear them. Returns the norm before clipping.

    decay: times the learning rate that the optimiser was made with. skip_nonfinite: leave weights and moments alone if
    the norm is not finite; it costs a look at the device each step.
    """
    parameters = optimizer.param_groups[0]["params"]
    average_gradients(parameters, world_size)
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.param_groups[0]["lr"] = decay * optimizer.defaults["lr"]
    if not skip_nonfinite or norm.isfinite():
        optimizer.step()
    optimizer.zero_grad()
    return norm


# ===============================================================================================================
# running: the paper does not need this. FSDP, command line, files, memory and speed, processes, the run itself
# ===============================================================================================================

# ---------------------------------------------------------------------------------------------------------------
# FSDP by hand
#
# Sharded: the frozen transformers. Each block is a unit, and what lies outside the blocks one more: its weights are cut
# over the processes, put together as its forward or backward begins, and let go behind it.
# Not sharded: VAE, text encoders and scorers, which every process has whole (--offload_encoders, --offload_rewards).
# Adapters need nothing: added after the cut, they belong to no unit, and are small, with their optimiser states and
# averages. Each process has them whole and a gradient of its own images; `average_gradients` makes one of them, and
# clipping, EMA and saving never meet a shard. FSDP itself has no gradient to reduce, for what it holds is frozen.

SHARD_MODES = ("none", "full", "grad", "hybrid")


def blocks(network):
    """The transformer blocks, whatever their lists are called: what is sharded and compiled one by one."""
    return [block for child in network.children() if isinstance(child, nn.ModuleList) for block in child]


def shard(backbone, mode="none", offload_frozen=False, frozen_dtype=None):
    """Place the frozen transformers on the processes' devices, before any adapter is added; see above.

    none: every process holds a whole copy. full: each holds its share, a block's shares are gathered for its forward
    and again for its backward. grad: gathered once, kept until the backward is done (faster, more memory). hybrid:
    full inside a node, copies across nodes. offload_frozen: shares wait in host memory. frozen_dtype: "float8_e4m3fn"
    or None, see `store_in_8_bits`.
    """
    assert mode in SHARD_MODES, mode
    for network in backbone.networks() if frozen_dtype else ():
        store_in_8_bits(network)
    if mode == "none" and not offload_frozen:
        for network in backbone.networks():
            network.to(backbone.device)
        return
    kind = backbone.device.type
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    n = dist.get_world_size()
    share = {"none": 1, "hybrid": int(os.environ.get("LOCAL_WORLD_SIZE", n))}.get(mode, n)  # processes a copy lies on
    mesh = init_device_mesh(kind, (n // share, share), mesh_dim_names=("replicate", "shard"))
    mesh = mesh if share < n else mesh["shard"]
    offload = CPUOffloadPolicy(pin_memory=kind == "cuda") if offload_frozen else OffloadPolicy()
    for network in backbone.networks():
        for module in (*blocks(network), network):
            fully_shard(module, mesh=mesh, reshard_after_forward=mode != "grad", offload_policy=offload)


# ---------------------------------------------------------------------------------------------------------------
# command line and errors


class Help(argparse.HelpFormatter):
    """Every flag with its value; `--model sd35 --help` shows sd35's."""

    def _get_help_string(self, action):
        shown = action.default not in (None, argparse.SUPPRESS, []) and action.default is not False  # 0 is shown
        return action.help + (" [%(default)s]" if shown else "")


def parser(description):
    """An ArgumentParser that takes no shortened flags and tells the values in --help."""
    options = dict(usage=argparse.SUPPRESS, formatter_class=Help, allow_abbrev=False)
    return argparse.ArgumentParser(description=description, **options)


def add_run_flags(p, presets, out, unit, every):
    """The flags of both stages that are no method: which networks, where and how they run, what is written when."""
    add = p.add_argument_group("the run").add_argument
    add("--model", default="classroom", choices=presets, help="backbone; picks the preset that other flags override")
    place = lambda text: str(path(text).absolute()) if path(text).is_dir() else text  # noqa: E731 (else a hub id)
    add("--weights", type=place, help="diffusers pipeline folder or hub id in place of the published one")
    add("--generator_weights", type=place, help="the same for the generator (FLUX.2: its step-distilled release)")
    below = dict(action="append", default=[], type=path)
    add("--teacher_lora", **below, help="adapter, a style's for example, frozen under all roles; repeat to stack")
    add("--resolution", type=at_least(1), help="pixels a side (default: the backbone's)")
    add("--out", type=path, default=Path(out), help="run folder")
    add("--resume", type=path, help="run or step_NNNNNN folder to go on from, with its settings where none are given")
    add("--seed", type=at_least(0), default=0, help="covers every draw and the adapters' first weights")
    add("--device", type=device_name, choices=["cpu", "cuda"], help="default: cuda where there is one")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of the networks; formulas are float32")
    add("--checkpointing", default="auto", choices=["auto", "on", "off"], help="of activations; auto: if memory asks")
    add("--shard", default="none", choices=SHARD_MODES, help="of the frozen base, by FSDP2; hybrid: in a node")
    add("--frozen_dtype", choices=["float8_e4m3fn"], help="of the frozen blocks' linear layers: half of bfloat16")
    add("--offload_frozen", action="store_true", help="the frozen base waits in host memory, block by block")
    add("--offload_encoders", action="store_true", help="text encoders wait on the CPU while they do not encode")
    add("--compile", action="store_true", help="torch.compile, block by block")
    add("--skip_nonfinite", type=at_least(0), default=0, help="non-finite gradients in a row that are only skipped")
    add("--log_every", type=at_least(1), default=1, help=f"{unit} whose log lines share one device sync")
    add("--sample_every", type=at_least(0), default=every, help=f"{unit} between sample grids; 0: none")
    add("--save_every", type=at_least(1), default=every, help=f"{unit} between checkpoints")
    add("--keep_every", type=at_least(0), default=0, help=f"{unit} between checkpoints that stay for good; 0: none")
    add("--wandb", action="store_true", help="log to Weights & Biases too")


def parse_with_preset(p, presets, argv=None):
    """p's arguments over the preset of --model; a resumed run goes on with its own settings, in its own folder."""
    argv = sys.argv[1:] if argv is None else argv
    known, _ = p.parse_known_args([word for word in argv if word not in ("-h", "--help")])
    p.set_defaults(guidance_scale=BACKBONES[known.model]["guidance"])
    p.set_defaults(**presets[known.model])
    own = {"out": p.get_default("out"), "resume": None}
    own |= {"teacher_lora": []} if known.teacher_lora else {}  # else what is given would follow the saved ones
    checkpointed = known.resume and ((known.resume / "state.pt").is_file() or step_folders(known.resume))
    if checkpointed and (known.resume / "args.json").is_file():  # else the run died before it had learned anything
        with contextlib.suppress(ValueError):  # a torn one is named when the checkpoint is read
            saved = json.loads((known.resume / "args.json").read_text())
            p.set_defaults(**{name: saved[name] for name in vars(known) if name in saved} | own)
    args = p.parse_args(argv)
    if args.prompts is None and args.model != "classroom":
        p.error(f"--model {args.model} needs --prompts FILE (.txt, .jsonl, .json, .csv or .tsv)")
    if not args.eval_every and (args.eval_prompts or args.fd_reference):
        p.error("--eval_prompts and --fd_reference are of the evaluation during training: give --eval_every N too")
    if args.resume and args.resume.absolute() == args.out.absolute() and not step_folders(args.out):
        args.resume = None  # a job script's first start
    if args.resume and not args.resume.is_dir():  # else the run would make this folder
        p.error(f"--resume {args.resume}: no such folder; give a run folder or one of its step_NNNNNN")
    if args.resume and not any(word.split("=")[0] == "--out" for word in argv):
        args.out = args.resume.parent if (args.resume / "state.pt").is_file() else args.resume
    return args


def between(low, high=math.inf, kind=float):
    """A flag's type: a finite number from `low` to `high`; with kind=int a whole one."""

    def number(text):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if low <= value <= high and abs(value) < math.inf:
                return value
        allowed = "" if low == -math.inf else f", at least {low}" if high == math.inf else f", {low} to {high}"
        raise UserError(f"{text}: must be a {'whole' if kind is int else 'finite'} number{allowed}")

    return number


at_least = functools.partial(between, kind=int)  # a flag's type: a whole number of at least so much


def path(text):
    """A flag's type: a path; ~ is the home folder, also in --out=~/runs, where no shell says so."""
    return Path(text).expanduser()


def device_name(text):
    """A flag's type: a device. Apple's is refused with what is known of it."""
    if text == "mps":
        raise UserError("mps: torch has no 8-bit types and no processes there, and nobody checked the rest; give cpu")
    return text


class UserError(ValueError, argparse.ArgumentTypeError):
    """Something a user can mend; a flag's type may raise it too. `run` prints it as one line and exits with 2."""


def first_line(error):
    """What an exception says, in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def named_failure(what):
    """A full disk, a read-only folder and the like become one line that says what could not be done."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except (OSError, ValueError, SafetensorError, RuntimeError) as error:  # of json, safetensors and torch.save
        raise UserError(f"{what}: {first_line(error)}") from error


def run(main, args):
    """A script's entry: main(args), with a UserError shown as one line."""
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may not know every letter; stderr is so by itself
    try:
        main(args)
    except (UserError, torch.OutOfMemoryError, MemoryError) as error:
        if Run.bar:  # else it is drawn again below the message
            Run.bar.close()
        if not isinstance(error, UserError):
            flags = "batch_size consistency_batch last_step_batch resolution checkpointing frozen_dtype"
            flags += " offload_encoders offload_rewards offload_frozen shard"
            flags = ", ".join(f"--{flag}" for flag in flags.split() if hasattr(args, flag))
            error = f"out of memory: {first_line(error)} What helps (sizes smaller): {flags}"
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if dist.is_initialized():  # not after an error: it could wait for the others, who wait for this process
        dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------
# weights and adapters on disk


def load(model, weights=None, generator_weights=None, device="cpu", dtype=torch.float32, resolution=None, **sharding):
    """A backbone by name. weights: a diffusers pipeline folder or hub id in place of the published one.

    dtype: of the networks; None leaves the transformer as its files have it, to be exported.
    generator_weights: the same for the generator's own transformer; by default FLUX.2's published one, with `weights`
    given that of `weights`. sharding: see `shard`.
    """
    if model not in BACKBONES:
        raise UserError(f"unknown model {model!r}; allowed: {', '.join(BACKBONES)}")
    if dtype == torch.bfloat16 and not computes_bfloat16(device):
        name = torch.cuda.get_device_name(device)
        raise UserError(f"bfloat16 was asked for, and {name} computes none (it would be slow): give --dtype float32")
    import diffusers

    quiet_libraries()
    spec = BACKBONES[model]
    family = spec["family"]
    if family.package and importlib.util.find_spec(family.package) is None:
        raise UserError(f"--model {model} needs a package: pip install {family.package}")
    source = fetch(weights or spec["repo"], "--weights")
    network, pipeline = (getattr(diffusers, name) for name in (family.network_class, family.pipeline))
    with named_failure(f"--weights {source} is no whole pipeline folder (what --export writes is a transformer)"):
        found = json.loads((source / "model_index.json").read_text()).get("_class_name")
        if found != family.pipeline:
            raise UserError(f"--weights {source} holds a {found}, and --model {model} needs a {family.pipeline}")
        transformer = load_transformer(network, source / "transformer", dtype)
        pipe = pipeline.from_pretrained(source, transformer=transformer, dtype=dtype, low_cpu_mem_usage=False)
    own, student = generator_weights or (None if weights else spec.get("student")), None
    if own:
        folder = fetch(own, "--generator_weights", ("transformer",))
        with named_failure(f"--generator_weights {folder} is no whole pipeline folder"):
            student = load_transformer(network, folder / "transformer", dtype)
    backbone = family(pipe, resolution or spec["resolution"], spec["text_tokens"], device, dtype, student)
    shard(backbone, **sharding)
    return backbone


def computes_bfloat16(device):
    """False on GPUs older than Ampere, where torch emulates it."""
    return torch.device(device).type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")


def fetch(source, flag, parts=PARTS):
    """Path of a pipeline folder: local, or a snapshot of the hub's, the weights of `parts` only."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or str(source).startswith("."):
        raise UserError(f"no weights at {source}: give a diffusers pipeline folder or a hub id with {flag}")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.txt", "*.model", "*.jinja"]
    # no variants, which nobody asked for: model.fp16.safetensors, model.fp16-00001-of-00002.safetensors
    patterns += [f"{part}/*model{end}.safetensors" for part in parts for end in ("", "-*")]
    try:
        return Path(snapshot_download(str(source), allow_patterns=patterns))
    except (OSError, ValueError) as error:  # no network, no such repository, not logged in to a gated one
        why = " ".join(str(error).split())[:300]
        gated = " Accept its licence on its page, then `hf auth login`." if "gated" in why else ""
        raise UserError(f"cannot fetch {source}: {why}{gated} Give a local pipeline folder with {flag}") from None


def quiet_libraries():
    """Errors only from diffusers and transformers: their notes on torchvision and progress bars hide our own."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def load_transformer(cls, folder, dtype):
    """Build a diffusers transformer on the meta device and assign its safetensors shards: no random fill, one copy."""
    config = cls.load_config(folder)
    if config["_class_name"] != cls.__name__:
        raise UserError(f"{folder} holds a {config['_class_name']}, and this backbone needs a {cls.__name__}")
    with torch.device("meta"):
        model = cls.from_config(config)
    state = {}
    for file in weight_files(Path(folder)):
        state |= load_tensors(file)
    state = {key: value.to(dtype or value.dtype) for key, value in state.items()}
    try:
        model.load_state_dict(state, assign=True)
        if any(getattr(t, "is_meta", False) for m in model.modules() for t in tree_leaves(vars(m))):
            model = cls.from_config(config)  # it makes tables that no file holds: they need numbers
            model.load_state_dict(state, assign=True)
    except RuntimeError as error:  # missing, left-over or misshapen keys, all named
        raise UserError(f"{folder} does not hold a {cls.__name__}: {' '.join(str(error).split())[:500]}") from None
    digest = hashlib.sha256()  # of some numbers of each tensor, in bf16: alike from files of either dtype
    for key, value in sorted(state.items()):
        some = value.flatten()[:: max(1, value.numel() // 64)].to(torch.bfloat16).float()
        digest.update(f"{key} {tuple(value.shape)}".encode() + some.numpy().tobytes())
    model.base = digest.hexdigest()[:16]
    return model.eval()


def weight_files(folder):
    """The shards that diffusers' index lists, or the one file; no variants that lie beside them, such as `.fp16.`."""
    names = ["diffusion_pytorch_model.safetensors"]
    index = folder / f"{names[0]}.index.json"
    if index.is_file():
        with named_failure(f"{index} cannot be read"):
            names = sorted(set(dict(json.loads(index.read_text())).get("weight_map", {}).values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        there = ", ".join(sorted(file.name for file in folder.glob("*.safetensors*"))) or "no .safetensors"
        raise UserError(f"{folder} lacks {(missing or ['its weight_map'])[0]}; there: {there}")
    return [folder / name for name in names]


# all that missing or broken files make safetensors and torch's unpickler raise
BROKEN = (SafetensorError, pickle.UnpicklingError, OSError, EOFError, RuntimeError, ValueError)


def load_tensors(path):
    """Tensors of a .safetensors file, or of a pickle, of which nothing is executed. A UserError if it is not whole."""
    try:
        if Path(path).suffix == ".safetensors":
            open(path, "rb").close()  # safetensors says "no such file" where permission is denied
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise UserError(f"{path} cannot be read: {error.strerror or first_line(error)}") from None
    except (*BROKEN, LookupError, AttributeError, TypeError) as error:
        if "GLOBAL" in str(error):  # torch's text goes on to recommend running it
            raise UserError(f"{path} holds more than tensors, and pickled code is never run; save tensors") from None
        why = f"{type(error).__name__}: {str(error).split('. ')[0]}".strip(" :")
        raise UserError(f"{path} is no complete file of tensors ({why}): cut short, or a git-lfs pointer?") from None


LORA_FILE = "pytorch_lora_weights.safetensors"
ADAPTER_FILES = (LORA_FILE, *(f"adapter_model.{kind}" for kind in ("safetensors", "bin", "pt")))  # diffusers', PEFT's
WRAPPERS = r"\b_(?:orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)\."  # what torch puts into a module's path
PREFIX = r"(?:(?:module|base_model\.model|transformer|diffusion_model)\.)*"
LORA_KEY = PREFIX + r"(.+)\.(alpha|lora_[AB](?:\.([^.]+))?\.weight)"
OTHER_NAMING = r"lora_unet_|lora[._](?:down|up)|\b(?:double|single|joint)_blocks\b"  # kohya's, the original code's
CONVERTED = r"(lora_unet_|lora_transformer_|(diffusion_model|transformer)\.).+\.(alpha|lora_(down|up|A|B)\.weight)"
PLAIN_INIT = "true false none gaussian orthogonal eva mica".split()  # PEFT's others change the base weights, too
NOT_PLAIN = "use_dora use_qalora use_bdlora lora_bias kasa_config alora_invocation_tokens layer_replication".split()


def save_adapter(transformer, name, folder):
    """Write folder/pytorch_lora_weights.safetensors, for `pipe.load_lora_weights(folder)`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    layers = {path: (m.lora_A[name], m.lora_B[name]) for path, m in lora_modules(transformer).items()}
    write_adapter(layers, folder / LORA_FILE, getattr(transformer, "base", None))


def write_adapter(layers, file, base=None):
    """Write {module path: (A, B)}, as `read_adapter` returns it, in diffusers' naming. base: of `load_transformer`.

    B times LORA_SCALE is stored, with alpha = rank: what a tool takes that does not read the metadata.
    """
    tensors = {}
    for path, (A, B) in layers.items():
        tensors[f"transformer.{path}.lora_A.weight"] = A.detach().cpu().contiguous()
        tensors[f"transformer.{path}.lora_B.weight"] = (LORA_SCALE * B.detach()).cpu().contiguous()
    config = {"r": len(A), "lora_alpha": len(A), "target_modules": sorted(layers), "revision": base}
    config = {f"transformer.{key}": value for key, value in config.items()}
    # one entry: safetensors writes several in random order, and equal adapters shall be equal files
    save_file(tensors, file, {"lora_adapter_metadata": json.dumps(config)})


def one_rank(layers):
    """{module path: (A, B)}, filled up with zeros to the highest rank."""
    rank = max(len(A) for A, _ in layers.values())
    pad = lambda A, B: (F.pad(A, (0, 0, 0, rank - len(A))), F.pad(B, (0, rank - len(A))))  # noqa: E731
    return {path: pad(*pair) for path, pair in layers.items()}


def adapter_file(source):
    """The file of an adapter: `source`, the one in that folder, or the one in its only subfolder that has one."""
    source = Path(source)
    try:
        if not source.is_dir():
            source.open("rb").close()
            return source
        os.listdir(source)
        here = [source / name for name in ADAPTER_FILES if (source / name).is_file()]
        inside = {file.parent: file for name in reversed(ADAPTER_FILES) for file in source.glob(f"*/{name}")}
    except OSError as error:
        raise UserError(f"no adapter at {source}: {first_line(error.strerror or error).lower()}") from None
    if not here and len(inside) > 1:
        raise UserError(f"no adapter at {source} itself: give one of {', '.join(map(str, sorted(inside)))}")
    for file in (*here, *inside.values()):
        return file
    raise UserError(f"no adapter at {source}: expected {LORA_FILE} (as in final/generator_ema), a PEFT folder or a .pt")


def adapter_config(file):
    """LoRA settings that diffusers writes into a .safetensors, or PEFT beside its file; {} where there are none."""
    config, beside = {}, file.with_name("adapter_config.json")
    with named_failure(f"{file}: its metadata or adapter_config.json cannot be read"):
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as f:
                config = json.loads((f.metadata() or {}).get("lora_adapter_metadata", "{}"))
        if file.stem == "adapter_model" or not config and file.name != LORA_FILE and beside.is_file():
            config = json.loads(beside.read_text())
    if not isinstance(config, dict):
        raise UserError(f"{file}: its metadata or adapter_config.json is no JSON object")
    config = {key.removeprefix("transformer."): value for key, value in config.items()}  # diffusers' prefix
    strange = [f"{key} {config[key]!r}" for key in NOT_PLAIN if config.get(key)]
    if strange or config.get("peft_type", "LORA") != "LORA":
        raise UserError(f"{file}: its {[*strange, config.get('peft_type')][0]} is not supported; only plain LoRA is")
    init = str(config.get("init_lora_weights")).lower()
    if init not in PLAIN_INIT:
        raise UserError(
            f"{file}: init_lora_weights={init} changed the base weights that it belongs to; where it was trained, "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...) makes plain LoRA of it"
        )
    return config


def layer_number(config, name, pattern, path):
    """config[name] for the layer at `path`; of the patterns, as in PEFT, the first that fits counts."""
    try:
        own = [value for key, value in (config.get(pattern) or {}).items() if re.match(rf"(.*\.)?({key})$", path)]
    except (AttributeError, re.error) as error:
        raise ValueError(f"{pattern} is no table of patterns: {error}") from None
    value = own[0] if own else config.get(name)
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}, and must be a number")
    return value


def lora_parts(tensors, where=""):
    """(its key, state dict with LoRA matrices), ... of what a trainer may have wrapped around them."""
    if isinstance(tensors, dict) and any("lora_" in str(key) for key in tensors):
        yield where, tensors
    elif isinstance(tensors, dict):
        for key, value in tensors.items():
            yield from lora_parts(value, f"{where}.{key}".strip("."))


def other_naming(tensors, file):
    """What to type for a file of kohya's or ComfyUI's names, and what diffusers drops of it without a word.

    It is not read through `lora_state_dict` at once: that knows FLUX's names alone, takes no folder of PEFT's for
    FLUX.1, and forgets what it cannot place.
    """
    new = file.with_name(f"{file.stem}_converted.safetensors")
    lost = [str(key) for key in tensors if not re.fullmatch(CONVERTED, str(key))]
    without = f", without {lost[0]} and the like ({len(lost)} keys)" if lost else ""
    return (
        f"another tool's naming. Diffusers converts FLUX.1's{without}, so (FLUX.2's: Flux2KleinPipeline): python -c "
        '"from diffusers import FluxPipeline as P; from safetensors.torch import save_file; '
        f"d = P.lora_state_dict({str(file)!r}); save_file({{k: d[k].clone() for k in d if k[:5] != 'text_'}}, "
        f'{str(new)!r})"'
    )


def read_adapter(source):
    """({module path: (A [rank, in], B [out, rank])}, file) of an adapter on disk, in float32 and for LORA_SCALE.

    Reads what `save_adapter` and diffusers write, PEFT's folders, and LoRA-only .pt / .pth state dicts, without running
    any pickled code. Taken off: prefixes as `module.` or `base_model.model.`, PEFT's adapter name
    (`lora_A.default.weight`). The file's scale, of each layer, goes into B; ranks are filled up to the highest with
    zeros. Where no alpha is told it is the rank, as diffusers has it, in a .pt twice that, the published setting.
    """
    file = adapter_file(source)
    tensors, config = load_tensors(file), adapter_config(file)
    inner = dict(lora_parts(tensors))
    if len(inner) > 1:
        raise UserError(f"{file} holds LoRA matrices under {' and '.join(inner)}: save one set by itself")
    tensors = next(iter(inner.values()), tensors)
    found, keys, names = {}, {}, {}
    for key, tensor in tensors.items() if isinstance(tensors, dict) else ():
        if re.search(OTHER_NAMING, str(key)):
            raise UserError(f"{file}: {key} is {other_naming(tensors, file)}")
        match = re.fullmatch(LORA_KEY, re.sub(WRAPPERS, "", str(key)))
        good = match and isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.numel()
        if not good or (tensor.numel() != 1 if match[2] == "alpha" else tensor.ndim != 2):
            dora = " but DoRA" if re.search("dora|magnitude", str(key)) else ""
            raise UserError(f"{file}: {key} is no LoRA matrix{dora} (<layer>.lora_A.weight or .lora_B.weight)")
        path, kind = match[1], match[2][:6]
        if kind != "alpha":
            names.setdefault(match[3], key)
        twice = [keys[path, kind], key] if (path, kind) in keys else list(names.values())
        if len(twice) > 1:
            raise UserError(f"{file}: {twice[0]} and {twice[1]} are of two adapters: leave one of them out")
        keys[path, kind] = key
        found.setdefault(path, {})[kind] = tensor.float()
    layers = {}
    for path, own in found.items():
        for kind in ("lora_A", "lora_B"):
            if kind not in own:
                raise UserError(f"{file}: {path}.{kind}.weight is missing")
        A, B, rank = own["lora_A"], own["lora_B"], len(own["lora_A"])
        alpha = rank if file.suffix == ".safetensors" else 2 * rank
        with named_failure(f"{file}: {path}"):
            said = layer_number(config, "r", "rank_pattern", path) if "r" in config else rank
            alpha = layer_number(config, "lora_alpha", "alpha_pattern", path) if config else alpha
        alpha = own["alpha"].item() if "alpha" in own else alpha
        if not rank == said == B.shape[1]:
            raise UserError(f"{file}: {path} has A of rank {rank} and B of rank {B.shape[1]}; its settings say {said}")
        B = B * (alpha / (rank**0.5 if config.get("use_rslora") else rank) / LORA_SCALE)
        if not (A.isfinite().all() and B.isfinite().all()):
            raise UserError(f"{file}: {path} holds numbers that are not finite")
        layers[path] = A, B
    if not layers:
        raise UserError(f"{file} holds no LoRA matrices")
    return one_rank(layers), file


def fingerprint(source):
    """A hash of an adapter's numbers, whatever file holds them."""
    digest = hashlib.sha256()
    for path, pair in sorted(read_adapter(source)[0].items()):
        for tensor in pair:
            digest.update(f"{path} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def load_adapter(transformer, name, source, trainable=False, any_base=False):
    """Add adapter `name` from what `read_adapter` reads; layers left out are zero, what does not fit is an error.
    any_base: that it was trained on other weights is only said."""
    layers, file = read_adapter(source)
    modules = lora_modules(transformer)
    left = sorted(set(layers) - set(modules))
    if left:
        raise UserError(f"{file}: {left[0]} is no layer of this backbone that takes adapters ({len(left)} such)")
    for path, (A, B) in layers.items():
        (out_features, in_features), rank = modules[path].base.weight.shape, len(A)
        for key, tensor, shape in (("lora_A", A, (rank, in_features)), ("lora_B", B, (out_features, rank))):
            if (has := tuple(tensor.shape)) != shape:
                raise UserError(f"{file}: {path}.{key}.weight has shape {has}, this backbone needs {shape}")
    bases = {adapter_config(file).get("revision"), getattr(transformer, "base", None)} - {None}
    if len(bases) > 1 and not any_base:
        raise UserError(f"{file} was trained on another base than this one: give the --weights of its run")
    say = print if not (dist.is_initialized() and dist.get_rank()) else lambda _: None
    if len(bases) > 1:
        say(f"{file} was trained on another base than this one")
    missing = [path for path in modules if path not in layers]
    if missing and trainable:
        raise UserError(f"{file}: {missing[0]}.lora_A.weight is missing, and to be trained it must have all layers")
    if missing:
        say(f"{file}: an adapter of {len(layers)} of the {len(modules)} layers that take one; zero on the others")
    add_adapter(transformer, name, rank, init_std=0.0, trainable=trainable)
    with torch.no_grad():
        for path, (A, B) in layers.items():
            modules[path].lora_A[name].copy_(A)
            modules[path].lora_B[name].copy_(B)
    return adapter_parameters(transformer, name)


def put_below(backbone, sources):
    """Load adapters that lie, frozen, under every role: what is distilled is the network with them."""
    for i, source in enumerate(sources):
        for network in backbone.networks():
            load_adapter(network, f"teacher_{i}", source)
        backbone.below += (f"teacher_{i}",)


def trained_over(folder, given):
    """Refuse adapters of a run (`folder` or the one around it has its args.json) without the run's --teacher_lora."""
    for file in (Path(folder) / "args.json", Path(folder).parent / "args.json"):
        if file.is_file():
            with named_failure(f"{file} cannot be read"):
                was = dict(json.loads(file.read_text()))
            if set(was.get(BELOW, ())) - {fingerprint(source) for source in given}:
                flags = " ".join(f"--teacher_lora {source}" for source in was["teacher_lora"])
                raise UserError(f"{folder} was trained over other adapters than are given: add {flags}")
            return


BELOW = "teacher_lora, sha256"  # in a run's args.json


def merge_adapters(transformer, names):
    """State dict of the transformer as published, with the adapters added in: W + 2 B A, in W's dtype."""
    assert not any(isinstance(m, Float8Linear) for m in transformer.modules()), "merge into the weights as published"
    state = {}
    for key, value in transformer.state_dict().items():
        if ".lora_A." not in key and ".lora_B." not in key:
            state[key.replace(".base.", ".")] = value
    for path, m in lora_modules(transformer).items():
        weight = m.base.weight.float()
        for name in names:
            weight = weight + LORA_SCALE * (m.lora_B[name] @ m.lora_A[name])
        state[f"{path}.weight"] = weight.to(m.base.weight.dtype)
    return {key: value.detach().cpu().contiguous() for key, value in state.items()}


# ---------------------------------------------------------------------------------------------------------------
# memory and speed


def needs_checkpointing(backbone, setting, samples):
    """setting "on" or "off" decides; "auto": would the activations of `samples` take over 70% of the GPU's free memory?

    What one forward keeps for its backward is measured on one sample. All ranks take the same way. Who shards or
    offloads is short of memory: on. A CPU never checkpoints on its own account.
    """
    if setting != "auto" or backbone.device.type != "cuda":
        return setting == "on"
    if any(isinstance(p, DTensor) for p in backbone.transformer.parameters()):
        return True
    x, cond = torch.randn(1, *backbone.latent_shape, device=backbone.device), backbone.encode([""])
    with torch.enable_grad():
        v = backbone.velocity("generator", x.requires_grad_(), 0.5, cond)
    kept = torch.cuda.memory_allocated(backbone.device)
    del v  # and with it all that its backward would need
    kept -= torch.cuda.memory_allocated(backbone.device)
    torch.cuda.empty_cache()  # what the offloaded encoders have left
    need = torch.tensor(samples * kept / torch.cuda.mem_get_info(backbone.device)[0])
    if dist.is_initialized():
        dist.all_reduce(need, dist.ReduceOp.MAX)
    return bool(need > 0.7)


def set_up_blocks(backbone, checkpointing, samples, compiled):
    """Activation checkpointing as the setting and `samples` ask for, the VAE's too, and torch.compile."""
    if needs_checkpointing(backbone, checkpointing, samples):
        if backbone.vae._supports_gradient_checkpointing:
            backbone.vae.enable_gradient_checkpointing()
        else:  # the DC-AE, where one picture would take 4 GB
            again = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False, preserve_rng_state=False)
            for block in (block for stage in backbone.vae.decoder.up_blocks for block in stage):
                block.forward = functools.partial(again, block.forward)
        for network in backbone.networks():
            enable_checkpointing(network)
    if compiled:
        compile_blocks(backbone)


def enable_checkpointing(transformer):
    """Activation checkpointing that recomputes a block with the adapters it ran with.

    The recomputation happens inside backward(), when another role may be switched on; without the context below it
    would run with that role's adapters and give wrong gradients without a word.
    """

    def checkpoint(module, *args):
        names = transformer.lora_switch.active
        contexts = lambda: (contextlib.nullcontext(), adapters(transformer, *names))  # noqa: E731
        options = dict(use_reentrant=False, preserve_rng_state=False, context_fn=contexts)  # nothing here is random
        return torch.utils.checkpoint.checkpoint(module.__call__, *args, **options)

    transformer.enable_gradient_checkpointing(checkpoint)


def compile_blocks(backbone):
    """torch.compile every block's forward; hooks of sharding and checkpointing stay outside.

    All blocks of a kind share one code object, and each set of adapters, batch size and gradient mode is a graph of its
    own: more than dynamo's limit of 8, beyond which it would run the rest uncompiled.
    """
    _ = backbone.flops  # counted now: dynamo gives up for good on a block that it first meets while torch counts
    name = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"  # torch 2.6
    setattr(torch._dynamo.config, name, 64)
    for network in backbone.networks():
        for block in blocks(network):
            block.forward = torch.compile(block.forward)


class Float8Linear(nn.Linear):
    """A frozen Linear whose weight is kept in 8 bits (e4m3), each output row with a scale: y = x (scale W8)^T + b."""

    def forward(self, x):
        device = x.device.type
        x = x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return Float8Product.apply(x, self.weight, self.scale, bias)


class Float8Product(torch.autograd.Function):
    """x (scale W8)^T + b. The backward converts W8 again: else the converted weights of all layers would wait for it.

    By another expression than the forward's: torch.compile would take two alike for one, and keep the result.
    """

    @staticmethod
    def forward(ctx, x, weight, scale, bias):
        ctx.save_for_backward(weight, scale)
        return F.linear(x, (weight.t().to(x.dtype) * scale.to(x.dtype)).t(), bias)

    @staticmethod
    def backward(ctx, grad):
        weight, scale = ctx.saved_tensors
        return grad @ (weight.to(grad.dtype) * scale.to(grad.dtype)[:, None]), None, None, None


@torch.no_grad()
def store_in_8_bits(network):
    """Turn every Linear of the blocks into a Float8Linear, in place."""
    for linear in (m for block in blocks(network) for m in block.modules() if type(m) is nn.Linear):
        largest = linear.weight.float().abs().amax(1, keepdim=True).clamp(min=1e-12)
        scale = (largest / torch.finfo(torch.float8_e4m3fn).max).log2().ceil().exp2()  # exact also in bf16
        weight = (linear.weight.float() / scale).to(torch.float8_e4m3fn)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.register_buffer("scale", scale.flatten())
        linear.__class__ = Float8Linear


PEAK = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12}  # dense bf16 FLOP/s; the first name that fits counts
PEAK |= {"A100": 312e12, "L40S": 362e12, "4090": 165e12}


def speed(backbone, seconds, steps, images):
    """{seconds of a step, images_per_s of all processes, peak_gb of this process so far, on a GPU mfu}.

    MFU = evaluations x FLOP of one / seconds / peak FLOP/s of the device; recomputed forwards are not counted.
    """
    row = {"seconds": seconds / steps, "images_per_s": images / seconds}
    if backbone.device.type == "cpu" and os.name == "posix":
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        row["peak_gb"] = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9
    if backbone.device.type == "cuda":
        row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        name = torch.cuda.get_device_name(backbone.device)
        peak = next((flops for key, flops in PEAK.items() if key in name), None)
        if peak and backbone.dtype == torch.bfloat16:
            row["mfu"] = backbone.evaluations * backbone.flops / seconds / peak
    backbone.evaluations = 0
    return row


# ---------------------------------------------------------------------------------------------------------------
# processes


def setup_distributed(device=None):
    """(rank, world size, device): torchrun's variables or one process; nccl on GPUs, gloo on CPUs."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1 and "MASTER_ADDR" not in os.environ:
        raise UserError(f"WORLD_SIZE={world_size} is set, but no MASTER_ADDR: unset WORLD_SIZE, or start with torchrun")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda"):
        if not torch.cuda.is_available():
            raise UserError("--device cuda was given, but torch sees no GPU: use --device cpu")
        local, n = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= n:
            raise UserError(f"process {local} of this machine has no GPU, torch sees {n}: give --nproc_per_node={n}")
        device = f"cuda:{local}"
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    return rank, world_size, torch.device(device)


def rows_over_ranks(rows, world_size):
    """[{name: scalar tensor or number}] -> [{name: float}]; tensors are averaged over ranks, all in one device sync."""
    values = [value.float() for row in rows for value in row.values() if torch.is_tensor(value)]
    if values and world_size > 1:
        values = torch.stack(values)
        dist.all_reduce(values)
        values = values / world_size
    values = iter(torch.stack(tuple(values)).tolist() if len(values) else ())
    return [{name: next(values) if torch.is_tensor(v) else v for name, v in row.items()} for row in rows]


def gather(objects, world_size):
    """Concatenate one list per rank, in rank order, on every rank."""
    if world_size == 1:
        return list(objects)
    lists = [None] * world_size
    dist.all_gather_object(lists, list(objects))
    return [item for items in lists for item in items]


# ---------------------------------------------------------------------------------------------------------------
# the run: its folder, log, sample grids, checkpoints and stops


class Run:
    """A training run apart from its method; the loop stays the stage's.

        run = Run(args, "steps", __file__)             processes, folder, the checkpoint that --resume names
        backbone = run.load_backbone()                 as the flags say
        a, b = run.adapters({"a": network, ...}, 32)   fresh ones, or the checkpoint's
        run.begin(backbone, pairs, optimizers, n)      the optimisers' state, the log; says what is not as it was
        for step in run.steps("AC-DMD"):               from 0; after each one sample grid, checkpoint, stop, as due
            run.log(step, row)

    An --out belongs to one process group at a time, and only what a run wrote is ever deleted. The first of these calls
    refuses what a user can mend, before weights load: a folder in use, a run that is there already, a torn checkpoint
    or one of another script or --rank, a missing package.
    """

    lock = None  # open while this process trains in a folder; the system lets go of it however the process ends
    bar = None

    def __init__(self, args, count, script, zeros=()):
        self.zeros = dict(zeros)  # {value: what to say once, if it is exactly 0}
        self.args, self.count, self.total, self.script = args, count, getattr(args, count), Path(script)
        self.rank, self.world_size, self.device = setup_distributed(args.device)
        self.print = print if self.rank == 0 else lambda *_: None
        self.out, self.pinned = Path(args.out).resolve(), {}
        self.log_file = self.out / "log.jsonl"
        self.take_lock()
        self.state = self.read_state()
        self.start = self.state["step"] if self.state else 0
        if self.start > self.total:
            raise UserError(f"--{count} {self.total}: the run is at {self.start} already")
        self.finished = self.start == self.total and (self.out / "final").is_dir()
        if self.finished:
            self.print(f"nothing left to train: {args.out}/final is the run's end, step {self.start}")
        resumed = self.state["folder"].resolve() if self.state else None
        partial = [p for p in self.out.glob(".*.partial") if re.fullmatch(r"\.(step_\d+|final)\.partial", p.name)]
        later = [p for p in step_folders(self.out) if int(p.name[5:]) > self.start]
        self.stale = [p for p in (*later, *partial, *self.out.glob("final")) if p.is_dir() and p != resumed]
        self.stop, self.heldout = StopSignal(), None
        self.pin("teacher_lora", {"all": [fingerprint(source) for source in args.teacher_lora]})

    def take_lock(self):
        """Lock --out for this process group: taken before the look into the folder, held to the end."""
        error = None
        if self.rank == 0:
            try:
                with named_failure(f"cannot write to --out {self.args.out}"):
                    self.out.mkdir(parents=True, exist_ok=True)
                    self.lock_folder()
            except UserError as failure:
                error = str(failure)
        if error := gather([error], self.world_size)[0]:
            raise UserError(error)

    def lock_folder(self):
        try:
            import fcntl
        except ImportError:  # Windows
            return
        if Run.lock:  # a process has one run at a time
            Run.lock.close()
        Run.lock = (self.out / ".lock").open("w")
        try:
            fcntl.flock(Run.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--out {self.args.out} is in use by a run: let it end, or give another --out") from None
        except OSError as error:  # a file system without locks
            print(f"{self.out} cannot be locked ({first_line(error)}): start no second run there")

    def read_state(self):
        """The state of the checkpoint that --resume names, or None; refuses what cannot become a run."""
        args, state = self.args, None
        if args.resume:
            state = read_checkpoint(args.resume)
            scripts = [p.name for p in state["folder"].glob("*.py")]
            if self.script.name not in scripts:
                raise UserError(f"--resume {state['folder']} is of {', '.join(scripts)}, not of {self.script.name}")
            was = state["args"].get("rank")
            if was != vars(args).get("rank"):
                raise UserError(f"--rank {args.rank}: the adapters of this run have rank {was}, and keep it")
        whole = [*step_folders(self.out), *self.out.glob("final")]
        if whole and (args.resume is None or self.out not in (args.resume.resolve(), args.resume.resolve().parent)):
            raise UserError(
                f"--out {self.out} holds a run ({whole[-1].name}): go on with --resume {self.out}, or give a new "
                "folder with --out"
            )
        if args.wandb and importlib.util.find_spec("wandb") is None:
            raise UserError("--wandb needs a package: pip install wandb")
        if args.weights and not args.generator_weights and "student" in BACKBONES[args.model]:
            raise UserError(
                f"--weights without --generator_weights: the generator of {args.model} starts from weights of its own, "
                "the step-distilled release; give its folder (or that of --weights again)"
            )
        return state

    def pin(self, flag, value):
        """Parts of a value {part: fingerprint} that must be what they were as the run began, or the flag is refused."""
        self.pinned[flag] = value
        was = self.state.get(flag) if self.state else None
        if isinstance(was, dict) and any(was.get(part, now) != now for part, now in value.items()):
            given = getattr(self.args, flag)
            given = " ".join(map(str, given)) or "left out" if isinstance(given, list) else given
            raise UserError(f"--{flag} {given}: not the adapters that this run began with")

    def load_backbone(self):
        a = self.args
        sources, dtype = (a.model, a.weights, a.generator_weights), getattr(torch, a.dtype)
        sharding = dict(mode=a.shard, offload_frozen=a.offload_frozen, frozen_dtype=a.frozen_dtype)
        self.print(f"device {self.device}, networks in {a.dtype}, processes: {self.world_size}")
        backbone = load(*sources, self.device, dtype, a.resolution, **sharding)
        backbone.offload_encoders = a.offload_encoders
        put_below(backbone, a.teacher_lora)
        return backbone

    def adapters(self, networks, rank, init_std=None):
        """Parameters of each adapter; networks: {adapter: its transformer}. One named ..._ema begins as its twin."""
        self.networks = networks
        for name, network in networks.items():
            trainable = not name.endswith("_ema")
            if self.state:
                load_adapter(network, name, self.state["folder"] / name, trainable)
            else:
                init = seeded(self.args.seed, "init", name.removesuffix("_ema"))
                add_adapter(network, name, rank, init_std=init_std, generator=init, trainable=trainable)
        return [adapter_parameters(network, name) for name, network in networks.items()]

    def begin(self, backbone, pairs, optimizers, images):
        """pairs: [(prompt, metadata)]; optimizers: {role: optimiser}; images: of one step."""
        self.backbone, self.optimizers, self.images = backbone, optimizers, images
        self.shown = [prompt for prompt, _ in (self.heldout.pairs if self.heldout else pairs)[:16]]
        texts, held = {prompt for prompt, _ in pairs}, self.heldout.pairs if self.heldout else []
        if known := sum(prompt in texts for prompt, _ in held):
            self.print(f"{known} of {len(held)} held-out prompts are trained on")
        self.postfix = {}
        if self.state:
            for role, optimizer in optimizers.items():
                optimizer.load_state_dict(self.state["optimizers"][role])
        self.rows, (self.in_a_row, self.skipped) = [], (self.state or {}).get("skipped", (0, 0))
        self.wandb = None
        if self.rank == 0:
            digest = hashlib.sha256(json.dumps(pairs, default=str).encode()).hexdigest()[:16]
            data = {"world size": self.world_size, "prompts read": f"{len(pairs)}, sha256 {digest}"}
            data["base"] = getattr(backbone and backbone.transformer, "base", None)
            data |= {BELOW: self.pinned["teacher_lora"]["all"]}
            for source in self.args.teacher_lora:
                print(f"frozen under all roles: {source}")
            with named_failure(f"cannot write to --out {self.args.out}"):
                settings = json.dumps(vars(self.args), default=lambda place: str(place.absolute()))
                self.begin_files(json.loads(settings) | data)

    def begin_files(self, settings):
        """args.json and log.jsonl; rows and checkpoints beyond the step that the run goes on from are dropped."""
        if self.state:
            print(f"going on from step {self.start}, {self.state['folder']}")
        for name, was in (self.state["args"] if self.state else {}).items():
            if name not in ("out", "resume") and was != settings.get(name):
                flag = f"--{name}" if hasattr(self.args, name) else name
                print(f"not as before step {self.start}: {flag} was {was}, is {settings.get(name)}")
        self.settings = json.dumps(settings, indent=2) + "\n"
        (self.out / "args.json").write_text(self.settings)
        goes_on = self.state and self.state["folder"].resolve().parent == self.out  # else its rows are another run's
        rows = self.log_file.read_text().splitlines() if goes_on and self.log_file.is_file() else []
        self.log_file.write_text("".join(row + "\n" for row in rows if step_of(row) <= self.start))
        for old in self.stale:
            shutil.rmtree(old)
            print(f"dropped {old}: this run goes on from step {self.start}, and writes its own")
        if self.args.wandb:
            import wandb

            self.wandb = wandb.init(dir=self.out, config=vars(self.args))

    def steps(self, name):
        """The steps that are left, from 0. What is due after a step is done when the next one is asked for."""
        self.bar = Run.bar = tqdm(desc=name, initial=self.start, total=self.total, disable=self.rank > 0)
        every = self.args.sample_every
        if self.heldout and self.start == 0:
            self.evaluate(0)
        self.since, self.backbone.evaluations = time.perf_counter(), 0
        for step in range(self.start, self.total):
            yield step
            done, stopped = step + 1, self.stop.agreed(self.world_size)
            saving = done % self.args.save_every == 0 or done == self.total or stopped
            judging = self.heldout and (done % self.heldout.every == 0 or done == self.total)
            if saving or judging:  # what is not finite must stop the run before it is saved
                self.write_rows()
            paused, evaluations = time.perf_counter(), self.backbone.evaluations
            if every and (done % every == 0 or step == 0):
                self.sample_grid(done)
            if judging:
                self.evaluate(done)
            if saving:
                self.save(done)
            self.since += time.perf_counter() - paused  # this is no part of the training's pace
            self.backbone.evaluations = evaluations
            self.bar.update()
            if stopped:
                return self.print_stopped(done)
        self.save(self.total, final=True)
        for name in [name for name in self.networks if name.endswith("_ema")]:
            if not any(B.any() for B in adapter_parameters(self.networks[name], name)[1::2]):
                self.print(f"{name} has not moved, and adds nothing: its average had no update, raise --{self.count}")
        self.close(f"done: {self.args.out}/final")

    def interrupted(self, step):
        """True if a stop was asked for within step `step`, of which nothing is learned yet: its draws come back."""
        if self.stop.agreed(self.world_size):
            self.write_rows()  # before saving, as in `steps`
            self.save(step)
            self.print_stopped(step)
        return self.stop.asked

    def print_stopped(self, step):
        go_on = f"go on with the same command and --resume {self.args.out}"
        self.close(f"\nstopped after {self.count.removesuffix('s')} {step}; {go_on}")

    def close(self, farewell):
        self.bar.close()
        self.print(farewell)
        if Run.lock:
            Run.lock.close()

    def log(self, step, row):
        """row: {name: number or scalar on the device}; written --log_every steps together, in one device sync."""
        self.rows.append((step + 1, {k: v.detach() if torch.is_tensor(v) else v for k, v in row.items()}))
        if (step + 1) % self.args.log_every == 0:
            self.write_rows()

    def write_rows(self):
        rows = rows_over_ranks([row for _, row in self.rows], self.world_size)
        n, now = len(rows), time.perf_counter()
        pace = speed(self.backbone, now - self.since, n, self.images * n) if n else {}
        self.since = now
        for (step, _), row in zip(self.rows, rows, strict=True):
            self.drop_nonfinite(step, row)
            for name in [name for name in self.zeros if row.get(name) == 0]:
                self.print(f"step {step}: {name} is 0: {self.zeros.pop(name).format(**row)}")
            self.write_row({"step": step, **row, "skipped": self.skipped, **pace})
        self.rows = []

    def write_row(self, row):
        row = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}
        shown = [name for name in row if name.startswith(SHOWN) and not name.endswith("_error")]
        self.postfix |= {name: f"{row[name]:.3g}" for name in shown}
        self.bar.set_postfix(self.postfix, refresh=False)
        if self.rank == 0:
            with named_failure(f"cannot write to {self.log_file}"), self.log_file.open("a") as file:
                print(json.dumps(row), file=file)
        if self.wandb:
            self.wandb.log(row)

    def drop_nonfinite(self, step, row):
        """Values that are not finite stop the run, unless --skip_nonfinite lets some steps in a row pass uncounted."""
        bad = [name for name, value in row.items() if not math.isfinite(value)]
        self.in_a_row, self.skipped = (self.in_a_row + 1, self.skipped + 1) if bad else (0, self.skipped)
        if self.in_a_row > self.args.skip_nonfinite:
            # what follows from others, as the generator's loss from a broken fake score, is not the one to name
            cause = min(bad, key=lambda name: ("generator" in name, not name.startswith("loss")))
            times = f", {self.in_a_row} times in a row," if self.in_a_row > 1 else ""
            after = f"nothing was saved from here on. Checkpoints: {self.args.out}/step_*"
            raise SystemExit(f"step {step}: {cause}{times} is not finite; {after}")
        for name in bad:
            del row[name]

    def evaluate(self, done):
        """Score the EMA generator's pictures of the held-out set, dealt to the processes: a log line of its own."""
        backbone, n = self.backbone, len(self.heldout.pairs)
        turns = -(-n // self.world_size)  # as many for every process: sharded networks need them all for a forward
        mine, scores = [(self.rank + i * self.world_size) % n for i in range(turns)], []
        for b in range(0, turns, self.args.batch_size):
            part = mine[b : b + self.args.batch_size]
            prompts = [self.heldout.pairs[i][0] for i in part]
            latents = sample_latents(backbone, prompts, backbone.sigmas(), self.args.eta, indices=part, role="ema")
            scores += self.heldout.score(decode_all(backbone, latents), part)
        row = self.heldout.summary(dict(gather(scores, self.world_size)))
        self.write_row({"step": done} | row)

    def sample_grid(self, done):
        """Write a picture of the EMA generator's samples: the same prompts and noise each time."""
        if self.rank > 0 and self.args.shard == "none":
            return  # sharded networks need every process for a forward
        latents = sample_latents(self.backbone, self.shown, self.backbone.sigmas(), self.args.eta, role="ema")
        if self.rank == 0:
            file = self.out / "samples" / f"{self.count.removesuffix('s')}_{done:06d}.png"
            save_grid(decode_all(self.backbone, latents), file, columns=8)

    def save(self, step, final=False):
        """Write out/step_NNNNNN (or out/final) aside, flush it, then rename it; of older ones the newest stays, and
        each --keep_every-th. A process killed at any moment leaves whole checkpoints only. Adapters: folders that
        diffusers can load; state.pt: optimisers and counters; the script is copied for the record."""
        if self.rank > 0:
            return
        target = self.out / ("final" if final else f"step_{step:06d}")
        aside = target.with_name(f".{target.name}.partial")
        whole = step_folders(self.out)
        hint = f"the last good checkpoint is {whole[-1]}" if whole else "there is no earlier checkpoint"
        optimizers = {role: optimizer.state_dict() for role, optimizer in self.optimizers.items()}
        state = {"step": step, "optimizers": optimizers, "skipped": (self.in_a_row, self.skipped), **self.pinned}
        with named_failure(f"cannot save {target} ({hint})"):
            shutil.rmtree(aside, ignore_errors=True)
            for name, network in self.networks.items():
                save_adapter(network, name, aside / name)
            torch.save(state, aside / "state.pt")
            (aside / "args.json").write_text(self.settings)
            shutil.copyfile(self.script, aside / self.script.name)  # not its permissions
            put_in_place(aside, target)
        for old in step_folders(self.out)[:-2]:
            if not self.args.keep_every or int(old.name[5:]) % self.args.keep_every:
                shutil.rmtree(old)


SHOWN = ("reward/", "eval/", "grad_norm/generator")  # beside the progress bar


def put_in_place(aside, target):
    """Rename a finished folder to its name; the rename must not reach the disk before the files do."""
    for path in [*aside.rglob("*"), aside]:
        flush(path)
    if target.exists():
        shutil.rmtree(target)
    aside.rename(target)
    flush(target.parent)


def flush(path):
    """Have the operating system write a file or folder to the disk; not all can flush a folder."""
    try:
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # some flush what may be written only
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):  # what was written is lost
            raise


def step_folders(out):
    """A run's checkpoints in order: folders named step_ and digits, and nothing else that a user may have put there."""
    folders = [p for p in Path(out).glob("step_*") if re.fullmatch(r"step_\d+", p.name) and p.is_dir()]
    return sorted(folders, key=lambda p: int(p.name[5:]))


def read_checkpoint(folder):
    """state.pt of a checkpoint, or of a run's newest, with its "args" and "folder"; a UserError if a file is torn."""
    folder = Path(folder)
    if not (folder / "state.pt").is_file():
        steps = step_folders(folder)
        if not steps:
            raise UserError(f"--resume {folder}: no checkpoint there; give a run folder or one of its step_NNNNNN")
        folder = steps[-1]
    older = step_folders(folder.parent)
    older = older[: older.index(folder)] if folder in older else older
    hint = f"the next older one: --resume {older[-1]}" if older else "there is no older one beside it"
    try:
        state = load_tensors(folder / "state.pt")
        if not isinstance(state, dict) or not {"step", "optimizers"} <= set(state):
            raise UserError("state.pt is no training state")
        with named_failure("args.json"):
            state["args"] = json.loads((folder / "args.json").read_text())
        for adapter in folder.iterdir():
            if adapter.is_dir():
                read_adapter(adapter)
    except UserError as error:
        raise UserError(f"{folder} is torn or no checkpoint: {first_line(error)}; {hint}") from error
    return state | {"folder": folder}


def step_of(line):
    """Step of a log line; infinity for a line that a killed process left half written."""
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:
        return math.inf


class StopSignal:
    """SIGTERM, Ctrl-C and schedulers' warnings ask for a stop after the current step; a second Ctrl-C stops at once.

    A second SIGTERM does not: a cluster's scheduler sends one to every process, and torchrun passes its own on.
    """

    def __init__(self):
        self.asked = False
        names = {"SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGXCPU"}
        for number in [number for number in signal.Signals if number.name in names]:  # Windows has two of them
            signal.signal(number, self._ask)

    def _ask(self, number, frame):
        if self.asked and number == signal.SIGINT:
            raise SystemExit(1)
        if not self.asked and os.environ.get("RANK", "0") == "0":  # a print could be interrupted by its like
            os.write(2, b"\nstopping after this step, to save; Ctrl-C again stops at once and saves nothing\n")
        self.asked = True

    def agreed(self, world_size):
        """True on every rank as soon as one rank was asked. Over the CPU: the GPUs need not catch up for it."""
        if world_size > 1:
            flag = torch.tensor(float(self.asked))
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            self.asked = bool(flag.item())
        return self.asked


def save_grid(images, path, columns, gap=2):
    """Write images [B, 3, H, W] in [0, 1] as one picture, `gap` white pixels between them."""
    from PIL import Image

    b, c, h, w = images.shape
    rows = -(-b // columns)
    sheet = torch.ones(rows * columns, c, h + gap, w + gap)
    sheet[:b, :, :h, :w] = images.cpu()
    sheet = sheet.view(rows, columns, c, h + gap, w + gap).permute(0, 3, 1, 4, 2)
    sheet = sheet.reshape(rows * (h + gap), columns * (w + gap), c)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((sheet * 255).round().byte().numpy()).save(path)
