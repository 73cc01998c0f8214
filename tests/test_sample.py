"""sample.py: how many pictures of what, which sampler, and what the table says."""

import json

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
    assert row["error"] == pytest.approx(sample.bootstrap_error([np.mean(scores[:3]), np.mean(scores[3:])]))
    assert "prompts" in capsys.readouterr().out.splitlines()[0]
    again = sampled(tmp_path / "b", "--prompt", "a circle", "--eval", "clipscore=1", "--per_prompt", 2)
    assert [e["scores"]["clipscore"] for e in again["images"]] == pytest.approx(scores[:2], abs=1e-5)


def test_a_file_says_how_many_pictures_and_may_repeat_a_prompt(tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "a circle", "n": 2}, {"prompt": "a cross"}, {"prompt": "a circle"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--prompts", file, "--eval", "clipscore=1"]
    got = sampled(tmp_path / "a", *flags)
    assert [e["prompt"] for e in got["images"]] == ["a circle", "a circle", "a cross", "a circle"]
    assert (got["rewards"]["clipscore"]["n"], got["rewards"]["clipscore"]["prompts"]) == (4, 2)
    assert len(sampled(tmp_path / "b", *flags, "--per_prompt", 1, "--n_images", 2)["images"]) == 2
    assert "prompts" not in capsys.readouterr().out.splitlines()[-3]  # nothing was repeated
    file.write_text(json.dumps({"prompt": "a circle", "n": "many"}))
    with pytest.raises(models.UserError, match="'a circle': its \"n\", 'many', is no number of pictures"):
        sampled(tmp_path / "c", *flags)


def test_more_images_than_prompts_are_asked_for_in_one_line(tmp_path, capsys):
    got = sampled(tmp_path / "a", "--prompt", "a circle", "--n_images", 4)
    assert len(got["images"]) == 1
    said = "--n_images 4, but the number of prompts is 1; --per_prompt gives more pictures of each"
    assert capsys.readouterr().out.splitlines()[0] == said
    assert len(sampled(tmp_path / "b", "--prompt", "a circle", "--prompt", "a cross", "--n_images", 1)["images"]) == 1
    assert "--per_prompt" not in capsys.readouterr().out
