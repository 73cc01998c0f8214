"""Numbers that were wrong without a word: turned pictures, letters of another form, errors of nothing, sheets."""

import json
import unicodedata

import numpy as np
import pytest
import torch
from PIL import Image

import acdmd
import models
import rewards
import sample


def scorers():
    return rewards.load_scorers({"clipscore": 1.0}, "cpu", models.CLASSROOM)


@pytest.mark.parametrize("tag", range(1, 9))
def test_a_picture_counts_as_a_viewer_shows_it(tag, tmp_path):
    pixels = torch.rand(1, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    upright = Image.fromarray(rewards.eight_bits(pixels)[0])
    turns = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90"}
    turns |= {7: "TRANSVERSE", 8: "ROTATE_270"}  # what undoes the tag's turn
    stored = upright.transpose(Image.Transpose[turns[tag]]) if tag in turns else upright
    exif = Image.Exif()
    exif[0x0112] = tag
    stored.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(rewards.eight_bits(rewards.read_picture(tmp_path / "a.png")), rewards.eight_bits(pixels))


def test_a_folder_of_turned_pictures_is_at_no_distance_from_the_upright_ones(tmp_path):
    judge, exif = scorers(), Image.Exif()
    exif[0x0112] = 6
    for name in ("upright", "turned"):
        (tmp_path / name).mkdir()
    for i in range(3):
        picture = Image.fromarray((np.indices((48, 32)).sum(0)[..., None] * [i, 1, 2]).astype(np.uint8))
        picture.save(tmp_path / f"upright/{i}.png")
        picture.transpose(Image.Transpose.ROTATE_90).save(tmp_path / f"turned/{i}.png", exif=exif)
    a, b = (judge.features_of_folder(tmp_path / name) for name in ("upright", "turned"))
    assert np.array_equal(a, b)


def test_what_is_no_picture_of_8_bits_is_named(tmp_path):
    (tmp_path / "a.png").write_text("none")
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(tmp_path / "b.png")
    for name, said in (("a", "cannot identify"), ("b", "save it with 8 bits a channel")):
        with pytest.raises(models.UserError, match=f"{name}.png cannot be read as a picture: .*{said}"):
            rewards.read_picture(tmp_path / f"{name}.png")


TEXTS = ("café", "Ünïcödé", "한국어", "ﬁne", "１２３", "STRASSE")


@pytest.mark.parametrize("form", ("NFC", "NFD", "NFKC", "NFKD"))
@pytest.mark.parametrize("text", TEXTS)
def test_a_right_reading_is_right_in_every_normal_form(text, form):
    written = unicodedata.normalize(form, text)
    for prompt, read in ((written, text), (text, written), (written.upper(), text.lower())):
        assert rewards.ocr_accuracy([(read, 0.9)], f'a sign that says "{prompt}"') == 1
    assert rewards.ocr_accuracy([("cafe", 0.9)], 'a sign that says "café"') == 0.75


@pytest.mark.parametrize("text, letter", (("МИР", "м"), ("peace МИР", "м"), ("café", "é"), ("OPEN 24/7!", None)))
def test_a_text_that_the_reader_has_no_letters_for_is_refused(text, letter, tmp_path):
    (tmp_path / "ocr_rec").mkdir()
    characters = ["blank", *"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"]
    (tmp_path / "ocr_rec/preprocessor_config.json").write_text(json.dumps({"character_list": characters}))
    pairs = [(f'a sign that says "{text}"', {})]
    if letter is None:
        return rewards.check_prompts(pairs, ["ocr"], tmp_path)
    with pytest.raises(models.UserError, match=f"prompt 1 .*ocr's reader does not know the letter '{letter}'"):
        rewards.check_prompts(pairs, ["ocr"], tmp_path)


def test_one_prompt_has_no_error(tmp_path, capsys):
    flags = ["--prompt", "a circle", "--per_prompt", "3", "--eval", "clipscore", "--device", "cpu"]
    sample.main(sample.parse_args([*flags, "--out", str(tmp_path / "out")]))
    row = json.loads((tmp_path / "out/metadata.json").read_text())["rewards"]["clipscore"]
    assert row["error"] is None and (row["n"], row["prompts"]) == (3, 1)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("clipscore "))
    assert line.split()[-1] == "–"


@pytest.mark.parametrize("prompts", (["a circle"] * 4, ["a circle", "a cross"] * 3, ["a circle", "a cross"]))
def test_errors_of_training_are_over_prompts_as_sample_pys(prompts, tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(prompts))
    args = acdmd.parse_args(f"--eval_every 1 --eval_rewards clipscore --eval_prompts {tmp_path}/a.txt".split())
    held, values = rewards.HeldOut(args, "cpu"), np.random.default_rng(0).normal(size=len(prompts))
    summary = held.summary({i: ({"clipscore": value}, None) for i, value in enumerate(values)})
    entries = [{"prompt": p, "scores": {"clipscore": v}} for p, v in zip(prompts, values, strict=True)]
    want = sample.summarize(entries, {"clipscore": 1.0})["rewards"]["clipscore"]
    assert summary["eval/clipscore"] == pytest.approx(want["mean"])
    assert ("eval/clipscore_error" in summary) == (want["error"] is not None) == (len(set(prompts)) > 1)
    if len(set(prompts)) > 1:
        assert summary["eval/clipscore_error"] == pytest.approx(want["error"])


@pytest.mark.parametrize("name", ("a.csv", "a.tsv"))
@pytest.mark.parametrize("mark", ",;\t|")
@pytest.mark.parametrize("first", ("Prompt{}Category", '"category"{}"prompt"'))
def test_sheets_are_read_whatever_divides_their_columns(name, mark, first, tmp_path):
    row = "a cat{}animals" if first.startswith("P") else 'animals{}"a cat"'
    (tmp_path / name).write_text(f"{first}\r\n{row}\r\n".format(mark, mark))
    ((prompt, metadata),) = rewards.read_prompts(tmp_path / name)
    assert prompt == "a cat" and metadata.get("Category", metadata.get("category")) == "animals"
