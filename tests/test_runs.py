"""Runs as people start, stop and carry them elsewhere: job scripts, schedulers, shares, other bases, other tools."""

import errno
import fcntl
import importlib.metadata
import json
import os
import re
import runpy
import shutil
import signal
import sys
import tomllib
from pathlib import Path

import bench
import pytest
import torch

import acdmd
import models
import rtdmd
import sample

ROOT = Path(__file__).resolve().parent.parent
ADAPTERS = models.CLASSROOM / "adapters/acdmd"
SMALL_1 = (
    "--batch_size 2 --consistency_batch 1 --rank 2 --fake_update_ratio 2 --save_every 1 --sample_every 0 --eval_every 0"
)
SMALL_2 = "--batch_size 2 --batches 1 --group_size 2 --consistency_batch 1 --sample_every 0 --eval_every 0"


def stage_1(out, *flags):
    acdmd.main(acdmd.parse_args([*SMALL_1.split(), "--out", str(out), *map(str, flags)]))
    return log(Path(out))


def stage_2(out, distilled, *flags):
    rtdmd.main(rtdmd.parse_args([*SMALL_2.split(), "--out", str(out), "--distilled", str(distilled), *map(str, flags)]))
    return log(Path(out))


def log(out):
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("images_per_s", "seconds", "peak_gb", "mfu")} for row in rows]


def sampled(out, *flags):
    sample.main(sample.parse_args(["--prompt", "a circle", "--device", "cpu", "--out", str(out), *map(str, flags)]))


def another_base(folder, change):
    """The classroom's pipeline with every tensor of its transformer changed."""
    shutil.copytree(models.CLASSROOM / "teacher", folder)
    file = next((folder / "transformer").glob("*.safetensors"))
    models.save_file({key: change(value).contiguous() for key, value in models.load_file(file).items()}, file)
    return folder


# ---------------------------------------------------------------------------------------------------------------
# what an adapter belongs to, and what it holds


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """(another base, the final folder of a run of stage 1 on it)"""
    folder = tmp_path_factory.mktemp("other")
    base = another_base(folder / "base", lambda value: value * 1.01)
    stage_1(folder / "run", "--steps", 2, "--weights", base)
    return base, folder / "run/final"


def test_an_adapter_of_another_base_is_refused_by_stage_2_and_by_a_resumed_run(other, tmp_path):
    base, final = other
    assert json.loads((final / "args.json").read_text())["base"]
    with pytest.raises(
        models.UserError, match="safetensors was trained on another base .*give the --weights of its run"
    ):
        stage_2(tmp_path / "rl", final, "--epochs", 1)
    shutil.rmtree(tmp_path / "rl")
    stage_2(tmp_path / "rl", final, "--epochs", 1, "--weights", base)
    with pytest.raises(models.UserError, match="another base"):
        stage_1(tmp_path / "on", "--steps", 3, "--resume", final, "--weights", models.CLASSROOM / "teacher")


def test_sample_says_that_an_adapter_is_of_another_base(other, tmp_path, capsys):
    base, final = other
    both = ["--lora", final / "generator_ema", "--lora", final / "generator"]
    sampled(tmp_path / "a", *both)
    assert capsys.readouterr().out.count("was trained on another base") == 2
    sampled(tmp_path / "b", *both, "--weights", base)
    assert "another base" not in capsys.readouterr().out
    sampled(tmp_path / "c", *both, "--export_lora", tmp_path / "one.safetensors")
    sampled(tmp_path / "d", "--lora", tmp_path / "one.safetensors")
    assert capsys.readouterr().out.count("one.safetensors was trained on another base") == 1


def test_a_base_is_the_same_in_every_dtype_and_place(tmp_path):
    from diffusers import SD3Transformer2DModel

    folder = another_base(tmp_path / "base", lambda value: value.to(torch.bfloat16)) / "transformer"
    places = (
        (models.CLASSROOM / "teacher/transformer", torch.float32),
        (folder, torch.float32),
        (folder, torch.bfloat16),
    )
    assert len({models.load_transformer(SD3Transformer2DModel, *place).base for place in places}) == 1


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
def test_an_export_has_the_dtype_of_the_files(dtype, tmp_path):
    base = another_base(tmp_path / "base", lambda value: value.to(dtype))
    flags = ["--weights", base, "--lora", ADAPTERS / "generator_ema", "--export", tmp_path / "merged"]
    sampled(tmp_path / "a", *flags)
    (file,) = (tmp_path / "merged").glob("*.safetensors")
    got, was = models.load_file(file), models.load_file(next((base / "transformer").glob("*.safetensors")))
    assert got.keys() == was.keys() and all(got[key].dtype == was[key].dtype == dtype for key in got)
    backbone = models.load("classroom", base)
    models.load_adapter(backbone.transformer, "a", ADAPTERS / "generator_ema")
    assert all(torch.equal(v.to(dtype), got[k]) for k, v in models.merge_adapters(backbone.transformer, ["a"]).items())


@pytest.mark.parametrize("flags, said", ((["--ema_every", 8], 1), (["--ema_every", 1], 0)))
def test_an_average_that_has_not_moved_is_said_at_the_end(flags, said, tmp_path, capsys):
    stage_2(tmp_path, ADAPTERS, "--epochs", 2, *flags)
    told = [line for line in capsys.readouterr().out.splitlines() if "has not moved" in line]
    assert len(told) == said and all(line.startswith("rl_ema has not moved, and adds nothing") for line in told)


def test_a_generator_that_was_never_updated_is_said_too(tmp_path, capsys):
    stage_1(tmp_path, "--steps", 1)  # of --fake_update_ratio 2
    assert "generator_ema has not moved" in capsys.readouterr().out


def test_a_generator_alone_is_reinforced_without_the_leash(tmp_path, capsys):
    (tmp_path / "stage_1").mkdir()
    shutil.copytree(ADAPTERS / "generator_ema", tmp_path / "stage_1/generator_ema")
    for number, source in enumerate(("stage_1", "stage_1/generator_ema", f"stage_1/generator_ema/{models.LORA_FILE}")):
        flags = ["--epochs", 1, "--dm_weight", 0]
        rows = stage_2(tmp_path / str(number), tmp_path / source, *flags)
        assert rows == stage_2(tmp_path / f"{number}_whole", ADAPTERS, *flags)
    with pytest.raises(models.UserError, match="not the adapters that this run began with"):
        stage_2(tmp_path / "0", ADAPTERS.parent / "rtdmd/rl_ema", *flags, "--resume", tmp_path / "0")
    with pytest.raises(SystemExit):
        stage_2(tmp_path / "leashed", tmp_path / "stage_1", "--epochs", 1)
    assert "stage_1 has no fake" in capsys.readouterr().err


WRAPPERS = {  # what a trainer saved around {"lora": matrices} -> the keys above them, or several
    "a state dict": (lambda lora: {"state_dict": lora, "epoch": 3, "lr": 1e-4}, 1),
    "a state dict in a model": (lambda lora: {"model": {"state_dict": lora}, "step": torch.tensor(3)}, 1),
    "beside an optimiser": (lambda lora: {"network": lora, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}, 1),
    "two networks": (lambda lora: {"state_dict": lora, "ema": {"weights": lora}}, "state_dict and ema.weights"),
}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_lora_matrices_are_found_inside_what_a_trainer_saved(kind, tmp_path):
    wrap, said = WRAPPERS[kind]
    lora = {f"transformer_blocks.0.attn.to_q.lora_{part}.weight": torch.ones(2, 2) for part in "AB"}
    torch.save(lora, tmp_path / "plain.pt"), torch.save(wrap(lora), tmp_path / "wrapped.pt")
    if said != 1:
        with pytest.raises(models.UserError, match=f"wrapped.pt holds LoRA matrices under {said}: save one"):
            models.read_adapter(tmp_path / "wrapped.pt")
        return
    assert models.fingerprint(tmp_path / "wrapped.pt") == models.fingerprint(tmp_path / "plain.pt")


def test_levels_that_leave_no_room_for_t_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(models.Backbone, "sigmas", lambda self: [1.0, 0.987, 0.75, 0.5, 0.0])
    with pytest.raises(models.UserError, match="--resolution 64: its first step ends at noise level 0.987"):
        stage_1(tmp_path)


# ---------------------------------------------------------------------------------------------------------------
# job scripts, schedulers, shares


def test_a_job_script_begins_and_goes_on_with_one_command(tmp_path, capsys):
    out = tmp_path / "run"
    whole = stage_1(tmp_path / "whole", "--steps", 2, "--lr_decay", 0)
    assert stage_1(out, "--resume", out, "--steps", 1, "--lr_decay", 0) == whole[:1]
    assert stage_1(out, "--resume", out, "--steps", 2, "--lr_decay", 0) == whole
    assert "going on from step 1" in capsys.readouterr().out
    early = tmp_path / "early"  # its first run was killed before it saved
    early.mkdir()
    for name in ("args.json", "log.jsonl"):
        shutil.copy(out / name, early)
    settings = json.loads((early / "args.json").read_text())  # of then; the command is the one to follow
    (early / "args.json").write_text(json.dumps(settings | {"lr": 0.5}))
    assert stage_1(early, "--resume", early, "--steps", 2, "--lr_decay", 0) == whole
    for flags in (
        ["--resume", str(tmp_path / "mistyped")],
        ["--resume", str(tmp_path / "mistyped"), "--out", str(out)],
    ):
        with pytest.raises(SystemExit):
            acdmd.parse_args(flags)
        assert "mistyped: no such folder" in capsys.readouterr().err


def test_a_run_that_branches_off_leaves_the_other_as_it_is(tmp_path, monkeypatch):
    """Also into the folder that is the default; and rows of a run that died there are not this run's."""
    monkeypatch.chdir(tmp_path)
    stage_1("run", "--steps", 2, "--save_every", 1, "--lr_decay", 0)
    default = acdmd.parse_args([]).out
    default.mkdir(parents=True)
    (default / "log.jsonl").write_text('{"step": 1, "lr": 0.5}\n')
    branch = acdmd.parse_args(["--resume", "run/step_000001", "--out", str(default)])
    assert branch.out == default and acdmd.parse_args(["--resume", "run/step_000001"]).out == Path("run")
    acdmd.main(branch)
    assert [row["step"] for row in log(default)] == [2] and [row["step"] for row in log(Path("run"))] == [1, 2]
    assert {"step_000001", "step_000002", "final"} <= {p.name for p in Path("run").iterdir()}


@pytest.mark.parametrize("name", ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGXCPU"))
def test_every_signal_that_announces_the_end_saves(name, tmp_path, monkeypatch, capfd):
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    step = acdmd.step_optimizer
    monkeypatch.setattr(
        acdmd, "step_optimizer", lambda *a: step(*a) if signal.raise_signal(signal.Signals[name]) else step(*a)
    )
    try:
        stage_1(tmp_path, "--steps", 3, "--save_every", 100)
    finally:
        for number in (signal.Signals[n] for n in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGXCPU")):
            signal.signal(number, before[number])
    out, err = capfd.readouterr()
    assert "stopped after step 1; go on with the same command" in out and err.count("stopping after this step") == 1
    assert models.read_checkpoint(tmp_path)["step"] == 1


def test_a_run_is_resumed_from_any_folder(tmp_path, monkeypatch):
    """Prompts, held-out prompts, pictures, and weights were given relative to where the run began."""
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    here.mkdir(), elsewhere.mkdir()
    (here / "a.txt").write_text("a circle\na cross\n"), (here / "b.txt").write_text("a square\na circle\n")
    (here / "base").symlink_to(models.CLASSROOM / "teacher"), (here / "real").mkdir()
    for i in range(2):
        models.save_grid(torch.full((1, 3, 64, 64), i / 2), here / f"real/{i}.png", 1, gap=0)
    monkeypatch.chdir(here)
    flags = "--prompts a.txt --weights base --eval_every 2 --eval_prompts b.txt --eval_rewards clipscore --lr_decay 0"
    whole = stage_1("run", "--steps", 2, *flags.split(), "--fd_reference", "real")
    shutil.rmtree(here / "run/step_000002"), shutil.rmtree(here / "run/final")
    monkeypatch.chdir(elsewhere)
    acdmd.main(acdmd.parse_args(["--resume", str(here / "run"), "--eval_rewards", "clipscore"]))
    assert log(here / "run") == whole and not list(elsewhere.iterdir())


def test_a_stage_2_run_is_resumed_from_any_folder(tmp_path, monkeypatch):
    (tmp_path / "stage_1").symlink_to(ADAPTERS)
    monkeypatch.chdir(tmp_path)
    stage_2("run", "stage_1", "--epochs", 1)
    monkeypatch.chdir(ROOT)
    rtdmd.main(rtdmd.parse_args(["--resume", str(tmp_path / "run"), "--epochs", "2"]))
    assert [row["step"] for row in log(tmp_path / "run")] == [1, 2]


def unable(folders=None, readers=None):
    """os.fsync that fails on folders, or on files that are open for reading only, with these errors."""

    def fsync(descriptor):
        is_folder = os.path.isdir(f"/proc/self/fd/{descriptor}")
        reads = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        number = folders if is_folder else readers if reads else None
        if number:
            raise OSError(number, os.strerror(number))

    return fsync


@pytest.mark.parametrize("kind", (dict(folders=errno.EINVAL), dict(readers=errno.EBADF), dict(folders=errno.ENOTSUP)))
def test_a_share_that_cannot_flush_is_saved_to_all_the_same(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(models.os, "fsync", unable(**kind))
    stage_1(tmp_path / "run", "--steps", 1)
    assert models.read_checkpoint(tmp_path / "run")["step"] == 1 and (tmp_path / "run/final").is_dir()
    sampled(tmp_path / "a", "--lora", ADAPTERS / "generator_ema", "--export_lora", tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").is_file()


def test_a_flush_that_lost_what_was_written_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(models.os, "fsync", unable(folders=errno.EIO))
    with pytest.raises(models.UserError, match="cannot save .*step_000001 .*Input/output error"):
        stage_1(tmp_path / "run", "--steps", 1)
    assert not models.step_folders(tmp_path / "run")


def test_a_script_that_may_only_be_read_is_copied_as_any_other(tmp_path):
    (tmp_path / "acdmd.py").write_text("# a script")
    (tmp_path / "acdmd.py").chmod(0o444)
    run = models.Run(acdmd.parse_args(["--out", str(tmp_path / "run")]), "steps", tmp_path / "acdmd.py")
    run.optimizers, run.networks, run.settings, run.in_a_row, run.skipped = {}, {}, "{}", 0, 0
    (tmp_path / "run/.step_000001.partial").mkdir()  # which no adapter makes here
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models.shutil, "rmtree", lambda *args, **kwargs: None)
        run.save(1)
    assert os.stat(tmp_path / "run/step_000001/acdmd.py").st_mode & 0o200


# ---------------------------------------------------------------------------------------------------------------
# one line each


def test_the_start_says_device_dtype_and_processes(tmp_path, capsys):
    stage_1(tmp_path / "run", "--steps", 1, "--device", "cpu")
    sampled(tmp_path / "a")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("device ")]
    assert lines == ["device cpu, networks in float32, processes: 1"] * 2


@pytest.mark.parametrize("held, said", (("a circle\na cross\na star\n", "2 of 3"), ("a star\n", None)))
def test_held_out_prompts_that_are_trained_on_are_counted(held, said, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("a circle\na cross\na square\n"), (tmp_path / "b.txt").write_text(held)
    flags = f"--prompts {tmp_path}/a.txt --eval_prompts {tmp_path}/b.txt --eval_rewards clipscore --eval_every 1"
    stage_1(tmp_path / "run", "--steps", 1, *flags.split())
    told = re.findall(r"(\d+ of \d+) held-out prompts are trained on", capsys.readouterr().out)
    assert told == ([said] if said else [])


FLAGS = "--repeat 0,--batch_size 0,--resolution -8,--plan --gpus 0,--plan --gb 0,--plan --mfu 0,--plan --mfu 2"


@pytest.mark.parametrize("flags", [*FLAGS.split(","), "--plan --peak nan", "--plan --last_step_batch 0"])
def test_a_benchmark_of_nothing_is_refused(flags, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.py", *flags.split()])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(bench.__file__, run_name="__main__")
    flag = [word for word in flags.split() if word.startswith("--")][-1]
    said = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and re.search(f"argument {flag}: .* must be", said[-1]) and len(said) == 1


def test_the_python_that_the_packages_need_is_said():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    least = tuple(map(int, project["requires-python"].removeprefix(">=").split(".")))
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        need = importlib.metadata.metadata(line.partition("==")[0])["Requires-Python"] or ">=3"
        assert tuple(map(int, re.search(r">=\s*([\d.]+)", need)[1].split("."))) <= least + (0,), line
    assert f"Python {'.'.join(map(str, least))}" in (ROOT / "README.md").read_text(encoding="utf-8")
