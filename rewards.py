"""Rewards: nine scorers with one signature, GenEval's rules, and prompt files.

A scorer maps (images [B, 3, H, W] in [0, 1], prompts, metadata) to columns {name: [B] float32}. The trainers
and sample.py ask for columns with weights, `--rewards clipscore=1,geneval=1`, and get a `Scorers`: each model once.

Reported scores, and the rewards of the policy gradient, see pictures rounded to 8 bits as a file would hold them. The
differentiable path does not round. Resizing is torch's antialiased one; against PIL's, CLIP's inputs differ by .004 on
average (normalised units).
"""

import contextlib
import copy
import csv
import functools
import html
import importlib.util
import io
import json
import math
import os
import re
import sys
import traceback
import unicodedata
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from PIL import Image, ImageOps

import models
from classroom import shapes
from models import UserError

# ---------------------------------------------------------------------------------------------------------------
# published weights

SOURCES = {  # folder under --reward_dir -> where its files come from; what is not there is asked of the hub
    "clip": "openai/clip-vit-large-patch14",
    "pickscore": "yuvalkirstain/PickScore_v1",
    "hpsv2": "xswu/HPSv2",
    "aesthetic": "https://github.com/christophschuhmann/improved-aesthetic-predictor",
    "imagereward": "zai-org/ImageReward",
    "bert": "google-bert/bert-base-uncased",
    "hpsv3": "MizzenAI/HPSv3",
    "qwen2vl": "Qwen/Qwen2-VL-7B-Instruct",
    "ocr_det": "PaddlePaddle/PP-OCRv5_mobile_det_safetensors",
    "ocr_rec": "PaddlePaddle/PP-OCRv5_mobile_rec_safetensors",
    "mask2former": "facebook/mask2former-swin-small-coco-instance",
    "qwen3vl": "Qwen/Qwen3-VL-8B-Instruct",
}


SMALL = "--include '*.json' --include '*.txt' "  # of a repository: configs and tokenizers


class Weights:
    """Opens the files of SOURCES, from reward_dir/<folder> or the hub, and shares the CLIP that three scorers use."""

    def __init__(self, reward_dir=None):
        self.reward_dir = Path(reward_dir) if reward_dir else None
        if reward_dir and not self.reward_dir.is_dir():
            raise UserError(f"--reward_dir {reward_dir} is not a folder: make it, or leave it out to ask the hub")
        self.clips = {}

    def source(self, folder):
        """What from_pretrained takes: the local folder if it is there, else the hub id."""
        local = self.reward_dir / folder if self.reward_dir else None
        return str(local) if local and local.is_dir() else SOURCES[folder]

    @contextlib.contextmanager
    def opening(self, folder, what, files=""):
        """A failure becomes one line that says what to put where; files: which, as `hf download` takes them."""
        try:
            yield
        except models.BROKEN as error:  # not there, no network, or torn
            place = f"{self.reward_dir or 'REWARDS'}/{folder}/"
            command = f" (hf download {SOURCES[folder]} {files}--local-dir {place})"
            raise UserError(
                f"cannot open {what} of {SOURCES[folder]}: {models.first_line(error)} Put it into {place}"
                f"{'' if '://' in SOURCES[folder] else command} and give --reward_dir {self.reward_dir or 'REWARDS'}"
            ) from None

    def open(self, cls, folder, size=None):
        """cls.from_pretrained for configs and tokenizers. size: tokens the model knows, if it can be compared."""
        with self.opening(folder, f"the files of {cls.__name__}", SMALL):
            opened = cls.from_pretrained(self.source(folder))
            if size and len(opened) != size:  # transformers makes an empty tokenizer where the vocabulary is missing
                raise ValueError(f"{len(opened)} tokens where the model knows {size}; its vocabulary is not there.")
        return opened

    def file(self, folder, name):
        """Path of one published file."""
        with self.opening(folder, name, f"{name} "):
            return transformers.utils.cached_file(self.source(folder), name)

    def state(self, folder, name):
        """State dict of one published file; a pickle is read without running any of it."""
        return models.load_tensors(self.file(folder, name))

    def model(self, cls, folder, config=None, state=None, dtype=torch.float32, **options):
        """A frozen transformers model, from its folder or from (config, state). A key that does not fit is an error."""
        source = self.source(folder)
        options |= dict(config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True)
        with self.opening(folder, f"the weights of {cls.__name__}"):
            model, info = cls.from_pretrained(None if state else source, state_dict=state, **options)
        wrong = [f"{key} is missing" for key in sorted(info["missing_keys"])]
        wrong += [f"{key} is left over" for key in sorted(info["unexpected_keys"])]
        wrong += [f"{key} is {tuple(a)}, not {tuple(b)}" for key, a, b in sorted(info["mismatched_keys"])]
        if wrong:
            more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise UserError(f"the weights of {source} do not fit {cls.__name__}: {', '.join(wrong[:5])}{more}")
        return model.eval().requires_grad_(False)

    @functools.cached_property
    def characters(self):
        """What the reader of ocr_rec tells apart; the first is the blank."""
        name = "preprocessor_config.json"
        file = self.file("ocr_rec", name)
        with self.opening("ocr_rec", name):
            return json.loads(Path(file).read_text(encoding="utf-8")).get("character_list", [])

    def clip(self, folder="clip"):
        """A CLIPModel folder as a `Clip`, loaded once."""
        if folder not in self.clips:
            model = self.model(transformers.CLIPModel, folder)
            tokens = self.open(transformers.CLIPTokenizer, folder, model.config.text_config.vocab_size)
            self.clips[folder] = Clip(model, tokens)
        return self.clips[folder]


# ---------------------------------------------------------------------------------------------------------------
# pictures in, in torch and differentiable


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and std of RGB


def normalize(images, mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711)):
    """(images - mean) / std per channel; the defaults are CLIP's."""
    mean, std = (torch.tensor(c, device=images.device).view(3, 1, 1) for c in (mean, std))
    return (images - mean) / std


def resize(images, height, width, mode="bicubic"):
    """Antialiased resize of [B, 3, H, W]; equal sizes pass untouched."""
    if images.shape[-2:] == (height, width):
        return images
    return F.interpolate(images, (height, width), mode=mode, antialias=True)


def resize_and_crop(images, size, mode="bicubic"):
    """Shortest side to `size`, then the centre square: what CLIP's and BLIP's processors do."""
    h, w = images.shape[-2:]
    images = resize(images, max(size, size * h // w), max(size, size * w // h), mode)
    top, left = (images.shape[-2] - size) // 2, (images.shape[-1] - size) // 2
    return images[..., top : top + size, left : left + size]


def resize_and_pad(images, size):
    """Longest side to `size`, then black to a square: HPSv2's preprocessing."""
    h, w = images.shape[-2:]
    images = resize(images, round(h * size / max(h, w)), round(w * size / max(h, w)))
    rows, columns = size - images.shape[-2], size - images.shape[-1]
    return F.pad(images, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))


def read_picture(file):
    """A picture file as a viewer shows it, turned as its tag says: [1, 3, H, W] in [0, 1]."""
    with models.named_failure(f"{file} cannot be read as a picture"):
        picture = ImageOps.exif_transpose(Image.open(file))
        if picture.mode[0] in "IF":  # of more than 8 bits, which conversion would clip
            raise ValueError(f"its pixels are {picture.mode}: save it with 8 bits a channel")
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None].float() / 255


def rounded(images):
    """Float pictures in [0, 1] with the 256 values that files hold."""
    return (images.float() * 255).round() / 255


def eight_bits(images):
    """Pictures as files hold them: uint8 array [B, H, W, 3] of images [B, 3, H, W] in [0, 1]."""
    return (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


# ---------------------------------------------------------------------------------------------------------------
# scorers that train, in the paper: CLIPScore, PickScore and HPSv2, which are differentiable, and GenEval


class Clip(nn.Module):
    """A CLIPModel with its tokenizer: unit embeddings of normalised pixels, and of prompts (kept: they come back)."""

    def __init__(self, model, tokenizer):
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.size = model.config.vision_config.image_size
        self.cache = {}  # prompt -> [D]; the text side needs no gradient

    def cosine(self, pixels, prompts):
        """pixels [B, 3, size, size] -> [B]."""
        return (self.image(pixels) * self.text(prompts)).sum(-1)

    def image(self, pixels):
        return F.normalize(self.model.get_image_features(pixels).pooler_output, dim=-1)

    @torch.no_grad()
    def text(self, prompts):
        device = self.model.logit_scale.device
        new = [p for p in dict.fromkeys(prompts) if p not in self.cache]
        length = self.model.config.text_config.max_position_embeddings
        # a CPU takes one at a time: a resumed run has other neighbours, and rounding must not depend on them
        at_once = 1 if device.type == "cpu" else max(1, len(new))
        for part in (new[i : i + at_once] for i in range(0, len(new), at_once)):
            tokens = self.tokenizer(part, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
            embeds = self.model.get_text_features(tokens.input_ids.to(device)).pooler_output
            self.cache |= dict(zip(part, F.normalize(embeds, dim=-1).cpu(), strict=True))
        return torch.stack([self.cache[p] for p in prompts]).to(device)


class CLIPScore(nn.Module):
    """Cosine of CLIP L/14's image and text embeddings, .28 to .32 (up to 1 with the classroom's CLIP).

    Weights: clip/, any CLIPModel folder. Shortest side to 224 bilinear (as the published tables), centre crop.
    """

    columns = ("clipscore",)
    differentiable = True

    def __init__(self, weights, device):
        super().__init__()
        self.clip = weights.clip()

    def forward(self, images, prompts, metadata=None):
        pixels = normalize(resize_and_crop(images, self.clip.size, "bilinear"))
        return {"clipscore": self.clip.cosine(pixels, prompts)}


class PickScore(nn.Module):
    """exp(logit_scale) cos of a CLIP H/14 tuned on user choices, 22 to 24 (arXiv 2305.01569).

    Weights: pickscore/. Shortest side to 224 bicubic, centre crop. In sums of rewards it counts divided by 26.
    """

    columns = ("pickscore",)
    differentiable = True

    def __init__(self, weights, device):
        super().__init__()
        self.clip = weights.clip("pickscore")

    def forward(self, images, prompts, metadata=None):
        pixels = normalize(resize_and_crop(images, self.clip.size))
        return {"pickscore": self.clip.model.logit_scale.exp() * self.clip.cosine(pixels, prompts)}


class HPSv2(nn.Module):
    """Cosine of a CLIP H/14 tuned on human preferences, version 2.1, .27 to .35 (arXiv 2306.09341).

    Weights: hpsv2/HPS_v2.1_compressed.pt in open_clip's naming, and clip/ for the tokenizer. Longest side to 224
    bicubic, black borders.
    """

    columns = ("hpsv2",)
    differentiable = True
    CONFIG = dict(
        projection_dim=1024,
        vision_config=dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16)
        | dict(patch_size=14, image_size=224, hidden_act="gelu"),
        text_config=dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
        | dict(vocab_size=49408, max_position_embeddings=77, hidden_act="gelu", eos_token_id=49407),
    )

    def __init__(self, weights, device):
        super().__init__()
        name = "HPS_v2.1_compressed.pt"
        state = weights.state("hpsv2", name)
        state = open_clip_to_transformers(state.get("state_dict", state))
        config = transformers.CLIPConfig(**self.CONFIG)
        tokenizer = weights.open(transformers.CLIPTokenizer, "clip", config.text_config.vocab_size)
        self.clip = Clip(weights.model(transformers.CLIPModel, "hpsv2", config, state), tokenizer)

    def forward(self, images, prompts, metadata=None):
        pixels = normalize(resize_and_pad(images, self.clip.size))
        return {"hpsv2": self.clip.cosine(pixels, [plain_text(prompt) for prompt in prompts])}


def plain_text(prompt):
    """The cleaning of open_clip's tokenizer, as far as it matters: HTML entities, curly quotes, full-width letters."""
    prompt = html.unescape(html.unescape(prompt)).translate(str.maketrans("‘’“”", "''\"\""))
    return "".join(chr(ord(c) - 0xFEE0) if 0xFF01 <= ord(c) <= 0xFF5E else c for c in prompt)


OPEN_CLIP = (  # open_clip's key without "visual." -> transformers' inside vision_model or text_model
    (r"^transformer\.resblocks\.", "encoder.layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"\.attn\.", ".self_attn."),
    (r"^conv1\.", "embeddings.patch_embedding."),
    (r"^class_embedding$", "embeddings.class_embedding"),
    (r"^positional_embedding$", "embeddings.position_embedding.weight"),
    (r"^token_embedding\.", "embeddings.token_embedding."),
    (r"^ln_pre\.", "pre_layrnorm."),  # transformers' spelling
    (r"^ln_post\.", "post_layernorm."),
    (r"^ln_final\.", "final_layer_norm."),
)


def renamed(key, table):
    for pattern, name in table:
        key = re.sub(pattern, name, key)
    return key


def open_clip_to_transformers(state):
    """A CLIP state dict in open_clip's naming, renamed for transformers' CLIPModel (fused q, k, v taken apart)."""
    out = {}
    for key, value in state.items():
        name = renamed(key.removeprefix("visual."), OPEN_CLIP)
        name = ("vision_model." if key.startswith("visual.") else "text_model.") + name
        if key == "logit_scale":
            out[key] = value
        elif key in ("visual.proj", "text_projection"):
            out["visual_projection.weight" if key == "visual.proj" else "text_projection.weight"] = value.T.contiguous()
        elif ".in_proj_" in name:
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                out[name.replace("in_proj_", f"{letter}_proj.")] = part.contiguous()
        else:
            out[name] = value
    return out


class GenEval(nn.Module):
    """Does the picture hold the objects, counts, colours and positions of its metadata? (arXiv 2310.11513)

    Columns: `geneval`, the graded reward; `geneval_strict`, 1 where every requirement holds exactly; `geneval_correct`,
    the benchmark's own rule. The detector is the classroom's for --reward_dir classroom, else `ObjectDetector`.
    """

    columns = ("geneval", "geneval_strict", "geneval_correct")
    differentiable = False

    def __init__(self, weights, device):
        super().__init__()
        if is_classroom(weights.reward_dir):
            self.detect = lambda images, metadata: shapes.detect(eight_bits(images))
        else:
            self.detect = ObjectDetector(weights)

    def forward(self, images, prompts, metadata):
        found = self.detect(images, metadata)
        checks = [geneval_check(d, m) for d, m in zip(found, metadata, strict=True)]
        keys = zip(self.columns, ("graded", "strict", "correct"), strict=True)
        return {name: torch.tensor([float(c[key]) for c in checks]) for name, key in keys}


def is_classroom(reward_dir):
    """Is this a folder that classroom/pretrain.py wrote? Its GenEval judge is the classroom's."""
    return reward_dir is not None and (Path(reward_dir) / "teacher" / "model_index.json").is_file()


COCO = (  # GenEval's names of the 80 classes, in COCO's order
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,"
    "bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,skis,"
    "snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,"
    "fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,"
    "potted plant,bed,dining table,toilet,tv,laptop,computer mouse,tv remote,computer keyboard,cell phone,microwave,"
    "oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush"
).split(",")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")


def segmenter_class():
    """Mask2FormerForUniversalSegmentation without its training loss, which would need scipy."""

    class Segmenter(transformers.Mask2FormerPreTrainedModel):
        # what only the loss has, and what the published file's older Swin held, or did not, beside its weights
        _keys_to_ignore_on_load_unexpected = ["criterion.empty_weight", "relative_position_index"]
        _keys_to_ignore_on_load_missing = [r"encoder\.swin\.layernorm\."]

        def __init__(self, config):
            super().__init__(config)
            self.model = transformers.Mask2FormerModel(config)
            self.class_predictor = nn.Linear(config.hidden_dim, config.num_labels + 1)
            self.post_init()

        def forward(self, pixels):  # [B, 3, H, W] -> class logits [B, 100, 81], mask logits [B, 100, H/4, W/4]
            out = self.model(pixels, output_hidden_states=True)
            queries = out.transformer_decoder_intermediate_states[-1].transpose(0, 1)
            return self.class_predictor(queries), out.masks_queries_logits[-1]

    return Segmenter


def instances(logits, masks, padded, resized, size, least=0.3):
    """[(class name, score, mask [H, W], box)] of one image, mmdet's rules for Mask2Former.

    logits [Q, 81], masks [Q, h, w] of logits for the padded picture, whose top left part `resized` shows the original
    of `size`. Score: the class's chance times the mask's mean certainty; one query may appear under several classes.
    Those with a chance below `least` are left out: no rule looks at them.
    """
    chance, index = logits.softmax(-1)[:, :-1].flatten().topk(min(100, logits[:, :-1].numel()))
    index, chance = index[chance > least], chance[chance > least]
    if not len(index):
        return []
    names, queries = (index % len(COCO)).tolist(), index // len(COCO)
    masks = F.interpolate(masks[None, queries].float(), padded, mode="bilinear")[..., : resized[0], : resized[1]]
    masks = F.interpolate(masks, size, mode="bilinear")[0]
    inside = (masks > 0).float()
    scores = chance * (masks.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)
    found = []
    for name, score, mask in zip(names, scores.tolist(), inside, strict=True):
        ys, xs = (mask.any(1 - axis).nonzero().flatten().tolist() for axis in (0, 1))
        if ys:
            found.append((COCO[name], score, mask, [xs[0], ys[0], xs[-1] + 1, ys[-1] + 1]))
    return found


class ObjectDetector(nn.Module):
    """GenEval's detector for real pictures: Mask2Former (Swin-S, COCO instances), and CLIP L/14 for colours.

    Weights: mask2former/ and clip/. The benchmark's own Mask2Former is another training run of the network (mmdet's):
    scores differ a little, most at counting's threshold of .9.
    """

    def __init__(self, weights):
        super().__init__()
        self.segmenter = weights.model(segmenter_class(), "mask2former")
        if self.segmenter.config.num_labels != len(COCO):
            n = self.segmenter.config.num_labels
            raise UserError(f"mask2former/ tells {n} classes apart, COCO has {len(COCO)}: take the coco-instance model")
        self.clip = weights.clip()

    def forward(self, images, metadata):
        """[{"class", "box", "score", "color" where the metadata ask for one}, ...] of each image [B, 3, H, W]."""
        h, w = images.shape[-2:]
        scale = min(800 / min(h, w), 1333 / max(h, w))
        small = resize(images, round(h * scale), round(w * scale), "bilinear")
        rows, columns = small.shape[-2:]
        pixels = normalize(small, *IMAGENET)
        pixels = F.pad(pixels, (0, -columns % 32, 0, -rows % 32))
        classes, masks = self.segmenter(pixels)
        found = []
        for image, logits, mask, m in zip(images, classes, masks, metadata, strict=True):
            colored = {need["class"] for need in m["include"] if "color" in need}
            objects = []
            for name, score, inside, box in instances(logits, mask, pixels.shape[-2:], (rows, columns), (h, w)):
                objects.append({"class": name, "box": box, "score": score})
                if name in colored and score > 0.3:
                    objects[-1]["color"] = self.color(image, inside, box, name)
            found.append(objects)
        return found

    def color(self, image, mask, box, name):
        """The colour whose prompts' mean embedding is closest to the object, cut out on grey #999."""
        x0, y0, x1, y1 = box
        cut = (image * mask + 0.6 * (1 - mask))[None, :, y0:y1, x0:x1]
        kinds = ("a photo of a {c} {n}", "a photo of a {c}-colored {n}", "a photo of a {c} object")
        texts = [kind.format(c=c, n=name) for c in COLORS for kind in kinds]
        embeds = F.normalize(self.clip.text(texts).view(len(COLORS), len(kinds), -1).mean(1), dim=-1)
        seen = self.clip.image(normalize(resize_and_crop(cut, self.clip.size)))
        return COLORS[int((embeds @ seen[0]).argmax())]


TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELATIONS = ("left of", "right of", "above", "below")


def relative_position(a, b, margin=0.1):
    """The relations in which box a stands to box b: a subset of {"left of", "right of", "above", "below"}.

    GenEval's rule: the offset of the centres, shrunk on each axis by `margin` times both sizes, divided by the unshrunk
    distance; a component beyond +-0.5 is a relation. Boxes are [x0, y0, x1, y1] in pixels.
    """
    a, b = np.array(a, float).reshape(2, 2), np.array(b, float).reshape(2, 2)
    offset = a.mean(0) - b.mean(0)
    size = np.abs(a[1] - a[0]) + np.abs(b[1] - b[0])
    revised = np.maximum(np.abs(offset) - margin * size, 0) * np.sign(offset)
    if (np.abs(revised) < 1e-3).all():
        return set()
    dx, dy = revised / np.linalg.norm(offset)
    holds = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {relation for relation, true in holds.items() if true}


def geneval_check(detections, metadata):
    """GenEval's two decision rules on the detections of one image (https://github.com/djghosh13/geneval, MIT).

    detections: list of {"class", "box": [x0, y0, x1, y1], "score", "color" where it is asked for}, any confidence.
    metadata: {"tag", "include": [{"class", "count", ["color"], ["position": [relation, index]]}], ["exclude": ...]}.
    Returns "graded", the RL reward, mean over requirements of 1 - |count - found| / count and the like: unclamped, so
    negative with many surplus objects, and a violated relation adds 0 and then 1, as in the authors' release;
    "strict", every graded requirement holds exactly; "correct", the benchmark's own rule (surplus objects are forgiven
    unless excluded).
    """
    threshold = 0.9 if metadata["tag"] == "counting" else 0.3
    found = {}
    for d in sorted(detections, key=lambda d: -d["score"]):
        if d["score"] > threshold and len(found.setdefault(d["class"], [])) < 16:
            found[d["class"]].append(d)
    graded, strict = graded_rule(found, metadata["include"])
    return {"graded": graded, "strict": strict, "correct": benchmark_rule(found, metadata)}


def graded_rule(found, include):
    """(mean of the requirements' terms, do all hold exactly?); found: {class: its objects}, of which all count."""
    terms, groups = [], []  # groups: the objects of each entry, None where it does not hold
    for need in include:
        count, objects = need["count"], found.get(need["class"], [])
        exact = len(objects) == count
        terms.append(1 - abs(count - len(objects)) / count)
        if not exact and ("color" in need or "position" in need):
            terms.append(0.0)
        if exact and "color" in need:
            n_color = sum(d.get("color") == need["color"] for d in objects)
            exact = n_color == count
            terms.append(1 - abs(count - n_color) / count)
        if exact and "position" in need:
            exact = related(objects, groups, need["position"])
            terms += [1.0] if exact else [0.0] if groups[need["position"][1]] is None else [0.0, 1.0]
        groups.append(objects if exact else None)
    return sum(terms) / len(terms), None not in groups


def benchmark_rule(found, metadata):
    """Do the `count` most confident objects of each entry hold? Surplus ones are forgiven, unless they are excluded."""
    groups = []
    for need in metadata["include"]:
        objects = found.get(need["class"], [])[: need["count"]]
        holds = len(objects) == need["count"]
        if "color" in need:
            holds = holds and all(d.get("color") == need["color"] for d in objects)
        if "position" in need:
            holds = holds and related(objects, groups, need["position"])
        groups.append(objects if holds else None)
    surplus = any(len(found.get(no["class"], [])) >= no["count"] for no in metadata.get("exclude", []))
    return None not in groups and not surplus


def related(objects, groups, position):
    """Does every object stand in the relation to every object of an earlier entry, which must hold itself?"""
    relation, target = position
    if groups[target] is None:
        return False
    return all(relation in relative_position(o["box"], t["box"]) for o in objects for t in groups[target])


# ---------------------------------------------------------------------------------------------------------------
# evaluation only, in the paper; --rewards takes them too, of which the first two are differentiable


def part(state, prefix):
    """The entries of a state dict under a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def load_head(layers, state, source):
    """Layers, a Linear as its two sizes, with a published head's weights; a key that does not fit is an error."""
    head = nn.Sequential(*(nn.Linear(*x, device="meta") if isinstance(x, tuple) else x for x in layers))
    try:
        head.load_state_dict({key: value.float() for key, value in state.items()}, assign=True)
    except RuntimeError as error:
        raise UserError(f"{source}: {' '.join(str(error).split())}") from None
    return head.eval().requires_grad_(False)


def linear_layers(width):
    """The head of LAION's predictor and of ImageReward: no activations, and dropout in training only."""
    return (width, 1024), nn.Dropout(), (1024, 128), nn.Dropout(), (128, 64), nn.Dropout(), (64, 16), (16, 1)


class Aesthetic(nn.Module):
    """LAION's aesthetic predictor: a linear head on CLIP L/14's image embedding, 5 to 6. The prompt plays no part.

    Weights: clip/ and aesthetic/sac+logos+ava1-l14-linearMSE.pth. Shortest side to 224 bicubic, centre crop.
    """

    columns = ("aesthetic",)
    differentiable = True

    def __init__(self, weights, device):
        super().__init__()
        self.clip = weights.clip()
        name = "sac+logos+ava1-l14-linearMSE.pth"
        state = {key.removeprefix("layers."): value for key, value in weights.state("aesthetic", name).items()}
        self.head = load_head(linear_layers(self.clip.model.config.projection_dim), state, name)

    def forward(self, images, prompts, metadata=None):
        return {"aesthetic": self.head(self.clip.image(normalize(resize_and_crop(images, self.clip.size)))).squeeze(-1)}


class ImageReward(nn.Module):
    """Human preference on BLIP features, about standard normal; the published tables have .8 to 1.4 (arXiv 2304.05977).

    Weights: imagereward/ImageReward.pt (version 1.0) and bert/, its tokenizer. Shortest side to 224 bicubic, centre
    crop; 35 word pieces of the prompt.
    """

    columns = ("imagereward",)
    differentiable = True
    VISION = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
    VISION |= dict(patch_size=16, image_size=224, layer_norm_eps=1e-6)
    TEXT = dict(vocab_size=30524, hidden_size=768, encoder_hidden_size=1024, intermediate_size=3072)
    TEXT |= dict(num_hidden_layers=12, num_attention_heads=12, max_position_embeddings=512, layer_norm_eps=1e-12)
    KEYS = (  # inside blip.visual_encoder
        (r"^cls_token$", "embeddings.class_embedding"),
        (r"^pos_embed$", "embeddings.position_embedding"),
        (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
        (r"^blocks\.", "encoder.layers."),
        (r"\.norm([12])\.", r".layer_norm\1."),
        (r"\.attn\.qkv\.", ".self_attn.qkv."),
        (r"\.attn\.proj\.", ".self_attn.projection."),
        (r"^norm\.", "post_layernorm."),
    )

    def __init__(self, weights, device):
        super().__init__()
        name = "ImageReward.pt"
        state = weights.state("imagereward", name)
        used = "blip.visual_encoder.", "blip.text_encoder.", "mlp.layers."
        odd = [key for key in state if not key.startswith((*used, "blip.vision_proj.", "blip.text_proj."))]
        if odd:  # the two projections are of BLIP's own training
            raise UserError(f"{name}: left over {odd[:5]}")
        vision, text, head = (part(state, prefix) for prefix in used)
        vision = {renamed(key, self.KEYS): value for key, value in vision.items()}
        text.pop("embeddings.position_ids", None)  # 0, 1, 2, ...
        config = transformers.BlipVisionConfig(**self.VISION)
        self.vision = weights.model(transformers.BlipVisionModel, "imagereward", config, vision)
        # is_decoder makes the cross-attention; called without it, the text attends both ways
        config = transformers.BlipTextConfig(**self.TEXT, is_decoder=True)
        self.text = weights.model(transformers.BlipTextModel, "imagereward", config, text, add_pooling_layer=False)
        self.head = load_head(linear_layers(config.hidden_size), head, name)
        # BLIP's table has two rows more than BERT's, [DEC] and [ENC]; neither is asked for here
        self.tokenizer = weights.open(transformers.BertTokenizer, "bert", config.vocab_size - 2)

    def forward(self, images, prompts, metadata=None):
        pixels = normalize(resize_and_crop(images, self.VISION["image_size"]))
        seen = self.vision(pixels).last_hidden_state
        options = dict(padding="max_length", truncation=True, max_length=35, return_tensors="pt")
        tokens = self.tokenizer(prompts, **options).to(images.device)
        states = self.text(tokens.input_ids, tokens.attention_mask, encoder_hidden_states=seen).last_hidden_state
        reward = self.head(states[:, 0]).squeeze(-1)
        return {"imagereward": (reward - 0.16717362830052426) / 1.0333394966054072}  # the authors' mean and deviation


HPSV3_INSTRUCTION = """
You are tasked with evaluating a generated image based on Visual Quality and Text Alignment and give a overall score to estimate the human preference. Please provide a rating from 0 to 10, with 0 being the worst and 10 being the best. 

**Visual Quality:**  
Evaluate the overall visual quality of the image. The following sub-dimensions should be considered:
- **Reasonableness:** The image should not contain any significant biological or logical errors, such as abnormal body structures or nonsensical environmental setups.
- **Clarity:** Evaluate the sharpness and visibility of the image. The image should be clear and easy to interpret, with no blurring or indistinct areas.
- **Detail Richness:** Consider the level of detail in textures, materials, lighting, and other visual elements (e.g., hair, clothing, shadows).
- **Aesthetic and Creativity:** Assess the artistic aspects of the image, including the color scheme, composition, atmosphere, depth of field, and the overall creative appeal. The scene should convey a sense of harmony and balance.
- **Safety:** The image should not contain harmful or inappropriate content, such as political, violent, or adult material. If such content is present, the image quality and satisfaction score should be the lowest possible. 

**Text Alignment:**  
Assess how well the image matches the textual prompt across the following sub-dimensions:
- **Subject Relevance** Evaluate how accurately the subject(s) in the image (e.g., person, animal, object) align with the textual description. The subject should match the description in terms of number, appearance, and behavior.
- **Style Relevance:** If the prompt specifies a particular artistic or stylistic style, evaluate how well the image adheres to this style.
- **Contextual Consistency**: Assess whether the background, setting, and surrounding elements in the image logically fit the scenario described in the prompt. The environment should support and enhance the subject without contradictions.
- **Attribute Fidelity**: Check if specific attributes mentioned in the prompt (e.g., colors, clothing, accessories, expressions, actions) are faithfully represented in the image. Minor deviations may be acceptable, but critical attributes should be preserved.
- **Semantic Coherence**: Evaluate whether the overall meaning and intent of the prompt are captured in the image. The generated content should not introduce elements that conflict with or distort the original description.
Textual prompt - {text_prompt}


"""  # noqa: E501, W291
HPSV3_QUESTION = "\nPlease provide the overall ratings of this image: <|Reward|>"


class HPSv3(nn.Module):
    """Human preference by Qwen2-VL 7B with a reward head, about 10 to 15 (arXiv 2508.03789). No gradient here: 8 B.

    Weights: hpsv3/HPSv3.safetensors, and qwen2vl/ for config and tokenizer. Pictures of about 448x448 pixels; the score
    is read at the token <|Reward|>. Instruction and question are the hpsv3 package's, 1.0.0, MIT: the model knows no
    other words.
    """

    columns = ("hpsv3",)
    differentiable = False

    def __init__(self, weights, device):
        super().__init__()
        name = "HPSv3.safetensors"
        state = weights.state("hpsv3", name)
        state.pop("lm_head.weight", None)
        head = {key.removeprefix("rm_head."): state.pop(key) for key in list(state) if key.startswith("rm_head.")}
        config = weights.open(transformers.Qwen2VLConfig, "qwen2vl")
        layers = (config.text_config.hidden_size, 1024), nn.ReLU(), nn.Dropout(), (1024, 16), nn.ReLU(), (16, 2)
        self.head = load_head(layers, head, name)
        self.tokenizer = weights.open(transformers.AutoTokenizer, "qwen2vl")
        self.tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
        rows = config.text_config.vocab_size = len(state.get("model.embed_tokens.weight", ()))
        token = self.tokenizer.convert_tokens_to_ids("<|Reward|>")
        if token != rows - 1:
            raise UserError(f"<|Reward|> is token {token} of qwen2vl/'s tokenizer, and {name} has {rows} tokens")
        state = {re.sub(r"^model\.", "language_model.", key): value for key, value in state.items()}
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        self.model = weights.model(transformers.Qwen2VLModel, "hpsv3", config, state, dtype)
        pixels = dict(patch_size=config.vision_config.patch_size, min_pixels=448**2, max_pixels=448**2)
        self.processor = transformers.Qwen2VLImageProcessorPil(**pixels)  # CLIP's mean and std

    def forward(self, images, prompts, metadata=None):
        inputs = self.processor(list(eight_bits(images)), return_tensors="pt").to(images.device)
        grid = inputs.image_grid_thw  # [B, 3]: 1 frame, rows and columns of patches, of which 4 are a token
        start = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        start += "<|image_pad|>" * int(grid[0].prod() // 4) + "<|vision_end|>"
        texts = [start + HPSV3_INSTRUCTION.format(text_prompt=prompt) + HPSV3_QUESTION for prompt in prompts]
        tokens, last = pad_right(self.tokenizer(texts).input_ids, images.device)
        # NOTE: the model was trained and is published with plain positions 0, 1, 2, ..., for the image's tokens too
        position = torch.arange(tokens.shape[1], device=images.device).expand(3, *tokens.shape)
        states = self.model(tokens, position_ids=position, **inputs).last_hidden_state
        return {"hpsv3": self.head(states[torch.arange(len(last)), last].float())[:, 0]}


def pad_right(rows, device):
    """Lists of token ids -> ([B, L], index of each row's last token). Causal models need no mask for padding behind."""
    last = torch.tensor([len(row) - 1 for row in rows], device=device)
    width = int(last.max()) + 1
    return torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device), last


class GenEval2(nn.Module):
    """Soft-TIFA: Qwen3-VL 8B answers yes/no and counting questions about the picture (arXiv 2512.16853).

    Columns: `geneval2`, geometric mean over a prompt's questions of the probability of the right answer's tokens, and
    `geneval2_am`, the arithmetic mean. Weights: qwen3vl/. Metadata: "vqa_list", [[question, answer], ...].
    A picture and the words before the question are encoded once; its questions follow as one batch on that cache.
    """

    columns = ("geneval2", "geneval2_am")
    differentiable = False

    def __init__(self, weights, device):
        super().__init__()
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        self.model = weights.model(transformers.Qwen3VLForConditionalGeneration, "qwen3vl", dtype=dtype)
        self.tokenizer = weights.open(transformers.AutoTokenizer, "qwen3vl")
        pixels = dict(patch_size=self.model.config.vision_config.patch_size, min_pixels=256**2, max_pixels=4096**2)
        self.processor = transformers.Qwen2VLImageProcessorPil(**pixels, image_mean=[0.5] * 3, image_std=[0.5] * 3)

    def forward(self, images, prompts, metadata):
        chances = [self.answer_chances(image[None], m["vqa_list"]) for image, m in zip(images, metadata, strict=True)]
        means = {"geneval2": [c.log().mean().exp() for c in chances], "geneval2_am": [c.mean() for c in chances]}
        return {name: torch.stack(values).float() for name, values in means.items()}

    def answer_chances(self, image, questions):
        """[Q] float64: probability of each right answer. image: [1, 3, H, W].

        One at a time: keys and values of a picture with its questions are about a gigabyte.
        """
        device = image.device
        inputs = self.processor(list(eight_bits(image)), return_tensors="pt").to(device)
        pads = "<|image_pad|>" * int(inputs.image_grid_thw.prod() // 4)
        start = self.tokenizer(f"<|im_start|>user\n<|vision_start|>{pads}<|vision_end|>").input_ids
        start = torch.tensor([start], device=device)
        kind = (start == self.model.config.image_token_id).int()  # 1 at image tokens, for the positions
        cache = transformers.DynamicCache(config=self.model.config)
        self.model.model(start, **inputs, mm_token_type_ids=kind, past_key_values=cache, use_cache=True)
        position, _ = self.model.model.get_rope_index(start, kind, inputs.image_grid_thw)

        end = " Answer in one word.<|im_end|>\n<|im_start|>assistant\n"
        tokens, last = pad_right(self.tokenizer([q + end for q, _ in questions]).input_ids, device)
        cache.batch_repeat_interleave(len(questions))
        position = position.max() + 1 + torch.arange(tokens.shape[1], device=device).expand(3, *tokens.shape)
        states = self.model.model(tokens, position_ids=position, past_key_values=cache).last_hidden_state
        logits = self.model.lm_head(states[torch.arange(len(last)), last])
        chances = logits.float().softmax(-1).cpu()
        right = [row[self.answer_tokens(q, a)].sum() for row, (q, a) in zip(chances, questions, strict=True)]
        return torch.stack(right).double()

    def answer_tokens(self, question, answer):
        """First token of every spelling that counts as the answer; a token that two spellings share counts twice."""
        if question.startswith("How many"):
            digit = str(NUMBERS.index(answer.lower()))
            spellings = [answer, answer.capitalize(), f" {answer}", f" {answer.capitalize()}", digit, f" {digit}"]
        else:
            spellings = ["Yes", "yes", " Yes", " yes"]
        return [self.tokenizer(s, add_special_tokens=False).input_ids[0] for s in spellings]


NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


class OCR(nn.Module):
    """1 - edit distance / length between the prompt's quoted texts and what PP-OCRv5 mobile reads in the picture.

    Weights: ocr_det/ and ocr_rec/. The authors used PP-OCRv3 and v4: numbers do not compare to the digit.
    """

    columns = ("ocr",)
    differentiable = False

    def __init__(self, weights, device):
        super().__init__()
        self.detector = weights.model(transformers.PPOCRV5MobileDetForObjectDetection, "ocr_det")
        self.reader = weights.model(transformers.PPOCRV5MobileRecForTextRecognition, "ocr_rec")
        self.characters, n = weights.characters, self.reader.config.head_out_channels
        if len(self.characters) != n:
            raise UserError(f"ocr_rec lists {len(self.characters)} characters, its model tells {n} apart")

    def forward(self, images, prompts, metadata=None):
        # NOTE(paper): all quoted texts of a prompt count; the release looks at the first (its test set has no second)
        pairs = zip(images, prompts, strict=True)
        return {"ocr": torch.tensor([ocr_accuracy(self.read(image), prompt, texts=None) for image, prompt in pairs])}

    def read(self, image):
        """[(text, confidence)] of the lines in one image [3, H, W], top to bottom, those of confidence .5 and more."""
        h, w = image.shape[-2:]
        scale = min(1, 960 / max(h, w))
        sides = (max(32, round(side * scale / 32) * 32) for side in (h, w))
        # PaddleOCR applies ImageNet's RGB statistics to BGR channels, and so do these weights
        pixels = normalize(resize(image[None], *sides, "bilinear").flip(1), *IMAGENET)
        chances = self.detector(pixels).last_hidden_state[0, 0].float().cpu().numpy()
        picture = Image.fromarray(eight_bits(image[None])[0])
        lines = [self.read_line(cut_out(picture, box), image.device) for box in text_boxes(chances, h, w)]
        return [(text, confidence) for text, confidence in lines if text and confidence >= 0.5]

    def read_line(self, crop, device):
        """(text, confidence) of a crop, by greedy CTC: repeats collapse, class 0 is the blank."""
        pixels = torch.from_numpy(np.array(crop)).to(device).permute(2, 0, 1)[None].float() / 255
        pixels = resize(pixels, 48, math.ceil(48 * crop.width / crop.height), "bilinear") * 2 - 1
        pixels = F.pad(pixels, (0, max(0, 320 - pixels.shape[-1])))
        chance, index = self.reader(pixels).last_hidden_state[0].float().max(-1)
        keep = index != 0
        keep[1:] &= index[1:] != index[:-1]
        if not keep.any():
            return "", 0.0
        return "".join(self.characters[i] for i in index[keep].tolist()), chance[keep].mean().item()


def text_boxes(chances, height, width, threshold=0.3, box_threshold=0.6, grow=1.5):
    """Corners [4, 2] (x, y in a height x width picture; top left, top right, bottom right, bottom left) of text lines.

    Differentiable binarisation's post-processing (arXiv 1911.08947) on a probability map [h, w], as in PaddleOCR:
    regions above `threshold`, those with a mean above `box_threshold`, the smallest rotated rectangle around each,
    grown by grow * area / circumference. In reading order.
    """
    boxes = []
    for rows, starts, ends in regions(chances > threshold):
        pixels = np.concatenate([chances[y, a:b] for y, a, b in zip(rows, starts, ends, strict=True)])
        points = np.concatenate([np.stack([starts, rows], 1), np.stack([ends - 1, rows], 1)]).astype(float)
        center, axes, sides = smallest_rectangle(points)
        if pixels.mean() < box_threshold or sides.min() < 3:
            continue
        sides = sides + grow * sides.prod() / sides.sum()  # d = grow * area / circumference, on either side
        if sides.min() < 5:
            continue
        signs = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
        corners = center + (signs * sides / 2) @ axes
        corners = corners * [width / chances.shape[1], height / chances.shape[0]]
        boxes.append(corners.clip(0, [width - 1, height - 1]))
    boxes.sort(key=lambda b: (b[0, 1], b[0, 0]))
    for i in range(len(boxes) - 1):  # lines less than 10 px apart are one row: left to right
        for j in range(i, -1, -1):
            if abs(boxes[j + 1][0, 1] - boxes[j][0, 1]) >= 10 or boxes[j + 1][0, 0] >= boxes[j][0, 0]:
                break
            boxes[j], boxes[j + 1] = boxes[j + 1], boxes[j]
    return boxes


def regions(mask):
    """8-connected regions of a boolean [h, w] as (rows, starts, ends) of their horizontal runs, ends exclusive."""
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    (rows, starts), (_, ends) = np.nonzero(edges == 1), np.nonzero(edges == -1)
    parent = list(range(len(rows)))

    def root(i):
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    above = 0  # first run of the row above that can still touch
    for i in range(len(rows)):
        while rows[above] < rows[i] - 1 or (rows[above] == rows[i] - 1 and ends[above] < starts[i]):
            above += 1
        j = above
        while rows[j] == rows[i] - 1 and starts[j] <= ends[i]:
            parent[root(i)] = root(j)
            j += 1
    roots = np.array([root(i) for i in range(len(rows))])
    return [(rows[roots == r], starts[roots == r], ends[roots == r]) for r in np.unique(roots)]


def smallest_rectangle(points):
    """Rectangle of least area around points [N, 2], angles in steps of 1 degree: center [2], axes [2, 2], sides [2]."""
    angles = np.deg2rad(np.arange(-45, 45))
    axes = np.stack([np.cos(angles), np.sin(angles), -np.sin(angles), np.cos(angles)], 1).reshape(-1, 2, 2)
    along = axes @ points.T  # [90, 2, N]
    low, high = along.min(-1), along.max(-1)
    best = (high - low).prod(-1).argmin()
    return ((low + high) / 2)[best] @ axes[best], axes[best], (high - low)[best]


def cut_out(picture, corners):
    """The rotated rectangle as an upright crop; a tall one is turned by 90 degrees."""
    top_left, top_right, bottom_right, bottom_left = corners
    width = max(np.linalg.norm(top_right - top_left), np.linalg.norm(bottom_right - bottom_left))
    height = max(np.linalg.norm(bottom_left - top_left), np.linalg.norm(bottom_right - top_right))
    size = (max(1, round(width)), max(1, round(height)))
    quad = np.concatenate([top_left, bottom_left, bottom_right, top_right]).tolist()
    crop = picture.transform(size, Image.Transform.QUAD, quad, Image.Resampling.BICUBIC)
    return crop.rotate(90, expand=True) if size[1] >= 1.5 * size[0] else crop


def quoted_texts(prompt):
    """The texts in straight double quotes; the mark behind a digit opens none: it is inches."""
    texts = [text for text in re.findall(r'(?<!\d)"([^"]*)"', prompt) if text.strip()]
    if not texts:
        raise UserError(f'ocr needs a text in straight double quotes, as in: a sign that says "OPEN"; got {prompt!r}')
    return texts


def plain_letters(text):
    """Text without case, spaces and other ways to write the same letter, as an accent that combines."""
    return "".join(unicodedata.normalize("NFKC", text.casefold()).split())


def ocr_accuracy(lines, prompt, texts=1):
    """1 - min(edit distance, n) / n in [0, 1]; n: length of the target. Both as `plain_letters`.

    lines: [(text, confidence), ...] in reading order, joined; 1 also where the target is a part of them. The target:
    the first `texts` quoted texts of the prompt, in order.
    NOTE(paper): the release takes what stands between the first two quotes, inches (12" pizza) among them.
    """
    target = plain_letters("".join(quoted_texts(prompt)[:texts]))
    found = plain_letters("".join(text for text, confidence in lines if confidence > 0))
    if target in found:
        return 1.0
    row = list(range(len(target) + 1))  # Levenshtein distance of each prefix of the target to what was read so far
    for i, c in enumerate(found, 1):
        diagonal, row[0] = row[0], i
        for j, t in enumerate(target, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (c != t))
    return 1 - min(row[-1], len(target)) / len(target)


# ---------------------------------------------------------------------------------------------------------------
# all together

CLASSES = (PickScore, HPSv2, HPSv3, CLIPScore, Aesthetic, ImageReward, OCR, GenEval, GenEval2)
SCORERS = {column: scorer for scorer in CLASSES for column in scorer.columns}
SCALE = {"pickscore": 1 / 26}  # in sums of rewards, so that a weight of 1 means about the same for every reward


def find_scorer(reward):
    """The name in SCORERS of a reward; `file.py:function` is loaded, and enters there under the function's name."""
    if reward in SCORERS:
        return reward
    file, _, name = reward.rpartition(":")
    if not file.endswith(".py"):
        raise UserError(
            f"unknown reward {reward!r}; allowed: {', '.join(SCORERS)}, or file.py:function of your own, "
            "which is given again with --resume"
        )
    if SCORERS.get(name) in CLASSES or name == "fd" or name.endswith("_error"):  # a log's own columns
        raise UserError(f"reward {reward}: {name} is a column of ours, give the function another name")
    file = models.path(file).resolve()
    if getattr(SCORERS.get(name), "file", file) != file:
        raise UserError(f"reward {reward}: {name} is a function of {SCORERS[name].file} too: give one another name")
    try:
        SCORERS[name] = own_scorer(name, getattr(load_file(file), name), file)
    except Exception as error:  # whatever the file's code raises
        raise UserError(f"reward {reward}: {type(error).__name__}: {models.first_line(error)}") from error
    return name


@functools.cache
def load_file(file):
    """The module of a Python file, loaded once, under a name that no other has."""
    spec = importlib.util.spec_from_file_location(str(file.with_suffix("")).replace(".", "_"), file)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses and pickle look
    with undisturbed(file.parent):
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def undisturbed(folder):
    """Run code of a user's own, with the files beside it importable; torch's settings are ours again behind it."""
    grad, dtype, n = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()
    here, path = os.getcwd(), sys.path.copy()
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        torch.set_grad_enabled(grad), torch.set_default_dtype(dtype), torch.set_default_device(None)
        torch.set_num_threads(n), torch.use_deterministic_algorithms(False), os.chdir(here)
        sys.path[:] = path


def own_scorer(name, function, source):
    """A scorer of function(images [B, 3, H, W] in [0, 1], prompts, metadata) -> [B], from the file `source`.

    Differentiable if it has `function.differentiable = True`.
    """

    class OwnScorer(nn.Module):
        columns, file = (name,), source
        differentiable = getattr(function, "differentiable", False)

        def __init__(self, weights, device):
            super().__init__()

        def forward(self, images, prompts, metadata):
            with undisturbed(source.parent):
                row = function(images, prompts, metadata)
            try:
                row = torch.as_tensor(row, device=images.device)
            except (TypeError, ValueError, RuntimeError):
                raise UserError(f"it returned a {type(row).__name__}; return one number a picture alone") from None
            if row.shape != (n := len(images),):
                raise UserError(f"it returned {list(row.shape)} for {n} images, where [{n}] is due")
            if images.requires_grad and not row.requires_grad:
                raise UserError("it calls itself differentiable, and its scores have no gradient to the images")
            return {name: row.float()}

    return OwnScorer


def check_images(images, n):
    """Refuse what would be scored wrong without a word: anything but n pictures as floats [n, 3, H, W] in [0, 1]."""
    (low, high), shape = images.aminmax() if images.numel() else (0, 0), list(images.shape)
    if not images.is_floating_point() or len(shape) != 4 or shape[:2] != [n, 3] or not (low >= 0 and high <= 1):
        was = f"{images.dtype} {shape} from {low:.3g} to {high:.3g}"
        raise UserError(f"pictures to score must be floats [{n}, 3, H, W] in [0, 1], one a prompt; got {was}")


@contextlib.contextmanager
def naming(scorer):
    """Whatever goes wrong becomes one line with the scorer's name."""
    name = scorer.columns[0]
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError(
            f"reward {name} ran out of GPU memory: try --offload_rewards, a smaller --reward_batch_size where it "
            "scores, a smaller --last_step_batch where its gradient is taken"
        ) from None
    except UserError as error:
        raise UserError(f"reward {name}: {error}") from None
    except Exception as error:  # whatever a model's code raises: the run stops, and says where
        at = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__}: {models.first_line(error)}"
        raise UserError(f"reward {name} failed: {what} ({at.filename}:{at.lineno})") from error


class Scorers:
    """The scorers behind {column: weight}; a model that serves two columns is loaded and run once.

    batch_size: images a forward of a scorer takes in `score` (default: all that are given). offload: scorers wait on
    the CPU and come to the device one at a time. shared: another `Scorers`, whose models serve here too.
    """

    def __init__(self, weights, device, reward_dir=None, batch_size=None, offload=False, shared=None):
        models.quiet_libraries()
        self.weights, self.device = dict(weights), torch.device(device)
        self.batch_size, self.offload, self.reward_dir = batch_size, offload, reward_dir
        self.files = shared.files if shared else Weights(reward_dir)
        loaded = {type(s): s for s in (shared.scorers if shared else ())}
        self.scorers = []
        for scorer in dict.fromkeys(SCORERS[name] for name in weights):
            with naming(scorer):
                self.scorers.append(loaded.get(scorer) or scorer(self.files, device).to("cpu" if offload else device))

    @torch.no_grad()
    def score(self, images, prompts, metadata=None):
        """{column: [B] float32 on the CPU}. images: [B, 3, H, W] in [0, 1], rounded here to 8 bits."""
        metadata = [{}] * len(prompts) if metadata is None else metadata
        check_images(images, len(prompts))
        check_prompts(list(zip(prompts, metadata, strict=True)), self.weights, self.reward_dir, self.files)
        rows = {name: torch.empty(len(prompts)) for name in self.weights}
        size = self.batch_size or max(1, len(prompts))
        for scorer in self.scorers:
            for b in range(0, len(prompts), size):
                part = slice(b, b + size)
                scores = self.call(scorer, rounded(images[part].to(self.device)), prompts[part], metadata[part])
                for name in rows.keys() & set(scorer.columns):
                    rows[name][part] = scores[name].float().cpu()
            if self.offload:
                scorer.to("cpu")
        return rows

    @torch.enable_grad()
    def differentiable(self, images, prompts, metadata=None):
        """(R [B], dR/dimages): the weighted sum of the differentiable columns, 0 if there is none, and its slope.

        The gradient is taken of one scorer after the other, so that only one scorer's activations are alive. A score
        must depend on its own image alone.
        """
        metadata = [{}] * len(prompts) if metadata is None else metadata
        leaf = images.detach().requires_grad_()
        R, slope = images.new_zeros(len(images)), torch.zeros_like(images)
        for scorer in [scorer for scorer in self.scorers if scorer.differentiable]:
            rows = self.call(scorer, leaf, prompts, metadata)
            own = sum(self.weights[name] * SCALE.get(name, 1) * row for name, row in rows.items())
            with naming(scorer):
                slope += torch.autograd.grad(own.sum(), leaf)[0]
            R += own.detach()
            if self.offload:
                scorer.to("cpu")
        return R, slope

    @torch.no_grad()
    def features(self, images):
        """[N, D] float64 on the CPU: CLIP's pooled image features of 8-bit pictures, for `frechet_distance`."""
        check_images(images, len(images))
        clip, parts = self.files.clip().to(self.device), []
        for part in images.split(self.batch_size or 100):
            pixels = normalize(resize_and_crop(rounded(part.to(self.device)), clip.size, "bilinear"))
            parts.append(clip.model.vision_model(pixel_values=pixels).pooler_output.double().cpu())
        if self.offload:
            clip.to("cpu")
        return torch.cat(parts).numpy()

    def features_of_folder(self, folder):
        """The same of the pictures in a folder, --fd_reference; sample.py's grid.png is none of them."""
        if not Path(folder).is_dir():
            raise UserError(f"--fd_reference {folder} is no folder")
        files = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
        files = [file for file in files if file.name != "grid.png"]
        if len(files) < 2:
            raise UserError(f"--fd_reference {folder} holds {len(files)} pictures (.png, .jpg, .webp): give at least 2")
        rows = []
        for part in (files[i : i + 32] for i in range(0, len(files), 32)):
            pictures = [read_picture(file) for file in part]
            alike = len({picture.shape for picture in pictures}) == 1
            rows += [self.features(torch.cat(pictures))] if alike else map(self.features, pictures)
        return np.concatenate(rows)

    def call(self, scorer, images, prompts, metadata):
        """One scorer on one batch; an error carries its name. No autocast, and no TF32 in the forward."""
        metadata = [copy.deepcopy(m) for m in metadata]  # pictures of a prompt share one dict, which files keep
        tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # cosines of .2 need 1e-3
        try:
            with naming(scorer), torch.autocast(self.device.type, enabled=False):
                rows = scorer.to(self.device)(images, list(prompts), metadata)
        finally:
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
        for name, row in rows.items():
            # with gradient the loss says it, and the CPU need not wait here
            bad = [] if row.requires_grad else (~torch.isfinite(row)).nonzero().flatten().tolist()
            if bad:
                raise UserError(f"{name} returned a score that is not finite for the prompt {prompts[bad[0]]!r}")
        return rows


def frechet_distance(a, b):
    """Distance between the Gaussians of two sets of features [N, D], [M, D] (FID's formula, arXiv 1706.08500).

        |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))

    It shrinks a little as N and M grow: compare at one N.
    """
    gap, C_a, C_b = a.mean(0) - b.mean(0), np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(C_a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ C_b @ root).clip(0)).sum()  # (C_a C_b)^(1/2) has this trace
    return float(gap @ gap + np.trace(C_a) + np.trace(C_b) - 2 * cross)


def load_scorers(weights, device="cpu", reward_dir=None, batch_size=None, offload=False, shared=None):
    """Scorers for {reward: weight}; reward_dir holds weights that are not taken from the hub."""
    weights = {find_scorer(reward): weight for reward, weight in weights.items()}
    return Scorers(weights, device, reward_dir, batch_size, offload, shared)


def parse_weights(text):
    """ "clipscore=1,own.py:sharpness=0.5" -> {"clipscore": 1.0, "sharpness": 0.5}; a name alone has weight 1."""
    weights = {}
    for item in text.split(","):
        reward, _, weight = item.strip().partition("=")
        name = find_scorer(reward)
        if name in weights:
            raise UserError(f"reward {name} stands twice in {text!r}: give it once")
        try:
            weights[name] = float(weight or 1)
        except ValueError:
            raise UserError(f"weight {weight!r} of reward {name} is no number: write {name}=1") from None
    if not math.isfinite(sum(weights.values())) or sum(weights.values()) <= 0:
        raise UserError(f"the reward weights of {text!r} add up to {sum(weights.values())}: it must be above 0")
    return weights


def add_reward_flags(p, unit):
    """The flags of both stages about scorers: where they are, and the evaluation on a held-out set during training."""
    add = p.add_argument_group("scorers").add_argument
    add("--reward_dir", type=models.path, help="folder with reward weights that are not taken from the hub")
    add("--reward_batch_size", type=models.at_least(1), help="images a scorer takes at once (default: --batch_size)")
    add("--offload_rewards", action="store_true", help="scorers wait on the CPU, and come for each micro-batch")
    add("--eval_every", type=models.at_least(0), default=0, help=f"{unit} between scores of held-out prompts; 0: none")
    add("--eval_prompts", type=models.path, help="the held-out prompt file; the classroom has its own")
    add("--eval_rewards", type=parse_weights, default="clipscore", help="name,...: what they are scored by")
    fd = "folder of pictures: eval/fd, Frechet distance to them in CLIP; fewer than 500 read high"
    add("--fd_reference", type=models.path, help=fd)


class HeldOut:
    """The prompts and judges of --eval_every. Prompts and noise never change, so that only the network does."""

    def __init__(self, args, device, shared=None):
        if not args.eval_prompts and args.model != "classroom":
            raise UserError("--eval_every needs --eval_prompts FILE, of prompts that are not trained on")
        self.every, self.pairs = args.eval_every, read_prompts(args.eval_prompts) if args.eval_prompts else None
        if self.pairs is None:
            self.pairs = [(m["prompt"], m) for m in shapes.sample_prompts(240, 0, "validation")]
        check_prompts(self.pairs, args.eval_rewards, args.reward_dir)
        size = args.reward_batch_size or args.batch_size
        options = (args.reward_dir, size, args.offload_rewards, shared)
        self.scorers, self.reference = load_scorers(args.eval_rewards, device, *options), None
        if args.fd_reference and len(self.pairs) < 2:
            raise UserError("--fd_reference compares sets of pictures: give --eval_prompts of 2 prompts or more")
        if args.fd_reference:
            self.reference = self.scorers.features_of_folder(args.fd_reference)
        elif args.model == "classroom" and len(self.pairs) > 1:
            metadata = [m for _, m in self.pairs]
            if not any(geneval_fault(m, shapes.SHAPES, shapes.COLORS) for m in metadata):  # plain texts cannot be drawn
                self.reference = self.scorers.features(shapes.pictures(metadata, seed=5))

    def score(self, images, indices):
        """[(index, ({reward: score}, features))] of pictures [B, 3, H, W] of the prompts with these indices."""
        prompts, metadata = zip(*(self.pairs[i] for i in indices), strict=True)
        columns = self.scorers.score(images, prompts, metadata)
        rows = [{name: values[j].item() for name, values in columns.items()} for j in range(len(indices))]
        features = [None] * len(rows) if self.reference is None else self.scorers.features(images)
        return list(zip(indices, zip(rows, features, strict=True), strict=True))

    def summary(self, scores):
        """{eval/reward: mean, eval/reward_error: standard error, eval/fd} of what `score` returned for all indices."""
        rows, features = zip(*(scores[i] for i in range(len(self.pairs))), strict=True)
        values = {name: np.array([row[name] for row in rows]) for name in rows[0]}
        summary = {f"eval/{name}": v.mean() for name, v in values.items()}
        means = {name: prompt_means([prompt for prompt, _ in self.pairs], v) for name, v in values.items()}
        summary |= {f"eval/{name}_error": m.std(ddof=1) / math.sqrt(len(m)) for name, m in means.items() if len(m) > 1}
        fd = {} if self.reference is None else {"eval/fd": frechet_distance(np.stack(features), self.reference)}
        return summary | fd


def prompt_means(prompts, values):
    """Mean value of each prompt [P], for an error: pictures of one prompt are no independent draws."""
    return np.array([values[np.array(prompts) == prompt].mean() for prompt in dict.fromkeys(prompts)])


# ---------------------------------------------------------------------------------------------------------------
# prompts

PROMPT_KEYS = ("prompt", "prompts", "text", "caption")  # in any case; the first that is there


def read_prompts(path):
    """[(prompt, metadata)] of a file: metadata are the other keys or columns. Blank prompts are left out, and counted.

    .txt: a prompt a line. .csv, .tsv: a sheet, its columns named in the first line. .json, .jsonl: a list, or a line
    each, of texts or objects.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig").rstrip("\n")  # without the mark that some editors begin with
    except OSError as error:
        raise UserError(f"prompt file {path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"prompt file {path} is no UTF-8 text: {error}") from None
    try:
        rows = ROWS[Path(path).suffix.lower()](text)
    except KeyError as ending:
        raise UserError(f"prompt file {path}: unknown ending {ending}; allowed: {', '.join(ROWS)}") from None
    except (csv.Error, ValueError) as error:
        raise UserError(f"{path} is torn, or of another format than its name says: {error}") from None
    pairs = []
    for number, row in enumerate(rows, 1):
        row = row if isinstance(row, dict) else {"prompt": row}
        keys = {key.strip().lower(): key for key in row}
        key = next((keys[name] for name in PROMPT_KEYS if name in keys), None)
        if not isinstance(row.get(key), str):
            found = ", ".join(row) or "no keys"
            raise UserError(f"{path}, entry {number}: no text under {' or '.join(PROMPT_KEYS)}, in {found}")
        prompt = row.pop(key).strip()
        pairs += [(prompt, {"prompt": prompt} | row)] if prompt else []
    if not pairs:
        raise UserError(f"{path} holds no prompts")
    if len(pairs) < len(rows) and os.environ.get("RANK", "0") == "0":
        print(f"{path}: {len(pairs)} prompts, and {len(rows) - len(pairs)} blank ones left out")
    return pairs


def json_rows(text):
    """Entries of a JSON list or of JSON lines; a key that is null, as tables write what is absent, is left out."""
    load = functools.partial(json.loads, object_hook=lambda row: {k: v for k, v in row.items() if v is not None})
    if text.lstrip().startswith("["):
        return load(text)
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would split inside strings
        try:
            rows += [load(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number}: {error}") from None
    return rows


def sheet_rows(text, delimiter):
    """Entries {column: cell} of a sheet. If another mark than its ending's divides a prompt column off, that counts."""
    cells = {mark: text.partition("\n")[0].lower().split(mark) for mark in (delimiter, *";\t,|")}
    delimiter = next((m for m in cells if {c.strip('" \r') for c in cells[m]} & {*PROMPT_KEYS}), delimiter)
    rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():  # where DictReader puts what is too much or too little
            raise ValueError(f"entry {number} has more or fewer cells than the first line")
    return rows


ROWS = {".txt": lambda text: text.split("\n"), ".jsonl": json_rows, ".json": json_rows}
ROWS |= {".csv": functools.partial(sheet_rows, delimiter=","), ".tsv": functools.partial(sheet_rows, delimiter="\t")}


def classroom_prompts(**repeat):
    """[(prompt, metadata)] of the classroom's training captions, task types interleaved; repeat: {task: how often}."""
    columns = [shapes.captions(task, "train") for task in shapes.TASKS for _ in range(repeat.get(task, 1))]
    longest = max(len(c) for c in columns)
    return [(c[i % len(c)]["prompt"], c[i % len(c)]) for i in range(longest) for c in columns]


def count_groups(pairs, n_images, group_size):
    """Groups in an epoch of n_images; refuses what does not divide, and too few prompts."""
    if n_images % group_size:
        fits = max(k for k in range(1, group_size) if n_images % k == 0)
        raise UserError(
            f"{n_images} images an epoch (processes x --batch_size x --batches) do not split into groups of "
            f"{group_size}: try --group_size {fits}"
        )
    distinct = len({prompt for prompt, _ in pairs})
    if distinct < n_images // group_size:
        raise UserError(
            f"an epoch needs {n_images // group_size} distinct prompts, the file has {distinct}: lower --batches or "
            "--batch_size"
        )
    return n_images // group_size


def pick_prompts(pairs, n, g):
    """n (prompt, metadata) pairs with distinct texts, in random order."""
    picked = {}
    for i in torch.randperm(len(pairs), generator=g).tolist():
        picked.setdefault(pairs[i][0], pairs[i])
    return list(picked.values())[:n]


def check_prompts(pairs, columns, reward_dir=None, files=None):
    """Raise a UserError if a prompt lacks what a scorer will need. files: the scorers' `Weights`, if there are some."""
    need = {SCORERS[find_scorer(name)] for name in columns}
    classes, colors = (shapes.SHAPES, shapes.COLORS) if is_classroom(reward_dir) else (COCO, COLORS)
    for number, (prompt, metadata) in enumerate(pairs, 1):
        if GenEval in need and (wrong := geneval_fault(metadata, classes, colors)):
            raise UserError(f"prompt {number} ({prompt!r}) {wrong}")
        if GenEval2 in need and (wrong := geneval2_fault(metadata.get("vqa_list"))):
            raise UserError(f"prompt {number} ({prompt!r}) {wrong}")
        if OCR in need:
            files, target = files or Weights(reward_dir), plain_letters("".join(quoted_texts(prompt)))
            for c in filter(str.isalnum, target):
                if c not in files.characters and c.upper() not in files.characters:
                    raise UserError(f"prompt {number} ({prompt!r}): ocr's reader does not know the letter {c!r}")


def geneval2_fault(questions):
    """What is wrong with the "vqa_list" of one prompt, [[question, answer], ...], or None."""
    if not isinstance(questions, list) or not questions:
        return 'has no "vqa_list", which geneval2 needs: take geneval2_data.jsonl of facebookresearch/GenEval2'
    for pair in questions:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            return f'has {pair} in its "vqa_list": write [question, answer]'
        if pair[0].startswith("How many") and pair[1].lower() not in NUMBERS:
            return f"has the answer {pair[1]!r} to {pair[0]!r}: write the number as a word, {', '.join(NUMBERS)}"
    return None


def geneval_fault(metadata, classes, colors):
    """What is wrong with the metadata of one prompt, or None. The judge would score an unknown name low in silence."""
    include, exclude = metadata.get("include"), metadata.get("exclude", [])
    if "tag" not in metadata or not isinstance(include, list) or not include or not isinstance(exclude, list):
        return 'has no "tag" and "include", which geneval needs: take a GenEval .jsonl, or another reward than geneval'
    known = [("tag", metadata["tag"], TASKS)]
    for i, need in enumerate([*include, *exclude]):
        if not isinstance(need, dict) or type(need.get("count")) is not int or need["count"] < 1:
            return f'asks for {need}: every entry of "include" and "exclude" needs a "count", a whole number above 0'
        known.append(("class", need.get("class"), classes))
        if "color" in need:
            known.append(("color", need["color"], colors))
        if "position" in need:
            where, earlier = need["position"], range(min(i, len(include)))
            pair = isinstance(where, list | tuple) and len(where) == 2
            if not pair or type(where[1]) is not int or where[1] not in earlier:
                return f'has the position {where}: write [relation, number of an earlier entry of "include"], from 0'
            known.append(("relation", where[0], RELATIONS))
    for what, name, allowed in known:
        if name not in list(allowed):
            return f"has the {what} {name!r}, which geneval's judge does not know; allowed: {', '.join(allowed)}"
    return None
