"""Runs that are killed, disks that are full, checkpoints that are torn: nothing is lost, nothing is half loaded."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline  # noqa: F401 (once, not in each fork)
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel  # noqa: F401

import acdmd
import models

ROOT = Path(__file__).resolve().parent.parent
FLAGS = (
    "--batch_size 2 --consistency_batch 1 --rank 2 --log_every 1 --fake_update_ratio 2 --save_every 1 "
    "--sample_every 0 --eval_every 0"
)
KILLS, STEPS = 40, 120


def life(flags, started):
    """One process of a run whose saving is slow, so that many kills fall into it; never returns."""
    torch.set_num_threads(1)
    save, step = models.save_adapter, acdmd.step_optimizer

    def slow(*args):
        save(*args)
        time.sleep(0.03)

    def told(*args):
        os.write(started, b".")
        return step(*args)

    models.save_adapter, acdmd.step_optimizer = slow, told
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
    try:
        acdmd.main(acdmd.parse_args(flags))
        os._exit(0)
    finally:
        os._exit(1)


def harness(folder):
    """Run to the end once; then again with 40 kills on the way. Forks of one process that has only imported.

    Writes kills.json: how many kills, and how many of them left a half-written checkpoint.
    """
    flags = [*FLAGS.split(), "--steps", str(STEPS), "--device", "cpu", "--out"]
    rng, out, kills, inside = np.random.default_rng(0), folder / "killed", 0, 0
    runs = [[str(folder / "whole"), "--save_every", "60"]] + [[str(out)]] * (KILLS + 1)
    for number, more in enumerate(runs):
        more = more + (["--resume", str(out)] if number and list(out.glob("step_*")) else [])
        heard, started = os.pipe()
        pid = os.fork()
        if pid == 0:
            life([*flags, *more], started)
        os.close(started)
        if 0 < number <= KILLS:
            assert os.read(heard, 1), "the run ended before its first step"
            time.sleep(rng.uniform(0, 0.4))
            os.kill(pid, signal.SIGKILL)
            inside += bool(list(out.glob(".*.partial")))
        _, status = os.waitpid(pid, 0)
        os.close(heard)
        killed = os.WIFSIGNALED(status)
        assert killed == (0 < number <= KILLS), f"process {number} ended with status {status}: make the run longer"
        kills += killed
    (folder / "kills.json").write_text(json.dumps({"kills": kills, "inside": inside}))


def log(out):
    volatile = ("images_per_s", "seconds", "peak_gb")
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in volatile} for row in rows]


def test_forty_kills_change_nothing(tmp_path):
    """kill -9 at random moments, also inside a save: every time the run goes on, to the bit-identical end."""
    call = f"import pathlib, test_faults; test_faults.harness(pathlib.Path({str(tmp_path)!r}))"
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    told, out = json.loads((tmp_path / "kills.json").read_text()), tmp_path / "killed"
    assert told["kills"] == KILLS
    assert told["inside"] >= 5, "hardly a kill fell into a save: make it slower"
    assert log(out) == log(tmp_path / "whole")
    for name in ("generator", "generator_ema", "fake"):
        a, b = (models.load_file(run / "final" / name / models.LORA_FILE) for run in (tmp_path / "whole", out))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert not list(out.glob(".*.partial")) and (out / "final" / "acdmd.py").is_file()


def pairs(folder, n=20, steps=12):
    """n times two runs in one folder, the second up to 3 s after the first; forks of one process that only imported.

    Writes pairs.json: the exit status and the last line of each run, in order of their start.
    """
    torch.set_num_threads(1)
    flags = [*FLAGS.split(), "--save_every", "4", "--steps", str(steps), "--device", "cpu", "--out"]
    rng, rows = np.random.default_rng(0), []
    for pair in range(-1, n):  # -1: a run alone
        pids = []
        for number in range(1 if pair < 0 else 2):
            time.sleep(number * 3 * rng.random() * rng.random())
            pids.append(os.fork())
            if pids[-1] == 0:
                sys.stdout = sys.stderr = (folder / f"{pair}_{number}.txt").open("w", buffering=1)
                try:
                    models.run(acdmd.main, acdmd.parse_args([*flags, str(folder / f"run_{pair}")]))
                    os._exit(0)
                except SystemExit as error:
                    os._exit(error.code)
                finally:
                    os._exit(99)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        lines = [(folder / f"{pair}_{number}.txt").read_text().splitlines()[-1] for number in range(len(pids))]
        rows.append(list(zip(statuses, lines, strict=True)))
    (folder / "pairs.json").write_text(json.dumps(rows))


def test_twenty_pairs_of_runs_in_one_folder_leave_one_run_each(tmp_path):
    """Whoever comes second ends with a line that says why, and takes nothing from the first."""
    call = f"import pathlib, test_faults; test_faults.pairs(pathlib.Path({str(tmp_path)!r}))"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    alone, *rows = json.loads((tmp_path / "pairs.json").read_text())
    assert alone[0][0] == 0 and len(rows) == 20
    met = 0
    for pair, row in enumerate(rows):
        assert sorted(status for status, _ in row) == [0, 2], row
        line = next(line for status, line in row if status == 2)
        assert re.search("is in use by (process|another process)|holds a run", line), line
        met += "is in use by" in line
        a, b = tmp_path / "run_-1", tmp_path / f"run_{pair}"
        assert sorted(p.name for p in a.iterdir()) == sorted(p.name for p in b.iterdir()) and log(a) == log(b)
        for name in ("generator", "generator_ema", "fake"):
            assert (a / "final" / name / models.LORA_FILE).read_bytes() == (
                b / "final" / name / models.LORA_FILE
            ).read_bytes()
    assert met >= 5, "hardly two runs met: make them longer"


@pytest.fixture
def run(tmp_path):
    """A run of two steps with a checkpoint each."""
    acdmd.main(acdmd.parse_args([*FLAGS.split(), "--steps", "2", "--out", str(tmp_path / "run")]))
    return tmp_path / "run"


def test_only_folders_of_the_run_are_its_own(run):
    """Copies that a user makes are no checkpoints: they stay, also when later ones go, and --resume looks past them."""
    for name in ("step_000001_best", "step_best", "step_000001.bak", "final_old"):
        shutil.copytree(run / "step_000001", run / name)
    (run / "step_000077").write_text("a file")
    resume(run, "--steps", "6")
    left = sorted(path.name for path in run.glob("*_*"))
    assert left == ["final_old", "step_000001.bak", "step_000001_best", "step_000005", "step_000006", "step_000077"] + [
        "step_best"
    ]
    for number in (999_999, 1_000_000):
        (run / f"step_{number:06d}").mkdir()
    assert [path.name for path in models.step_folders(run)[-2:]] == ["step_999999", "step_1000000"]


def test_checkpoints_are_kept_as_asked(tmp_path):
    flags = [*FLAGS.split(), "--steps", "7", "--keep_every", "3", "--out", str(tmp_path / "run")]
    acdmd.main(acdmd.parse_args(flags))
    assert [int(path.name[5:]) for path in models.step_folders(tmp_path / "run")] == [3, 6, 7]


def test_what_is_not_as_it_was_is_printed(run, tmp_path, capsys, monkeypatch):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue square\n")
    out = str(tmp_path / "other")
    acdmd.main(acdmd.parse_args([*FLAGS.split(), "--steps", "1", "--prompts", str(prompts), "--out", out]))
    prompts.write_text("a red circle\na blue cross\n")
    settings = json.loads((tmp_path / "other/step_000001/args.json").read_text())
    (tmp_path / "other/step_000001/args.json").write_text(json.dumps(settings | {"world size": 8}))
    shutil.rmtree(tmp_path / "other/final")
    capsys.readouterr()
    acdmd.main(acdmd.parse_args([*FLAGS.split(), "--steps", "2", "--prompts", str(prompts), "--resume", out]))
    said = capsys.readouterr().out
    assert "not as before step 1: world size was 8, is 1" in said
    assert "not as before step 1: prompts read was 2, sha256 " in said and "--steps was 1, is 2" in said
    assert "--lr" not in said


def test_nothing_goes_that_was_not_seen_at_the_first_look(run):
    """A checkpoint that appears after the look, whoever made it, stays."""
    args = acdmd.parse_args([*FLAGS.split(), "--steps", "3", "--resume", str(run / "step_000001")])
    look = models.Run.__init__

    def then_another(self, *rest):
        look(self, *rest)
        shutil.copytree(run / "step_000002", run / "step_000009")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models.Run, "__init__", then_another)
        acdmd.main(args)
    assert (run / "step_000009" / "state.pt").is_file() and (run / "final").is_dir()


def test_a_folder_in_use_names_who_uses_it(run):
    """The lock is the operating system's, and goes with the process that holds it."""
    code = "import fcntl, sys, time; f = open(sys.argv[1], 'a+'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True)"
    holder = [sys.executable, "-c", code + "; time.sleep(60)", str(run / ".lock")]
    with subprocess.Popen(holder, stdout=subprocess.PIPE) as process:
        process.stdout.read(1)
        with pytest.raises(models.UserError, match="is in use by .*: let it end, or give another --out"):
            resume(run, "--steps", "3")
        process.kill()
    resume(run, "--steps", "3")


@pytest.mark.parametrize("flag", ("--out", "--prompts", "--resume", "--reward_dir", "--eval_prompts", "--fd_reference"))
def test_the_home_folder_is_meant_by_a_tilde(flag, monkeypatch, tmp_path):
    (tmp_path / "runs").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    args = acdmd.parse_args([f"{flag}=~/runs"])
    assert vars(args)[flag[2:]] == tmp_path / "runs"


def test_a_resolution_beyond_the_table_of_positions_is_named(tmp_path):
    with pytest.raises(models.UserError, match="resolution 80: this transformer's table of positions ends at 64"):
        acdmd.main(acdmd.parse_args([*FLAGS.split(), "--resolution", "80", "--out", str(tmp_path)]))


def resume(out, *more):
    acdmd.main(acdmd.parse_args([*FLAGS.split(), "--steps", "3", "--out", str(out), "--resume", str(out), *more]))


@pytest.mark.parametrize("file", ("state.pt", f"fake/{models.LORA_FILE}", f"generator/{models.LORA_FILE}"))
def test_a_torn_checkpoint_is_refused_and_the_older_one_offered(run, file):
    path = run / "step_000002" / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(models.UserError, match="step_000002 is torn or no checkpoint.*step_000001"):
        resume(run)
    resume(run, "--resume", str(run / "step_000001"))
    assert (run / "final").is_dir() and len(log(run)) == 3


def test_a_run_goes_on_from_its_final_folder_alone(run):
    """The folder that a run is resumed from stays until the next checkpoint is whole."""
    for step in run.glob("step_*"):
        shutil.rmtree(step)
    args = acdmd.parse_args([*FLAGS.split(), "--steps", "3", "--out", str(run), "--resume", str(run / "final")])
    begun = models.Run(args, "steps", acdmd.__file__)
    begun.begin(None, [], {}, 1)
    begun.file.close()
    assert models.read_checkpoint(run / "final")["step"] == 2
    resume(run, "--resume", str(run / "final"))
    assert [row["step"] for row in log(run)] == [1, 2, 3] and models.read_checkpoint(run / "final")["step"] == 3


def test_a_checkpoint_of_the_other_stage_is_refused(run, tmp_path):
    import rtdmd

    small = "--batch_size 2 --batches 1 --group_size 2 --sample_every 0 --eval_every 0 --epochs 1".split()
    flags = [*small, "--distilled", str(run / "final"), "--out", str(tmp_path / "rl"), "--resume", str(run)]
    with pytest.raises(models.UserError, match="step_000002 is of acdmd.py, not of rtdmd.py"):
        rtdmd.main(rtdmd.parse_args(flags))


def test_a_run_goes_on_with_the_adapters_it_began_with_only(run, tmp_path):
    import rtdmd

    small = "--batch_size 2 --batches 1 --group_size 2 --sample_every 0 --eval_every 0".split()
    flags = [*small, "--out", str(tmp_path / "rl"), "--distilled"]
    for name in ("generator_ema", "fake"):  # moved, and written by another library
        folder = tmp_path / "moved" / name
        folder.mkdir(parents=True)
        with models.safe_open(run / "final" / name / models.LORA_FILE, "pt") as file:
            more = file.metadata() | {"written": "anew"}
        models.save_file(models.load_tensors(run / "final" / name / models.LORA_FILE), folder / models.LORA_FILE, more)
    shutil.copytree(run / "final/generator", tmp_path / "other/generator_ema")
    shutil.copytree(run / "final/fake", tmp_path / "other/fake")
    rtdmd.main(rtdmd.parse_args([*flags, str(run / "final"), "--epochs", "1"]))
    more = ["--resume", str(tmp_path / "rl"), "--epochs", "2"]
    for epochs in ("1", "2"):  # of a finished run too: another stage 1 below it would be reported as its own
        with pytest.raises(models.UserError, match="other: not the adapters that this run began with"):
            rtdmd.main(rtdmd.parse_args([*flags, str(tmp_path / "other"), *more[:-1], epochs]))
    rtdmd.main(rtdmd.parse_args([*flags, str(tmp_path / "moved"), *more]))
    assert len(log(tmp_path / "rl")) == 2


def test_a_log_with_a_half_written_line_is_mended(run):
    with (run / "log.jsonl").open("a") as file:
        file.write('{"step": 3, "loss/ac')
    resume(run)
    assert [row["step"] for row in log(run)] == [1, 2, 3]


def test_a_full_disk_is_named_and_the_last_checkpoint_stays(run):
    """A limit on file sizes stands in for the full disk: the write itself fails, in the middle of a file."""
    flags = [*FLAGS.split(), "--steps", "4", "--out", str(run), "--resume", str(run)]

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    command = [sys.executable, "acdmd.py", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=limit)
    said = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and "cannot save" in said and "the last good checkpoint is" in said, done.stderr[-2000:]
    assert sorted(path.name for path in run.glob("step_*")) == ["step_000001", "step_000002"]
    resume(run)


def test_a_checkpoint_is_on_the_disk_before_it_gets_its_name(run, monkeypatch):
    flushed, renamed, rename, fsync = set(), [], Path.rename, models.os.fsync

    def spied_rename(aside, target):
        renamed.append((set(flushed), {path.stat().st_ino for path in [*aside.rglob("*"), aside]}))
        return rename(aside, target)

    monkeypatch.setattr(models.os, "fsync", lambda file: flushed.add(models.os.fstat(file).st_ino) or fsync(file))
    monkeypatch.setattr(Path, "rename", spied_rename)
    resume(run)
    assert renamed and all(len(files) > 8 and files <= done for done, files in renamed)


def test_a_log_on_a_full_disk_is_named(run):
    """/dev/full answers every write with ENOSPC."""
    before = {path: path.read_bytes() for path in (run / "step_000002").rglob("*") if path.is_file()}
    (run / "log.jsonl").unlink()
    (run / "log.jsonl").symlink_to("/dev/full")
    with pytest.raises(models.UserError, match="cannot write to .*log.jsonl.*No space left on device"):
        resume(run)
    assert before == {path: path.read_bytes() for path in before}


@pytest.mark.parametrize("out", ("/sys/run", "{tmp}/file/run"))
def test_an_out_folder_that_cannot_be_written_is_named(tmp_path, out):
    (tmp_path / "file").write_text("")
    flags = [*FLAGS.split(), "--steps", "1", "--out", out.format(tmp=tmp_path)]
    with pytest.raises(models.UserError, match="cannot write to --out"):
        acdmd.main(acdmd.parse_args(flags))


def test_a_malicious_checkpoint_is_refused_and_does_not_run(run, tmp_path):
    import pickle

    class Payload:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    (run / "step_000002" / "state.pt").write_bytes(pickle.dumps({"step": Payload()}))
    with pytest.raises(models.UserError, match="is torn or no checkpoint"):
        resume(run)
    assert not (tmp_path / "executed").exists()


def break_gradients(monkeypatch, module, at):
    """The fake score's gradient is NaN at the given optimiser steps (0, 1, ...)."""
    calls, step = [], module.step_optimizer

    def broken(optimizer, lr, *args):
        if lr == 1.0:  # --lr_fake of these tests
            calls.append(1)
            if len(calls) - 1 in at:
                optimizer.param_groups[0]["params"][1].grad[0, 0] = float("nan")
        return step(optimizer, lr * 1e-3, *args)

    monkeypatch.setattr(module, "step_optimizer", broken)


def test_a_gradient_that_is_not_finite_stops_the_run_with_step_and_term(tmp_path, monkeypatch):
    break_gradients(monkeypatch, acdmd, at=(3,))
    flags = [*FLAGS.split(), *"--steps 20 --lr_fake 1 --lr_decay 0 --log_every 10 --out".split(), str(tmp_path)]
    with pytest.raises(SystemExit, match="step 4: grad_norm/fake is not finite"):
        acdmd.main(acdmd.parse_args([*flags, "--save_every", "2"]))
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_000002"]


def test_a_stop_between_two_writes_of_the_log_does_not_save_what_is_not_finite(tmp_path, monkeypatch):
    """The log is written every 10 steps, so that no GPU waits; a checkpoint on a signal must look all the same."""
    break_gradients(monkeypatch, acdmd, at=(2,))
    calls = []
    monkeypatch.setattr(models.StopSignal, "agreed", lambda self, world_size: calls.append(1) or len(calls) == 3)
    flags = "--steps 20 --lr_fake 1 --lr_decay 0 --log_every 10 --save_every 2".split()
    with pytest.raises(SystemExit, match="step 3: grad_norm/fake is not finite"):
        acdmd.main(acdmd.parse_args([*FLAGS.split(), *flags, "--out", str(tmp_path)]))
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_000002"]


def test_of_several_values_that_are_not_finite_the_cause_is_named(tmp_path):
    nan, one = float("nan"), 1.0
    row = {
        "grad_norm/fake": nan,
        "grad_norm/generator": nan,
        "loss/ac_k1": one,
        "loss/ac_k2": nan,
        "loss/generator": nan,
    }
    args = acdmd.parse_args(["--out", str(tmp_path)])
    run = models.Run(args, "steps", acdmd.__file__)
    run.begin(None, [], {}, 1)
    with pytest.raises(SystemExit, match="step 12: loss/ac_k2 is not finite"):
        run.drop_nonfinite(12, row)
    run.in_a_row = 0
    with pytest.raises(SystemExit, match="step 20: loss/generator is not finite"):
        run.drop_nonfinite(20, {"grad_norm/generator": nan, "loss/generator": nan})
    run.drop_nonfinite(20, {"loss/ac_k1": one})
    assert run.in_a_row == 0


def test_skipped_steps_are_counted_and_change_nothing(tmp_path, monkeypatch):
    break_gradients(monkeypatch, acdmd, at=(1, 2))
    flags = [*FLAGS.split(), "--steps", "4", "--lr_fake", "1", "--lr_decay", "0", "--skip_nonfinite"]
    acdmd.main(acdmd.parse_args([*flags, "2", "--out", str(tmp_path / "two")]))
    rows = log(tmp_path / "two")
    assert [row["skipped"] for row in rows] == [0, 1, 2, 2] and "grad_norm/fake" not in rows[1]
    assert all(np.isfinite(v) for row in rows for v in row.values())
    tensors = models.load_file(tmp_path / "two/final/fake" / models.LORA_FILE)
    assert all(torch.isfinite(t).all() for t in tensors.values())
    break_gradients(monkeypatch, acdmd, at=(1, 2))
    with pytest.raises(SystemExit, match="step 3: grad_norm/fake, 2 times in a row, is not finite"):
        acdmd.main(acdmd.parse_args([*flags, "1", "--out", str(tmp_path / "one")]))
