"""sample.py is stopped, fails, or its card is full: what was made stays, and the same command goes on."""

import json

import pytest
import torch

import models
import rewards
import sample

FLAGS = ["--prompts", "{tmp}/prompts.jsonl", "--batch_size", "2", "--device", "cpu", "--eval", "clipscore,geneval"]
FLAGS += ["--fd_reference", "{tmp}/real"]


@pytest.fixture
def flags(tmp_path):
    """Six prompts in three batches, with scores and the distance to a folder."""
    pairs = rewards.classroom_prompts()[:6]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(m) + "\n" for _, m in pairs))
    (tmp_path / "real").mkdir()
    for i, image in enumerate(torch.rand(3, 3, 64, 64, generator=models.seeded(0))):
        models.save_grid(image[None], tmp_path / f"real/{i}.png", 1, gap=0)
    return [flag.format(tmp=tmp_path) for flag in FLAGS]


def call(flags, *more):
    sample.main(sample.parse_args([*flags, *map(str, more)]))


def result(out):
    got = json.loads((out / "metadata.json").read_text())
    return {name: got[name] for name in ("rewards", "weighted_mean", "fd", "images")}


def stop_at(monkeypatch, module, name, at, made):
    """The at-th call of a function ends as Ctrl-C does; made: a list of one entry a call."""
    function = getattr(module, name)

    def stopping(*args, **kwargs):
        made.append(1)
        if len(made) == at:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, stopping)


def test_what_was_made_before_a_stop_is_kept_and_not_made_again(flags, tmp_path, monkeypatch, capsys):
    call(flags, "--out", tmp_path / "whole")
    made, done = [], []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, sample, "generate", 3, made)
        call(flags, "--out", tmp_path / "run")
    lines = (tmp_path / "run/scores.jsonl").read_text().splitlines()
    assert [json.loads(line)["index"] for line in lines] == [0, 1, 2, 3]
    assert all(set(json.loads(line)["entry"]["scores"]) >= {"clipscore", "geneval"} for line in lines)
    with (tmp_path / "run/scores.jsonl").open("a") as file:
        file.write('{"index": 4, "ent')  # a process killed while it wrote
    with monkeypatch.context() as patch:
        stop_at(patch, sample, "generate", 9, done)
        call(flags, "--out", tmp_path / "run")
    assert len(done) == 1 and result(tmp_path / "run") == result(tmp_path / "whole")
    for file in (tmp_path / "whole").glob("*.png"):
        assert file.read_bytes() == (tmp_path / "run" / file.name).read_bytes()


def test_a_failing_summary_costs_nothing(flags, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, sample, "summarize", 1, [])
        call(flags, "--out", tmp_path / "run")
    made = []
    with monkeypatch.context() as patch:
        stop_at(patch, sample, "generate", 9, made)
        call(flags, "--out", tmp_path / "run")
    assert not made and len(result(tmp_path / "run")["images"]) == 6


def test_without_a_folder_the_same_command_goes_on_in_its_own(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, sample, "generate", 2, [])
        call(flags)
    call(flags, "--seed", 1)  # another call
    assert (
        not (tmp_path / "out/samples/metadata.json").exists() and (tmp_path / "out/samples_2/metadata.json").is_file()
    )
    call(flags)
    assert (tmp_path / "out/samples/metadata.json").is_file() and not (tmp_path / "out/samples_3").exists()
    call(flags)
    assert (tmp_path / "out/samples_3/metadata.json").is_file()


CHANGED = {"settings": ["--seed", "1"], "prompts": [], "finished": []}


@pytest.mark.parametrize("kind", CHANGED)
def test_what_another_call_began_is_not_gone_on_with(kind, flags, tmp_path, monkeypatch):
    at = 9 if kind == "finished" else 2
    with monkeypatch.context() as patch:
        stop_at(patch, sample, "generate", at, [])
        try:
            call(flags, "--out", tmp_path / "run")
        except KeyboardInterrupt:
            assert at == 2
    if kind == "prompts":
        text = (tmp_path / "prompts.jsonl").read_text()
        (tmp_path / "prompts.jsonl").write_text(text.replace('"prompt": "', '"prompt": "please, '))
    before = (tmp_path / "run/scores.jsonl").read_bytes()
    with pytest.raises(models.UserError, match="run is a file or not empty: give a new folder"):
        call(flags, "--out", tmp_path / "run", *CHANGED[kind])
    assert before == (tmp_path / "run/scores.jsonl").read_bytes()


def test_tags_of_any_kind_cost_no_summary(tmp_path):
    tags = [["shape", "red"], {"a": 1}, 3, None, "shape"]
    rows = [{"prompt": f"a circle {i}", "tag": tag} for i, tag in enumerate(tags)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--prompts", str(tmp_path / "a.jsonl"), "--eval", "clipscore", "--device", "cpu"]
    call(flags, "--out", tmp_path / "out")
    got = json.loads((tmp_path / "out/metadata.json").read_text())
    assert [entry.get("tag") for entry in got["images"]] == tags
    assert got["rewards"]["clipscore"]["n"] == 5 and list(got["rewards"]["clipscore"]["tasks"]) == ["shape"]


@pytest.mark.parametrize("where", ("network", "weights", "placement"))
def test_a_full_card_is_one_line_with_what_helps(where, tmp_path, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.1 GiB.\nAnd more lines.")

    place = {
        "network": (models.SD3, "predict"),
        "weights": (models, "load_transformer"),
        "placement": (models, "shard"),
    }
    monkeypatch.setattr(*place[where], full)
    with pytest.raises(SystemExit) as stopped:
        flags = ["--prompt", "a circle", "--out", str(tmp_path / "out"), "--device", "cpu"]
        models.run(sample.main, sample.parse_args(flags))
    said = [line for line in capsys.readouterr().err.splitlines() if line and not line.startswith("images:")]
    assert stopped.value.code == 2 and len(said) == 1 and "Tried to allocate 9.1 GiB" in said[0]
    assert "out of memory" in said[0] and all(f"--{flag}" in said[0] for flag in ("batch_size", "resolution"))
    assert "--checkpointing" not in said[0]  # a flag that sample.py does not have


def test_a_batch_is_as_large_as_a_card_of_24_gb_takes():
    """SD3.5's sums of one forward at 1024 x 1024 are .18 GB a picture, FLUX.1's .49, beside the weights."""
    size = lambda *flags: sample.parse_args(["--prompt", "a", *flags]).batch_size  # noqa: E731
    assert size() == 50 and size("--model", "sd35", "--batch_size", "3") == 3
    assert 4 <= size("--model", "sd35") <= 16 and size("--model", "sd35", "--resolution", "512") == 4 * size(
        "--model", "flux1"
    )
    assert size("--model", "sd35", "--resolution", "4096") == 1
