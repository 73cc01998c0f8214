"""The scripts as a user runs them: training, resuming, sampling, and what bad input gets."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import acdmd
import models
import rewards
import rtdmd
import sample
from classroom import demo, shapes
from classroom import prompts as prompt_writer

ROOT = Path(__file__).parent.parent
SMALL_1 = "--batch_size 4 --consistency_batch 2 --rank 4 --log_every 1 --fake_update_ratio 2".split()
SMALL_2 = "--batch_size 4 --batches 2 --group_size 4 --consistency_batch 2 --ema_every 2".split()
SMALL_1, SMALL_2 = ([*flags, "--sample_every", "0", "--eval_every", "0"] for flags in (SMALL_1, SMALL_2))
VOLATILE = ("images_per_s", "seconds", "peak_gb", "mfu")


EIGHT_BITS = ["--frozen_dtype", "float8_e4m3fn"]


def stage_1(out, *flags):
    acdmd.main(acdmd.parse_args([*SMALL_1, "--out", str(out), *map(str, flags)]))
    return log(out)


def stage_2(out, distilled, *flags):
    rtdmd.main(rtdmd.parse_args([*SMALL_2, "--out", str(out), "--distilled", str(distilled), *map(str, flags)]))
    return log(out)


def log(out):
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in VOLATILE} for row in rows]


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    out = tmp_path_factory.mktemp("acdmd")
    rows = stage_1(out, "--steps", 4, "--save_every", 2)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    return out


def same_adapters(a, b):
    assert len(list(a.glob("*/*.safetensors"))) == 3
    for file in a.glob("*/*.safetensors"):
        one, two = models.load_file(file), models.load_file(b / file.relative_to(a))
        assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_stage_1_moves_both_adapters_and_resumes_exactly(distilled, tmp_path):
    start, end = distilled / "step_000002", distilled / "final"
    for name in ("generator", "generator_ema", "fake"):
        a, b = (models.load_file(folder / name / models.LORA_FILE) for folder in (start, end))
        assert any(not torch.equal(a[k], b[k]) for k in a)
    rows = stage_1(tmp_path, "--steps", 4, "--resume", start)
    assert rows == log(distilled)[2:]
    same_adapters(end, tmp_path / "final")


def test_stage_2_trains_and_resumes_exactly(distilled, tmp_path):
    whole = stage_2(tmp_path / "whole", distilled / "final", "--epochs", 4, "--save_every", 2)
    assert {"reward/geneval", "loss/policy", "grad_x0/dm", "grad_x0/bp", "loss/ac"} <= whole[0].keys()
    assert whole[0]["clip_fraction"] == 0  # one optimiser step an epoch: the ratio is 1
    resumed = tmp_path / "whole" / "step_000002"
    rows = stage_2(tmp_path / "rest", distilled / "final", "--epochs", 4, "--resume", resumed)
    assert rows == whole[2:]
    same_adapters(tmp_path / "whole" / "final", tmp_path / "rest" / "final")


SHARDED = {  # run name -> flags
    "none": [],
    "full": ["--shard", "full"],
    "grad": ["--shard", "grad", "--checkpointing", "on"],
    "hybrid": ["--shard", "hybrid"],
    "offload": ["--shard", "full", "--offload_frozen"],
    "offload_whole": ["--offload_frozen"],
}


def test_two_processes_equal_one_in_every_shard_mode(distilled, tmp_path, monkeypatch):
    """Both stages on the same global batch; runs saved by two processes go on as one, and the reverse, up to rounding;
    and those that go on as two to the last digit. Adam divides a gradient by its own size, one of rounding size too:
    its epsilon of 1e-8 leaves single entries 1.3e-5 apart, that of 1e-5 none."""
    monkeypatch.setattr(torch.optim, "AdamW", partial(torch.optim.AdamW, eps=1e-5))
    first = [*SMALL_1, "--save_every", "1", "--steps"]
    second = [*SMALL_2, "--save_every", "1", "--group_size", "8", "--distilled", str(distilled / "final"), "--epochs"]
    for main, flags, name in ((acdmd, first, "acdmd"), (rtdmd, second, "rtdmd")):  # groups span both processes
        run = [*flags, "3", "--consistency_batch", "4", "--out"]
        main.main(main.parse_args([*run, str(tmp_path / name / "one")]))
        main.main(main.parse_args([*run, str(tmp_path / name / "one_of_8_bits"), *EIGHT_BITS]))
    half = ["--batch_size", "2", "--consistency_batch", "2"]
    (tmp_path / "runs.json").write_text(json.dumps({"first": [*first, "3", *half], "second": [*second, "3", *half]}))
    script = f"""
import functools, json, sys, torch
sys.path[:0] = [{str(ROOT)!r}]
import acdmd, models, rtdmd
torch.optim.AdamW = functools.partial(torch.optim.AdamW, eps=1e-5)
runs, out = json.load(open("runs.json")), {str(tmp_path)!r}
for name, more in {SHARDED | {"of_8_bits": ["--shard", "full", "--checkpointing", "on", *EIGHT_BITS]}!r}.items():
    acdmd.main(acdmd.parse_args([*runs["first"], *more, "--out", f"{{out}}/acdmd/{{name}}"]))
    rtdmd.main(rtdmd.parse_args([*runs["second"], *more, "--out", f"{{out}}/rtdmd/{{name}}"]))
models.dist.barrier()  # rank 0 has saved
for stage, run, name in ((acdmd, "first", "acdmd"), (rtdmd, "second", "rtdmd")):
    for start, mode, end in (("one", "full", "continued"), ("none", "none", "exact")):
        resume = ["--resume", f"{{out}}/{{name}}/{{start}}/step_000002", "--out", f"{{out}}/{{name}}/{{end}}"]
        stage.main(stage.parse_args([*runs[run], *resume, "--shard", mode]))
sparse = [*runs["first"], "--steps", "4", "--log_every", "2", "--save_every", "4", "--out"]
acdmd.main(acdmd.parse_args([*sparse, f"{{out}}/acdmd/whole"]))
agreed, calls = models.StopSignal.agreed, []
models.StopSignal.agreed = lambda self, world_size: calls.append(1) or len(calls) == 3  # not at a log line
acdmd.main(acdmd.parse_args([*sparse, f"{{out}}/acdmd/stopped"]))
models.StopSignal.agreed = agreed
models.dist.barrier()  # rank 0 has saved
acdmd.main(acdmd.parse_args([*sparse, f"{{out}}/acdmd/stopped", "--resume", f"{{out}}/acdmd/stopped"]))
"""
    (tmp_path / "runs.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "runs.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("acdmd", "rtdmd"):
        for mode in SHARDED:
            close_adapters(tmp_path / name / "one/final", tmp_path / name / mode / "final")
        close_adapters(tmp_path / name / "one_of_8_bits/final", tmp_path / name / "of_8_bits/final")
        same_adapters(tmp_path / name / "none/final", tmp_path / name / "exact/final")
        assert log(tmp_path / name / "exact") == log(tmp_path / name / "none")[2:]
    whole, stopped = (log(tmp_path / "acdmd" / name) for name in ("whole", "stopped"))
    assert [row["step"] for row in stopped] == [1, 2, 3, 4] and stopped == whole
    for main, flags, name in ((acdmd, first, "acdmd"), (rtdmd, second, "rtdmd")):
        resumed = ["--resume", str(tmp_path / name / "full/step_000002"), "--out", str(tmp_path / name / "resumed")]
        main.main(main.parse_args([*flags, "3", "--consistency_batch", "4", *resumed]))
        for out in ("resumed", "continued"):
            close_adapters(tmp_path / name / "one/final", tmp_path / name / out / "final", rows=slice(2, None))


def test_four_micro_batches_equal_one_batch_of_all(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.optim, "AdamW", partial(torch.optim.AdamW, eps=1e-5))
    flags = ["--steps", 4, "--gamma", 1]
    one = stage_1(tmp_path / "one", *flags, "--batch_size", 8, "--consistency_batch", 8)
    four = stage_1(tmp_path / "four", *flags, "--batch_size", 2, "--consistency_batch", 2, "--batches", 4)
    assert len(one) == len(four) == 4
    close_adapters(tmp_path / "one/final", tmp_path / "four/final")  # and their logs
    other = stage_1(tmp_path / "other", *flags, "--batch_size", 8, "--consistency_batch", 2)
    assert other[0]["loss/cons"] != pytest.approx(one[0]["loss/cons"], rel=1e-4)


def close_adapters(a, b, rows=slice(None)):
    files = list(a.glob("*/*.safetensors"))
    assert len(files) == 3
    for file in files:
        one, two = models.load_file(file), models.load_file(b / file.relative_to(a))
        assert all((one[key] - two[key]).abs().max() <= 1e-5 for key in one), file
    for one, two in zip(log(a.parent)[rows], log(b.parent), strict=True):
        assert one.keys() == two.keys()
        for name in one:  # rewards see pictures of 8 bits, where rounding may tip a pixel
            loose = 1e-3 if name.startswith(("reward/", "group_std/")) else 1e-5
            assert one[name] == pytest.approx(two[name], rel=loose, abs=loose), name


def test_a_used_folder_is_gone_on_with_or_refused(distilled, tmp_path, capsys):
    stage_1(tmp_path, "--steps", 4, "--save_every", 1)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    for more in ([], ["--resume", distilled]):  # a run elsewhere does not go on here either
        with pytest.raises(models.UserError, match=f"{tmp_path} holds a run .final.: go on with --resume {tmp_path}"):
            stage_1(tmp_path, "--steps", 2, *more)
    with pytest.raises(models.UserError, match="holds a run"):
        stage_2(tmp_path, distilled / "final", "--epochs", 2)
    assert before == {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    capsys.readouterr()
    stage_1(tmp_path, "--steps", 4, "--save_every", 2, "--resume", tmp_path / "step_000003")
    assert log(tmp_path) == log(distilled)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("not as before")]
    assert said == ["not as before step 3: --save_every was 1, is 2"]
    with pytest.raises(models.UserError, match="--rank 2: the adapters of this run have rank 4"):
        stage_1(tmp_path, "--steps", 5, "--resume", tmp_path, "--rank", 2)
    assert acdmd.parse_args(["--resume", str(tmp_path)]).out == tmp_path
    assert acdmd.parse_args(["--resume", str(tmp_path / "step_000004")]).out == tmp_path
    with pytest.raises(models.UserError, match="--steps 3: the run is at 4 already"):
        stage_1(tmp_path, "--steps", 3, "--resume", tmp_path)


def test_a_run_is_resumed_with_its_own_settings(distilled, tmp_path, capsys):
    """--resume alone is enough; a flag that is given again counts."""
    whole = stage_2(tmp_path / "whole", distilled / "final", "--epochs", 3, "--seed", 5, "--save_every", 1)
    shutil.rmtree(tmp_path / "whole/final"), shutil.rmtree(tmp_path / "whole/step_000003")
    args = rtdmd.parse_args(["--resume", str(tmp_path / "whole")])
    assert (args.out, args.seed, args.epochs, args.group_size) == (tmp_path / "whole", 5, 3, 4)
    assert args.rewards == rtdmd.parse_args(["--distilled", str(distilled / "final")]).rewards
    rtdmd.main(args)
    assert log(tmp_path / "whole") == whole
    args = rtdmd.parse_args(["--resume", str(tmp_path / "whole/step_000002"), "--epochs", "7"])
    assert (args.out, args.seed, args.epochs) == (tmp_path / "whole", 5, 7)
    settings = json.loads((tmp_path / "whole/args.json").read_text())
    (tmp_path / "whole/args.json").write_text(json.dumps(settings | {"rewards": {"blueness": 1.0}}))
    with pytest.raises(SystemExit):
        rtdmd.parse_args(["--resume", str(tmp_path / "whole")])
    assert "blueness is a function of yours; give its file again" in capsys.readouterr().err


def test_a_finished_run_is_made_longer_from_its_end(distilled, tmp_path):
    flags = ["--save_every", 3, "--lr_decay", 0]
    stage_1(tmp_path / "a", "--steps", 4, *flags)
    assert (tmp_path / "a/step_000004").is_dir()  # though --save_every does not ask for it
    stage_1(tmp_path / "a", "--steps", 5, *flags, "--resume", tmp_path / "a")
    stage_1(tmp_path / "b", "--steps", 5, *flags)
    assert log(tmp_path / "a") == log(tmp_path / "b")
    same_adapters(tmp_path / "a/final", tmp_path / "b/final")


def test_a_reward_that_fails_late_is_named_and_costs_no_checkpoint(distilled, tmp_path, monkeypatch):
    flags = ["--epochs", 3, "--save_every", 1]
    whole = stage_2(tmp_path / "whole", distilled / "final", *flags)
    forward, calls = rewards.CLIPScore.forward, []

    def failing(self, images, prompts, metadata):
        calls.append(not images.requires_grad)  # else it is asked for its gradient
        if sum(calls) == 4:  # two micro-batches an epoch: the last of epoch 2
            raise RuntimeError("the server\nis gone")
        return forward(self, images, prompts, metadata)

    monkeypatch.setattr(rewards.CLIPScore, "forward", failing)
    with pytest.raises(models.UserError, match="clipscore failed: RuntimeError: the server .*test_scripts.py:"):
        stage_2(tmp_path / "run", distilled / "final", *flags)
    assert [path.name for path in (tmp_path / "run").glob("step_*")] == ["step_000001"]
    monkeypatch.undo()
    assert stage_2(tmp_path / "run", distilled / "final", *flags, "--resume", tmp_path / "run") == whole
    same_adapters(tmp_path / "whole" / "final", tmp_path / "run" / "final")


def test_sigterm_saves_and_the_resumed_log_is_the_uninterrupted_one(tmp_path):
    flags = [*SMALL_1, "--steps", "12", "--log_every", "5", "--save_every", "1000", "--out"]
    command = [sys.executable, "acdmd.py", *flags]
    whole = subprocess.run([*command, tmp_path / "a"], cwd=ROOT, capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr[-2000:]
    at_step_7 = """import itertools, os, signal, sys
sys.path.insert(0, os.getcwd())
import acdmd, models
log, steps = models.Run.log, itertools.count()
models.Run.log = lambda *row: log(*row) or next(steps) == 6 and os.kill(os.getpid(), signal.SIGTERM)
models.run(acdmd.main, acdmd.parse_args())
"""
    stopped = subprocess.run([sys.executable, "-c", at_step_7, *flags, tmp_path / "b"], cwd=ROOT, capture_output=True)
    assert stopped.returncode == 0 and f"--resume {tmp_path / 'b'}" in stopped.stdout.decode(), stopped.stderr[-2000:]
    assert [row["step"] for row in log(tmp_path / "b")][-1] == 7
    done = subprocess.run([*command, tmp_path / "b", "--resume", tmp_path / "b"], cwd=ROOT, capture_output=True)
    assert done.returncode == 0 and log(tmp_path / "b") == log(tmp_path / "a")
    same_adapters(tmp_path / "a" / "final", tmp_path / "b" / "final")


def test_a_stop_in_the_middle_of_an_epoch_of_stage_2_loses_nothing(distilled, tmp_path, monkeypatch, capsys):
    whole = stage_2(tmp_path / "whole", distilled / "final", "--epochs", 3)
    asked, sample_ = [], rtdmd.sample

    def interrupted(*args):
        asked.append(args[-1].key[1])  # the epoch
        if asked.count(1) == 1 and asked[-1] == 1:
            signal.raise_signal(signal.SIGTERM)
        return sample_(*args)

    monkeypatch.setattr(rtdmd, "sample", interrupted)
    first = stage_2(tmp_path / "run", distilled / "final", "--epochs", 3, "--log_every", 3)  # the row was pending
    assert len(first) == 1 and asked.count(1) == 1  # one of the second epoch's two micro-batches was sampled
    assert "stopped after epoch 1; go on with the same command and --resume" in capsys.readouterr().out
    monkeypatch.undo()
    assert stage_2(tmp_path / "run", distilled / "final", "--epochs", 3, "--resume", tmp_path / "run") == whole
    same_adapters(tmp_path / "whole" / "final", tmp_path / "run" / "final")


@pytest.mark.parametrize("flags", (["--gamma", "0"], ["--plain_dmd"]))
def test_ablations_of_stage_1(tmp_path, flags):
    rows = stage_1(tmp_path, "--steps", 2, *flags)
    assert ("loss/cons" not in rows[0]) == ("--gamma" in flags)


@pytest.mark.parametrize(
    "flags, absent",
    (
        (["--n_chosen", "3", "--step_weights", "1,1,1"], ()),
        (["--bp_weight", "0"], ()),
        (["--dm_weight", "0"], ("loss/ac", "grad_norm/fake")),
        (["--policy_weight", "0"], ("loss/policy", "ratio_drift")),
    ),
)
def test_ablations_of_stage_2(distilled, tmp_path, flags, absent, monkeypatch):
    chosen, choose = [], rtdmd.choose_steps
    monkeypatch.setattr(rtdmd, "choose_steps", lambda *args: chosen.append(choose(*args)) or chosen[-1])
    rows = stage_2(tmp_path, distilled / "final", "--epochs", 1, *flags)
    assert len(chosen) == 1 and len(chosen[0]) == (3 if "--n_chosen" in flags else 2)
    assert not set(absent) & rows[0].keys()
    assert (rows[0].get("grad_x0/bp", 0) == 0) == ("--bp_weight" in flags)


def test_the_last_step_takes_as_many_images_as_asked(distilled, tmp_path):
    whole, all_, two = (
        stage_2(tmp_path / str(n), distilled / "final", "--epochs", 1, *(["--last_step_batch", n] if n else []))[0]
        for n in (0, 4, 2)
    )
    assert all_ == whole
    assert two["loss/policy"] == whole["loss/policy"] and two["loss/ac"] == whole["loss/ac"]
    assert two["loss/bp"] != whole["loss/bp"] and two["loss/dm"] != whole["loss/dm"]


def test_groups_without_signal_do_not_count(distilled, tmp_path, monkeypatch):
    """Where one of two groups is flat, the policy gradient is the mean over the images of the other one."""
    norms, flat = {}, torch.tensor([True, False])
    advantages = rtdmd.group_advantages
    monkeypatch.setattr(rtdmd, "group_advantages", lambda *args: advantages(*args).masked_fill(flat[:, None], 0.0))
    flags = "--epochs 1 --batches 2 --batch_size 4 --group_size 4 --dm_weight 0 --bp_weight 0".split()
    for name, some in (("all", torch.ones_like(flat)), ("half", ~flat), ("none", torch.zeros_like(flat))):
        monkeypatch.setattr(rtdmd, "has_signal", lambda *args, some=some: some)
        norms[name] = stage_2(tmp_path / name, distilled / "final", *flags)[0]["grad_norm/generator"]
    assert norms["half"] == pytest.approx(2 * norms["all"], rel=1e-4) and 0 < norms["none"] < math.inf


def test_steps_that_are_not_trained_share_their_noise_in_a_group(monkeypatch):
    backbone, noises, step = models.load("classroom"), [], rtdmd.cps_step
    monkeypatch.setattr(rtdmd, "cps_step", lambda *call: noises.append(call[-1]) or step(*call))
    prompts, sigmas = ["a circle"] * 3 + ["a cross"], backbone.sigmas()
    noise = models.Noise((0, 0), range(4), backbone.latent_shape, "cpu")
    states, log_probs = rtdmd.sample(backbone, prompts, sigmas, [0, 2], 0.9, noise)
    assert log_probs.bool().tolist() == [[True, False, True]] * 4 and states.shape == (4, 5, *backbone.latent_shape)
    assert noises[3] is None  # the last step is deterministic
    for j, rows in enumerate(noises[:3]):
        same = [torch.equal(rows[0], row) for row in rows]
        assert same == ([True] * 3 + [False] if j == 1 else [True] + [False] * 3)


@pytest.mark.parametrize("flags", ([], ["--plain_dmd"]))
def test_a_step_is_matched_at_its_own_level_or_with_plain_dmd_at_0(tmp_path, monkeypatch, flags):
    walked, rollout = set(), acdmd.rollout
    monkeypatch.setattr(acdmd, "rollout", lambda *args, **kw: walked.add(tuple(args[2])) or rollout(*args, **kw))
    stage_1(tmp_path, "--steps", 8, *flags)
    sigmas = models.load("classroom").sigmas()
    assert walked == {(*sigmas[:k], 0.0 if flags else sigmas[k]) for k in (1, 2, 3, 4)}


@pytest.mark.parametrize("k", (1, 2, 3, 4))
def test_a_rollout_has_gradient_in_its_last_step_only(k, monkeypatch):
    backbone = models.load("classroom")
    seen, velocity = [], backbone.velocity
    spied = lambda *args, **kwargs: seen.append(torch.is_grad_enabled()) or velocity(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(backbone, "velocity", spied)
    backbone.roles["generator"] = ("generator",)
    models.add_adapter(backbone.student, "generator", 2)
    cond, levels = backbone.encode(["a circle"]), backbone.sigmas()[: k + 1]
    noise = models.Noise((0,), range(1), backbone.latent_shape, "cpu")
    x = acdmd.rollout(backbone, cond, levels, 0.9, noise, grad=True)
    assert seen == [False] * (k - 1) + [True] and x.requires_grad
    x = acdmd.rollout(backbone, cond, levels, 0.9, noise)
    assert seen[k:] == [False] * k and not x.requires_grad


def test_sample_writes_scores_for_a_stack(distilled, tmp_path):
    stage_2(tmp_path / "rl", distilled / "final", "--epochs", 1)
    stack = ["--lora", distilled / "final/generator_ema", "--lora", tmp_path / "rl/final/rl_ema"]
    flags = [*stack, "--n_images", 12, "--eval", "clipscore=1,geneval=1", "--out", tmp_path / "s", "--seed", 3]
    sample.main(sample.parse_args([*map(str, flags)]))
    got = json.loads((tmp_path / "s" / "metadata.json").read_text())
    assert got["nfe"] == 4 and len(got["images"]) == 12 and (tmp_path / "s" / "grid.png").is_file()
    columns = {name: [e["scores"][name] for e in got["images"]] for name in ("clipscore", "geneval", "geneval_strict")}
    for name, values in columns.items():
        assert got["rewards"][name]["mean"] == pytest.approx(sum(values) / 12)
        assert set(got["rewards"][name]["tasks"]) == {e["tag"] for e in got["images"]}
    means = got["rewards"]["clipscore"]["mean"] + got["rewards"]["geneval"]["mean"]
    assert got["weighted_mean"] == pytest.approx(means / 2)


def test_demo_from_start_to_report_ablations_and_summary(tmp_path, monkeypatch):
    run = tmp_path / "run"
    flags = ["--out", str(run), "--n_prompts", "12", "--acdmd_steps", "4", "--rtdmd_epochs", "2"]
    command = [sys.executable, "classroom/demo.py", *flags]
    with (tmp_path / "stderr").open("w") as file:
        first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=file)
    while first.poll() is None and not (run / "rtdmd" / "log.jsonl").is_file():
        time.sleep(0.1)
    early = (run / "report.md").read_text()  # what stage 1 has to show is there while stage 2 trains
    assert "AC-DMD | 4 |" in early and "RTDMD" not in early and (run / "samples.png").is_file()
    first.terminate()  # in stage 2, the demo alone: it has the stage save
    assert first.wait() == 1, (tmp_path / "stderr").read_text()[-3000:]
    assert (tmp_path / "stderr").read_text().endswith("stopped; the same command goes on from here\n")
    assert list((run / "rtdmd").glob("step_*")) and not (run / "rtdmd/final").is_dir()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "nothing left to train" in done.stdout and "going on from step" in done.stdout
    text = (run / "report.md").read_text()
    assert all(name in text for name in ("teacher, 28 steps guided | 56", "DMD2 | 4", "AC-DMD | 4", "RTDMD − AC-DMD"))
    assert "The training reward (strict) went from" in text and text.split("\n| real")[0].count("RTDMD") == 1
    assert (run / "samples.png").stat().st_size > 10_000 and (run / "curves.png").stat().st_size > 5_000
    assert 10_000 < (run / "steps.gif").stat().st_size < 1e6 and Image.open(run / "steps.gif").n_frames == 4

    monkeypatch.chdir(ROOT)
    names = ("no_reward", "no_leash", "dmd2")
    demo.main(demo.parse_args([*flags, "--stages", "ablations", "--only", *names]))
    text = (run / "ablations.md").read_text()
    for _, name, of in map(demo.ABLATIONS.get, names):
        assert f"| {name} | 4 |" in text and f"| {name} `{of}` |" in text
    report, rows = (json.loads((run / f"{name}.json").read_text()) for name in ("report", "ablations"))
    assert [row["scores"] for row in report[-2:]] == [row["scores"] for row in rows[:2]]  # the full methods
    for row in rows[2:]:
        assert row["scores"] not in (report[-1]["scores"], report[-2]["scores"])
    for name, flag, value in (("no_reward", "bp_weight", 0), ("no_leash", "dm_weight", 0), ("dmd2", "eta", 1)):
        assert json.loads((run / "ablations" / name / "args.json").read_text())[flag] == value

    shutil.copytree(run, tmp_path / "again")
    both = ["--runs", str(run), str(tmp_path / "again"), "--out", str(tmp_path / "sum")]
    demo.main(demo.parse_args(["--stages", "summary", *both]))
    text = (tmp_path / "sum" / "summary.md").read_text()
    gap = np.subtract(*(np.mean(row["scores"]["geneval_strict"]) for row in (rows[1], rows[0])))
    assert f"| RTDMD − AC-DMD | {gap:+.3f} ± " in text and (tmp_path / "sum" / "rewards.png").is_file()


def test_a_run_of_another_length_has_a_folder_of_its_own():
    """In one folder the longer would go on from the shorter's end, where the rate has fallen to 0."""
    runs = {flag: demo.parse_args([flag] if flag else []) for flag in ("", "--quick", "--long")}
    assert len({args.out for args in runs.values()}) == len({args.rtdmd_epochs for args in runs.values()}) == 3
    assert all(args.rl == args.out / "rtdmd" / "final" for args in runs.values())
    assert demo.parse_args(["--long", "--out", "mine"]).out == Path("mine")


def test_the_long_run_s_settings_are_of_stage_2_and_an_ablation_s_own_count(tmp_path, monkeypatch):
    commands = []

    def start(command, env):
        commands.append(command)
        for name in ("generator_ema", "fake"):
            (Path(command[command.index("--out") + 1]) / "final" / name).mkdir(parents=True)
        return SimpleNamespace(wait=lambda: 0, returncode=0)

    monkeypatch.setattr(demo.subprocess, "Popen", start)
    args = demo.parse_args(["--long", "--out", str(tmp_path)])
    demo.run_stage("acdmd.py", args, tmp_path / "acdmd")
    demo.run_stage("rtdmd.py", args, tmp_path / "two")
    demo.run_stage("rtdmd.py", args, tmp_path / "three", "--bp_weight", "0")
    (script, *first), *others = (command[command.index("cpu") - 2 :] for command in commands)
    one, (two, three) = acdmd.parse_args(first), (rtdmd.parse_args(flags) for _, *flags in others)
    assert script.endswith("acdmd.py") and one.lr_decay == acdmd.PRESETS["classroom"]["lr_decay"]
    assert (two.epochs, two.lr_decay, two.bp_weight) == (1800, 1, 0.4)
    assert (three.epochs, three.lr_decay, three.bp_weight) == (1800, 1, 0)
    pairs = rewards.read_prompts(two.prompts)
    assert pairs == rewards.classroom_prompts(**demo.LONG_TASKS) != rewards.classroom_prompts(**rtdmd.WEAK_TASKS)


def test_a_missing_package_is_named_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(models.UserError, match="pip install matplotlib"):
        demo.main(demo.parse_args(["--out", str(tmp_path / "run")]))
    assert not (tmp_path / "run").exists()


def test_errors_of_a_summary_are_over_runs_and_captions():
    draws = [np.arange(100)] * 3  # captions as they are: no error of theirs
    run = lambda value: {"scores": {c: [value] * 100 for c in demo.COLUMNS}, "distances": [value] * 3}  # noqa: E731
    runs = [{"a": run(value), "b": run(0.5)} for value in (0.5, 0.6, 0.7)]
    assert demo.over_runs(runs, "a", "b", draws)[::2] == ["+0.100 ± 0.058"] * 3  # std .1 over root 3
    alike = [{"a": {"scores": {c: [0, 1] * 50 for c in demo.COLUMNS}, "distances": [1] * 3}}] * 2
    draws = demo.resamples([{"tag": "one", "prompt": str(i)} for i in range(100)], 300)
    cell = demo.over_runs(alike, "a", None, draws)[0]
    assert cell.startswith("0.500 ± ") and float(cell.split()[-1]) == pytest.approx(0.05, rel=0.25)


def test_reward_gaps_subtract_the_control_epoch_by_epoch(tmp_path):
    noise = np.random.default_rng(0).normal(size=24)  # prompts that are easy or hard for both
    for folder, slope in (("rtdmd", 0.01), ("ablations/no_reward", 0), ("ablations/no_policy", 0.005)):
        (tmp_path / folder).mkdir(parents=True)
        rows = [{"step": i + 1, "reward/geneval_strict": noise[i] + slope * i} for i in range(24)]
        lines = [json.dumps(row) + "\n" for row in ({"step": 0, "eval/fd": 1.0}, *rows)]
        (tmp_path / folder / "log.jsonl").write_text("".join(lines))
    (tmp_path / "rtdmd/args.json").write_text(json.dumps({"batch_size": 4, "batches": 2, "world size": 3}))
    gaps = demo.reward_gaps([tmp_path], blocks=6)
    assert set(gaps) == {"RTDMD", "RTDMD, no policy gradient"}
    images, means, errors = gaps["RTDMD"]
    assert images.tolist() == [24 * (4 * k + 2) for k in range(6)]
    assert np.allclose(means, [0.01 * (4 * k + 1.5) for k in range(6)]) and max(errors) < 0.02
    assert demo.draw_rewards(gaps, tmp_path / "a.png") and (tmp_path / "a.png").is_file()


def test_curves_are_drawn_of_what_there_is(tmp_path):
    file, png = tmp_path / "log.jsonl", tmp_path / "curves.png"
    for rows, drawn in (
        (None, False),
        ([{"step": 1, "a": 1.0}], False),
        ([{"step": 1, "a": 1}, {"step": 2, "a": 2}], True),
    ):
        if rows:
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert demo.draw_curves([("run", file, ["a", "b"])], png) == png.is_file() == drawn


def test_distances_see_a_planted_bias_and_nothing_in_real_scenes():
    metadata = shapes.sample_prompts(1800, 3, "heldout")
    scorers = rewards.load_scorers({"clipscore": 1.0}, "cpu", models.CLASSROOM)
    real, again = demo.truth(scorers, metadata), demo.distribution(scorers, shapes.pictures(metadata, 6), metadata)
    rng = np.random.default_rng(7)
    scenes = [shapes.scene(m, rng) for m in metadata]
    for m, scene in zip(metadata, scenes, strict=True):  # every second open colour turns green
        if not any("color" in need for need in m["include"]) and rng.random() < 0.5:
            scene[:] = [(shape, "green", *cell) for shape, _, *cell in scene]
    biased = torch.from_numpy(shapes.render(scenes, rng)).permute(0, 3, 1, 2).float() / 255
    biased = demo.distribution(scorers, biased, metadata)
    (fd, tv, cells), (fd_error, *_) = demo.distance_difference(again, None, real, n=20)
    assert fd < 0.5 and tv < 0.1 and cells < 0.15 and 0 < fd_error < 0.4
    more, error = demo.distance_difference(biased, again, real, n=20)
    assert more[0] > 4 * error[0] and more[1] > 4 * error[1] and more[1] > 0.2 and abs(more[2]) < 0.1
    black = demo.distribution(scorers, torch.zeros(12, 3, 64, 64), metadata[:12])
    assert np.isfinite(demo.distances(black, real)).all()


def test_errors_are_over_captions_and_over_the_pictures_of_an_only_one():
    """Each task's own share of the error; of 50 captions with 4 pictures each, of one with 100."""
    metadata = [{"tag": "many", "prompt": str(i // 4)} for i in range(200)] + [{"tag": "one", "prompt": "x"}] * 100
    picks = demo.resamples(metadata, 300)
    assert all(len(p) == 300 and (p < 200).sum() == 200 for p in picks)
    rng = np.random.default_rng(0)
    by_caption, by_picture = np.repeat(rng.normal(size=50), 4), rng.normal(size=100)
    noise = rng.normal(size=200)  # no effect of the caption
    real = {"draws": picks}
    for own, want in ((by_caption, 50**-0.5 * 2 / 3), (noise, 200**-0.5 * 2 / 3), (np.zeros(200), 0)):
        row = {"scores": {"a": np.concatenate([own, by_picture])}}
        mean, error = demo.difference(row, None, "a", real)
        assert mean == row["scores"]["a"].mean()
        assert error == pytest.approx((want**2 + (1 / 10 * 100 / 300) ** 2) ** 0.5, rel=0.25)


def test_frechet_distance_of_two_gaussians():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, (20_000, 3)), rng.normal(2, 3, (20_000, 3))
    assert rewards.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert rewards.frechet_distance(a, b) == pytest.approx(3 * (2**2 + (3 - 1) ** 2), rel=0.02)


def test_the_log_is_the_same_however_often_it_is_written(distilled, tmp_path):
    assert stage_1(tmp_path, "--steps", 4, "--log_every", 3, "--save_every", 4) == log(distilled)


def test_held_out_evaluation_changes_nothing_and_survives_a_resume(distilled, tmp_path):
    prompts = tmp_path / "heldout.jsonl"
    rows = shapes.sample_prompts(6, 0, "validation")
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--eval_every", 2, "--eval_prompts", prompts, "--eval_rewards", "geneval_strict,clipscore"]
    whole = stage_1(tmp_path / "whole", "--steps", 4, "--save_every", 2, *flags)
    scored = [row for row in whole if "eval/clipscore" in row]
    assert [row for row in whole if row not in scored] == log(distilled)
    assert [row["step"] for row in scored] == [0, 2, 4]
    assert all({"eval/geneval_strict", "eval/clipscore_error", "eval/fd"} < set(row) for row in scored)
    assert scored[0]["eval/clipscore"] != scored[2]["eval/clipscore"]
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(tmp_path / "part/final"), shutil.rmtree(tmp_path / "part/step_000004")
    assert stage_1(tmp_path / "part", "--steps", 4, "--save_every", 2, *flags, "--resume", tmp_path / "part") == whole
    # step 0 is the teacher's transformer, walked as the student: sample.py's own numbers for these prompts
    out = tmp_path / "samples"
    flags = ["--sampler", "student", "--prompts", str(prompts), "--eval", "clipscore", "--out", str(out)]
    sample.main(sample.parse_args(flags))
    summary = json.loads((out / "metadata.json").read_text())["rewards"]
    assert summary["clipscore"]["mean"] == pytest.approx(scored[0]["eval/clipscore"], abs=1e-5)
    with pytest.raises(models.UserError, match="--eval_every needs --eval_prompts FILE"):
        args = acdmd.parse_args(["--model", "sd3", "--prompts", str(prompts), "--eval_every", "5"])
        rewards.HeldOut(args, "cpu")


def test_sample_tells_the_distance_to_a_folder_of_pictures(tmp_path, capsys):
    flags = ["--lora", str(ROOT / "classroom/adapters/acdmd/generator_ema"), "--n_images", "12", "--device", "cpu"]
    sample.main(sample.parse_args([*flags, "--out", str(tmp_path / "a")]))
    for seed, out in ((0, "b"), (1, "c")):
        more = ["--out", str(tmp_path / out), "--fd_reference", str(tmp_path / "a"), "--seed", str(seed)]
        sample.main(sample.parse_args([*flags, *more]))
    same, other = (json.loads((tmp_path / out / "metadata.json").read_text())["fd"] for out in "bc")
    assert (same["n"], same["n_reference"]) == (12, 12) and same["value"] == pytest.approx(0, abs=1e-4)
    assert other["value"] > 0.1 and "12 pictures to 12 of" in capsys.readouterr().out


def test_what_cannot_be_evaluated_is_said_first(tmp_path, capsys):
    (tmp_path / "one.txt").write_text("a cat\n")
    (tmp_path / "plain.txt").write_text("a cat\na dog\n")
    flags = ["--eval_rewards", "clipscore", "--eval_every", "5", "--eval_prompts"]
    plain = acdmd.parse_args([*flags, str(tmp_path / "plain.txt")])
    assert rewards.HeldOut(plain, "cpu").reference is None  # nobody can draw these
    one = acdmd.parse_args([*flags, str(tmp_path / "one.txt"), "--fd_reference", str(tmp_path)])
    with pytest.raises(models.UserError, match="give --eval_prompts of 2 prompts or more"):
        rewards.HeldOut(one, "cpu")
    with pytest.raises(models.UserError, match="ask for 2 or more"):
        sample.main(sample.parse_args(["--prompt", "a cat", "--fd_reference", str(tmp_path)]))
    with pytest.raises(SystemExit):
        acdmd.parse_args(["--eval_every", "0", "--eval_prompts", "a.txt"])
    assert "give --eval_every N too" in capsys.readouterr().err
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "own.py").write_text("def twice(images, prompts, metadata): return [0.0] * len(prompts)")
    rewards.find_scorer(f"{tmp_path}/a/own.py:twice")
    with pytest.raises(models.UserError, match="twice is a function of .*a/own.py too: give one another name"):
        rewards.find_scorer(f"{tmp_path}/b/own.py:twice")


def test_rewards_of_training_serve_the_evaluation_too(tmp_path):
    scorers = rewards.load_scorers({"clipscore": 1.0, "geneval": 1.0}, "cpu", models.CLASSROOM)
    more = rewards.load_scorers({"clipscore": 1.0}, "cpu", models.CLASSROOM, shared=scorers)
    assert more.scorers[0] is scorers.scorers[0] and more.files.clip() is scorers.scorers[0].clip
    with pytest.raises(models.UserError, match="holds 0 pictures"):
        more.features_of_folder(tmp_path)
    images = torch.rand(3, 3, 64, 64)
    for i, image in enumerate(images):
        models.save_grid(image[None], tmp_path / f"{i}.png", 1, gap=0)
    assert np.allclose(more.features_of_folder(tmp_path), more.features(images), atol=1e-5)


def test_ablations_compare_like_with_like(distilled, tmp_path):
    shutil.copytree(distilled, tmp_path / "acdmd")
    (tmp_path / "rtdmd/final/rl_ema").mkdir(parents=True)
    with pytest.raises(models.UserError, match="/acdmd has 4 steps: add --acdmd_steps 4"):
        demo.main(demo.parse_args(["--out", str(tmp_path), "--stages", "ablations"]))
    with pytest.raises(models.UserError, match="/acdmd has seed 0: add --seed 0"):
        flags = ["--seed", "1", "--acdmd_steps", "4"]
        demo.main(demo.parse_args(["--out", str(tmp_path), "--stages", "ablations", *flags]))
    flags = ["--acdmd_steps", "4", "--rtdmd_epochs", "3"]
    for prompts, more, said in (
        (None, ["--long"], "without --long: leave it out"),
        ("a", [], "with --long: give it"),
    ):
        settings = {"epochs": 3, "seed": 0, "prompts": prompts}
        (tmp_path / "rtdmd/args.json").write_text(json.dumps(settings))
        with pytest.raises(models.UserError, match=said):
            demo.main(demo.parse_args(["--out", str(tmp_path), "--stages", "ablations", *flags, *more]))


@pytest.mark.parametrize("stage", ("report", "ablations"))
def test_what_compares_needs_the_full_method_first(stage, tmp_path):
    with pytest.raises(models.UserError, match="generator_ema does not exist: run the stages acdmd and rtdmd first"):
        demo.main(demo.parse_args(["--out", str(tmp_path), "--stages", stage]))
    assert not list(tmp_path.iterdir())


BAD = {  # command -> what the one line on standard error must say
    "acdmd.py --model sd4": "invalid choice: 'sd4'",
    "acdmd.py --lr_fak 1": "unrecognized arguments: --lr_fak",
    "acdmd.py --model sd35": "--model sd35 needs --prompts FILE",
    "acdmd.py --eta 1.5": "argument --eta: 1.5: must be a finite number, 0 to 1",
    "rtdmd.py --step_weights 1,2": "argument --step_weights: 1,2: must be three numbers, not all 0, such as 0,2.5,1",
    "rtdmd.py --step_weights 0,0,0": "must be three numbers, not all 0",
    "rtdmd.py --step_weights 1,0,0": "--n_chosen 2 is more steps than --step_weights 1,0,0 has above 0: give --step_",
    "acdmd.py --batch_size 0": "argument --batch_size: 0: must be a whole number, at least 1",
    "acdmd.py --prompts {tmp}/none.txt": "none.txt cannot be read: No such file",
    "acdmd.py --prompts {tmp}/empty.txt": "empty.txt holds no prompts",
    "acdmd.py --prompts {tmp}/list.csv": "list.csv, entry 1: no text under prompt or prompts or text or caption",
    "acdmd.py --prompts {tmp}/torn.jsonl": "torn.jsonl is torn, or of another format than",
    "acdmd.py --prompts {tmp}/nokey.jsonl": "nokey.jsonl, entry 1: no text under prompt or",
    "acdmd.py --resolution 50 --steps 1": "resolution 50 does not divide by 16: try 48 or 64",
    "acdmd.py --weights {tmp}/nowhere": "no weights at",
    "acdmd.py --resume {tmp}": "no checkpoint there",
    "acdmd.py --resume {tmp}/mistyped": "no such folder; give a run folder or one of its step_NNNNNN",
    "rtdmd.py --distilled {tmp}": "has no generator_ema: run acdmd.py first",
    "rtdmd.py --distilled {acdmd} --rewards clipscore=1,beauty=1": "unknown reward 'beauty'; allowed: pickscore, hpsv2",
    "rtdmd.py --distilled {acdmd} --rewards own.py:f": "reward own.py:f: FileNotFoundError",
    "rtdmd.py --distilled {acdmd} --rewards clipscore=much": "weight 'much' of reward clipscore is no number",
    "rtdmd.py --distilled {acdmd} --group_size 7": "do not split into groups of 7: try --group_size 6",
    "rtdmd.py --distilled {acdmd} --prompts {tmp}/plain.txt": 'has no "tag" and "include", which geneval needs',
    "rtdmd.py --distilled {acdmd} --rewards geneval=1": "--bp_weight needs a differentiable reward such as clipscore",
    "rtdmd.py --distilled {acdmd} --rewards geneval=1,clipscore=0": "--bp_weight needs a differentiable reward such as",
    "rtdmd.py --distilled {acdmd} --lr_decay 2": "argument --lr_decay: 2: must be a finite number, 0 to 1",
    "sample.py --eval clipscore=0": "add up to 0.0: it must be above 0",
    "sample.py --batch_size 0": "argument --batch_size: 0: must be a whole number, at least 1",
    "rtdmd.py --distilled {acdmd} --eta 0": "the policy gradient needs noise",
    "rtdmd.py --distilled {acdmd} --rewards clipscore --reward_dir {tmp}": "cannot open",
    "rtdmd.py --distilled {acdmd} --reward_dir {tmp}": "has the class 'circle', which geneval's judge does not know",
    "sample.py --lora {tmp}/nowhere": "no adapter at",
    "sample.py --lora {acdmd}": "itself: give one of",
    "sample.py --prompt a --prompts b.txt": "give --prompt or --prompts, not both",
    "sample.py --steps 0": "argument --steps: 0: must be a whole number, at least 1",
    "sample.py --device cuda": "torch sees no GPU: use --device cpu",
    "sample.py --prompt cat --eval geneval=1": "which geneval needs",
    "acdmd.py --shard both": "invalid choice: 'both' (choose from",
    "acdmd.py --skip_nonfinite -1": "argument --skip_nonfinite: -1: must be a whole number, at least 0",
    "acdmd.py --prompts {tmp}": "Is a directory",
    "acdmd.py --prompts {tmp}/latin.txt": "latin.txt is no UTF-8 text: 'utf-8' codec",
    "acdmd.py --prompts {tmp}/none.json": "none.json holds no prompts",
    "acdmd.py --model flux1 --prompts {tmp}/plain.txt --weights {classroom}": "holds a StableDiffusion3Pipeline, and",
    "acdmd.py --model flux1 --prompts {tmp}/plain.txt --weights {tmp}": "(what --export writes is a transformer): [Err",
    "acdmd.py --steps 1 --out {tmp}/plain.txt/run": "cannot write to --out",
    "rtdmd.py --distilled {acdmd} --policy_weight 0 --dm_weight 0 --bp_weight 0": "nothing would train",
    "rtdmd.py --distilled {acdmd} --reward_batch_size 0": "--reward_batch_size: 0: must be a whole number, at least 1",
    "rtdmd.py --distilled {acdmd} --rewards clipscore=nan": "add up to nan: it must be above 0",
    "rtdmd.py --distilled {acdmd} --group_size 1 --batch_size 90 --batches 9": "an epoch needs 810 distinct prompts",
    "sample.py --lora {tmp}/plain.txt": "plain.txt is no complete file of tensors",
    "sample.py --lora {acdmd}/fake --lora {tmp}": "no adapter at",
    "sample.py --lora {acdmd}/fake --export {tmp}": "exists: give a new folder",
    "acdmd.py --lr nan": "argument --lr: nan: must be a finite number, at least 0",
    "acdmd.py --ema_decay 1.5": "argument --ema_decay: 1.5: must be a finite number, 0 to 1",
    "acdmd.py --wandb": "--wandb needs a package: pip install wandb",
    "acdmd.py --model flux2-4b --prompts {tmp}/plain.txt --weights {tmp}": "--weights without --generator_weights",
    "rtdmd.py --distilled {tmp}/torn": "is no complete file of tensors",
    "sample.py --eval hpsv2 --reward_dir {tmp}": "cannot open HPS_v2.1_compressed.pt of xswu/HPSv2",
    "sample.py --eval hpsv2 --reward_dir {tmp}/nowhere": "nowhere is not a folder: make it, or leave it out",
    "sample.py --eval clipscore=1,clipscore=2": "reward clipscore stands twice in 'clipscore=1,clipscore=2'",
    "sample.py --out {tmp}": "is a file or not empty: give a new folder",
    "sample.py --out {tmp}/plain.txt": "is a file or not empty: give a new folder",
    "sample.py --out {tmp}/plain.txt/run": "cannot write to",
    "sample.py --seed -1": "argument --seed: -1: must be a whole number, at least 0",
    "sample.py --guidance_scale nan": "argument --guidance_scale: nan: must be a finite number",
    "acdmd.py --sample_every -1": "argument --sample_every: -1: must be a whole number, at least 0",
    "rtdmd.py --distilled {acdmd} --reward_margin nan": "argument --reward_margin: nan: must be a finite number",
    "acdmd.py --steps 2 --rank 4 --resume {acdmd}": "--steps 2: the run is at 4 already",
    "acdmd.py --rank 5 --resume {acdmd}": "--rank 5: the adapters of this run have rank 4, and keep it",
    "prompts.py {tmp}/plain.txt/a.jsonl --n 6": "cannot write",
    "rtdmd.py --distilled {acdmd}/..": "/final",
    "rtdmd.py --distilled {acdmd} --prompts {tmp}/dog.jsonl": "prompt 1 ('a dog') has the class 'dog', which geneval's",
    "prompts.py a.jsonl --n 0": "argument --n: 0: must be a whole number, at least 1",
    "prompts.py prompts.txt": "prompts.txt is no .jsonl: name a new .jsonl",
    "prompts.py {tmp}/dog.jsonl": "dog.jsonl exists: name a new .jsonl",
    "prompts.py a.jsonl --exclude {tmp}/plain.txt": 'prompt 1 (\'a cat\') has no "tag" and "include"',
}


NEEDS_WEIGHTS = ("--resolution 50",)  # what divides it stands in the pipeline's files


@pytest.mark.parametrize("command", BAD)
def test_bad_input(command, distilled, tmp_path, monkeypatch, capsys):
    if "cuda" in command and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "plain.txt").write_text("a cat\n")
    (tmp_path / "list.csv").write_text("a cat\na dog\n")
    (tmp_path / "torn.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    (tmp_path / "nokey.jsonl").write_text('{"label": "a"}\n')
    (tmp_path / "latin.txt").write_bytes("café\n".encode("latin-1"))
    (tmp_path / "none.json").write_text("[]")
    dog = {"prompt": "a dog", "tag": "single_object", "include": [{"class": "dog", "count": 1}]}
    (tmp_path / "dog.jsonl").write_text(json.dumps(dog) + "\n")  # COCO's, not the classroom's
    for name in ("generator_ema", "fake"):
        (tmp_path / "torn" / name).mkdir(parents=True)
        (tmp_path / "torn" / name / models.LORA_FILE).write_bytes(b"half")
    places = dict(tmp=tmp_path, acdmd=distilled / "final", classroom=models.CLASSROOM / "teacher")
    script, *flags = command.format(**places).split()
    module = {"acdmd.py": acdmd, "rtdmd.py": rtdmd, "sample.py": sample, "prompts.py": prompt_writer}[script]
    monkeypatch.setattr(sys, "argv", [script, *flags])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    loaded, load = [], models.load_transformer
    monkeypatch.setattr(models, "load_transformer", lambda *args: loaded.append(args) or load(*args))
    with pytest.raises(SystemExit) as stopped:
        models.run(module.main, module.parse_args())
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert BAD[command] in said and said.count("\n") == 1
    assert not loaded or any(flag in command for flag in NEEDS_WEIGHTS)


@pytest.mark.parametrize("command", ("acdmd.py --model sd4", "rtdmd.py --distilled {tmp}", "sample.py --lora nowhere"))
def test_bad_input_ends_a_process_with_one_line(command, tmp_path):
    script, *flags = command.format(tmp=tmp_path).split()
    done = subprocess.run([sys.executable, str(ROOT / script), *flags], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    usage, _, said = done.stderr.rpartition(f"{script}: error: ")  # argparse prints how a script is used before it
    assert said.count("\n") == 1 and "Traceback" not in usage


def test_a_world_size_that_was_left_over_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(models.UserError, match="WORLD_SIZE=2 is set, but no MASTER_ADDR: unset WORLD_SIZE, or start"):
        stage_1(tmp_path, "--steps", 1)


@pytest.mark.parametrize("command", ("acdmd.py --steps 1 --sample_every 0 --batch_size 2", "sample.py --prompt größe"))
def test_a_terminal_that_knows_ascii_only_shows_any_folder(command, tmp_path):
    script, *flags = command.split()
    out = tmp_path / "größe ❤"
    env = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii:strict"}
    run = partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, env=env)
    command = [sys.executable, script, *flags, "--device", "cpu", "--out", str(out)]
    done = run(command)
    assert done.returncode == 0 and "gr\\xf6\\xdfe \\u2764" in done.stdout, done.stderr[-2000:]
    again = run(command)  # now the folder is refused, on standard error
    assert again.returncode == 2 and "gr\\xf6\\xdfe \\u2764" in again.stderr.splitlines()[-1]


def test_a_scorer_that_returns_nan_stops_the_run():
    scorers = rewards.load_scorers({"clipscore": 1.0}, "cpu", models.CLASSROOM)
    scorers.scorers[0].clip.cache["a"] = torch.full((64,), float("nan"))
    with pytest.raises(ValueError, match="clipscore returned a score that is not finite"):
        scorers.score(torch.rand(1, 3, 64, 64), ["a"])
