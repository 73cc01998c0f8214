"""Stage 0: train the classroom's teacher from nothing, about half an hour on 2 CPU cores.

1. VAE: a small AutoencoderKL (64x64 px -> 4x8x8 latents), L1 + L2 reconstruction and a little KL.
2. CLIP: a small CLIPModel, contrastive, plus a loss that makes its text tower's penultimate layer tell the parse.
   That layer is what SD3 reads, and contextual text features are what let a small transformer bind colours to shapes.
3. Teacher: an SD3Transformer2DModel, flow matching v = noise - x0, on pre-encoded latents; Muon for the matrices of
   the blocks, AdamW for the rest, EMA, caption dropout 10% for classifier-free guidance. Its captions are true for the
   first 65% of the steps, so that it learns to draw and to read, and its learning rate falls to 0 there. Then, at 0.3
   of that rate, they are unreliable, as captions of the web are: pictures show an object twice or contradict their
   caption (shapes.unreliable_scene says how often). So the teacher fails as published ones do, by miscounting,
   misplacing and mixing up what it can draw, and stage 2 has what to mend.

    torchrun --nproc_per_node=2 classroom/pretrain.py              (or plain `python classroom/pretrain.py`)

Writes classroom/teacher/ (a complete StableDiffusion3Pipeline folder) and classroom/clip/ (CLIPModel, processor), fp16.
Only "train" captions are used (see shapes.py); the scores printed at the end are on held-out ones.
"""

import json
import math
import os
import sys
import time
from pathlib import Path

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers.models import BPE
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # so that `python classroom/pretrain.py` finds the package it lives in
import models  # noqa: E402
import rewards  # noqa: E402
from classroom import shapes  # noqa: E402
from models import at_least, step_optimizer  # noqa: E402

TRUE_SHARE = 0.65  # of the teacher's steps and pictures, whose captions are true; what follows is unreliable
MAX_TOKENS = 14  # start token + at most 8 words + end token, and a tail of at least 4 that `parse_of` gives a use


def parse_args(argv=None):
    p = models.parser(__doc__.splitlines()[0])
    p.add_argument("--stages", nargs="+", default=["vae", "clip", "teacher"], choices=["vae", "clip", "teacher"])
    p.add_argument("--out", type=models.path, default=HERE, help="folder that receives teacher/ and clip/")
    p.add_argument("--vae_steps", type=at_least(1), default=1200, help="batches of 32 images")
    p.add_argument("--clip_steps", type=at_least(1), default=500, help="batches of 192 image-caption pairs")
    p.add_argument("--teacher_steps", type=at_least(1), default=4000, help="global batches of 96 latents")
    p.add_argument("--n_latents", type=at_least(1), default=72000, help="the teacher's training images")
    p.add_argument("--n_prompts", type=at_least(6), default=600, help="pictures that score the VAE and the teacher")
    p.add_argument("--seed", type=at_least(0), default=0, help="covers data, initial weights and noise")
    return p.parse_args(argv)


def batch_of(n, rng, draw=shapes.scene, **task_weights):
    """n captioned pictures: (metadata list, images float [n, 3, 64, 64] in [0, 1])."""
    metadata = shapes.sample_prompts(n, rng.integers(2**31), task_weights=task_weights)
    return metadata, shapes.drawn([draw(m, rng) for m in metadata], rng)


def cosine(step, steps, warmup=20):
    return min(1, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


# ---------------------------------------------------------------------------------------------------------------
# 1. VAE


def train_vae(args):
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=shapes.SIZE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    vae.to(memory_format=torch.channels_last)  # a fifth faster on CPU
    optimizer = torch.optim.AdamW(vae.parameters(), lr=3e-3, betas=(0.9, 0.99))
    bar = tqdm(range(args.vae_steps), "VAE")
    for step in bar:
        scenes = [shapes.dense_scene(rng) for _ in range(16)]
        scenes += [shapes.scene(m, rng) for m in shapes.sample_prompts(16, rng.integers(2**31))]
        x = (shapes.drawn(scenes, rng) * 2 - 1).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        loss = F.mse_loss(y, x) + 0.2 * F.l1_loss(y, x) + 2e-5 * kl
        loss.backward()
        step_optimizer(optimizer, cosine(step, args.vae_steps), world_size=1)
        if step % 20 == 0:
            bar.set_postfix(mse=f"{F.mse_loss(y, x).item():.4f}", kl=f"{kl.item():.2f}")
    with torch.no_grad():  # scale and shift: latents of unit variance, SD3's convention z = (mean - shift) * scale
        metadata, images = batch_of(1000, rng)
        z = vae.encode(images * 2 - 1).latent_dist.mean
        vae.register_to_config(scaling_factor=round(1 / z.std().item(), 4), shift_factor=round(z.mean().item(), 4))
        z, metadata = z[: args.n_prompts], metadata[: args.n_prompts]
        for sigma in (0.0, 0.1):
            y = vae.decode(z + sigma * z.std() * torch.randn_like(z)).sample.clamp(-1, 1) / 2 + 0.5
            print(f"VAE: strict GenEval of reconstructions, latent noise {sigma}: {strict(y, metadata).mean():.3f}")
    vae.half().save_pretrained(args.out / "teacher" / "vae")


def strict(images, metadata):
    """Share of pictures [B, 3, 64, 64] in [0, 1] that show what the caption asks for: [B] of 0 and 1."""
    found = shapes.detect(rewards.eight_bits(images))
    return np.array([rewards.geneval_check(d, m)["strict"] for d, m in zip(found, metadata, strict=True)])


# ---------------------------------------------------------------------------------------------------------------
# 2. CLIP


def build_tokenizer():
    """A CLIPTokenizer for which every word of the captions is one token; any other text falls back to letters."""
    words = Tokenizer(BPE(end_of_word_suffix="</w>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=5000, end_of_word_suffix="</w>", show_progress=False)
    words.train_from_iterator((m["prompt"] for t in shapes.TASKS for m in shapes.captions(t, "train")), trainer)
    merges = [tuple(pair) for pair in json.loads(words.to_str())["model"]["merges"]]
    vocab = alphabet + [c + "</w>" for c in alphabet] + ["".join(m) for m in merges]
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*vocab, "<|startoftext|>", "<|endoftext|>"]))}
    return transformers.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def tokenize(tokenizer, prompts):
    return tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids


def parse_of(metadata):
    """What a caption says, as small integers with 0 for "open": (whole, sides).

    whole [6]: task, count, kind and colour of both objects; read at the end token.
    sides [4, 2]: the kind and colour that the caption puts left, right, above, below; each read at one of the last four
    tokens of the padded text. Attention is causal, so "circle" in "a circle left of a square" cannot know its side, but
    the tail can, and there an image token can find its side by attention alone. Each tail token has a map of its own:
    SD3 gives text tokens no positions, so what they hold must tell which of them they are.
    """
    kinds, colors = (None, *shapes.SHAPES), (None, *shapes.COLORS)
    code = lambda need: [kinds.index(need.get("class")), colors.index(need.get("color"))]  # noqa: E731
    first, second = (metadata["include"] + [{}])[:2]
    sides = dict.fromkeys(shapes.RELATIONS, {})
    if "position" in second:
        relation = second["position"][0]
        sides[relation], sides[shapes.OPPOSITE[relation]] = second, first
    whole = [shapes.TASKS.index(metadata["tag"]), first["count"], *code(first), *code(second)]
    return whole, [code(need) for need in sides.values()]


def parse_loss(heads, hidden, tokens, metadata):
    """Cross-entropy of the parse, read from hidden states [B, L, D] by the linear maps `heads`."""
    whole, sides = (torch.tensor(part) for part in zip(*map(parse_of, metadata), strict=True))
    end = tokens.eq(tokens[0, -1]).int().argmax(1)  # the first end token; padding repeats it
    guesses = heads["whole"](hidden[torch.arange(len(hidden)), end]).split([6, 5, 5, 6, 5, 6], dim=-1)
    loss = sum(F.cross_entropy(guess, whole[:, i]) for i, guess in enumerate(guesses))
    of_sides = heads["side"](hidden[:, -4:]).unflatten(-1, (4, 11)).diagonal(dim1=1, dim2=2).mT  # token i by map i
    kind, color = of_sides.split([5, 6], dim=-1)
    return loss + F.cross_entropy(kind.mT, sides[..., 0]) * 4 + F.cross_entropy(color.mT, sides[..., 1]) * 4


def train_clip(args):
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed + 1)
    tokenizer = build_tokenizer()
    tower = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4)
    words = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    words |= dict(vocab_size=len(tokenizer), max_position_embeddings=MAX_TOKENS, projection_dim=64)
    pixels = dict(image_size=shapes.SIZE, patch_size=shapes.CELL, projection_dim=64)
    towers = dict(text_config=tower | words, vision_config=tower | pixels)
    clip = transformers.CLIPModel(transformers.CLIPConfig(**towers, projection_dim=64))
    heads = torch.nn.ModuleDict({name: torch.nn.Linear(128, n) for name, n in (("whole", 33), ("side", 44))})
    parameters = [*clip.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.05)
    bar = tqdm(range(args.clip_steps), "CLIP")
    for step in bar:
        metadata, images = batch_of(192, rng)
        images = images + 0.1 * torch.rand(len(images), 1, 1, 1) * torch.randn_like(images)  # not only clean pictures
        tokens = tokenize(tokenizer, [m["prompt"] for m in metadata])
        text = clip.text_model(input_ids=tokens, output_hidden_states=True)
        text_embeds = F.normalize(clip.text_projection(text.pooler_output), dim=-1)
        image_embeds = F.normalize(clip.get_image_features(rewards.normalize(images)).pooler_output, dim=-1)
        logits = clip.logit_scale.exp() * image_embeds @ text_embeds.T
        same = torch.tensor([[float(a["include"] == b["include"]) for b in metadata] for a in metadata])
        target = same / same.sum(1, keepdim=True)  # captions that mean the same are not each other's negatives
        contrastive = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        parse = parse_loss(heads, text.hidden_states[-2], tokens, metadata)
        loss = contrastive + 0.3 * parse
        loss.backward()
        step_optimizer(optimizer, cosine(step, args.clip_steps), world_size=1)
        with torch.no_grad():
            clip.logit_scale.clamp_(max=math.log(30))
        if step % 20 == 0:
            bar.set_postfix(contrastive=f"{contrastive.item():.3f}", parse=f"{parse.item():.3f}")
    size = {"height": shapes.SIZE, "width": shapes.SIZE}
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": shapes.SIZE}, crop_size=size)
    transformers.CLIPProcessor(processor, tokenizer).save_pretrained(args.out / "clip")
    save_half(clip, args.out / "clip")
    text_encoder = transformers.CLIPTextModelWithProjection(clip.config.text_config)
    text_encoder.load_state_dict(clip.state_dict(), strict=False)
    for name, encoder in (("", text_encoder), ("_2", text_encoder), ("_3", silent_t5(len(tokenizer)))):
        tokenizer.save_pretrained(args.out / "teacher" / f"tokenizer{name}")
        save_half(encoder, args.out / "teacher" / f"text_encoder{name}")


def save_half(model, folder):
    """fp16 weights on disk, but a config that says float32, so that a plain from_pretrained runs on a CPU."""
    model.half().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}, indent=2) + "\n")


def silent_t5(vocab_size):
    """A T5 encoder that answers 0 to every prompt: its last norm has weight 0.

    StableDiffusion3Pipeline puts zeros where it has no T5, but such a folder loads only with text_encoder_3=None typed
    out. This stands in the gap: `from_pretrained("classroom/teacher")` works, and the text is CLIP's alone.
    """
    sizes = dict(d_model=256, d_kv=4, d_ff=8, num_layers=1, num_heads=1)
    model = transformers.T5EncoderModel(transformers.T5Config(vocab_size=vocab_size, **sizes))
    torch.nn.init.zeros_(model.encoder.final_layer_norm.weight)
    return model


# ---------------------------------------------------------------------------------------------------------------
# 3. teacher


class Muon:
    """Momentum whose updates are made orthogonal, for matrices (https://kellerjordan.github.io/posts/muon/).

    torch.optim.Muon multiplies in bfloat16, which a CPU without the instructions does thirty times slower.
    """

    def __init__(self, matrices):
        self.alike = {}  # shape -> its matrices, which are orthogonalised together, and their momenta
        for p in matrices:
            self.alike.setdefault(p.shape, []).append(p)
        self.momenta = {shape: torch.zeros(len(group), *shape) for shape, group in self.alike.items()}

    @torch.no_grad()
    def step(self, lr):
        for (rows, columns), group in self.alike.items():
            grad = torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in group])
            momentum = self.momenta[group[0].shape].lerp_(grad, 0.05)
            update = orthogonal(grad.lerp(momentum, 0.95)) * math.sqrt(max(1, rows / columns))
            torch._foreach_add_(group, list(update), alpha=-lr)


def orthogonal(x):
    """Newton-Schulz iteration on matrices [N, rows, columns]: singular values go to about 1, directions stay."""
    if x.shape[-2] > x.shape[-1]:
        return orthogonal(x.mT).mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    return x


@torch.no_grad()
def encode_data(args, rng, n, draw):
    """n latents [N, 4, 8, 8], caption index [N], and the embeddings of every training caption (the last row: "")."""
    folder = args.out / "teacher"
    vae = AutoencoderKL.from_pretrained(folder / "vae", dtype=torch.float32)
    tower = transformers.CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
    prompts = [m["prompt"] for t in shapes.TASKS for m in shapes.captions(t, "train")] + [""]
    out = tower(tokenize(tokenizer, prompts), output_hidden_states=True)
    # as StableDiffusion3Pipeline.encode_prompt: of both its CLIPs, which are the same here
    embeds, pooled = torch.cat([out.hidden_states[-2]] * 2, -1), torch.cat([out.text_embeds] * 2, -1)
    latents, index = [], []
    row = {prompt: i for i, prompt in enumerate(prompts)}
    for _ in tqdm(range(-(-n // 500)), "encode"):
        metadata, images = batch_of(500, rng, draw, position=2.5, counting=1.5)  # the hard ones more often
        z = vae.encode(images * 2 - 1).latent_dist.mean
        latents.append((z - vae.config.shift_factor) * vae.config.scaling_factor)
        index += [row[m["prompt"]] for m in metadata]
    return torch.cat(latents), torch.tensor(index), embeds, pooled


def train_teacher(args, rank, world_size):
    torch.manual_seed(args.seed)
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=256,
        caption_projection_dim=128,
        pooled_projection_dim=128,
        pos_embed_max_size=4,
        qk_norm="rms_norm",
    )
    rng = np.random.default_rng([args.seed, 2, rank])
    told, n = int(TRUE_SHARE * args.teacher_steps), args.n_latents // world_size
    n_true = int(TRUE_SHARE * n)
    data = [encode_data(args, rng, n_true, shapes.scene), encode_data(args, rng, n - n_true, shapes.unreliable_scene)]
    matrices = [p for n, p in model.transformer_blocks.named_parameters() if p.ndim == 2 and "norm" not in n]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    muon = Muon(matrices)
    adam = torch.optim.AdamW(others, lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0)
    average = [p.detach().clone() for p in model.parameters()]
    ema = models.EMA(model.parameters(), average, 0.998, warmup=True)
    g = torch.Generator().manual_seed(args.seed * 1000 + rank)
    batch = 96 // world_size
    bar = tqdm(range(args.teacher_steps), "teacher", disable=rank > 0)
    for step in bar:
        # A user's plain `pipe(prompt)` appends the silent T5's 256 zero tokens: every 16th step shows them.
        long = step % 16 == 15
        latents, index, embeds, pooled = data[step >= told]
        pick = torch.randint(len(latents), (batch // 6 if long else batch,), generator=g)
        x0, text = latents[pick], index[pick]
        text = torch.where(torch.rand(len(pick), generator=g) < 0.1, len(embeds) - 1, text)
        context = F.pad(embeds[text], (0, 0, 0, 256)) if long else embeds[text]
        u = torch.sigmoid(torch.randn(len(pick), generator=g))
        u = torch.where(torch.rand(len(pick), generator=g) < 0.2, torch.rand(len(pick), generator=g), u)
        sigma = 2.5 * u / (1 + 1.5 * u)
        noise = torch.randn(x0.shape, generator=g)
        s = models.per_sample(sigma, x0)
        x = (1 - s) * x0 + s * noise
        v = model(
            hidden_states=x, timestep=1000 * sigma, encoder_hidden_states=context, pooled_projections=pooled[text]
        ).sample
        loss = F.mse_loss(v, noise - x0)
        model.zero_grad()
        loss.backward()
        models.average_gradients(list(model.parameters()), world_size)
        peak, i, steps = (1.0, step, told) if step < told else (0.3, step - told, args.teacher_steps - told)
        scale = peak * min(1, (i + 1) / 50, (steps - i) / (0.45 * steps))
        muon.step(0.02 * scale)
        step_optimizer(adam, scale, world_size=1)  # gradients are averaged above, for both
        ema.update(step)
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
        last = step + 1 == args.teacher_steps
        if rank == 0 and (last or (step + 1) % 500 == 0):
            save_teacher(model.config, average, args.out / "teacher", args.n_prompts if last else 120)


def save_teacher(config, average, folder, n_prompts):
    """Write the pipeline folder with the averaged weights, then score the pipeline as a user would load it."""
    half = SD3Transformer2DModel.from_config(config).half()
    torch._foreach_copy_([p.data for p in half.parameters()], average)
    half.save_pretrained(folder / "transformer")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.save_pretrained(folder / "scheduler")
    names = "CLIPTextModelWithProjection", "T5EncoderModel", "CLIPTokenizer"
    clip, t5, tokenizer = (["transformers", name] for name in names)
    index = {"_class_name": "StableDiffusion3Pipeline", "_diffusers_version": diffusers.__version__}
    index |= {"scheduler": ["diffusers", type(scheduler).__name__], "vae": ["diffusers", "AutoencoderKL"]}
    index |= {"transformer": ["diffusers", type(half).__name__]}
    index |= {"text_encoder": clip, "text_encoder_2": clip, "text_encoder_3": t5}
    index |= {"tokenizer": tokenizer, "tokenizer_2": tokenizer, "tokenizer_3": tokenizer}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    diffusers.utils.logging.set_verbosity_error()  # it would tell that the silent T5 sees two tokens only
    pipe = StableDiffusion3Pipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    metadata = shapes.sample_prompts(n_prompts, 11, "validation")
    images = []
    for i in range(0, n_prompts, 60):
        prompts = [m["prompt"] for m in metadata[i : i + 60]]
        g = torch.Generator().manual_seed(i)
        call = dict(num_inference_steps=28, guidance_scale=2.0, max_sequence_length=2, output_type="pt", generator=g)
        images.append(pipe(prompts, **call).images)
    hits = strict(torch.cat(images), metadata)
    tags = np.array([m["tag"] for m in metadata])
    table = "  ".join(f"{t} {hits[tags == t].mean():.2f}" for t in shapes.TASKS)
    score = f"{hits.mean():.3f} +- {hits.std() / math.sqrt(len(hits)):.3f}"
    print(f"\nteacher, 28 guided steps, {n_prompts} of validation: strict {score} | {table}", flush=True)


def main(args):
    rank, world_size, _ = models.setup_distributed("cpu")
    if world_size > 1:  # torchrun gives a process one thread
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
    start = time.time()
    for turn, (stage, train) in enumerate((("vae", train_vae), ("clip", train_clip))):
        if stage in args.stages and rank == turn % world_size:  # side by side where there are two processes
            train(args)
            print(f"{stage} done after {(time.time() - start) / 60:.1f} min", flush=True)
    if world_size > 1:
        torch.distributed.barrier()
    if "teacher" in args.stages:
        train_teacher(args, rank, world_size)
    if rank == 0:
        print(f"all done after {(time.time() - start) / 60:.1f} min")


if __name__ == "__main__":
    models.run(main, parse_args())
