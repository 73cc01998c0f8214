"""Rewards of one's own as people write them: what they do to the process, to the metadata, to each other."""

import json
import os
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch

import models
import rewards
import rtdmd
import sample

ADAPTERS = models.CLASSROOM / "adapters/acdmd"
SMALL = "--batch_size 2 --batches 1 --group_size 2 --sample_every 0 --eval_every 0 --policy_weight 0 --dm_weight 0"


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a file into a folder of its own, from which nothing is imported by itself; returns its path."""
    monkeypatch.setattr(rewards, "SCORERS", dict(rewards.SCORERS))

    def written(name, code):
        (tmp_path / "rewards_of_mine").mkdir(exist_ok=True)
        (tmp_path / "rewards_of_mine" / name).write_text(textwrap.dedent(code))
        return tmp_path / "rewards_of_mine" / name

    return written


def score(reward, n=2, metadata=None):
    scorers = rewards.load_scorers(rewards.parse_weights(str(reward)), "cpu", models.CLASSROOM)
    return scorers.score(torch.full((n, 3, 8, 8), 0.5), ["a circle"] * n, metadata)


def trained(out, rewards_, *flags):
    args = [*SMALL.split(), "--distilled", str(ADAPTERS), "--out", str(out), "--rewards", str(rewards_)]
    rtdmd.main(rtdmd.parse_args([*args, *map(str, flags)]))
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


BRIGHT = """
    def bright(images, prompts, metadata):
        return {factor} * images.mean((1, 2, 3))
    bright.differentiable = True
    """


@pytest.mark.parametrize("factor, margin, said", ((10, 3, 1), (1, 3, 0), (1, -0.1, 1)))
def test_rewards_that_pull_nothing_are_said_once(factor, margin, said, write, tmp_path, capsys):
    own = write("own.py", BRIGHT.format(factor=factor) + "\n    def keep(images, prompts, metadata): return 4 * images")
    rows = trained(tmp_path / "run", f"{own}:bright", "--reward_margin", margin, "--epochs", 2)
    told = [line for line in capsys.readouterr().out.splitlines() if "no reward is back-propagated" in line]
    assert len(told) == said and all((row["loss/bp"] == 0) == bool(said) for row in rows)
    assert all("--reward_margin" in line and f"(mean {rows[0]['R']:.4g})" in line for line in told)
    assert rows[0]["R"] == pytest.approx(rows[0]["reward/bright"], abs=0.01)


def test_only_images_below_the_margin_pull(write):
    scorers = rewards.load_scorers(rewards.parse_weights(f"{write('own.py', BRIGHT.format(factor=1))}:bright"))
    decodes_to_half, x0 = SimpleNamespace(decode=lambda x: 0.5 * x), torch.full((3, 3, 8, 8), 1.0)
    x0[1] = 0.2  # R: .5, .1, .5
    values, got = rtdmd.reward_gradient(decodes_to_half, scorers, ["a"] * 3, {"a": {}}, x0, margin=0.3)
    assert (values["loss/bp"].item(), values["R"].item()) == pytest.approx((0.2 / 3, 1.1 / 3))
    wanted = torch.zeros_like(x0)
    wanted[1] = -0.5 / (3 * x0[1].numel())  # of mean(relu(margin - R)), through decode
    torch.testing.assert_close(got, wanted)


TARGET = """
    def target(images, prompts, metadata):
        return -(images.mean((1, 2, 3)) - images.new_tensor([m["brightness"] for m in metadata])).square()
    target.differentiable = True
    """


def test_the_gradient_sees_the_metadata_of_the_file(write, tmp_path):
    own, images = write("own.py", TARGET), torch.full((2, 3, 8, 8), 0.5)
    scorers = rewards.load_scorers(rewards.parse_weights(f"{own}:target"))
    _, slope = scorers.differentiable(images, ["a", "b"], [{"brightness": 0.1}, {"brightness": 0.9}])
    assert slope[0].mean() < 0 < slope[1].mean()
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a circle", "brightness": 0.9}\n')
    row = trained(tmp_path / "run", f"{own}:target", "--prompts", tmp_path / "prompts.jsonl", "--epochs", 1)[0]
    assert row["R"] == pytest.approx(row["reward/target"], abs=0.01)


def test_what_a_reward_keeps_in_the_metadata_is_its_own(write, tmp_path):
    code = """
        import torch
        def keeps(images, prompts, metadata):
            first = [len(m) for m in metadata]
            for m, image in zip(metadata, images):
                m["seen"] = image
                m.setdefault("list", []).append(1)
            prompts[:] = []
            return [float(n == first[0] and m["list"] == [1]) for n, m in zip(first, metadata)]
        """
    own, shared = write("own.py", code), {"prompt": "a circle", "nested": []}
    assert score(f"{own}:keeps", 3, [shared] * 3)["keeps"].tolist() == [1, 1, 1]
    assert shared == {"prompt": "a circle", "nested": []}
    flags = ["--prompt", "a circle", "--per_prompt", "2", "--eval", f"{own}:keeps", "--out", str(tmp_path / "out")]
    sample.main(sample.parse_args([*flags, "--device", "cpu"]))
    entries = json.loads((tmp_path / "out/metadata.json").read_text())["images"]
    assert entries == [{"prompt": "a circle", "scores": {"keeps": 1.0}}] * 2


CHANGES = """
    torch.set_grad_enabled({on})
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_num_threads(3)
    torch.use_deterministic_algorithms(True)
    os.chdir(os.path.dirname(__file__))
    sys.path[:] = []
"""


def state():
    made = torch.ones(1, requires_grad=True) * 1.0
    more = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), os.getcwd(), list(sys.path)
    return made.requires_grad, made.dtype, made.device, *more


@pytest.mark.parametrize("when", ("import", "call", "failing import", "failing call"))
def test_a_reward_file_leaves_the_process_as_it_was(when, write):
    changes = textwrap.dedent(CHANGES.format(on="call" in when))
    body = textwrap.indent(changes, "    ") if "call" in when else ""
    fail = "raise KeyError('gone')\n" if "failing" in when else ""
    code = f"import os, sys, torch\n{'' if body else changes + fail}def one(images, prompts, metadata):\n{body}"
    own = write("own.py", code + f"    {fail if body else ''}\n    return [1.0] * len(prompts)\n")
    before = state()
    try:
        assert score(f"{own}:one")["one"].tolist() == [1, 1] and not fail
    except models.UserError:
        assert fail
    assert state() == before


def test_a_reward_file_is_a_module_that_is_loaded_once_with_what_lies_beside_it(write, tmp_path):
    write("helpers_of_mine.py", "def mean(images): return images.mean((1, 2, 3))")
    write("late_helpers_of_mine.py", "def high(images): return images.amax((1, 2, 3))")
    code = f"""
        from __future__ import annotations
        import pickle
        from dataclasses import dataclass
        from helpers_of_mine import mean
        with open({str(tmp_path / "loads")!r}, "a") as file:
            file.write("x")
        @dataclass
        class Setting:
            factor: float = 2.0
        def one(images, prompts, metadata):
            return pickle.loads(pickle.dumps(Setting())).factor * mean(images)
        def two(images, prompts, metadata):
            from late_helpers_of_mine import high
            return high(images)
        """
    own = write("own.py", code)
    for _ in range(2):  # argparse asks twice
        got = score(f"{own}:one=1,{own}:two=1")
    assert got["one"].tolist() == pytest.approx([256 / 255] * 2)
    assert got["two"].tolist() == pytest.approx([128 / 255] * 2)
    assert (tmp_path / "loads").read_text() == "x" and str(own.parent) not in sys.path


def test_a_reward_file_may_be_called_as_one_of_our_modules(write):
    own = write("rewards.py", "def one(images, prompts, metadata): return [1.0] * len(prompts)")
    assert score(f"{own}:one")["one"].tolist() == [1, 1] and sys.modules["rewards"] is rewards


@pytest.mark.parametrize("name", ("fd", "clipscore_error", "geneval_strict"))
def test_a_name_that_meets_a_column_of_ours_is_refused(name, write):
    own = write("own.py", f"def {name}(images, prompts, metadata): return [1.0] * len(prompts)")
    with pytest.raises(models.UserError, match=f"own.py:{name}: {name} is a column of ours, give the function another"):
        rewards.parse_weights(f"clipscore,{own}:{name}")


GOOD = torch.full((2, 3, 8, 8), 0.5)
WRONG = {  # what is given as pictures -> what is said of it
    "8 bits": ((GOOD * 255).byte(), r"torch.uint8 \[2, 3, 8, 8\] from 127 to 127"),
    "0 to 255": (GOOD * 255, "from 128 to 128"),
    "-1 to 1": (GOOD - 1, "from -0.5 to -0.5"),
    "no numbers": (GOOD * float("nan"), "from nan to nan"),
    "channels last": (GOOD.permute(0, 2, 3, 1), r"\[2, 8, 8, 3\]"),
    "one picture": (GOOD[0], r"\[3, 8, 8\]"),
    "another number": (GOOD[:1], r"\[1, 3, 8, 8\]"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_no_picture_is_refused(kind):
    images, said = WRONG[kind]
    scorers = rewards.load_scorers({"clipscore": 1.0}, "cpu", models.CLASSROOM)
    with pytest.raises(models.UserError, match=rf"must be floats \[2, 3, H, W\] in \[0, 1\].*{said}"):
        scorers.score(images, ["a circle"] * 2)
    if kind != "another number":
        with pytest.raises(models.UserError, match="must be floats"):
            scorers.features(images)
    assert scorers.score(GOOD, ["a circle"] * 2)["clipscore"].shape == (2,)


@pytest.mark.parametrize("returned", ("(row, {'details': 1})", "(row, row, row)", "{'own': row}", "None", "['a', 'b']"))
def test_what_a_reward_must_return_is_said(returned, write):
    code = "def own(images, prompts, metadata):\n    row = images.mean((1, 2, 3))\n    return "
    own = write("own.py", code + returned)
    kind = type(eval(returned, {"row": 0})).__name__
    with pytest.raises(models.UserError, match=f"^reward own: it returned a {kind}; return one number a picture alone"):
        score(f"{own}:own")
