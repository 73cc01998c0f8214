"""--teacher_lora: an adapter frozen under teacher, generator and fake score, in both stages and in sample.py."""

import json
import shutil

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

import acdmd
import models
import rtdmd
import sample

ONE = "--steps 2 --fake_update_ratio 1 --rank 2 --batch_size 2 --save_every 1 --sample_every 0 --eval_every 0".split()
TWO = (
    "--epochs 1 --batches 1 --batch_size 4 --group_size 2 --sample_every 0 --eval_every 0 --rewards clipscore=1".split()
)


def styled(folder, *names, std=0.2):
    """Strong random adapters in folder/name."""
    backbone = models.load("classroom")
    for name in names:
        for p in models.add_adapter(backbone.transformer, name, 2, generator=models.seeded(name)):
            p.data += std * torch.randn(p.shape, generator=models.seeded(name, tuple(p.shape)))
        models.save_adapter(backbone.transformer, name, folder / name)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """style and other, two adapters; plain and under, stage 1 without and with style; two, stage 2 on under."""
    out = tmp_path_factory.mktemp("runs")
    styled(out, "style", "other")
    acdmd.main(acdmd.parse_args([*ONE, "--out", str(out / "plain")]))
    below = ["--teacher_lora", str(out / "style")]
    acdmd.main(acdmd.parse_args([*ONE, *below, "--out", str(out / "under")]))
    flags = [*TWO, "--distilled", str(out / "under/final"), "--out", str(out / "two")]
    rtdmd.main(rtdmd.parse_args([*flags, *below]))
    return out


def logged(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_every_role_stands_on_it(runs):
    backbone = models.load("classroom")
    x, cond = torch.randn(2, *backbone.latent_shape, generator=models.seeded("x")), backbone.encode(["a circle"] * 2)
    with torch.no_grad():
        plain = backbone.velocity("teacher", x, 0.5, cond)
        models.put_below(backbone, [runs / "style", runs / "other"])
        under = [backbone.velocity(role, x, 0.5, cond, 2.0) for role in ("teacher", "generator", "fake")]
        stacked = models.load("classroom")
        for name in ("style", "other"):
            models.load_adapter(stacked.transformer, name, runs / name)
        stacked.roles["teacher"] = ("style", "other")
        want = stacked.velocity("teacher", x, 0.5, cond, 2.0)
    assert len(backbone.below) == 2 and (plain - want).abs().max() > 0.1
    for v in under:
        torch.testing.assert_close(v, want, rtol=1e-4, atol=1e-4)
    assert not any(
        p.requires_grad for name in backbone.below for p in models.adapter_parameters(backbone.transformer, name)
    )


def test_the_student_of_a_styled_teacher_is_another(runs):
    plain, under = (models.read_adapter(runs / name / "final/generator")[0] for name in ("plain", "under"))
    assert any((plain[path][1] - under[path][1]).abs().max() > 1e-4 for path in plain)
    first = [logged(runs / name)[0] for name in ("plain", "under")]
    assert all(first[0][key] != first[1][key] for key in first[0] if key.startswith("loss/"))  # the fake score's too
    assert logged(runs / "two")[0]["grad_norm/generator"] > 0


def test_it_is_kept_and_told_at_a_resume(runs, tmp_path, capsys):
    shutil.copytree(runs / "under/step_000001", tmp_path / "a/step_000001")
    again = ["--resume", str(tmp_path / "a/step_000001")]
    with pytest.raises(models.UserError, match=r"--teacher_lora \S+other: not the adapters that this run began with"):
        acdmd.main(acdmd.parse_args([*again, "--teacher_lora", str(runs / "other")]))
    capsys.readouterr()
    acdmd.main(acdmd.parse_args([*again, "--teacher_lora", str(runs / "style")]))  # said again: the same, not twice
    assert f"frozen under all roles: {runs / 'style'}" in capsys.readouterr().out
    assert logged(tmp_path / "a")[0]["loss/cons"] == logged(runs / "under")[1]["loss/cons"]
    acdmd.main(acdmd.parse_args([*again[:1], str(tmp_path / "a")]))  # left out: as it was
    shutil.copytree(runs / "plain/step_000001", tmp_path / "b/step_000001")
    with pytest.raises(models.UserError, match="not the adapters that this run began with"):
        acdmd.main(
            acdmd.parse_args(["--resume", str(tmp_path / "b/step_000001"), "--teacher_lora", str(runs / "style")])
        )


def test_adapters_trained_over_it_are_not_taken_without(runs, tmp_path):
    said = rf"was trained over other adapters than are given: add --teacher_lora {runs / 'style'}"
    with pytest.raises(models.UserError, match=said):
        rtdmd.main(rtdmd.parse_args([*TWO, "--distilled", str(runs / "under/final"), "--out", str(tmp_path / "two")]))
    with pytest.raises(models.UserError, match=said):
        lora = ["--lora", str(runs / "under/final/generator_ema")]
        sample.main(sample.parse_args([*lora, "--prompt", "a circle", "--out", str(tmp_path / "s")]))


def test_sample_and_export_stack_it(runs, tmp_path):
    below = ["--teacher_lora", str(runs / "style")]
    lora = ["--lora", str(runs / "under/final/generator"), "--lora", str(runs / "two/final/rl")]
    sample.main(sample.parse_args([*below, *lora, "--export_lora", str(tmp_path / "one.safetensors")]))
    StableDiffusion3Pipeline.from_pretrained(models.CLASSROOM / "teacher").save_pretrained(tmp_path / "float32")
    base = ["--weights", str(tmp_path / "float32")]  # an export has its files' dtype, and the committed ones' rounds
    sample.main(sample.parse_args([*base, *below, *lora, "--export", str(tmp_path / "merged")]))
    one = ["--lora", str(tmp_path / "one.safetensors")]
    sample.main(sample.parse_args([*base, *one, "--export", str(tmp_path / "as_one")]))
    weights = "diffusion_pytorch_model.safetensors"
    a, b = (models.load_file(tmp_path / name / weights) for name in ("merged", "as_one"))
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-5)
    pictures = {}
    common = ["--prompt", "a circle", "--steps", "3"]
    for name, flags in (("teacher", []), ("styled", below)):
        sample.main(sample.parse_args([*common, *flags, "--out", str(tmp_path / name)]))
        pictures[name] = (tmp_path / name / "grid.png").read_bytes()
        assert json.loads((tmp_path / name / "metadata.json").read_text())["nfe"] == 6
    assert pictures["teacher"] != pictures["styled"]


def test_one_that_does_not_fit_is_refused(runs, tmp_path):
    (path, (A, B)), *_ = models.read_adapter(runs / "style")[0].items()
    for name, layers, said in (
        (
            "layer",
            {"transformer_blocks.0.ff.net.2": (A, B)},
            "transformer_blocks.0.ff.net.2 is no layer of this backbone",
        ),
        ("shape", {path: (A[:, 1:], B)}, "this backbone needs"),
    ):
        models.write_adapter(layers, tmp_path / f"{name}.safetensors")
        flags = [*ONE, "--teacher_lora", str(tmp_path / f"{name}.safetensors"), "--out", str(tmp_path / name)]
        with pytest.raises(models.UserError, match=said) as error:
            acdmd.main(acdmd.parse_args(flags))
        assert "\n" not in str(error.value)
    with pytest.raises(models.UserError, match="no adapter at "):
        acdmd.main(
            acdmd.parse_args([*ONE, "--teacher_lora", str(tmp_path / "none"), "--out", str(tmp_path / "none_out")])
        )
