"""sample.py: how many pictures of what, which sampler, and what the table says."""

import json
import resource
from contextlib import contextmanager

import numpy as np
import pytest

import models
import sample


def sampled(out, *flags):
    """metadata.json of a call."""
    sample.main(sample.parse_args([*map(str, flags), "--device", "cpu", "--out", str(out)]))
    return json.loads((out / "metadata.json").read_text())


def test_several_pictures_of_each_prompt(tmp_path, capsys):
    many = ["--prompt", "a circle", "--prompt", "a cross", "--eval", "clipscore=1"]
    got = sampled(tmp_path / "a", *many, "--per_prompt", 3, "--batch_size", 4)
    assert [e["prompt"] for e in got["images"]] == ["a circle"] * 3 + ["a cross"] * 3
    scores = [e["scores"]["clipscore"] for e in got["images"]]
    assert len(set(scores)) == 6  # image i depends on (seed, i)
    row = got["rewards"]["clipscore"]
    assert (row["n"], row["prompts"]) == (6, 2)
    assert row["error"] == pytest.approx(abs(np.mean(scores[:3]) - np.mean(scores[3:])) / 2)
    (head,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("reward ")]
    assert "prompts" in head
    again = sampled(tmp_path / "b", "--prompt", "a circle", "--eval", "clipscore=1", "--per_prompt", 2)
    assert [e["scores"]["clipscore"] for e in again["images"]] == pytest.approx(scores[:2], abs=1e-5)


def test_a_file_may_repeat_a_prompt(tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_text("a circle\na cross\na circle\n")
    flags = ["--prompts", file, "--eval", "clipscore=1"]
    got = sampled(tmp_path / "a", *flags)
    assert [e["prompt"] for e in got["images"]] == ["a circle", "a cross", "a circle"]
    assert (got["rewards"]["clipscore"]["n"], got["rewards"]["clipscore"]["prompts"]) == (3, 2)
    assert len(sampled(tmp_path / "b", *flags, "--n_images", 2)["images"]) == 2
    heads = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("reward ")]
    assert heads == [["reward", "n", "prompts", "mean", "+-"]] * 2


def test_more_images_than_prompts_are_asked_for_in_one_line(tmp_path, capsys):
    got = sampled(tmp_path / "a", "--prompt", "a circle", "--n_images", 4)
    assert len(got["images"]) == 1
    said = "--n_images 4, but the number of prompts is 1; --per_prompt gives more pictures of each"
    assert capsys.readouterr().out.splitlines()[0] == said
    assert len(sampled(tmp_path / "b", "--prompt", "a circle", "--prompt", "a cross", "--n_images", 1)["images"]) == 1
    assert "--per_prompt" not in capsys.readouterr().out


def test_a_task_may_be_called_as_a_column_is():
    entries = [
        {"prompt": p, "tag": tag, "scores": {"clipscore": x}} for p, tag, x in (("a", "mean", 0.9), ("b", "n", 0.1))
    ]
    head, row, _ = (line.split() for line in sample.report(sample.summarize(entries, {"clipscore": 1.0})).splitlines())
    assert head == ["reward", "n", "prompts", "mean", "+-", "task", "mean", "mean", "n"]
    assert row == ["clipscore", "2", "2", "0.500", "0.400", "0.500", "0.900", "0.100"]


LORA = ["--lora", models.CLASSROOM / "adapters/acdmd/generator_ema"]
SAMPLERS = (  # flags, the sampler in words, its network evaluations, raw timesteps (None: the pipeline's schedule)
    (LORA, "4 CPS steps, eta 0.9, no guidance", 4, models.FEW_STEPS),
    ([*LORA, "--steps", 2], "2 CPS steps, eta 0.9, no guidance", 2, (1000, 500)),
    ([*LORA, "--steps", 8, "--eta", 0.5], "8 CPS steps, eta 0.5, no guidance", 8, range(1000, 0, -125)),
    ([*LORA, "--guidance_scale", 2], "4 CPS steps, eta 0.9, guidance 2.0", 8, models.FEW_STEPS),
    ([*LORA, "--sampler", "teacher", "--steps", 4], "4 Euler steps, guidance 2.0", 8, None),
    (["--sampler", "student"], "4 CPS steps, eta 0.9, no guidance", 4, models.FEW_STEPS),
    (["--sampler", "student", "--eta", 0], "4 Euler steps, no guidance", 4, models.FEW_STEPS),
    ([], "28 Euler steps, guidance 2.0", 56, None),
    (["--steps", 4], "4 Euler steps, guidance 2.0", 8, None),
    (["--steps", 8, "--guidance_scale", 1, "--eta", 0], "8 Euler steps, no guidance", 8, None),  # as PRX's student
    (["--steps", 4, "--eta", 0.9], "4 CPS steps, eta 0.9, guidance 2.0", 8, None),
)


@pytest.mark.parametrize("flags, said, nfe, raw", SAMPLERS)
def test_the_sampler_says_the_schedule_and_flags_its_numbers(flags, said, nfe, raw, tmp_path, monkeypatch, capsys):
    walked, generate, steps = [], sample.generate, int(said.split()[0])

    def spied(backbone, prompts, sigmas, eta, guidance_scale, *args, **kwargs):
        walked.append((sigmas, backbone.sigmas(steps if raw is None else list(raw)), eta, guidance_scale))
        return generate(backbone, prompts, sigmas, eta, guidance_scale, *args, **kwargs)

    monkeypatch.setattr(sample, "generate", spied)
    got = sampled(tmp_path / "s", "--prompt", "a circle", *flags)
    ((sigmas, want, eta, guidance_scale),) = walked
    assert sigmas == want and got["sampler"] == said and got["nfe"] == nfe
    assert (f"eta {eta}" in said) == (eta > 0) and (f"guidance {guidance_scale}" in said) == (guidance_scale > 1)
    assert f"1 images, {said}: {nfe} NFE" in capsys.readouterr().out


@pytest.mark.parametrize("model", models.BACKBONES)
def test_pictures_are_as_large_as_the_published_evaluations(model, capsys):
    side = {"classroom": 64, "sana": 512, "prx": 512}.get(model, 1024)
    assert sample.parse_args(["--model", model, "--prompt", "a cat"]).resolution == side
    assert sample.parse_args(["--model", model, "--prompt", "a cat", "--resolution", "512"]).resolution == 512
    with pytest.raises(SystemExit):
        sample.parse_args(["--help"])
    assert "1024, the classroom's 64" in " ".join(capsys.readouterr().out.split())


def test_prompts_are_asked_for_where_there_are_none_of_ones_own(tmp_path, capsys):
    said = "--model sd3 needs --prompts FILE or --prompt TEXT"
    assert said in refused(capsys, "--model", "sd3", "--out", tmp_path / "s")


def refused(capsys, *flags):
    """What one line says when a call ends with status 2."""
    with pytest.raises(SystemExit) as stopped:
        models.run(sample.main, sample.parse_args([*map(str, flags), "--device", "cpu"]))
    said = capsys.readouterr().err.splitlines()
    said = [line for line in said if line and not line.startswith("images:")]  # the bar
    assert stopped.value.code == 2 and len(said) == 1
    return said[0]


@contextmanager
def full_disk(size):
    """No file grows beyond `size` bytes: the write itself fails, in the middle of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_named_while_pictures_are_written(tmp_path, capsys):
    with full_disk(300):
        said = refused(capsys, "--prompt", "a circle", "--out", tmp_path / "s")
    assert f"cannot write to {tmp_path}/s: [Errno 27] File too large" in said
    sample.main(sample.parse_args(["--prompt", "a circle", "--out", str(tmp_path / "s")]))  # nothing is in the way


def test_a_full_disk_is_named_while_metadata_are_written(tmp_path, monkeypatch, capsys):
    """/dev/full answers every write with ENOSPC."""
    generate, aside = sample.generate, tmp_path / "s/.metadata.json.partial"

    def filling(*args, **kwargs):
        aside.symlink_to("/dev/full")
        return generate(*args, **kwargs)

    monkeypatch.setattr(sample, "generate", filling)
    said = refused(capsys, "--prompt", "a circle", "--out", tmp_path / "s")
    assert f"cannot write to {tmp_path}/s: [Errno 28] No space left on device" in said
    aside.unlink()  # there is room again
    monkeypatch.setattr(sample, "generate", lambda *args, **kwargs: pytest.fail("made anew"))
    assert len(sampled(tmp_path / "s", "--prompt", "a circle")["images"]) == 1


def test_an_export_on_a_full_disk_leaves_nothing_in_the_way(tmp_path, capsys):
    flags = [*LORA, "--export", tmp_path / "merged"]
    with full_disk(20_000):
        assert f"cannot write --export {tmp_path}/merged: " in refused(capsys, *flags)
    assert not list(tmp_path.iterdir())
    (tmp_path / ".merged.partial").mkdir()  # as a killed process leaves it
    sample.main(sample.parse_args([*map(str, flags)]))
    assert [path.name for path in tmp_path.iterdir()] == ["merged"] and (tmp_path / "merged/config.json").is_file()


@pytest.mark.parametrize("flags", (["--export", "{tmp}/new"], ["--prompt", "a circle", "--out", "{tmp}"]))
def test_a_folder_without_permission_is_refused_before_anything_loads(flags, tmp_path, monkeypatch, capsys):
    def denied(dir):
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr("tempfile.TemporaryFile", denied)  # root may write everywhere
    monkeypatch.setattr(models, "load", lambda *args, **kwargs: pytest.fail("loaded"))
    said = refused(capsys, *LORA, *(flag.format(tmp=tmp_path) for flag in flags))
    assert f"cannot write to {tmp_path}: [Errno 13] Permission denied" in said
    assert "cannot write to /proc: " in refused(capsys, *LORA, "--export", "/proc/new")  # which nobody can write to
