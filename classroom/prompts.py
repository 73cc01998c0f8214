"""Write GenEval-style training prompts for stage 2 of the published backbones.

    python classroom/prompts.py geneval_train.jsonl --n 50000

The classroom itself needs none: it makes its own captions (shapes.py).
"""

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that `python classroom/prompts.py` finds these
import models  # noqa: E402
import rewards  # noqa: E402


def geneval_prompts(n, seed=0, exclude=()):
    """n prompts with GenEval metadata, the six task types in turn: [{"tag", "include", "prompt", ...}].

    Of COCO's 80 classes, 10 colours, counts 2 to 4 and 4 positions; the small task types repeat. The benchmark's 553
    prompts all begin with "a photo of"; these never do, so none of them is among them. exclude: metadata (such as the
    benchmark's file) whose content, in whatever words and order of objects, must not come either.
    """
    rng = np.random.default_rng(seed)
    content = lambda m: (m["tag"], frozenset(json.dumps(need, sort_keys=True) for need in m["include"]))  # noqa: E731
    taken, rows, tries = {content(m) for m in exclude}, [], 0
    while len(rows) < n:
        m = geneval_prompt(rewards.TASKS[len(rows) % len(rewards.TASKS)], rng)
        if content(m) not in taken:
            rows.append(m)
            tries = 0
        elif (tries := tries + 1) == 10_000:
            raise models.UserError(f"--exclude leaves no {m['tag']} prompt to draw: take a smaller file")
    return rows


def geneval_prompt(tag, rng):
    """One random prompt of a task type as GenEval metadata."""
    pick = lambda values, k: rng.choice(values, k, replace=False).tolist()  # noqa: E731
    names = pick(rewards.COCO, 2 if tag in ("two_object", "position", "color_attr") else 1)
    include = [{"class": name, "count": 1} for name in names]
    if tag == "counting":
        include[0]["count"] = int(rng.integers(2, 5))
    if tag in ("colors", "color_attr"):
        for need, color in zip(include, pick(rewards.COLORS, len(include)), strict=True):
            need["color"] = color
    objects, link = [in_words(need) for need in include], " and "
    if tag == "position":  # the object that the other one stands to comes first
        include[1]["position"] = [*pick(rewards.RELATIONS, 1), 0]
        objects, link = objects[::-1], f" {include[1]['position'][0]} "
    openings = "a picture of", "an image of", "a photograph of", "a snapshot of", "a shot of", "a photograph showing"
    m = {"tag": tag, "include": include, "prompt": f"{pick(openings, 1)[0]} {link.join(objects)}"}
    return m | {"exclude": [include[0] | {"count": include[0]["count"] + 1}]} if tag == "counting" else m


def in_words(need):
    """An entry of "include" as a prompt says it: "a red car", "two pairs of scissors"."""
    count, name = need["count"], f"{need.get('color', '')} {need['class']}".strip()
    if name.endswith(("skis", "scissors")):
        name = f"pair{'s' * (count > 1)} of {name}"
    elif count > 1:
        plurals = {"person": "people", "sheep": "sheep", "knife": "knives", "computer mouse": "computer mice"}
        name = plurals.get(name, name + ("es" if name.endswith(("s", "ch", "sh")) else "s"))
    return f"{rewards.NUMBERS[count] if count > 1 else 'an' if name[0] in 'aeiou' else 'a'} {name}"


def parse_args(argv=None):
    p = models.parser(__doc__.splitlines()[0])
    p.add_argument("file", type=models.path, help="the .jsonl to write")
    p.add_argument("--n", type=models.at_least(1), default=50_000, help="prompts")
    p.add_argument("--exclude", type=models.path, help="GenEval .jsonl whose content must not come, in whatever words")
    args = p.parse_args(argv)
    if args.file.suffix != ".jsonl" or args.file.exists():
        p.error(f"{args.file} {'exists' if args.file.exists() else 'is no .jsonl'}: name a new .jsonl")
    return args


def main(args):
    pairs = rewards.read_prompts(args.exclude) if args.exclude else []
    rewards.check_prompts(pairs, ["geneval"])
    rows = geneval_prompts(args.n, exclude=[metadata for _, metadata in pairs])
    with models.named_failure(f"cannot write {args.file}"):
        args.file.parent.mkdir(parents=True, exist_ok=True)
        args.file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{len(rows)} prompts in {args.file}, for example: {', '.join(row['prompt'] for row in rows[:6])}")


if __name__ == "__main__":
    models.run(main, parse_args())
