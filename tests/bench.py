"""Speed and memory of both stages at published size: ms, images/s, MFU and peak GB of their four parts.

    python tests/bench.py                                               the classroom, on a CPU
    python tests/bench.py --model sd35 --random_weights                 one GPU; nothing is downloaded
    python tests/bench.py --model flux1 --random_weights --batch_size 4 --compile

Stage 1: a fake-score step (rollout of k = 2, L_ac and L_cons) and a generator step (rollout, teacher with guidance,
L_G). Stage 2: a rollout with decoding, and the update of one micro-batch (fake score, two chosen steps, the leash).
MFU: matrix products and attention of the forwards, as torch counts them, a backward as one forward more (the frozen
base needs no weight gradients), over the device's dense bf16 peak. A recomputed forward is not counted.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import diffusers
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import acdmd  # noqa: E402
import models  # noqa: E402
import rtdmd  # noqa: E402

SD3 = dict(sample_size=128, attention_head_dim=64, joint_attention_dim=4096, caption_projection_dim=1536)
SD3 |= dict(pooled_projection_dim=2048, in_channels=16, out_channels=16, patch_size=2, num_layers=24)
SD3 |= dict(num_attention_heads=24)
PUBLISHED = {  # model -> numbers of its transformer
    "sd3": SD3 | dict(pos_embed_max_size=192),
    "sd35": SD3 | dict(pos_embed_max_size=384, qk_norm="rms_norm", dual_attention_layers=tuple(range(13))),
    "flux1": dict(guidance_embeds=True),
    "flux2-4b": dict(num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680)
    | dict(guidance_embeds=False),
    "flux2-9b": dict(num_layers=8, num_single_layers=24, num_attention_heads=32, joint_attention_dim=12288)
    | dict(guidance_embeds=False),
}
TEXT = {"sd3": 205, "flux1": 512, "flux2": 512}  # tokens; SD3: 77 of CLIP and 128 of T5


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
    else:
        vae = diffusers.AutoencoderKL(
            **wide,
            latent_channels=16,
            scaling_factor=0.36,
            shift_factor=0.12,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    dynamic = family is not models.SD3
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=dynamic, base_shift=0.5, max_shift=1.15, max_image_seq_len=4096
    )
    pipeline = getattr(diffusers, family.pipeline)
    names = "_pack_latents _unpack_latents _prepare_latent_image_ids _prepare_latent_ids _prepare_text_ids".split()
    pipe = SimpleNamespace(**{n: getattr(pipeline, n) for n in [*names, "_unpatchify_latents"] if hasattr(pipeline, n)})
    pipe.transformer, pipe.vae, pipe.scheduler, pipe.vae_scale_factor = networks[0], vae.to(dtype), scheduler, 8
    student = networks[1] if len(networks) > 1 else None
    backbone = family(pipe, resolution or spec["resolution"], spec["text_tokens"], device, dtype, student)
    models.shard(backbone)
    config = networks[0].config
    cond = {"encoder_hidden_states": torch.randn(TEXT[family.family], config.joint_attention_dim)}
    if family is not models.Flux2:
        cond["pooled_projections"] = torch.randn(config.pooled_projection_dim)
    backbone._embeddings = {prompt: {k: v.to(dtype) for k, v in cond.items()} for prompt in ("", "a prompt")}
    return backbone


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
    cond, sigmas = backbone.encode(["a prompt"] * n), backbone.sigmas()
    noise, levels = models.Noise(0, range(n), backbone.latent_shape, device), sigmas[:3]
    n_cons = one.consistency_batch or n

    def fake_step():
        x_s = acdmd.rollout(backbone, cond, levels, one.eta, noise)
        sigma_t = acdmd.draw_t(noise.uniform("t"), levels[-1])
        x_t, target, sigma_ts = acdmd.renoise(x_s, levels[-1], sigma_t, noise.normal("z"))
        v_fake = backbone.velocity("fake", x_t, sigma_t, cond)
        loss_ac = acdmd.fake_score_loss(v_fake, target, sigma_ts)
        start = x_t, sigma_t, v_fake
        loss_cons = acdmd.consistency(backbone, cond, start, noise[:n_cons], one.eta, one.delta_max)
        (loss_ac + one.gamma * loss_cons).backward()
        models.step_optimizer(optimizers["fake"], 1e-5, 1)

    def generator_step():
        x_s = acdmd.rollout(backbone, cond, levels, one.eta, noise, grad=True)
        _, g = rtdmd.matching_gradient(backbone, cond, x_s, noise, one.guidance_scale)
        x_s.backward(g)
        models.step_optimizer(optimizers["generator"], 1e-5, 1)

    def rollout_step():
        with torch.no_grad():
            backbone.decode(models.sample_latents(backbone, ["a prompt"] * n, sigmas, 0.9))

    states = torch.randn(n, 5, *backbone.latent_shape, device=device)

    def update_step():
        x0 = states[:, -1]
        x_t, sigma_t, z = rtdmd.noised(x0, noise)
        v_fake = backbone.velocity("fake", x_t, sigma_t, cond)
        loss_ac = rtdmd.fake_score_loss(v_fake, x0, z, sigma_t)
        loss_cons = rtdmd.consistency(backbone, cond, (x_t, sigma_t, v_fake), noise[:n_cons], one.eta)
        (loss_ac + one.gamma * loss_cons).backward()
        models.step_optimizer(optimizers["fake"], 1e-5, 1)
        for j in (0, 1):
            v = backbone.velocity("generator", states[:, j], sigmas[j], cond)
            step = states[:, j + 1], states[:, j], v, sigmas[j], sigmas[j + 1], one.eta
            ones = torch.ones(n, device=device)
            rtdmd.policy_loss(rtdmd.cps_log_prob(*step), -ones, ones).backward()
        v = backbone.velocity("generator", states[:, 3], sigmas[3], cond)
        x0 = models.cps_step(states[:, 3], v, sigmas[3], 0.0)
        _, g = rtdmd.matching_gradient(backbone, cond, x0, noise, one.guidance_scale)
        x0.backward(g)
        models.step_optimizer(optimizers["generator"], 1e-5, 1)

    parts = {"stage 1, fake score": fake_step, "stage 1, generator": generator_step}
    parts |= {"stage 2, rollout": rollout_step, "stage 2, update": update_step}
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
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", default="classroom", choices=models.BACKBONES)
    parser.add_argument(
        "--random_weights", action="store_true", help="and dummy embeddings, in place of published ones"
    )
    parser.add_argument("--resolution", type=int, help="pixels a side (default: the backbone's)")
    parser.add_argument("--batch_size", type=int, help="images (default: stage 1's preset)")
    parser.add_argument("--repeat", type=int, default=5, help="timed calls of each part")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--checkpointing", default="auto", choices=["auto", "on", "off"], help="as in the stages")
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=models.path, help=".jsonl to append the rows to")
    args = parser.parse_args()
    if args.random_weights and args.model == "classroom":
        parser.error("--random_weights: the classroom has weights; leave the flag out")
    models.run(main, args)
