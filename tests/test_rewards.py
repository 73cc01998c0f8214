"""The nine scorers: mappings against independent computations, gradients, rules, and all of them in one run."""

import json
import math
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import bench_rewards
import numpy as np
import pytest
import tiny_rewards
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from transformers import AutoConfig, AutoTokenizer, CLIPModel

import models
import rewards
import sample
from classroom.prompts import geneval_prompts

ROOT = Path(__file__).resolve().parent.parent
TIGHT = dict(rtol=0, atol=2e-5)
PROMPTS = ["a red circle", 'a sign that says "OPEN"', "two cats & a dog"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    models.quiet_libraries()
    return tiny_rewards.write_all(tmp_path_factory.mktemp("rewards"))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    tiny_rewards.shrink(monkeypatch.setattr)


@pytest.fixture(scope="session")
def images():
    """Smooth pictures [3, 3, 48, 64] in [0, 1]."""
    noise = torch.rand(3, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    return (F.interpolate(noise, (48, 64), mode="bicubic") * 0.8 + 0.1).clamp(0, 1)


def one(name, folder, **options):
    return rewards.load_scorers({name: 1.0}, "cpu", folder, **options).scorers[0]


def pil_crop(image, size, resample):
    """Shortest side to `size`, centre square, 8 bits, by PIL. image [3, H, W] -> [3, size, size]."""
    picture = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())
    scale = size / min(picture.size)
    picture = picture.resize((int(picture.width * scale), int(picture.height * scale)), resample)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return torch.from_numpy(np.array(picture.crop((left, top, left + size, top + size)))).permute(2, 0, 1) / 255


# ---------------------------------------------------------------------------------------------------------------
# mappings


def open_clip_features(state, pixels, tokens):
    """open_clip's CLIP, from its own state dict, in torch's functional attention."""

    def tower(x, prefix, heads, mask=None):  # x [B, L, D]
        for i in range(2):
            p = {k.removeprefix(f"{prefix}transformer.resblocks.{i}."): v for k, v in state.items()}
            y = F.layer_norm(x, x.shape[-1:], p["ln_1.weight"], p["ln_1.bias"]).transpose(0, 1)
            weights = (p["attn.in_proj_weight"], p["attn.in_proj_bias"], None, None, False, 0.0)
            out = (p["attn.out_proj.weight"], p["attn.out_proj.bias"])
            y, _ = F.multi_head_attention_forward(y, y, y, x.shape[-1], heads, *weights, *out, attn_mask=mask)
            x = x + y.transpose(0, 1)
            y = F.layer_norm(x, x.shape[-1:], p["ln_2.weight"], p["ln_2.bias"])
            y = F.linear(F.gelu(F.linear(y, p["mlp.c_fc.weight"], p["mlp.c_fc.bias"])), p["mlp.c_proj.weight"])
            x = x + y + p["mlp.c_proj.bias"]
        return x

    def ln(x, name):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    x = F.conv2d(pixels, state["visual.conv1.weight"], stride=8).flatten(2).transpose(1, 2)
    x = torch.cat([state["visual.class_embedding"].expand(len(x), 1, -1), x], 1) + state["visual.positional_embedding"]
    x = tower(ln(x, "visual.ln_pre"), "visual.", 2)
    image = ln(x[:, 0], "visual.ln_post") @ state["visual.proj"]
    y = state["token_embedding.weight"][tokens] + state["positional_embedding"][: tokens.shape[1]]
    mask = torch.full((tokens.shape[1],) * 2, float("-inf")).triu(1)
    y = ln(tower(y, "", 2, mask), "ln_final")
    end = tokens.eq(tokens.max()).int().argmax(1)  # the end token has the largest id
    return image, y[torch.arange(len(y)), end] @ state["text_projection"]


def test_hpsv2_reads_open_clips_naming(folder, images):
    state = torch.load(folder / "hpsv2/HPS_v2.1_compressed.pt", weights_only=True)["state_dict"]
    tokenizer = AutoTokenizer.from_pretrained(folder / "clip")
    tokens = tokenizer(PROMPTS, padding="max_length", max_length=20, return_tensors="pt").input_ids
    small = F.interpolate(images, (24, 32), mode="bicubic", antialias=True)  # longest side 32, then 4 black rows
    want_image, want_text = open_clip_features(state, rewards.normalize(F.pad(small, (0, 0, 4, 4))), tokens)
    scorer = one("hpsv2", folder)
    got = scorer(images, PROMPTS)["hpsv2"]
    torch.testing.assert_close(got, F.cosine_similarity(want_image, want_text), **TIGHT)
    assert got.std() > 1e-3


def test_open_clip_itself_agrees(tmp_path):
    """With open_clip installed (it needs torchvision, so the test environment has it not): same features."""
    open_clip = pytest.importorskip("open_clip")
    config = tiny_rewards.CLIP_CONFIG
    vision = open_clip.CLIPVisionCfg(layers=2, width=32, head_width=16, patch_size=8, image_size=32, mlp_ratio=2)
    text = open_clip.CLIPTextCfg(context_length=20, vocab_size=100, width=48, heads=2, layers=2, mlp_ratio=4 / 3)
    model = open_clip.CLIP(24, vision, text).eval()
    text_config = config["text_config"] | dict(vocab_size=100, eos_token_id=99)
    from transformers import CLIPConfig

    state = rewards.open_clip_to_transformers(model.state_dict())
    options = dict(config=CLIPConfig(**config | {"text_config": text_config}), state=state)
    (tmp_path / "hpsv2").mkdir()
    ours = rewards.Weights(tmp_path).model(CLIPModel, "hpsv2", **options)
    pixels, tokens = torch.randn(2, 3, 32, 32), torch.randint(1, 98, (2, 20))
    tokens[:, -1] = 99
    torch.testing.assert_close(ours.get_image_features(pixels).pooler_output, model.encode_image(pixels), **TIGHT)
    torch.testing.assert_close(ours.get_text_features(tokens).pooler_output, model.encode_text(tokens), **TIGHT)


def clip_cosines(path, pixels, prompts):
    """Cosines by transformers' own classes, without anything of rewards.py."""
    model, tokenizer = CLIPModel.from_pretrained(path).float().eval(), AutoTokenizer.from_pretrained(path)
    length = model.config.text_config.max_position_embeddings
    tokens = tokenizer(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    out = model(input_ids=tokens.input_ids, pixel_values=pixels)
    return F.cosine_similarity(out.image_embeds, out.text_embeds), out, model


@pytest.mark.parametrize("name, resample", (("clipscore", Image.Resampling.BILINEAR), ("pickscore", Image.BICUBIC)))
def test_clip_scores(folder, images, name, resample):
    path = folder / ("clip" if name == "clipscore" else name)
    size = CLIPModel.from_pretrained(path).config.vision_config.image_size
    pixels = rewards.normalize(torch.stack([pil_crop(x, size, resample) for x in images]))
    with torch.no_grad():
        want, _, model = clip_cosines(path, pixels, PROMPTS)
    factor = model.logit_scale.exp().item() if name == "pickscore" else 1.0
    got = one(name, folder)(images, PROMPTS)[name]
    torch.testing.assert_close(got, want * factor, rtol=0, atol=0.01 * factor)  # 8 bits in PIL, none here
    ours = rewards.resize_and_crop(images, size, "bilinear" if name == "clipscore" else "bicubic")
    assert (rewards.normalize(ours) - pixels).abs().mean() < 0.006


@pytest.mark.parametrize("name", ("clipscore", "pickscore", "aesthetic", "imagereward", "hpsv2"))
def test_pictures_are_prepared_as_pil_would_with_the_published_filter(folder, monkeypatch, name):
    """On noise, where filters differ most: ours is near PIL's own and far from the other one."""
    images = torch.rand(2, 3, 100, 140, generator=torch.Generator().manual_seed(3))
    scorer, seen = one(name, folder), []
    target, attribute = (scorer.vision, "forward") if name == "imagereward" else (scorer.clip, "image")
    call = getattr(target, attribute)
    monkeypatch.setattr(target, attribute, lambda pixels, *args, **kw: seen.append(pixels) or call(pixels, *args, **kw))
    scorer(images, PROMPTS[:2])
    size, gaps = seen[0].shape[-1], []
    for resample in (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC):
        if name == "hpsv2":  # longest side, black borders
            pictures = [Image.fromarray((x * 255).round().byte().permute(1, 2, 0).numpy()) for x in images]
            small = [np.array(x.resize((size, round(size * 100 / 140)), resample)) for x in pictures]
            rows = size - len(small[0])
            small = [np.pad(x, ((rows // 2, rows - rows // 2), (0, 0), (0, 0))) for x in small]
            want = torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2) / 255
        else:
            want = torch.stack([pil_crop(x, size, resample) for x in images])
        gaps.append((seen[0] - rewards.normalize(want)).abs().mean().item())
    right, wrong = gaps if name == "clipscore" else gaps[::-1]
    assert right < 0.03 and wrong > 3 * right, gaps


def test_hpsv2_cleans_its_prompts(folder, monkeypatch):
    scorer, seen = one("hpsv2", folder), []
    text = scorer.clip.text
    monkeypatch.setattr(scorer.clip, "text", lambda prompts: seen.extend(prompts) or text(prompts))
    scorer(torch.rand(2, 3, 32, 32), ["“cats” &amp;amp; dogs", "a  ＤＯＧ‘s\nbowl"])
    assert seen == ['"cats" & dogs', "a  DOG's\nbowl"]  # the tokenizer takes all white space alike


def test_aesthetic_is_the_published_stack_of_linear_layers(folder, images):
    state = torch.load(folder / "aesthetic/sac+logos+ava1-l14-linearMSE.pth", weights_only=True)
    scorer = one("aesthetic", folder)
    pixels = rewards.normalize(rewards.resize_and_crop(images, 64))
    with torch.no_grad():
        _, out, _ = clip_cosines(folder / "clip", pixels, PROMPTS)
    x = out.image_embeds / out.image_embeds.norm(dim=-1, keepdim=True)
    for i in (0, 2, 4, 6, 7):
        x = x @ state[f"layers.{i}.weight"].T + state[f"layers.{i}.bias"]
    torch.testing.assert_close(scorer(images, PROMPTS)["aesthetic"], x[:, 0], **TIGHT)


def imagereward_reference(state, pixels, ids, mask):
    """BLIP's vision transformer (timm's naming) and BERT with cross-attention, from ImageReward.pt's own keys."""
    get = lambda name: (state[f"{name}.weight"], state[f"{name}.bias"])  # noqa: E731

    def ln(x, name, eps):
        return F.layer_norm(x, x.shape[-1:], *get(name), eps)

    def attend(q, k, v, heads, bias=0):
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + bias).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2)

    v = "blip.visual_encoder."
    x = F.conv2d(pixels, *get(v + "patch_embed.proj"), stride=8).flatten(2).transpose(1, 2)
    x = torch.cat([state[v + "cls_token"].expand(len(x), -1, -1), x], 1) + state[v + "pos_embed"]
    for i in range(2):
        b = f"{v}blocks.{i}."
        q, k, value = F.linear(ln(x, b + "norm1", 1e-6), *get(b + "attn.qkv")).chunk(3, -1)
        x = x + F.linear(attend(q, k, value, 2), *get(b + "attn.proj"))
        x = x + F.linear(F.gelu(F.linear(ln(x, b + "norm2", 1e-6), *get(b + "mlp.fc1"))), *get(b + "mlp.fc2"))
    x = ln(x, v + "norm", 1e-6)
    t = "blip.text_encoder."
    y = state[t + "embeddings.word_embeddings.weight"][ids]
    y = ln(y + state[t + "embeddings.position_embeddings.weight"][: ids.shape[1]], t + "embeddings.LayerNorm", 1e-12)
    for i in range(2):
        layer = f"{t}encoder.layer.{i}."
        for kind, seen, bias in (("attention", None, (1 - mask)[:, None, None] * -1e9), ("crossattention", x, 0)):
            q = F.linear(y, *get(f"{layer}{kind}.self.query"))
            k, value = (
                F.linear(y if seen is None else seen, *get(f"{layer}{kind}.self.{n}")) for n in ("key", "value")
            )
            out = F.linear(attend(q, k, value, 2, bias), *get(f"{layer}{kind}.output.dense"))
            y = ln(out + y, f"{layer}{kind}.output.LayerNorm", 1e-12)
        out = F.gelu(F.linear(y, *get(layer + "intermediate.dense")))
        y = ln(F.linear(out, *get(layer + "output.dense")) + y, layer + "output.LayerNorm", 1e-12)
    f = y[:, 0]
    for i in (0, 2, 4, 6, 7):
        f = F.linear(f, *get(f"mlp.layers.{i}"))
    return (f[:, 0] - 0.16717362830052426) / 1.0333394966054072


def test_imagereward_reads_its_published_naming(folder, images):
    state = torch.load(folder / "imagereward/ImageReward.pt", weights_only=True)
    options = dict(padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    tokens = AutoTokenizer.from_pretrained(folder / "bert")(PROMPTS, **options)
    pixels = rewards.normalize(rewards.resize_and_crop(images, 32))
    want = imagereward_reference(state, pixels, tokens.input_ids, tokens.attention_mask.float())
    got = one("imagereward", folder)(images, PROMPTS)["imagereward"]
    torch.testing.assert_close(got, want, **TIGHT)
    assert got.std() > 1e-3


def qwen_inputs(folder, name, image, text, patch, mean, std):
    """Token ids of one image and text, and the pixel rows: 2x2 patches together, one frame twice."""
    _, h, w = image.shape
    x = rewards.normalize(image, mean, std).view(3, h // patch // 2, 2, patch, w // patch // 2, 2, patch)
    x = x.permute(1, 4, 2, 5, 0, 3, 6).unsqueeze(5).expand(-1, -1, -1, -1, -1, 2, -1, -1)
    text = text.replace("<|image_pad|>", "<|image_pad|>" * (h // patch * (w // patch) // 4))
    ids = AutoTokenizer.from_pretrained(folder / name)(text, return_tensors="pt").input_ids
    return ids, x.flatten(4).flatten(0, 3), torch.tensor([[1, h // patch, w // patch]])


def test_hpsv3_reads_its_published_naming_and_uses_plain_positions(folder):
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    images = torch.randint(0, 256, (3, 3, 56, 84), generator=torch.Generator().manual_seed(1)) / 255
    state = models.load_file(folder / "hpsv3/HPSv3.safetensors")
    head = {k: state.pop(k) for k in list(state) if k.startswith("rm_head.")}
    config = Qwen2VLConfig.from_pretrained(folder / "qwen2vl")
    config.text_config.vocab_size = len(state["lm_head.weight"])
    model = Qwen2VLForConditionalGeneration(config).eval()
    rename = lambda k: k.replace("visual.", "model.visual.") if k[0] == "v" else "model.language_model." + k[6:]  # noqa: E731
    model.load_state_dict({k if k.startswith("lm_head") else rename(k): v for k, v in state.items()})
    reward = len(state["lm_head.weight"]) - 1
    want = []
    for image, prompt in zip(images, PROMPTS, strict=True):
        text = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        text += "<|image_pad|><|vision_end|>" + rewards.HPSV3_INSTRUCTION.replace("{text_prompt}", prompt)
        text += "\nPlease provide the overall ratings of this image: "
        mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
        ids, rows, grid = qwen_inputs(folder, "qwen2vl", image, text, 14, mean, std)
        ids = torch.cat([ids, torch.tensor([[reward]])], 1)
        position = torch.arange(ids.shape[1]).view(1, 1, -1).expand(3, 1, -1)
        with torch.no_grad():
            out = model.model(input_ids=ids, position_ids=position, pixel_values=rows, image_grid_thw=grid)
        x = out.last_hidden_state[0, -1]
        for i in (0, 3, 5):
            x = F.linear(x if i == 0 else x.relu(), head[f"rm_head.{i}.weight"], head[f"rm_head.{i}.bias"])
        want.append(x[0])
    scorers = rewards.load_scorers({"hpsv3": 1.0}, "cpu", folder)
    assert scorers.scorers[0].processor.size == {"shortest_edge": 448**2, "longest_edge": 448**2}
    scorers.scorers[0].processor.do_resize = False  # 768 of the 448 x 448 pixels are enough here
    got = scorers.score(images, PROMPTS)["hpsv3"]
    torch.testing.assert_close(got, torch.stack(want), **TIGHT)
    assert got.std() > 1e-3


@pytest.mark.parametrize(
    "name, given, want",
    (("hpsv3", (512, 512), (448, 448)), ("hpsv3", (768, 768), (420, 420)), ("hpsv3", (1024, 768), (504, 364)))
    + (("hpsv3", (720, 1280), (336, 588)), ("hpsv3", (152, 152), (476, 476)))  # enlarged to the next whole patches
    + (("geneval2", (512, 512), (512, 512)), ("geneval2", (64, 64), (256, 256)), ("geneval2", (100, 300), (160, 448))),
)
def test_picture_size_of_the_large_models(folder, name, given, want):
    scorer, patch = one(name, folder), {"hpsv3": 14, "geneval2": 16}[name]
    inputs = scorer.processor(list(rewards.eight_bits(torch.rand(1, 3, *given))), return_tensors="pt")
    assert inputs.image_grid_thw.tolist() == [[1, want[0] // patch, want[1] // patch]]


def test_hpsv3_instruction_is_the_published_one():
    import hashlib

    published = "0393599dad45a971903d1d62a3acf9bad3ccccdafa7f40f680523419e1f68b7a"
    assert hashlib.sha256(rewards.HPSV3_INSTRUCTION.encode()).hexdigest() == published


QUESTIONS = [
    [["How many cats are there?", "two"], ["Is there a dog?", "Yes"], ["Is it red, as asked?", "Yes"]],
    [["Is there a sign?", "Yes"]],
    [["How many dogs are in the picture?", "three"], ["Are they asleep?", "Yes"]],
]


def test_geneval2_on_a_shared_prefix_equals_one_question_at_a_time(folder):
    from transformers import Qwen3VLForConditionalGeneration

    images = torch.randint(0, 256, (3, 3, 256, 288), generator=torch.Generator().manual_seed(2)) / 255
    model = Qwen3VLForConditionalGeneration.from_pretrained(folder / "qwen3vl").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "qwen3vl")
    first = lambda text: tokenizer(text).input_ids[0]  # noqa: E731
    want = []
    for image, questions in zip(images, QUESTIONS, strict=True):
        scores = []
        for question, answer in questions:
            text = (
                f"<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{question} Answer in one word.<|im_end|>"
            )
            text += "\n<|im_start|>assistant\n"
            ids, rows, grid = qwen_inputs(folder, "qwen3vl", image, text, 16, (0.5,) * 3, (0.5,) * 3)
            kind = (ids == model.config.image_token_id).int()
            with torch.no_grad():
                logits = model(input_ids=ids, pixel_values=rows, image_grid_thw=grid, mm_token_type_ids=kind).logits
            chances = logits[0, -1].softmax(-1)
            digit = {"two": "2", "three": "3"}.get(answer)
            words = [answer, answer.capitalize()] + ([digit] if digit else [answer.lower()])
            words = dict.fromkeys(words) if digit else ("Yes", "yes")
            scores.append(sum(chances[first(w)] + chances[first(" " + w)] for w in words).item())
        want.append(scores)
    got = rewards.load_scorers({"geneval2": 1.0, "geneval2_am": 1.0}, "cpu", folder, batch_size=2)
    got = got.score(images, PROMPTS, [{"vqa_list": q} for q in QUESTIONS])
    torch.testing.assert_close(got["geneval2_am"], torch.tensor([np.mean(s) for s in want]).float(), **TIGHT)
    means = [np.prod(s) ** (1 / len(s)) for s in want]
    torch.testing.assert_close(got["geneval2"], torch.tensor(means).float(), **TIGHT)


# ---------------------------------------------------------------------------------------------------------------
# published sizes, files that do not fit


def test_published_sizes_of_the_models_with_hub_configs():
    """Parameter counts from the published configs (rewards.SOURCES), as the checkpoints' sizes say."""
    import transformers as hub

    for cls, folder, want in (
        (hub.Qwen2VLModel, "qwen2vl", 8_288_465_408 - 151_658 * 3584),  # the published file has an lm_head too
        (hub.Qwen3VLForConditionalGeneration, "qwen3vl", 8_767_123_696),
        (rewards.segmenter_class(), "mask2former", 68_741_083),
        (CLIPModel, "clip", 427_616_513),
        (hub.PPOCRV5MobileDetForObjectDetection, "ocr_det", 3_492_033),
        (hub.PPOCRV5MobileRecForTextRecognition, "ocr_rec", 7_682_365),
    ):
        with torch.device("meta"):
            assert sum(p.numel() for p in cls(bench_rewards.CONFIGS[folder]()).parameters()) == want, cls.__name__


def test_bench_runs_every_scorer(folder, monkeypatch, capsys, tmp_path):
    """The same code on the small configs, through the same made-up files."""
    configs = {name: lambda name=name: AutoConfig.from_pretrained(folder / name) for name in bench_rewards.CONFIGS}
    monkeypatch.setattr(bench_rewards, "CONFIGS", configs)
    monkeypatch.setattr(rewards, "Weights", rewards.Weights)  # taken back afterwards
    names = list(dict.fromkeys(scorer.columns[0] for scorer in rewards.SCORERS.values()))
    flags = dict(device="cpu", batch_size=2, resolution=64, repeat=1, out=tmp_path / "rows.jsonl")
    bench_rewards.main(SimpleNamespace(rewards=",".join(names), **flags))
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["reward"] for row in rows] == names and len(names) == 9
    assert all(row["parameters"] > 0 and row["images_per_s"] > 0 for row in rows)
    differentiable = {row["reward"] for row in rows if row["images_per_s_gradient"]}
    assert differentiable == {"pickscore", "hpsv2", "clipscore", "aesthetic", "imagereward"}
    assert "geneval2" in capsys.readouterr().out


def damage(path, change):
    """Rewrite a checkpoint with `change` applied to its state dict."""
    state = torch.load(path, weights_only=True)
    change(state.get("state_dict", state))
    torch.save(state, path)


@pytest.mark.parametrize(
    "name, file, change, said",
    (
        (
            "hpsv2",
            "hpsv2/HPS_v2.1_compressed.pt",
            lambda s: s.pop("visual.proj"),
            "visual_projection.weight is missing",
        ),
        (
            "hpsv2",
            "hpsv2/HPS_v2.1_compressed.pt",
            lambda s: s.update(extra=torch.ones(1)),
            "text_model.extra is left over",
        ),
        (
            "hpsv2",
            "hpsv2/HPS_v2.1_compressed.pt",
            lambda s: s.update({"visual.class_embedding": torch.ones(7)}),
            r"class_embedding is \(7,\), not \(32,\)",
        ),
        ("imagereward", "imagereward/ImageReward.pt", lambda s: s.update(odd=torch.ones(1)), r"left over \['odd'\]"),
        (
            "aesthetic",
            "aesthetic/sac+logos+ava1-l14-linearMSE.pth",
            lambda s: s.pop("layers.7.bias"),
            'sac.logos.ava1-l14-linearMSE.pth: .* Missing key.*: "7.bias"',
        ),
        (
            "aesthetic",
            "aesthetic/sac+logos+ava1-l14-linearMSE.pth",
            lambda s: s.update({"layers.4.weight": torch.ones(8, 5)}),
            r"size mismatch for 4.weight: .*\[8, 5\]\) from checkpoint, .*\[64, 128\]\)",
        ),
    ),
)
def test_a_checkpoint_that_does_not_fit_is_named(folder, tmp_path, name, file, change, said):
    import shutil

    for part in {file.split("/")[0], "clip", "bert"}:
        shutil.copytree(folder / part, tmp_path / part)
    damage(tmp_path / file, change)
    with pytest.raises(models.UserError, match=said):
        one(name, tmp_path)


@pytest.mark.parametrize(
    "name, file, content, said",
    (
        ("clipscore", "clip/tokenizer.json", None, "593; its vocabulary is not there"),
        ("hpsv2", "clip/tokenizer.json", None, "tokens where the model knows"),
        ("imagereward", "bert/vocab.txt", None, "5 tokens where the model knows 62"),
        ("pickscore", "pickscore/model.safetensors", b"half", "cannot open the weights of CLIPModel of yuvalkirstain"),
        ("ocr", "ocr_rec/model.safetensors", b"half", "cannot open the weights of PPOCRV5MobileRec"),
        ("ocr", "ocr_rec/preprocessor_config.json", b'{"character', "cannot open preprocessor_config.json of Paddle"),
    ),
)
def test_a_folder_that_lost_or_tore_a_file_is_named(folder, tmp_path, name, file, content, said):
    """transformers makes an empty tokenizer where the vocabulary is missing, and any text would score the same."""
    import shutil

    shutil.copytree(folder, tmp_path / "rewards")
    path = tmp_path / "rewards" / file
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(models.UserError, match=said) as error:
        one(name, tmp_path / "rewards")
    assert "\n" not in str(error.value)


def test_a_pickle_is_not_executed(folder, tmp_path):
    import pickle

    class Payload:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    (tmp_path / "hpsv2").mkdir()
    (tmp_path / "hpsv2/HPS_v2.1_compressed.pt").write_bytes(pickle.dumps({"state_dict": Payload()}))
    with pytest.raises(models.UserError, match="is no complete file of tensors"):
        one("hpsv2", tmp_path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", sorted(set(rewards.SCORERS) - {"geneval_strict", "geneval_correct", "geneval2_am"}))
def test_weights_that_are_nowhere_say_which_file_from_where_and_whereto(tmp_path, name):
    (tmp_path / "rewards").mkdir()
    with pytest.raises(models.UserError) as error:
        one(name, tmp_path / "rewards")
    said = str(error.value)
    assert "cannot open" in said and f"Put it into {tmp_path}/rewards/" in said and "--reward_dir" in said
    assert "\n" not in said and any(source in said for source in rewards.SOURCES.values())
    command = {"hpsv2": "xswu/HPSv2 HPS_v2.1_compressed.pt --local-dir", "imagereward": "ImageReward.pt --local-dir"}
    assert command.get(name, "") in said


# ---------------------------------------------------------------------------------------------------------------
# gradients


@pytest.mark.parametrize("name", ("pickscore", "hpsv2", "clipscore", "aesthetic", "imagereward"))
def test_gradient_agrees_with_finite_differences(folder, images, name):
    scorers = rewards.load_scorers({name: 2.0}, "cpu", folder)
    scorers.scorers[0].double()
    images = images.double()
    total, grad = scorers.differentiable(images, PROMPTS)
    assert torch.isfinite(grad).all() and (grad.flatten(1).norm(dim=1) > 0).all()
    g = torch.Generator().manual_seed(3)
    directions = torch.randn(12, *images.shape, generator=g, dtype=torch.float64)
    total_at = lambda step: scorers.differentiable(images + step, PROMPTS)[0].sum()  # noqa: E731
    want = torch.stack([(total_at(1e-5 * d) - total_at(-1e-5 * d)) / 2e-5 for d in directions])
    got = (directions * grad).flatten(1).sum(1)
    assert F.cosine_similarity(got, want, dim=0) > 0.999
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)
    table = scorers.score(images, PROMPTS)[name]
    scale = 2 / 26 if name == "pickscore" else 2
    torch.testing.assert_close(total.float(), table * scale, rtol=0.02, atol=0.02)  # 8 bits in score


def test_gradients_taken_one_scorer_after_the_other_are_those_of_the_sum(folder, images):
    weights = {"clipscore": 2.0, "pickscore": 1.0, "aesthetic": 0.5, "geneval": 1.0}
    scorers, images = rewards.load_scorers(weights, "cpu", folder), images.clone().requires_grad_()
    with torch.no_grad():  # the caller's mode plays no part
        total, got = scorers.differentiable(images, PROMPTS)
    assert not total.requires_grad and not got.requires_grad  # no graph of a scorer is kept
    want = 0
    for scorer in scorers.scorers:
        if scorer.differentiable:
            for name, row in scorer(images, PROMPTS).items():
                want = want + weights[name] * rewards.SCALE.get(name, 1) * row
    torch.testing.assert_close(total, want)
    (want,) = torch.autograd.grad(want.sum(), images)
    torch.testing.assert_close(got, want, atol=1e-6 * want.abs().max().item(), rtol=1e-4)
    assert got.abs().max() > 0


# ---------------------------------------------------------------------------------------------------------------
# GenEval


class FixedSegmenter(torch.nn.Module):
    """Answers with objects given as (label, confidence, box) in fractions of the picture, whatever it is shown."""

    def __init__(self, objects, n=4):
        super().__init__()
        self.logits, self.masks = torch.full((1, n, 81), -9.0), torch.full((1, n, 64, 64), -20.0)
        self.logits[..., 80] = 9.0
        for q, (label, confidence, (x0, y0, x1, y1)) in enumerate(objects):
            self.logits[0, q, 80] = 0.0
            self.logits[0, q, label] = math.log(confidence / (1 - confidence))
            self.masks[0, q, int(64 * y0) : int(64 * y1), int(64 * x0) : int(64 * x1)] = 20.0

    def forward(self, pixels):
        return self.logits.expand(len(pixels), -1, -1), self.masks.expand(len(pixels), -1, -1, -1)


def test_detector_finds_boxes_scores_and_several_instances(folder):
    detector = one("geneval", folder).detect
    objects = [(15, 0.97, (0.25, 0.25, 0.5, 0.5)), (15, 0.6, (0.5, 0.5, 1.0, 1.0)), (16, 0.2, (0, 0, 0.5, 0.5))]
    detector.segmenter = FixedSegmenter(objects)
    found = detector(torch.rand(1, 3, 128, 128), [{"include": [{"class": "cat", "count": 2}]}])[0]
    assert [d["class"] for d in found] == ["cat", "cat"]  # the dog is below every threshold
    assert [d["score"] for d in found] == pytest.approx([0.97, 0.6], abs=0.01)
    # 800 px of a picture are 25 x 32, so nothing is padded; a mask pixel is 2 of the image's
    assert np.abs(np.array(found[0]["box"]) - [32, 32, 64, 64]).max() <= 2 and "color" not in found[0]
    assert np.abs(np.array(found[1]["box"]) - [64, 64, 128, 128]).max() <= 2


def test_detector_takes_off_the_padding(folder):
    """100 x 128 px become 800 x 1024 and 800 is 25 x 32; 90 x 128 become 800 x 1138, padded to 1152."""
    detector = one("geneval", folder).detect
    detector.segmenter = FixedSegmenter([(0, 0.9, (0.0, 0.0, 1.0, 1.0))])
    found = detector(torch.rand(1, 3, 90, 128), [{"include": []}])[0]
    assert found[0]["box"] == [0, 0, 128, 90] and found[0]["class"] == "person"
    detector.segmenter = FixedSegmenter([(0, 0.9, (0.5, 0.0, 1.0, 1.0))])
    found = detector(torch.rand(1, 3, 90, 128), [{"include": []}])[0]
    assert found[0]["box"][0] == pytest.approx(64 * 1152 / 1138, abs=1.5)


def test_instances_agree_with_transformers_own_postprocessing():
    from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil
    from transformers.models.mask2former.modeling_mask2former import Mask2FormerForUniversalSegmentationOutput as Output

    g = torch.Generator().manual_seed(5)
    logits, masks = 3 * torch.randn(1, 100, 81, generator=g), 5 * torch.randn(1, 100, 96, 96, generator=g)
    got = rewards.instances(logits[0], masks[0], (384, 384), (384, 384), (384, 384))
    output = Output(class_queries_logits=logits, masks_queries_logits=masks)
    options = dict(threshold=0.0, return_binary_maps=True, target_sizes=[(384, 384)])
    want = Mask2FormerImageProcessorPil().post_process_instance_segmentation(output, **options)[0]["segments_info"]
    want = sorted((round(s["score"], 4), rewards.COCO[s["label_id"]]) for s in want)
    got = sorted((round(score, 4), name) for name, score, _, _ in got)
    assert (
        len(got) >= 10 and set(got) <= set(want) and [g for g in got if g[0] > 0.3] == [w for w in want if w[0] > 0.3]
    )


def test_color_is_read_from_the_object_on_grey(folder):
    """Outside the mask everything is #999, whatever the picture shows there."""
    detector = one("geneval", folder).detect
    seen = []
    detector.clip.image = lambda pixels: seen.append(pixels) or torch.ones(1, 64)
    mask = torch.zeros(64, 64)
    mask[16:48, 16:48] = 1.0
    image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    detector.color(image, mask, [8, 8, 56, 56], "circle")
    detector.color(image * mask, mask, [8, 8, 56, 56], "circle")
    assert torch.equal(*seen)
    grey = rewards.normalize(torch.full((3, 4, 4), 0.6))
    torch.testing.assert_close(seen[0][0, :, :4, :4], grey, rtol=0, atol=1e-4)


def test_color_picks_the_closest_mean_of_three_templates(folder):
    detector = one("geneval", folder).detect
    names = [f"a photo of a {c}{rest}" for c in rewards.COLORS for rest in (" cat", "-colored cat", " object")]
    basis = torch.eye(len(rewards.COLORS)).repeat_interleave(3, 0)
    detector.clip.text = lambda texts: basis[[names.index(t) for t in texts]]
    for i, color in enumerate(rewards.COLORS):
        detector.clip.image = lambda pixels, i=i: torch.eye(len(rewards.COLORS))[i][None]
        assert detector.color(torch.rand(3, 32, 32), torch.ones(32, 32), [0, 0, 32, 32], "cat") == color


def test_geneval_end_to_end_with_real_network_classes(folder, images):
    meta = [{"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "red"}]}] * 3
    got = rewards.load_scorers({"geneval": 1.0}, "cpu", folder).score(images, PROMPTS, meta)
    assert set(got) == {"geneval"} and torch.isfinite(got["geneval"]).all()
    scorer = one("geneval", folder)
    scorer.detect.segmenter = FixedSegmenter([(15, 0.97, (0.25, 0.25, 0.5, 0.5))])
    scorer.detect.color = lambda *_: "red"
    rows = scorer(images, PROMPTS, meta)
    assert all(rows[name].tolist() == [1.0] * 3 for name in scorer.columns)
    scorer.detect.color = lambda *_: "blue"
    rows = scorer(images, PROMPTS, meta)
    assert rows["geneval"].tolist() == [0.5] * 3 and rows["geneval_correct"].tolist() == [0.0] * 3


def test_training_prompts():
    rows = geneval_prompts(600, seed=1)
    assert [m["tag"] for m in rows[:6]] == list(rewards.TASKS) and len({m["prompt"] for m in rows}) > 500
    assert rows == geneval_prompts(600, seed=1) != geneval_prompts(600, seed=2)
    for m in rows:
        assert not m["prompt"].startswith("a photo of ") and {need["class"] for need in m["include"]} <= set(
            rewards.COCO
        )
        boxes = {"left of": (0, 40), "right of": (80, 40), "above": (40, 0), "below": (40, 80)}
        found = []
        for need in m["include"]:  # a picture that shows exactly this is right
            x, y = boxes[need["position"][0]] if "position" in need else (40, 40)
            one = {"class": need["class"], "box": [x, y, x + 10, y + 10], "score": 0.99, "color": need.get("color")}
            found += [one] * need["count"]
        assert rewards.geneval_check(found, m) == {"graded": 1.0, "strict": True, "correct": True}, m
        for word in [need["class"] for need in m["include"]] + [need.get("color", "") for need in m["include"]]:
            assert word in m["prompt"] or m["tag"] == "counting"
    assert any("two pairs of scissors" in m["prompt"] for m in geneval_prompts(6000))
    assert any(" an orange" in m["prompt"] for m in rows) and not any(" a orange" in m["prompt"] for m in rows)


def test_training_prompts_leave_out_what_is_excluded():
    first = geneval_prompts(300, seed=1)
    turned = [{**m, "include": m["include"][::-1]} for m in first if m["tag"] in ("two_object", "color_attr")]
    content = lambda m: (m["tag"], sorted(json.dumps(need, sort_keys=True) for need in m["include"]))  # noqa: E731
    taken = [content(m) for m in turned]
    assert any(content(m) in taken for m in first)
    assert not any(content(m) in taken for m in geneval_prompts(300, seed=1, exclude=turned))
    every = [{"tag": "single_object", "include": [{"class": c, "count": 1}]} for c in rewards.COCO]
    with pytest.raises(models.UserError, match="leaves no single_object prompt"):
        geneval_prompts(6, exclude=every)


def test_training_prompts_as_a_file(tmp_path, monkeypatch):
    command = [sys.executable, "classroom/prompts.py", str(tmp_path / "a.jsonl"), "--n", "60"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "60 prompts" in done.stdout, done.stderr
    pairs = rewards.read_prompts(tmp_path / "a.jsonl")
    rewards.check_prompts(pairs, ["geneval"])
    assert [m for _, m in pairs] == geneval_prompts(60)


def metadata(**more):
    return {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red", **more}]}


RELATED = [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["above", 0]}]


@pytest.mark.parametrize(
    ("wrong", "said"),
    (
        ({"tag": "colours"}, "tag 'colours', .* allowed: single_object, two_object, counting, colors"),
        ({"include": []}, 'no "tag" and "include"'),
        ({"include": None}, 'no "tag" and "include"'),
        ({"exclude": {"class": "cat", "count": 1}}, 'no "tag" and "include"'),
        ({"include": ["dog"]}, "asks for dog: every entry"),
        ({"exclude": [{"class": "cat"}]}, "whole number above 0"),
        (metadata(count="two"), "'count': 'two'.* whole number above 0"),
        (metadata(count=0), "whole number above 0"),
        (metadata(**{"class": "hound"}), "class 'hound', .* allowed: person, bicycle"),
        (metadata(**{"class": ["dog"]}), r"class \['dog'\]"),
        (metadata(color="grey"), "color 'grey', .* allowed: red, orange"),
        ({"include": [RELATED[0], RELATED[1] | {"position": ["beside", 0]}]}, "relation 'beside', .* left of"),
        ({"include": [RELATED[0], RELATED[1] | {"position": ["above", 1]}]}, "number of an earlier entry"),
        ({"include": [RELATED[0], RELATED[1] | {"position": "above"}]}, "position above: write"),
        ({"include": [RELATED[0], RELATED[1] | {"position": ["above", 0.0]}]}, "number of an earlier entry"),
        ({"include": RELATED[::-1]}, "number of an earlier entry"),
    ),
)
def test_metadata_that_would_score_low_in_silence_are_refused(wrong, said):
    good = metadata() | {"exclude": [{"class": "cat", "count": 2}]}
    for fine in (good, good | {"include": RELATED}):
        rewards.check_prompts([("a red dog", fine)], ["geneval_strict"])
    rewards.check_prompts([("a red dog", good | wrong)], ["clipscore"])  # which does not look at them
    with pytest.raises(models.UserError, match="prompt 1 \\('a red dog'\\) .*" + said):
        rewards.check_prompts([("a red dog", good | wrong)], ["geneval_strict"])


def test_metadata_are_checked_against_the_judge_in_use():
    circle = {"tag": "colors", "include": [{"class": "circle", "count": 1, "color": "purple"}]}
    rewards.check_prompts([("", circle)], ["geneval"], models.CLASSROOM)
    with pytest.raises(models.UserError, match="class 'circle'"):
        rewards.check_prompts([("", circle)], ["geneval"], "elsewhere")
    with pytest.raises(models.UserError, match="color 'orange'.* allowed: red, green, blue, yellow, purple"):
        orange = {"tag": "colors", "include": [{"class": "circle", "count": 1, "color": "orange"}]}
        rewards.check_prompts([("", orange)], ["geneval"], models.CLASSROOM)


# ---------------------------------------------------------------------------------------------------------------
# OCR


def test_regions_are_8_connected():
    rng = np.random.default_rng(0)
    for density in (0.1, 0.4, 0.6):
        mask = rng.random((40, 50)) < density
        label, count = np.zeros(mask.shape, int), 0
        for start in zip(*np.nonzero(mask), strict=True):  # flood fill
            if label[start]:
                continue
            count, todo = count + 1, [start]
            while todo:
                y, x = todo.pop()
                if 0 <= y < 40 and 0 <= x < 50 and mask[y, x] and not label[y, x]:
                    label[y, x] = count
                    todo += [(y + a, x + b) for a in (-1, 0, 1) for b in (-1, 0, 1)]
        found = rewards.regions(mask)
        assert len(found) == count
        for rows, starts, ends in found:
            cells = [(y, x) for y, a, b in zip(rows, starts, ends, strict=True) for x in range(a, b)]
            assert len({label[c] for c in cells}) == 1 and len(cells) == (label == label[cells[0]]).sum()
    assert rewards.regions(np.zeros((4, 4), bool)) == []


def rectangle(h, w, center, sides, degrees):
    """Probability map of a rotated rectangle (.95 inside, .05 outside) and its corners."""
    angle = np.deg2rad(degrees)
    axes = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    y, x = np.mgrid[:h, :w]
    along = np.abs(np.stack([x - center[0], y - center[1]], -1) @ axes.T)
    inside = (along <= np.array(sides) / 2).all(-1)
    signs = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    return np.where(inside, 0.95, 0.05), np.array(center) + (signs * sides / 2) @ axes


@pytest.mark.parametrize("degrees", (0, 12, -30, 44))
def test_text_box_of_a_rotated_line(degrees):
    chances, corners = rectangle(200, 300, (150, 100), (120, 20), degrees)
    (got,) = rewards.text_boxes(chances, 400, 600)  # the picture is twice the map
    d = 1.5 * 120 * 20 / (2 * 140)
    want = rectangle(200, 300, (150, 100), (120 + 2 * d, 20 + 2 * d), degrees)[1] * 2
    assert np.abs(got - want).max() < 6
    assert rewards.text_boxes(np.where(chances > 0.5, 0.55, 0.05), 400, 600) == []  # seen, but not sure enough


def test_reading_order():
    maps = [rectangle(200, 300, c, (60, 14), 0)[0] for c in ((220, 44), (80, 40), (80, 150))]
    boxes = rewards.text_boxes(np.maximum.reduce(maps), 200, 300)
    assert [tuple((b.mean(0) / 50).round().astype(int)) for b in boxes] == [(2, 1), (4, 1), (2, 3)]


def test_cut_out_straightens_a_rotated_line():
    picture = Image.new("RGB", (300, 200), "white")
    ImageDraw.Draw(picture).rectangle((90, 90, 210, 110), fill="black")
    turned = picture.rotate(-20, Image.BICUBIC, fillcolor="white", center=(150, 100))
    _, corners = rectangle(200, 300, (150, 100), (116, 16), 20)
    crop = np.array(rewards.cut_out(turned, corners))
    assert crop.shape == (16, 116, 3) and crop.mean() < 15
    tall = rewards.cut_out(picture.rotate(90, expand=True), np.array([[90, 90], [110, 90], [110, 210], [90, 210]]))
    assert tall.size == (120, 20)
    marked = Image.new("RGB", (20, 60), "white")  # upwards text: its first letter is at the bottom
    ImageDraw.Draw(marked).rectangle((0, 50, 20, 60), fill="black")
    flat = np.array(rewards.cut_out(marked, np.array([[0, 0], [20, 0], [20, 60], [0, 60]])))
    assert flat.shape[:2] == (20, 60) and flat[:, :5].mean() != flat[:, -5:].mean()


def test_greedy_ctc_collapses_repeats_and_drops_blanks(folder):
    scorer = one("ocr", folder)
    text = "blank s s blank o o blank o n blank".split()
    chances = torch.full((1, len(text), len(scorer.characters)), 0.001)
    for i, c in enumerate(text):
        chances[0, i, scorer.characters.index(c)] = 0.8 if c == "s" else 0.9

    class Reader(torch.nn.Module):
        def forward(self, pixels):
            assert pixels.shape == (1, 3, 48, 320) and pixels.min() >= -1 and (pixels[..., 240:] == 0).all()
            return type("Output", (), {"last_hidden_state": chances})

    scorer.reader = Reader()
    got, confidence = scorer.read_line(Image.new("RGB", (100, 20), "black"), "cpu")
    assert got == "soon" and confidence == pytest.approx((0.8 + 3 * 0.9) / 4)


def test_ocr_end_to_end(folder, images):
    """The real network classes run; with their answers replaced, the quoted text is read line by line."""
    scorers = rewards.load_scorers({"ocr": 1.0}, "cpu", folder)
    prompts = ['a sign that says "OPEN DOOR"'] * 3
    assert torch.isfinite(scorers.score(images, prompts)["ocr"]).all()
    scorer = scorers.scorers[0]
    maps = [rectangle(64, 96, c, (50, 10), 0)[0] for c in ((40, 15), (40, 45))]

    class Detector(torch.nn.Module):
        def forward(self, pixels):
            assert pixels.shape == (1, 3, 64, 96)  # blue, green, red, with the statistics of red, green, blue
            assert (pixels[0, 0] > 2.2).all() and (pixels[0, 1:] < -1.7).all()
            answer = torch.from_numpy(np.maximum.reduce(maps))[None, None]
            return type("Output", (), {"last_hidden_state": answer})

    scorer.detector = Detector()
    lines = iter([("open", 0.9), ("doar", 0.8), ("open", 0.9), ("door", 0.4)])  # the last is dropped
    scorer.read_line = lambda crop, device: next(lines)
    picture = torch.tensor([0.0, 0.0, 1.0]).view(1, 3, 1, 1).expand(2, 3, 64, 96)  # blue
    assert scorers.score(picture, prompts[:2])["ocr"].tolist() == pytest.approx([7 / 8, 4 / 8])
    with pytest.raises(models.UserError, match="ocr needs a text in straight double quotes"):
        scorers.score(picture, ["a sign", prompts[0]])


def test_golden_ocr():
    golden = json.loads((ROOT / "tests/golden/ocr.json").read_text())
    assert len(golden["cases"]) == 25
    for case in golden["cases"]:
        got = rewards.ocr_accuracy([tuple(line) for line in case["lines"]], case["prompt"])
        assert got == pytest.approx(case["reward"], abs=1e-6), case


@pytest.mark.parametrize(
    "prompt, found, release, ours",
    (
        ('a 12" pizza box that says "OPEN"', "open", 1, 1),
        ('a 12" pizza box that says "OPEN"', "pizza box", 0, 0),
        ('an 8"x10" photo of a sign "24 h", 5" thick', "24h", 1, 1),
        ('"OPEN" on a door and "PULL" below', "open pull", 1, 1),
        ('"OPEN" on a door and "PULL" below', "open", 1, 0.5),
        ('a door with "" and " " and "IN"', "in", 1, 1),
        ('a sign that says "GOOD\nDAY"', "good day", 1, 1),
    ),
)
def test_quoted_texts(folder, monkeypatch, prompt, found, release, ours):
    """The release's rule takes one text, the scorer all of them; inches are none."""
    assert rewards.ocr_accuracy([(found, 0.9)], prompt) == release
    scorer = one("ocr", folder)
    monkeypatch.setattr(scorer, "read", lambda image: [(found, 0.9)])
    assert scorer(torch.zeros(1, 3, 8, 8), [prompt])["ocr"].item() == ours


@pytest.mark.parametrize("prompt", ("a sign", 'a 12" pizza', 'a 12" by 8" box', 'a sign that says ""'))
def test_a_prompt_without_a_quoted_text_is_refused(prompt):
    with pytest.raises(models.UserError, match="ocr needs a text in straight double quotes"):
        rewards.check_prompts([(prompt, {})], ["ocr"])


# ---------------------------------------------------------------------------------------------------------------
# rewards of the user's own


@pytest.fixture
def own(tmp_path, monkeypatch):
    """own.py with some rewards, in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rewards, "SCORERS", dict(rewards.SCORERS))
    code = """
        import torch
        def red(images, prompts, metadata):
            assert len(images) == len(prompts) == len(metadata)
            return images[:, 0].mean((1, 2)) + torch.tensor([m.get("bonus", 0.0) for m in metadata])
        red.differentiable = True
        def length(images, prompts, metadata):
            return [len(prompt) for prompt in prompts]
        def whole(images, prompts, metadata):
            return images.mean()
        def detached(images, prompts, metadata):
            return images.detach().mean((1, 2, 3))
        detached.differentiable = True
        def fails(images, prompts, metadata):
            raise KeyError("no such server")
        def nan(images, prompts, metadata):
            return [float("nan")] * len(prompts)
        def ocr(images, prompts, metadata):
            return [0.0] * len(prompts)
        """
    (tmp_path / "own.py").write_text(textwrap.dedent(code))
    (tmp_path / "torn.py").write_text("def red(:\n")


def test_a_reward_of_ones_own(own, folder, images):
    weights = rewards.parse_weights("own.py:red=2, own.py:length=0.5,clipscore")
    assert weights == {"red": 2.0, "length": 0.5, "clipscore": 1.0}
    assert rewards.SCORERS["red"].differentiable and not rewards.SCORERS["length"].differentiable
    rewards.check_prompts([("a", {})], ["own.py:red", "length"])
    scorers = rewards.load_scorers(weights, "cpu", folder, batch_size=2)
    got = scorers.score(images, PROMPTS, [{"bonus": 1.0}, {}, {}])
    rounded = (images * 255).round() / 255
    torch.testing.assert_close(got["red"], rounded[:, 0].mean((1, 2)) + torch.tensor([1.0, 0.0, 0.0]))
    assert got["length"].tolist() == [len(prompt) for prompt in PROMPTS] and got["length"].dtype == torch.float32
    clip, _ = rewards.load_scorers({"clipscore": 1.0}, "cpu", folder).differentiable(images, PROMPTS)
    torch.testing.assert_close(scorers.differentiable(images, PROMPTS)[0], clip + 2 * images[:, 0].mean((1, 2)))
    spelled = rewards.load_scorers({"own.py:red": 2.0}).score(images, PROMPTS)
    assert list(spelled) == ["red"]


@pytest.mark.parametrize(
    "reward, said",
    (
        ("own.py:whole", r"reward whole: it returned \[\] for 3 images, where \[3\] is due"),
        ("own.py:detached", "reward detached: it calls itself differentiable, and its scores have no gradient"),
        ("own.py:fails", r"reward fails failed: KeyError: 'no such server' \(.*own.py:15\)"),
        ("own.py:nan", "nan returned a score that is not finite for the prompt 'a red circle'"),
        ("own.py:ocr", "reward own.py:ocr: ocr is a column of ours, give the function another name"),
        ("own.py:blue", "reward own.py:blue: AttributeError: module '.*own' has no attribute 'blue'"),
        ("torn.py:red", "reward torn.py:red: SyntaxError: invalid syntax"),
        ("none.py:red", "reward none.py:red: FileNotFoundError: .*none.py"),
        ("own:red", "unknown reward 'own:red'; allowed: .* or file.py:function"),
    ),
)
def test_a_reward_of_ones_own_that_fails_is_named(own, images, reward, said):
    with pytest.raises(models.UserError, match=said) as error:
        scorers = rewards.load_scorers(rewards.parse_weights(reward))
        if scorers.scorers[0].differentiable:
            scorers.differentiable(images, PROMPTS)
        scorers.score(images, PROMPTS)
    assert "\n" not in str(error.value)


def test_a_reward_of_ones_own_in_sample_py(own, tmp_path):
    flags = ["--prompt", "a red circle", "--eval", "own.py:red,clipscore", "--out", "out", "--device", "cpu"]
    sample.main(sample.parse_args(flags))
    result = json.loads((tmp_path / "out/metadata.json").read_text())
    assert set(result["rewards"]) == {"red", "clipscore"} and 0 < result["rewards"]["red"]["mean"] < 1


# ---------------------------------------------------------------------------------------------------------------
# all together


def test_one_clip_serves_three_scorers(folder):
    scorers = rewards.load_scorers({"clipscore": 1.0, "aesthetic": 1.0, "geneval": 1.0}, "cpu", folder).scorers
    assert scorers[0].clip is scorers[1].clip is scorers[2].detect.clip


def test_micro_batches_do_not_change_scores(folder, images):
    weights = dict.fromkeys(("clipscore", "hpsv2", "imagereward", "hpsv3", "geneval2"), 1.0)
    meta = [{"vqa_list": q} for q in QUESTIONS]
    whole, parts = (rewards.load_scorers(weights, "cpu", folder, batch_size=n) for n in (None, 2))
    a, b = (s.score(images, PROMPTS, meta) for s in (whole, parts))
    for name in weights:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-5)


def test_a_scorer_that_raises_stops_the_run_with_its_name(folder, images):
    scorers = rewards.load_scorers({"clipscore": 1.0, "hpsv2": 1.0}, "cpu", folder)
    scorers.scorers[1].clip.model = None
    with pytest.raises(models.UserError, match=r"^reward hpsv2 failed: AttributeError: .* \(.*rewards.py:\d+\)$"):
        scorers.score(images, PROMPTS)


def test_offloaded_scorers_wait_on_the_cpu(folder, images, monkeypatch):
    moves = []
    scorers = rewards.load_scorers({"clipscore": 1.0, "hpsv2": 1.0}, "cpu", folder, offload=True)
    for scorer in scorers.scorers:
        monkeypatch.setattr(scorer, "to", lambda d, s=scorer: moves.append((s.columns[0], str(d))) or s)
    scorers.device = torch.device("cpu", 0)
    scorers.score(images, PROMPTS)
    assert moves == [(n, d) for n in ("clipscore", "hpsv2") for d in ("cpu:0", "cpu")]


ALL = "pickscore,hpsv2,hpsv3,clipscore,aesthetic,imagereward,ocr,geneval,geneval2"


def test_all_nine_in_one_run_and_the_same_on_two_processes(folder, tmp_path):
    rows = [m | {"prompt": f'{m["prompt"]} that says "OPEN"', "vqa_list": QUESTIONS[0]} for m in geneval_prompts(5)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    script = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\nimport models, sample, tiny_rewards\n"
    )
    script += "tiny_rewards.shrink()\nmodels.run(sample.main, sample.parse_args())\n"
    (tmp_path / "run.py").write_text(script)
    flags = ["--eval", ALL, "--prompts", "prompts.jsonl", "--reward_dir", str(folder), "--batch_size", "2", "--out"]
    results = []
    for out, launcher in (("one", []), ("two", ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"])):
        command = [sys.executable, *launcher, "run.py", *flags, out]
        env = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr[-3000:]
        results.append(json.loads((tmp_path / out / "metadata.json").read_text()))
        assert len(list((tmp_path / out).glob("0*.png"))) == 5
    one, two = results
    assert set(one["rewards"]) == set(one["images"][0]["scores"]) == set(rewards.SCORERS)
    for a, b in zip(one["images"], two["images"], strict=True):
        assert a["prompt"] == b["prompt"] and a["scores"] == pytest.approx(b["scores"], abs=1e-6)
    assert one["weighted_mean"] == pytest.approx(two["weighted_mean"], abs=1e-6)
    means = {name: row["mean"] for name, row in one["rewards"].items()}
    total = sum(means[name] / (26 if name == "pickscore" else 1) for name in ALL.split(","))
    assert one["weighted_mean"] == pytest.approx(total / 9)


@pytest.mark.parametrize(
    "questions, said",
    (
        ([], 'has no "vqa_list", which geneval2 needs'),
        ([["A dog?", "Yes"], ["A dog?"]], "has ['A dog?'] in its \"vqa_list\": write [question, answer]"),
        ([["How many dogs?", 2]], 'in its "vqa_list": write [question, answer]'),
        ([["How many dogs?", "12"]], "has the answer '12' to 'How many dogs?': write the number as a word, zero"),
    ),
)
def test_geneval2s_questions_are_checked_before_any_weights_load(questions, said):
    rewards.check_prompts([("dogs", {"vqa_list": [["How many dogs?", "Two"], ["A dog?", "Yes"]]})], ["geneval2"])
    with pytest.raises(models.UserError) as refused:
        rewards.check_prompts([("dogs", {"vqa_list": questions})], ["geneval2"])
    assert said in str(refused.value)


@pytest.mark.parametrize(
    "flags, said",
    (
        (["--eval", "ocr=1", "--prompt", "a sign"], "ocr needs a text in straight double quotes"),
        (["--eval", "geneval2=1", "--prompt", "a cat"], 'has no "vqa_list", which geneval2 needs'),
        (["--eval", "ocr=1", "--prompts", "nowhere.txt"], "nowhere.txt cannot be read: No such file"),
        (
            ["--eval", "clipscore", "--reward_batch_size", "0"],
            "argument --reward_batch_size: 0: must be a whole number, at least 1",
        ),
    ),
)
def test_bad_input(flags, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        models.run(sample.main, sample.parse_args([*flags, "--device", "cpu"]))
    assert stopped.value.code == 2 and said in capsys.readouterr().err.splitlines()[-1]


def test_a_text_embedding_does_not_depend_on_its_neighbours():
    """On a CPU: a resumed run, which embeds other prompts together, would differ in the last digit."""
    prompts = [prompt for prompt, _ in rewards.classroom_prompts()[:16]]
    together, alone = (rewards.Weights(models.CLASSROOM).clip() for _ in range(2))
    assert torch.equal(together.text(prompts), torch.cat([alone.text([prompt]) for prompt in prompts]))
