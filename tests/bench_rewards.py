"""Speed and memory of the nine scorers at published size, with random weights: images/s, with gradient too, and GB.

    python tests/bench_rewards.py                                       all nine, on a GPU; nothing is downloaded
    python tests/bench_rewards.py --rewards clipscore,ocr --batch_size 2 --device cpu

The scorers are those of rewards.py. Only the files are made up: networks of the published configs with random weights,
and tokenizers that cut a text into words. Random weights find no object and no line of text: for geneval and ocr this
is the time of their detectors, without colours and reading. geneval2 answers five questions a picture. CLIP's texts are
encoded in the warm-up alone, as in training where prompts come back.
"""

import argparse
import json
import re
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from transformers import BatchEncoding

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import models  # noqa: E402
import rewards  # noqa: E402


def clip_config():
    """CLIP L/14."""
    vision = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14)
    text = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    return transformers.CLIPConfig(projection_dim=768, vision_config=vision, text_config=text)


def qwen2vl_config():
    """Qwen2-VL 7B with HPSv3's vocabulary."""
    rope = dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24])
    text = dict(hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4)
    text |= dict(intermediate_size=18944, vocab_size=151658, rope_parameters=rope)
    vision = dict(depth=32, embed_dim=1280, num_heads=16, mlp_ratio=4, patch_size=14, hidden_size=3584)
    return transformers.Qwen2VLConfig(text_config=text, vision_config=vision)


def qwen3vl_config():
    """Qwen3-VL 8B."""
    text = dict(hidden_size=4096, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128)
    text |= dict(intermediate_size=12288, vocab_size=151936)
    vision = dict(depth=27, hidden_size=1152, num_heads=16, patch_size=16, out_hidden_size=4096)
    vision |= dict(intermediate_size=4304, deepstack_visual_indexes=[8, 16, 24])
    return transformers.Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)


def mask2former_config():
    """Mask2Former on Swin-S, COCO's 80 classes."""
    swin = transformers.SwinConfig(embed_dim=96, depths=[2, 2, 18, 2], num_heads=[3, 6, 12, 24], window_size=7)
    swin.out_features = ["stage1", "stage2", "stage3", "stage4"]
    return transformers.Mask2FormerConfig(backbone_config=swin, num_labels=80)


def ocr_rec_config():
    """PP-OCRv5 mobile's reader: strides for lines of 48 pixels, where the class's defaults are the detector's."""
    blocks = [
        [[3, 16, 32, 1, False]],
        [[3, 32, 64, 1, False], [3, 64, 64, 1, False]],
        [[3, 64, 128, [2, 1], False], [3, 128, 128, 1, False]],
        [[3, 128, 256, [1, 2], False], *[[5, 256, 256, 1, False]] * 4],
        [[5, 256, 512, [2, 1], True], [5, 512, 512, 1, True], [5, 512, 512, [2, 1], False], [5, 512, 512, 1, False]],
    ]
    backbone = dict(model_type="pp_lcnet_v3", scale=0.95, divisor=16, block_configs=blocks, out_features=["stage5"])
    return transformers.PPOCRV5MobileRecConfig(backbone_config=backbone)


CONFIGS = {  # folder in rewards.SOURCES -> its published config, as a function
    "clip": clip_config,
    "pickscore": lambda: transformers.CLIPConfig(**rewards.HPSv2.CONFIG),
    "qwen2vl": qwen2vl_config,
    "qwen3vl": qwen3vl_config,
    "mask2former": mask2former_config,
    "ocr_det": transformers.PPOCRV5MobileDetConfig,
    "ocr_rec": ocr_rec_config,
}


class Words:
    """In place of a tokenizer: a token a word or mark; Qwen-VL's image token and <|Reward|> keep their numbers."""

    def __init__(self, size, special=()):
        self.size, self.special = size, dict(special)

    def __call__(self, text, add_special_tokens=True, max_length=None, **_):
        if not isinstance(text, str):
            rows = [self(t).input_ids for t in text]
        else:
            words = re.findall(r"<\|\w+\|>| ?\w+|[^\w\s]|\s+", text)
            rows = [self.special.get(word, 1 + sum(map(ord, word)) % (self.size // 2)) for word in words]
        if max_length:  # CLIP and BLIP: all rows of one length
            rows = torch.tensor([(row + [0] * max_length)[:max_length] for row in rows])
            return BatchEncoding({"input_ids": rows, "attention_mask": torch.ones_like(rows)})
        return BatchEncoding({"input_ids": rows})

    def add_special_tokens(self, _):
        self.special["<|Reward|>"] = self.size - 1

    def convert_tokens_to_ids(self, token):
        return self.special[token]


class RandomWeights(rewards.Weights):
    """rewards.Weights without files."""

    device = "cpu"  # where the networks are made

    def __init__(self, reward_dir=None):
        super().__init__(reward_dir)
        self.folder = tempfile.TemporaryDirectory()

    def open(self, cls, folder, size=None):
        if size:
            return Words(size)
        config = CONFIGS[folder]()
        if cls is not transformers.AutoTokenizer:
            return config
        return Words(config.text_config.vocab_size, {"<|image_pad|>": config.image_token_id})

    def file(self, folder, name):
        file = Path(self.folder.name) / name
        file.write_text(json.dumps({"character_list": [*"_OPEN"] + ["a"] * (CONFIGS[folder]().head_out_channels - 5)}))
        return file

    def state(self, folder, name):
        """What the scorers take out of a file themselves: their heads."""
        if folder == "hpsv3":
            config = CONFIGS["qwen2vl"]().text_config
            rows = {"model.embed_tokens.weight": torch.empty(config.vocab_size, 0)}
            return rows | head("rm_head.", (0, 3, 5), (config.hidden_size, 1024, 16, 2))
        first = {"aesthetic": CONFIGS["clip"]().projection_dim, "imagereward": rewards.ImageReward.TEXT["hidden_size"]}
        prefix = {"aesthetic": "layers.", "imagereward": "mlp.layers."}
        widths = (first.get(folder), 1024, 128, 64, 16, 1)
        return head(prefix[folder], (0, 2, 4, 6, 7), widths) if folder in first else {}

    def model(self, cls, folder, config=None, state=None, dtype=torch.float32, **options):
        config = config or CONFIGS[folder]()
        with torch.device(self.device):
            return cls._from_config(config, dtype=dtype, **options).eval().requires_grad_(False)


def head(prefix, indices, widths):
    """A state dict of linear layers `prefix{i}` from widths[0] numbers to widths[-1]."""
    state = {}
    for i, rows, columns in zip(indices, widths[1:], widths, strict=False):
        state |= {f"{prefix}{i}.weight": 0.02 * torch.randn(rows, columns), f"{prefix}{i}.bias": torch.zeros(rows)}
    return state


def measure(scorers, images, prompts, metadata, gradient, repeat):
    """(images a second after one call to warm up, peak GB with the weights or None on a CPU)."""
    cuda = images.device.type == "cuda"
    wait = torch.cuda.synchronize if cuda else lambda: None

    def call():
        if not gradient:
            return scorers.score(images, prompts, metadata)
        scorers.differentiable(images, prompts)

    call()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    wait()
    start = time.perf_counter()
    for _ in range(repeat):
        call()
    wait()
    pace = repeat * len(images) / (time.perf_counter() - start)
    return pace, torch.cuda.max_memory_allocated() / 1e9 if cuda else None


def main(args):
    _, _, device = models.setup_distributed(args.device)
    rewards.Weights, RandomWeights.device = RandomWeights, device
    size = args.resolution
    images = torch.rand(args.batch_size, 3, size, size, generator=models.seeded(0)).to(device)
    prompts = [f'a photo of {n} dogs by a sign that says "OPEN"' for n in range(args.batch_size)]
    things = ("dog", "sign", "sky", "cat")
    questions = [["How many dogs are there?", "two"], *([f"Is the {thing} red?", "Yes"] for thing in things)]
    needs = {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}], "vqa_list": questions}
    print(f"{torch.cuda.get_device_name(device) if device.type == 'cuda' else 'CPU'}, torch {torch.__version__}")
    print(f"{args.batch_size} pictures of {size} x {size}, no file of weights")
    print(f"{'':27}{'scoring':>19}{'with gradient':>19}")
    print(f"{'reward':14}{'M parameters':>13}{'images/s':>10}{'peak GB':>9}{'images/s':>10}{'peak GB':>9}")
    for name in args.rewards.split(","):
        scorers = rewards.load_scorers({name: 1.0}, device)
        total = sum(p.numel() for module in scorers.scorers for p in module.parameters())
        row = dict(reward=name, parameters=total, batch=args.batch_size, resolution=size)
        cells = f"{name:14}{total / 1e6:13.1f}"
        for gradient, end in ((False, ""), (True, "_gradient")):
            pace, peak = None, None
            if scorers.scorers[0].differentiable or not gradient:
                pace, peak = measure(scorers, images, prompts, [needs] * len(prompts), gradient, args.repeat)
            row |= {f"images_per_s{end}": pace, f"peak_gb{end}": peak}
            cells += "".join(f"{'-' if v is None else f'{v:.2f}':>{width}}" for v, width in ((pace, 10), (peak, 9)))
        print(cells, flush=True)
        if args.out:
            with args.out.open("a") as file:
                print(json.dumps(row), file=file)
        del scorers  # before the next one loads


if __name__ == "__main__":
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__.splitlines()[0], allow_abbrev=False)
    everything = ",".join(dict.fromkeys(scorer.columns[0] for scorer in rewards.SCORERS.values()))
    parser.add_argument("--rewards", default=everything, help="default: all nine")
    parser.add_argument("--batch_size", type=models.at_least(1), default=8, help="pictures")
    parser.add_argument("--resolution", type=models.at_least(1), default=1024, help="pixels a side")
    parser.add_argument("--repeat", type=models.at_least(1), default=5, help="timed calls")
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=models.path, help=".jsonl to append the rows to")
    models.run(main, parser.parse_args())
