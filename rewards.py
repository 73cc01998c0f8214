"""Rewards: scorers with one signature, prompt files, and GenEval's decision rules.

A scorer maps (images [B, 3, H, W] in [0, 1], prompts, metadata) to columns {name: [B] float32}. The trainers
and sample.py ask for columns with weights, `--rewards clipscore=1,geneval=1`, and get a `Scorers`: each model once.

Reported scores, and the rewards of the policy gradient, see pictures rounded to 8 bits as a file would hold them. The
differentiable path does not round.
"""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import models
from models import UserError

# ---------------------------------------------------------------------------------------------------------------
# scorers


class CLIPScore:
    """Cosine of a CLIP model's image and text embeddings; differentiable in the images.

    Weights: reward_dir/clip, else openai/clip-vit-large-patch14 (any CLIPModel folder works). Preprocessing:
    shortest side to the model's size, bilinear with antialias, centre crop, CLIP mean and std. Range .28 to .32 with
    the published model, up to 1 with the classroom's.
    """

    columns = ("clipscore",)
    differentiable = True

    def __init__(self, device, reward_dir=None):
        models.quiet_libraries()
        from transformers import CLIPModel, CLIPTokenizer

        local = Path(reward_dir) / "clip" if reward_dir else None
        source = str(local) if local and local.is_dir() else "openai/clip-vit-large-patch14"
        self.model = CLIPModel.from_pretrained(source, dtype=torch.float32).eval().requires_grad_(False).to(device)
        self.tokenizer = CLIPTokenizer.from_pretrained(source)
        self.size = self.model.config.vision_config.image_size
        self.mean = torch.tensor((0.48145466, 0.4578275, 0.40821073), device=device).view(3, 1, 1)
        self.std = torch.tensor((0.26862954, 0.26130258, 0.27577711), device=device).view(3, 1, 1)
        self.text_embeds = {}  # prompt -> [D]; the text side needs no gradient and prompts come back

    def __call__(self, images, prompts, metadata=None):
        h, w = images.shape[-2:]
        scale = self.size / min(h, w)
        if scale != 1:
            shape = (max(self.size, round(h * scale)), max(self.size, round(w * scale)))
            images = F.interpolate(images, shape, mode="bilinear", antialias=True)
        top, left = (images.shape[-2] - self.size) // 2, (images.shape[-1] - self.size) // 2
        images = images[..., top : top + self.size, left : left + self.size]
        embeds = self.model.get_image_features((images - self.mean) / self.std).pooler_output
        return {"clipscore": F.cosine_similarity(embeds, self.embed_text(prompts), dim=-1)}

    @torch.no_grad()
    def embed_text(self, prompts):
        new = [p for p in dict.fromkeys(prompts) if p not in self.text_embeds]
        if new:
            tokens = self.tokenizer(new, padding="max_length", truncation=True, return_tensors="pt")
            embeds = self.model.get_text_features(tokens.input_ids.to(self.mean.device)).pooler_output
            self.text_embeds |= dict(zip(new, embeds, strict=True))
        return torch.stack([self.text_embeds[p] for p in prompts])


class GenEval:
    """Does the picture hold the objects, counts, colours and positions of its metadata? Not differentiable.

    Columns: `geneval`, the graded reward, and `geneval_strict`, 1 where every requirement holds exactly. The detector
    is a function from uint8 images [B, H, W, 3] to lists of {"class", "box", "score", "color"}; here the classroom's.
    """

    columns = ("geneval", "geneval_strict")
    differentiable = False

    def __init__(self, device, reward_dir=None):
        if reward_dir is None or Path(reward_dir).resolve() != models.CLASSROOM:
            raise UserError(f"geneval has the classroom's detector only: use --reward_dir classroom, not {reward_dir}")
        from classroom.shapes import detect

        self.detect = detect

    def __call__(self, images, prompts, metadata=None):
        if metadata is None or any("include" not in (m or {}) for m in metadata):
            raise UserError(
                'geneval needs metadata with "tag" and "include" for every prompt: use a GenEval .jsonl file'
            )
        pixels = (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        checks = [geneval_check(d, m) for d, m in zip(self.detect(pixels), metadata, strict=True)]
        return {
            "geneval": torch.tensor([c["graded"] for c in checks], dtype=torch.float32),
            "geneval_strict": torch.tensor([float(c["strict"]) for c in checks]),
        }


SCORERS = {column: scorer for scorer in (CLIPScore, GenEval) for column in scorer.columns}


class Scorers:
    """The scorers behind {column: weight}; a model that serves two columns is loaded and run once."""

    def __init__(self, weights, device, reward_dir=None):
        self.weights, self.device = dict(weights), device
        self.scorers = [cls(device, reward_dir) for cls in dict.fromkeys(SCORERS[name] for name in weights)]

    @torch.no_grad()
    def score(self, images, prompts, metadata=None):
        """{column: [B] float32 on the CPU}. images: [B, 3, H, W] in [0, 1], rounded here to 8 bits."""
        images = (images.to(self.device, torch.float32) * 255).round().clamp(0, 255) / 255
        rows = {}
        with torch.autocast(torch.device(self.device).type, enabled=False):  # cosines need more than bf16
            for scorer in self.scorers:
                rows |= {name: r.float().cpu() for name, r in scorer(images, prompts, metadata).items()}
        for name in self.weights:
            if not torch.isfinite(rows[name]).all():
                raise UserError(f"{name} returned a score that is not finite")
        return {name: rows[name] for name in self.weights}

    def differentiable(self, images, prompts):
        """Weighted sum of the differentiable columns, [B], with gradient to the images; 0 if there is none."""
        total = images.new_zeros(len(images))
        with torch.autocast(torch.device(self.device).type, enabled=False):
            for scorer in self.scorers:
                if scorer.differentiable:
                    rows = scorer(images, prompts)
                    total = total + sum(self.weights[name] * rows[name] for name in rows if name in self.weights)
        return total


def load_scorers(weights, device="cpu", reward_dir=None):
    """Scorers for {column: weight}; reward_dir holds weights that are not taken from the hub."""
    unknown = [name for name in weights if name not in SCORERS]
    if unknown:
        raise UserError(f"unknown reward {unknown[0]!r}; allowed: {', '.join(SCORERS)}")
    return Scorers(weights, device, reward_dir)


def parse_weights(text):
    """ "clipscore=1,geneval=0.5" -> {"clipscore": 1.0, "geneval": 0.5}; a name alone has weight 1."""
    weights = {}
    for item in text.split(","):
        name, _, weight = item.strip().partition("=")
        if name not in SCORERS:
            raise UserError(f"unknown reward {name!r}; allowed: {', '.join(SCORERS)}")
        try:
            weights[name] = float(weight or 1)
        except ValueError:
            raise UserError(f"weight {weight!r} of reward {name} is no number: write {name}=1") from None
    if sum(weights.values()) <= 0:
        raise UserError(f"the reward weights of {text!r} add up to {sum(weights.values())}: it must be above 0")
    return weights


# ---------------------------------------------------------------------------------------------------------------
# prompts


def read_prompts(path):
    """[(prompt, metadata)] from .txt (a prompt a line), .jsonl or .json ("prompt" or "text"; the rest is metadata)."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"prompt file {path} does not exist")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompt file {path} cannot be read as UTF-8 text: {error}") from None
    if path.suffix == ".txt":
        rows = [{"prompt": line.strip()} for line in text.splitlines() if line.strip()]
    elif path.suffix == ".jsonl":
        rows = []
        for number, line in enumerate(text.splitlines(), 1):
            try:
                rows += [json.loads(line)] if line.strip() else []
            except json.JSONDecodeError as error:
                raise UserError(f"{path} line {number} is not JSON: {error}") from None
    elif path.suffix == ".json":
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{path} is not JSON: {error}") from None
    else:
        raise UserError(f"prompt file {path}: unknown ending {path.suffix!r}; allowed: .txt, .jsonl, .json")
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path} holds no prompts")
    pairs = []
    for number, row in enumerate(rows, 1):
        row = {"prompt": row} if isinstance(row, str) else row
        prompt = row.get("prompt", row.get("text")) if isinstance(row, dict) else None
        if not isinstance(prompt, str):
            raise UserError(f'{path}, entry {number}: no "prompt" or "text" that is a string')
        pairs.append((prompt, row))
    return pairs


def classroom_prompts(**repeat):
    """[(prompt, metadata)] of the classroom's training captions, task types interleaved; repeat: {task: how often}."""
    from classroom.shapes import TASKS, captions

    columns = [captions(task, "train") for task in TASKS for _ in range(repeat.get(task, 1))]
    longest = max(len(c) for c in columns)
    return [(c[i % len(c)]["prompt"], c[i % len(c)]) for i in range(longest) for c in columns]


def check_prompts(pairs, columns):
    """Raise a ValueError if a prompt lacks what a scorer will need."""
    for number, (prompt, metadata) in enumerate(pairs, 1):
        if any(name.startswith("geneval") for name in columns) and not {"tag", "include"} <= set(metadata):
            raise UserError(
                f'prompt {number} ({prompt!r}) has no "tag" and "include", which geneval needs: take a GenEval .jsonl'
            )


# ---------------------------------------------------------------------------------------------------------------
# GenEval's rules


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

    terms, strict, exact_groups = [], True, []
    correct, top_groups = True, []
    for need in metadata["include"]:
        count, objects = need["count"], found.get(need["class"], [])
        # the graded rule looks at all objects of the class, the benchmark's at the `count` most confident ones
        terms.append(1 - abs(count - len(objects)) / count)
        exact = len(objects) == count
        if not exact and ("color" in need or "position" in need):
            terms.append(0.0)
        if exact and "color" in need:
            n_color = sum(d.get("color") == need["color"] for d in objects)
            terms.append(1 - abs(count - n_color) / count)
            exact = n_color == count
        if exact and "position" in need:
            exact = _related(objects, exact_groups, need["position"])
            target_found = exact_groups[need["position"][1]] is not None
            terms += [1.0] if exact else [0.0, 1.0] if target_found else [0.0]
        exact_groups.append(objects if exact else None)
        strict &= exact

        top = objects[:count]
        matched = len(top) == count
        if matched and "color" in need:
            matched = all(d.get("color") == need["color"] for d in top)
        if matched and "position" in need:
            matched = _related(top, top_groups, need["position"])
        top_groups.append(top if matched else None)
        correct &= matched
    for no in metadata.get("exclude", []):
        correct &= len(found.get(no["class"], [])) < no["count"]
    return {"graded": sum(terms) / len(terms), "strict": bool(strict), "correct": bool(correct)}


def _related(objects, groups, position):
    """True if every object stands in the relation to every object of the target group."""
    relation, target = position
    if groups[target] is None:
        return False
    return all(relation in relative_position(o["box"], t["box"]) for o in objects for t in groups[target])
