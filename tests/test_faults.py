"""Runs that are killed, disks that are full, checkpoints that are torn: nothing is lost, nothing is half loaded."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
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
WRITES = {"save_file": 1, "save": 1, "write_text": 0, "copyfile": 1}  # what writes a file -> which argument names it
STEPS, FIRST = 5, 3  # steps of a run; the save in which the first life ends, so that later ones have an old one to drop


def life(flags, at, nth, told):
    """One process of a run, killed at operation `at` of its nth save: in a write's middle, before anything else."""
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
    saves, operations, save = [], [], models.Run.save

    def counted(owner, name):
        do = getattr(owner, name)

        def operation(*args, **kwargs):
            if len(saves) != nth:
                return do(*args, **kwargs)
            operations.append(name)
            if len(operations) - 1 != at:
                return do(*args, **kwargs)
            if name in WRITES:
                do(*args, **kwargs)
                os.truncate(args[WRITES[name]], os.path.getsize(args[WRITES[name]]) // 2)
            if name == "rmtree" and Path(args[0]).is_dir():
                next(path for path in Path(args[0]).rglob("*") if path.is_file()).unlink()
            os.write(told, name.encode())
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(owner, name, operation)

    def told_save(self, *args, **kwargs):
        saves.append(1)
        save(self, *args, **kwargs)
        saves.extend([1] * 1000 * (len(saves) == nth))  # no later save counts

    models.Run.save = told_save
    owners = {"save_file": models, "save": torch, "write_text": Path, "rename": Path, "fsync": os}
    for name, owner in (owners | {"copyfile": shutil, "rmtree": shutil}).items():
        counted(owner, name)
    try:
        acdmd.main(acdmd.parse_args(flags))
        os._exit(0)
    finally:
        os._exit(1)


def harness(folder):
    """A run to its end; then one that is killed at every operation of a save in turn. Forks of one process that only
    imported. Writes kills.json: the operations."""
    flags = [*FLAGS.split(), "--steps", str(STEPS), "--device", "cpu", "--out"]
    kills, out = [], str(folder / "killed")
    lives = [([str(folder / "whole")], -1, 1), ([out], 0, FIRST)]
    lives += [([out, "--resume", out], at, 1) for at in range(1, 100)]
    for number, (more, at, nth) in enumerate(lives):
        heard, told = os.pipe()
        pid = os.fork()
        if pid == 0:
            life([*flags, *more], at, nth, told)
        os.close(told)
        _, status = os.waitpid(pid, 0)
        kills.append(os.read(heard, 99).decode())
        os.close(heard)
        if not os.WIFSIGNALED(status) and number:  # its save had no such operation: it came to the end
            break
    whole, *kills, last = kills
    assert status == 0 and whole == last == ""
    (folder / "kills.json").write_text(json.dumps(kills))


def log(out):
    volatile = ("images_per_s", "seconds", "peak_gb")
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in volatile} for row in rows]


def test_a_kill_at_any_operation_of_a_save_changes_nothing(tmp_path):
    """kill -9 in the middle of each write, before each flush and rename: the run goes on, to the bit-identical end."""
    call = f"import pathlib, test_faults; test_faults.harness(pathlib.Path({str(tmp_path)!r}))"
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    kills, out = json.loads((tmp_path / "kills.json").read_text()), tmp_path / "killed"
    assert kills[:8] == ["rmtree", *["save_file"] * 3, "save", "write_text", "copyfile", "fsync"]
    assert kills[8:17] == ["fsync"] * 9 and kills[17:20] == ["rename", "fsync", "rmtree"]  # 6 files and 4 folders
    assert log(out) == log(tmp_path / "whole")
    for name in ("generator", "generator_ema", "fake"):
        a, b = (models.load_file(run / "final" / name / models.LORA_FILE) for run in (tmp_path / "whole", out))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert not list(out.glob(".*.partial")) and (out / "final" / "acdmd.py").is_file()


MEETINGS = ("before it looks", "before its first step", "before its last step", "when it has ended")


def first_of_two(flags, meeting, here):
    """A run that stops itself, its folder as it is then, at the meeting point; another one comes before it goes on."""
    init, step, steps = models.Run.__init__, acdmd.step_optimizer, []

    def wait():
        os.write(here, b".")
        os.kill(os.getpid(), signal.SIGSTOP)

    def looking(self, *args):
        if meeting == "before it looks":
            wait()
        init(self, *args)

    def stepping(*args):
        steps.append(1)
        if meeting == {1: "before its first step", 6: "before its last step"}.get(len(steps)):
            wait()
        return step(*args)

    models.Run.__init__, acdmd.step_optimizer = looking, stepping
    models.run(acdmd.main, acdmd.parse_args(flags))
    if meeting == "when it has ended":
        wait()


def pairs(folder):
    """For each meeting point two runs in one folder, and one run alone. Forks of one process that only imported.

    Writes pairs.json: {meeting point: exit status and last line of the first and the second}.
    """
    torch.set_num_threads(1)
    flags, rows = [*FLAGS.split(), "--save_every", "2", "--steps", "4", "--device", "cpu", "--out"], {}

    def start(meeting, name, here=None):
        pid = os.fork()
        if pid == 0:
            sys.stdout = sys.stderr = (folder / f"{meeting} {name}.txt").open("w", buffering=1)
            try:
                first_of_two([*flags, str(folder / meeting)], name == "first" and meeting, here)
                os._exit(0)
            except SystemExit as error:
                os._exit(error.code)
            finally:
                os._exit(99)
        return pid

    for meeting in ("alone", *MEETINGS):
        heard, here = os.pipe()
        first = start(meeting, "first", here)
        statuses = {}
        if meeting in MEETINGS:
            os.close(here)
            assert os.read(heard, 1)
            os.waitpid(first, os.WUNTRACED)  # it has stopped
            statuses["second"] = os.waitstatus_to_exitcode(os.waitpid(start(meeting, "second"), 0)[1])
            os.kill(first, signal.SIGCONT)
        statuses["first"] = os.waitstatus_to_exitcode(os.waitpid(first, 0)[1])
        said = {name: (folder / f"{meeting} {name}.txt").read_text().splitlines()[-1] for name in statuses}
        rows[meeting] = {name: (status, said[name]) for name, status in statuses.items()}
    (folder / "pairs.json").write_text(json.dumps(rows))


def test_two_runs_in_one_folder_leave_one_run_wherever_they_meet(tmp_path):
    """Whoever comes second ends with a line that says why, and takes nothing from the first."""
    call = f"import pathlib, test_faults; test_faults.pairs(pathlib.Path({str(tmp_path)!r}))"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "pairs.json").read_text())
    assert rows.pop("alone")["first"][0] == 0 and list(rows) == list(MEETINGS)
    for meeting, row in rows.items():
        refused = "first" if meeting == "before it looks" else "second"
        assert {name: status for name, (status, _) in row.items()} == {"second": 0, "first": 0} | {refused: 2}, row
        late = meeting in ("before it looks", "when it has ended")
        assert re.search("holds a run" if late else "is in use by a run", row[refused][1]), row
        a, b = tmp_path / "alone", tmp_path / meeting
        assert sorted(p.name for p in a.iterdir()) == sorted(p.name for p in b.iterdir()) and log(a) == log(b)
        for name in ("generator", "generator_ema", "fake"):
            assert (a / "final" / name / models.LORA_FILE).read_bytes() == (
                b / "final" / name / models.LORA_FILE
            ).read_bytes()


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


def test_a_folder_in_use_is_refused(run):
    """The lock is the operating system's, and goes with the process that holds it."""
    code = "import fcntl, sys, time; f = open(sys.argv[1], 'a+'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True)"
    holder = [sys.executable, "-c", code + "; time.sleep(60)", str(run / ".lock")]
    with subprocess.Popen(holder, stdout=subprocess.PIPE) as process:
        process.stdout.read(1)
        with pytest.raises(models.UserError, match="is in use by a run: let it end, or give another --out"):
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

    def broken(optimizer, decay, *args):
        if optimizer.defaults["lr"] == 1.0:  # --lr_fake of these tests
            calls.append(1)
            if len(calls) - 1 in at:
                optimizer.param_groups[0]["params"][1].grad[0, 0] = float("nan")
        return step(optimizer, decay * 1e-3, *args)

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
