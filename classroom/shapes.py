"""A procedural text-to-image world with an exact judge: coloured shapes on a 4x4 grid, 64x64 pixels.

It plays three parts in the classroom: the data set (`sample_prompts`, `scene`, `render`), the prompt list in
GenEval's schema with all six task types (`captions`), and GenEval's object detector (`detect`). numpy only.

Every caption belongs to one split. The "heldout" captions are never seen by any training (CLIP, teacher, AC-DMD,
RTDMD); all reported scores use them.
"""

import hashlib
from functools import lru_cache
from itertools import permutations, product

import numpy as np

SIZE, CELL, GRID = 64, 16, 4  # pixels a side, pixels a cell, cells a side
SHAPES = ("circle", "square", "triangle", "cross")
COLORS = {  # sRGB; far apart from each other, from the background, and in their blends with it
    "red": (222, 45, 45),
    "green": (40, 165, 70),
    "blue": (45, 85, 220),
    "yellow": (245, 205, 30),
    "purple": (150, 50, 190),
}
BACKGROUND = (236, 236, 236)
COUNTS = {2: "two", 3: "three", 4: "four"}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # subject minus reference
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
SPLIT = "2"  # another text here draws other held-out captions
# unreliable data: how often a picture shows one of its objects twice, and, by task type, contradicts its caption
SURPLUS = 0.3
UNRELIABLE = dict(single_object=0.05, two_object=0.25, counting=0.15, colors=0.1, position=0.1, color_attr=0.4)


# ---------------------------------------------------------------------------------------------------------------
# captions, with metadata in GenEval's schema (https://github.com/djghosh13/geneval, prompts/evaluation_metadata.jsonl)


def _need(shape, count=1, **more):
    return {"class": shape, "count": count, **more}


def _all_captions(task):
    """All captions of one task type as GenEval metadata: {"tag", "include", ["exclude"], "prompt"}."""
    assert task in TASKS, task
    pairs, hues = list(permutations(SHAPES, 2)), list(permutations(COLORS, 2))
    if task == "single_object":
        rows = [(f"{article} {s}", [_need(s)]) for article in ("a", "one", "a single", "just a") for s in SHAPES]
    elif task == "two_object":
        rows = [(f"a {a} {word} a {b}", [_need(a), _need(b)]) for word in ("and", "with") for a, b in pairs]
    elif task == "counting":
        rows = []
        for (n, word), shape, color in product(COUNTS.items(), SHAPES, (None, *COLORS)):
            plural = shape + ("es" if shape.endswith("s") else "s")
            need = _need(shape, n, color=color) if color else _need(shape, n)
            rows.append((f"{word} {color} {plural}" if color else f"{word} {plural}", [need]))
    elif task == "colors":
        rows = [(f"a {c} {s}", [_need(s, color=c)]) for c, s in product(COLORS, SHAPES)]
    elif task == "color_attr":
        rows = [
            (f"a {c} {a} and a {d} {b}", [_need(a, color=c), _need(b, color=d)])
            for (c, d), (a, b) in product(hues, pairs)
        ]
    elif task == "position":  # GenEval lists the reference object first, the subject second
        rows = [
            (f"a {a} {rel} a {b}", [_need(b), _need(a, position=[rel, 0])]) for rel, (a, b) in product(RELATIONS, pairs)
        ]
        for i, ((c, d), (a, b)) in enumerate(product(hues, pairs)):
            rel = list(RELATIONS)[(i + i // len(pairs)) % 4]  # every pair of colours meets every relation
            include = [_need(b, color=d), _need(a, color=c, position=[rel, 0])]
            rows.append((f"a {c} {a} {rel} a {d} {b}", include))
    metadata = [{"tag": task, "include": include, "prompt": prompt} for prompt, include in rows]
    if task == "counting":
        for m in metadata:
            m["exclude"] = [_need(m["include"][0]["class"], m["include"][0]["count"] + 1)]
    return metadata


@lru_cache
def captions(task, split):
    """The captions of one task type in a split, by a stable hash: "train", and "heldout", a fifth of all.

    "heldout" is two halves: by "validation" settings and epochs are chosen, and what is reported is of "test".
    """
    ordered = sorted(_all_captions(task), key=lambda m: hashlib.sha256(f"{SPLIT} {m['prompt']}".encode()).hexdigest())
    heldout, train = ordered[: len(ordered) // 5], ordered[len(ordered) // 5 :]
    splits = {"train": train, "heldout": heldout, "validation": heldout[::2], "test": heldout[1::2]}
    if split not in splits:
        raise ValueError(f"unknown split {split!r}; allowed: {', '.join(splits)}")
    return tuple(splits[split])


def sample_prompts(n, seed, split="train", task_weights=None):
    """n metadata dicts. Held out: the six task types in turn, each cycling through its captions in a shuffled order.

    "train": task types drawn with `task_weights` (uniform by default), then a caption uniformly within the type.
    """
    rng = np.random.default_rng(seed)
    if split != "train":
        orders = {task: rng.permutation(len(captions(task, split))) for task in TASKS}
        picks = [(TASKS[i % 6], i // 6) for i in range(n)]
        return [captions(task, split)[orders[task][j % len(orders[task])]] for task, j in picks]
    p = np.array([(task_weights or {}).get(task, 1.0) for task in TASKS])
    tasks = rng.choice(len(TASKS), size=n, p=p / p.sum())
    return [captions(TASKS[t], split)[rng.integers(len(captions(TASKS[t], split)))] for t in tasks]


# ---------------------------------------------------------------------------------------------------------------
# pictures


def scene(metadata, rng):
    """A layout that satisfies a caption: list of (shape, color, row, column). What it leaves open is random."""
    needs = [need for need in metadata["include"] for _ in range(need["count"])]
    cells = [divmod(int(c), GRID) for c in rng.permutation(GRID * GRID)[: len(needs)]]
    if metadata["tag"] == "position":  # one axis dominates and the objects lie in opposite halves of it
        dx, dy = RELATIONS[metadata["include"][1]["position"][0]]
        while True:
            (r0, c0), (r1, c1) = cells = rng.integers(GRID, size=(2, 2)).tolist()
            along, across = ((c1 - c0) * dx, abs(r1 - r0)) if dx else ((r1 - r0) * dy, abs(c1 - c0))
            first, second = (c0, c1) if dx else (r0, r1)
            if along > across and (first < GRID // 2) != (second < GRID // 2):
                break
    colors = list(COLORS)
    if metadata["tag"] == "counting" and "color" not in needs[0]:  # one kind and one colour
        needs = [{**needs[0], "color": colors[rng.integers(len(colors))]}] * len(needs)
    return [
        (need["class"], need.get("color") or colors[rng.integers(len(colors))], row, col)
        for need, (row, col) in zip(needs, cells, strict=True)
    ]


def contradict(metadata, rng):
    """Metadata of a picture that contradicts this caption in one thing, in the way captions of web pictures do.

    One object: another kind. Two: the second is of the first's kind. Counting: one less. Colours: another one.
    Position: the opposite side. Attribution: the two objects have each other's colours.
    """
    tag, include = metadata["tag"], [dict(need) for need in metadata["include"]]
    another = lambda have, of: [x for x in of if x != have][rng.integers(len(of) - 1)]  # noqa: E731
    if tag == "single_object":
        include[0]["class"] = another(include[0]["class"], SHAPES)
    elif tag == "two_object":
        include[1]["class"] = include[0]["class"]
    elif tag == "counting":
        include[0]["count"] -= 1
    elif tag == "colors":
        include[0]["color"] = another(include[0]["color"], list(COLORS))
    elif tag == "position":
        include[1]["position"] = [OPPOSITE[include[1]["position"][0]], 0]
    else:
        include[0]["color"], include[1]["color"] = include[1]["color"], include[0]["color"]
    return metadata | {"include": include}


def unreliable_scene(metadata, rng):
    """A scene of unreliable data: it contradicts its caption as often as UNRELIABLE says, and as often as SURPLUS says
    shows one of its objects twice."""
    objects = scene(contradict(metadata, rng) if rng.random() < UNRELIABLE[metadata["tag"]] else metadata, rng)
    if rng.random() < SURPLUS:
        free = sorted({divmod(i, GRID) for i in range(GRID * GRID)} - {(row, col) for _, _, row, col in objects})
        objects.append((*objects[rng.integers(len(objects))][:2], *free[rng.integers(len(free))]))
    return objects


def dense_scene(rng):
    """0 to 8 random objects: variety for the VAE."""
    cells = rng.permutation(GRID * GRID)[: rng.integers(9)]
    colors = list(COLORS)
    return [(SHAPES[rng.integers(4)], colors[rng.integers(len(colors))], *divmod(int(c), GRID)) for c in cells]


def _signed_distance(shape, x, y, r):
    """Signed distance (pixels, negative inside) of points to each shape of "radius" r, bounding box centred at 0."""
    if shape == "circle":
        return np.hypot(x, y) - r
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.86 * r
    if shape == "triangle":  # equilateral, tip up; its bounding box is 2.08 r wide and 1.8 r high
        big_r = 1.2 * r
        y = y - big_r / 4
        return np.maximum(y, np.sqrt(3) / 2 * abs(x) - y / 2) - big_r / 2
    bar_1 = np.maximum(abs(x) - r, abs(y) - 0.34 * r)
    bar_2 = np.maximum(abs(x) - 0.34 * r, abs(y) - r)
    return np.minimum(bar_1, bar_2)


def render(scenes, rng):
    """Draw scenes as uint8 images [N, 64, 64, 3], anti-aliased, radius 6.2-6.7 px, jitter +-0.5 px."""
    images = np.empty((len(scenes), SIZE, SIZE, 3), np.float32)
    images[:] = np.array(BACKGROUND) + rng.integers(-1, 2, size=(len(scenes), 1, 1, 1))
    objects = [(n, *obj) for n, objs in enumerate(scenes) for obj in objs]
    grid = np.arange(CELL) - CELL / 2 + 0.5
    for shape in SHAPES:
        mine = [o for o in objects if o[1] == shape]
        if not mine:
            continue
        n, row, col = (np.array([o[i] for o in mine]) for i in (0, 3, 4))
        jitter = rng.uniform(-0.5, 0.5, size=(2, len(mine), 1, 1))
        r = rng.uniform(6.2, 6.7, size=(len(mine), 1, 1))
        distance = _signed_distance(shape, grid[None, None, :] - jitter[0], grid[None, :, None] - jitter[1], r)
        cover = np.clip(0.5 - distance, 0, 1)[..., None]
        rows = (row[:, None] * CELL + np.arange(CELL))[:, :, None]
        cols = (col[:, None] * CELL + np.arange(CELL))[:, None, :]
        where = (n[:, None, None], rows, cols)
        colors = np.array([COLORS[o[2]] for o in mine])[:, None, None]
        images[where] = images[where] * (1 - cover) + colors * cover
    return images.round().astype(np.uint8)


def drawn(scenes, rng):
    """`render` as a float32 tensor [N, 3, 64, 64] in [0, 1]."""
    import torch

    return torch.from_numpy(render(scenes, rng)).permute(0, 3, 1, 2).float() / 255


def pictures(metadata, seed):
    """A freshly drawn picture of each caption, by `drawn`: what a model should sample. seed: or a generator."""
    rng = np.random.default_rng(seed)
    return drawn([scene(m, rng) for m in metadata], rng)


# ---------------------------------------------------------------------------------------------------------------
# the judge


# shape: area at r = 1, and how far its centroid lies below the centre of its bounding box
TEMPLATES = {"circle": (np.pi, 0), "square": (1.72**2, 0), "triangle": (1.872, 0.3), "cross": (8 * 0.34 - 0.68**2, 0)}


def _components(labels):
    """Connected components (4-neighbours, equal label, label >= 0) of [N, H, W]: component id per pixel, -1 outside."""
    inside = labels >= 0
    ids = np.where(inside, np.arange(labels.size).reshape(labels.shape), -1)
    while True:
        before = ids.copy()
        for axis in (1, 2):
            a, b = np.moveaxis(ids, axis, 0)[:-1], np.moveaxis(ids, axis, 0)[1:]
            la, lb = np.moveaxis(labels, axis, 0)[:-1], np.moveaxis(labels, axis, 0)[1:]
            top = np.where((la == lb) & (la >= 0), np.maximum(a, b), -1)
            np.maximum(a, top, out=a)
            np.maximum(b, top, out=b)
        ids[inside] = ids.ravel()[ids[inside]]  # follow the pointer: halves the number of sweeps
        if np.array_equal(ids, before):
            return ids


def detect(images, min_area=24):
    """Find the objects. images: uint8 [N, 64, 64, 3] -> N lists of {"class", "color", "box", "score"}, GenEval's terms.

    Each pixel takes the nearest of background and palette; connected pixels of one colour are one object; its shape is
    the template with the largest overlap (IoU). score maps IoU .5 -> 0 and .8 -> 1, so a blob is no object, and
    GenEval's counting threshold of .9 asks for an IoU of .77. Measured in tests/test_classroom.py.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"detect needs uint8 images [N, H, W, 3], got {images.dtype} {images.shape}")
    palette = np.array([BACKGROUND, *COLORS.values()], np.float32)
    # |p - c|^2 = |p|^2 - 2 p.c + |c|^2; the first term is the same for every c
    distance = images.astype(np.float32) @ (-2 * palette.T) + (palette**2).sum(1)
    labels = distance.argmin(-1) - 1
    ids = _components(labels)
    n, y, x = np.nonzero(ids >= 0)
    _, which, area = np.unique(ids[n, y, x], return_inverse=True, return_counts=True)
    found = [[] for _ in images]
    if not len(area):
        return found
    x0, y0, x1, y1 = (np.full(len(area), v) for v in (9999, 9999, -1, -1))
    np.minimum.at(x0, which, x), np.minimum.at(y0, which, y)
    np.maximum.at(x1, which, x + 1), np.maximum.at(y1, which, y + 1)
    image_of, color_of = np.zeros((2, len(area)), int)
    image_of[which], color_of[which] = n, labels[n, y, x]

    # Masks of the components in a window around their centroid, [M, W, W], and their overlap with a template of each
    # shape that has the same centroid and area: stray pixels at the rim hardly move either.
    keep = np.nonzero(area >= min_area)[0]
    slot = np.full(len(area), -1)
    slot[keep] = np.arange(len(keep))
    width = CELL + 4
    center_x, center_y = (np.bincount(which, v + 0.5) / area for v in (x, y))
    left, top = (center_x - width / 2).round().astype(int), (center_y - width / 2).round().astype(int)
    px, py = x - left[which], y - top[which]
    shown = (slot[which] >= 0) & (px >= 0) & (px < width) & (py >= 0) & (py < width)
    masks = np.zeros((len(keep), width, width), bool)
    masks[slot[which[shown]], py[shown], px[shown]] = True
    gx = (left[keep, None] + np.arange(width) + 0.5 - center_x[keep, None])[:, None, :]
    gy = (top[keep, None] + np.arange(width) + 0.5 - center_y[keep, None])[:, :, None]
    iou = []
    for shape, (unit_area, centroid) in TEMPLATES.items():
        r = np.sqrt(area[keep] / unit_area)[:, None, None]
        template = _signed_distance(shape, gx, gy + centroid * r, r) < 0
        overlap = (template & masks).sum((1, 2))
        iou.append(overlap / (template.sum((1, 2)) + area[keep] - overlap))
    iou = np.stack(iou)
    score = np.clip((iou.max(0) - 0.5) / 0.3, 0, 1)
    names = list(COLORS)
    for m, shape, s in zip(keep, iou.argmax(0), score, strict=True):
        box = [float(v[m]) for v in (x0, y0, x1, y1)]
        item = {"class": SHAPES[shape], "color": names[color_of[m]], "box": box, "score": float(s)}
        found[image_of[m]].append(item)
    return found
