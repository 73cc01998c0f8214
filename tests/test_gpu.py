"""What must hold on a GPU: `python -m pytest -m gpu`; tests/gpu.sh prints the table.

The device comes from one fixture (--device, tests/conftest.py). Tiny networks are compared with a CPU's numbers; on a
CPU the same code compares a CPU with itself, so that CI tests all of it but the device. Memory and speed at published
size are a GPU's alone.
"""

import contextlib
import functools
import json
import subprocess
import sys
from pathlib import Path

import bench
import pytest
import test_scripts
import tiny_pipelines
import torch
import torch.distributed as dist

import acdmd
import models
import rewards
from classroom import shapes

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parent.parent
PROMPTS = ["a red circle above a blue square", "three green crosses", "a cross"]
FAMILIES = ("classroom", "flux1", "flux2-4b", "sana", "prx")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    models.quiet_libraries()
    out = tmp_path_factory.mktemp("pipelines")
    tiny_pipelines.write_flux1(out / "flux1")
    tiny_pipelines.write_flux2(out / "flux2-4b")
    tiny_pipelines.write_sana(out / "sana")
    tiny_pipelines.write_prx(out / "prx")
    return out


def loaded(folders, model, device, dtype=torch.float32, **options):
    """A small backbone with a generator and a fake score that are no zeros, the same on every device."""
    weights = None if model == "classroom" else folders / model
    backbone = models.load(model, weights, device=device, dtype=dtype, resolution=64, **options)
    for name in ("generator", "fake"):
        draws = models.seeded(name)
        for p in models.add_adapter(backbone.network(name), name, 4, generator=draws):
            p.data.copy_(0.05 * torch.randn(p.shape, generator=draws))
        backbone.roles[name] = (name,)
    return backbone


def outcome(backbone):
    """[v, its gradients at x and at the generator's adapter], on the CPU in float32."""
    x = torch.randn(3, *backbone.latent_shape, generator=models.seeded("x")).to(backbone.device).requires_grad_()
    v = backbone.velocity("generator", x, 0.7, backbone.encode(PROMPTS))
    parameters = models.adapter_parameters(backbone.student, "generator")
    return [t.detach().float().cpu() for t in (v, *torch.autograd.grad(v.square().mean(), [x, *parameters]))]


@pytest.fixture(scope="module")
def on_cpu(folders):
    """outcome of a family on the CPU in float32, once."""
    return functools.cache(lambda model: outcome(loaded(folders, model, "cpu")))


def close(got, want, bound):
    """The largest distance, relative to each tensor's norm, is below the bound."""
    gaps = [((a - b).norm() / b.norm()).item() for a, b in zip(got, want, strict=True)]
    assert max(gaps) <= bound, gaps
    return f"{max(gaps):.0e}"


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("model", FAMILIES)
def test_velocity_and_gradients(device, folders, on_cpu, record_property, model, dtype):
    in_bf16 = 0.2 if model == "sana" else 0.1  # SANA's attention has no softmax: .13 on a CPU
    bound = 1e-4 if dtype == torch.float32 else in_bf16
    got = outcome(loaded(folders, model, device, dtype))
    record_property("largest difference", close(got, on_cpu(model), bound))
    assert dtype == torch.float32 or not torch.equal(got[0], on_cpu(model)[0])


def test_checkpointing(device, folders, on_cpu):
    for setting in ("auto", "on", "off"):
        backbone = loaded(folders, "classroom", device)
        models.set_up_blocks(backbone, setting, 8, compiled=False)
        assert backbone.transformer.gradient_checkpointing == (setting == "on")  # it fits: auto is off
        close(outcome(backbone), on_cpu("classroom"), 1e-4)
    assert models.needs_checkpointing(backbone, "auto", 10**9) == (backbone.device.type == "cuda")


def test_eight_bits(device, folders):
    options = dict(frozen_dtype="float8_e4m3fn")
    want, got = (outcome(loaded(folders, "classroom", kind, **options)) for kind in ("cpu", device))
    close(got, want, 1e-3)


def test_offload(device, folders, on_cpu):
    """The frozen base, the text encoders and the rewards in host memory: nothing changes."""
    try:
        close(outcome(loaded(folders, "classroom", device, offload_frozen=True)), on_cpu("classroom"), 1e-4)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    backbone = loaded(folders, "classroom", device)
    backbone.offload_encoders = True
    close(outcome(backbone), on_cpu("classroom"), 1e-4)
    assert all(p.device.type == "cpu" for encoder in backbone.encoders for p in encoder.parameters())
    images, kept = torch.rand(3, 3, 64, 64, generator=models.seeded("images")).to(device), []
    for offload in (False, True):
        scorers = rewards.load_scorers({"clipscore": 1.0}, device, models.CLASSROOM, offload=offload)
        kept.append(scorers.score(images, PROMPTS)["clipscore"])
        assert all(p.device.type == ("cpu" if offload else device.type) for p in scorers.scorers[0].parameters())
    close(kept[1:], kept[:1], 1e-5)


def test_rewards(device):
    needs = shapes.sample_prompts(3, 0)
    prompts, images, found = [need["prompt"] for need in needs], shapes.pictures(needs, 0), []
    for kind in ("cpu", device):
        scorers = rewards.load_scorers({"clipscore": 1.0, "geneval": 1.0}, kind, models.CLASSROOM)
        scores = scorers.score(images.to(kind), prompts, needs)
        _, slope = scorers.differentiable(images.to(kind), prompts)
        found.append([scores["clipscore"], slope.cpu(), scores["geneval"]])
    assert all(found[0][2] > 0.5)
    close(found[1], found[0], 1e-3)


@pytest.fixture(scope="module")
def stages(device, tmp_path_factory):
    """{"cpu" or "device": (log of stage 1, of stage 2, folder)}: three steps each, the second from one stage 1."""
    found = {}
    for kind, where in (("cpu", "cpu"), ("device", device.type)):
        out = tmp_path_factory.mktemp(kind)
        one = test_scripts.stage_1(out / "one", "--steps", 3, "--save_every", 2, "--device", where)
        start = found["cpu"][2] / "one/final" if found else out / "one/final"
        flags = ("--epochs", 3, "--save_every", 3, "--rewards", "clipscore=1", "--device", where)
        found[kind] = one, test_scripts.stage_2(out / "two", start, *flags), out
    return found


@pytest.mark.parametrize("stage", (1, 2))
def test_three_steps(stages, record_property, stage):
    """The first step's networks are equal, and so are its losses; later ones went through Adam, which amplifies."""
    want, got = (stages[kind][stage - 1] for kind in ("cpu", "device"))
    assert len(got) == len(want) == 3
    largest = 0.0
    for step, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.keys() == b.keys()
        for name in (name for name in a if name.startswith(("loss/", "grad_norm/", "reward/"))):
            assert a[name] == pytest.approx(b[name], rel=1e-2 if step else 1e-3, abs=1e-5), (step, name)
            largest = max(largest, abs(a[name] - b[name]) / max(abs(b[name]), 1e-5)) if step == 0 else largest
    record_property("largest difference in step 1", f"{largest:.0e}")


def test_resume(device, stages, tmp_path):
    """Step 3 after a resume is step 3: on a CPU to the last digit."""
    rows, _, out = stages["device"]
    flags = ("--steps", 3, "--resume", out / "one/step_000002", "--device", device.type)
    again = test_scripts.stage_1(tmp_path, *flags)
    assert len(again) == 1 and again[0].keys() == rows[2].keys()
    exact = dict(rel=0, abs=0) if device.type == "cpu" else dict(rel=1e-3, abs=1e-5)
    assert again[0] == pytest.approx(rows[2], **exact)


@contextlib.contextmanager
def no_waiting(device, monkeypatch):
    """Fail where the CPU waits for the device. On a CPU: where a tensor's number becomes Python's."""
    with monkeypatch.context() as patch:
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        else:

            def looks(*_):
                raise AssertionError("a look at a tensor's number")

            for name in ("item", "tolist", "__bool__", "__int__", "__float__"):
                patch.setattr(torch.Tensor, name, looks)
        try:
            yield
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")


def test_no_step_waits_for_the_device(device, folders, monkeypatch):
    with pytest.raises((AssertionError, RuntimeError)), no_waiting(device, monkeypatch):
        torch.ones((), device=device).item()
    backbone, one = loaded(folders, "classroom", device), acdmd.parse_args([])
    one.consistency_batch, optimizers = 1, {}
    for name in ("generator", "fake"):
        parameters = models.adapter_parameters(backbone.network(name), name)
        optimizers[name] = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    backbone.encode(["a prompt", ""])
    parts = bench.steps_of(backbone, optimizers, 2, one, backbone.sigmas())
    assert len([part for part in parts if part.startswith("stage")]) == 6
    for step in parts.values():
        step()
        with no_waiting(device, monkeypatch):
            step()


def test_compile(device, folders, on_cpu, monkeypatch, record_property):
    """The same numbers, and on a GPU faster: SD3.5's widths, eight of its blocks."""
    if device.type == "cpu":  # traced, and run as it is: a compiler would take longer than all other checks
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    backbone = loaded(folders, "classroom", device)
    models.compile_blocks(backbone)
    close(outcome(backbone), on_cpu("classroom"), 1e-3)
    if device.type == "cuda":
        config = bench.with_blocks("sd35", plain=4, dual=4)
        backbone = bench.random_backbone("sd35", device, torch.bfloat16, config=config)
        x, cond = torch.randn(4, *backbone.latent_shape, device=device), backbone.encode(["a prompt"] * 4)
        pace = []

        @torch.no_grad()
        def step():
            backbone.velocity("teacher", x, 0.5, cond)

        for compiled in (False, True):
            if compiled:
                models.compile_blocks(backbone)
            pace.append(bench.measure(step, backbone, len(x), repeat=20, warmup=3)["seconds"])
        record_property("times as fast", f"{pace[0] / pace[1]:.2f}")
        assert pace[1] < pace[0]


@pytest.mark.parametrize("model", ("sd35", "flux2-4b"))
def test_memory_and_speed_of_both_stages(device, model, monkeypatch, tmp_path, record_property):
    """Peak memory of every part within 10% of the plan's. On a CPU one part, tiny; test_plan.py compares memory."""
    small = dict(num_attention_heads=2, attention_head_dim=16, num_layers=2)
    small |= dict(num_single_layers=1, axes_dims_rope=(4,) * 4) if model == "flux2-4b" else dict(sample_size=32)
    small |= dict(dual_attention_layers=(0,), caption_projection_dim=32) if model == "sd35" else {}
    if device.type == "cpu":
        monkeypatch.setitem(bench.PUBLISHED, model, bench.PUBLISHED[model] | small)
    else:
        torch.cuda.empty_cache()
    file, cuda = tmp_path / "rows.jsonl", device.type == "cuda"
    flags = f"--model {model} --random_weights --predict --checkpointing on --device {device.type} --out {file} "
    flags += "--batch_size 4 --repeat 3" if cuda else "--resolution 64 --batch_size 1 --repeat 1 --warmup 0 --only"
    bench.main(bench.parse_args(flags.split() + ([] if cuda else ["stage 1, generator"])))
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == (6 if cuda else 1) and all(row["plan_gb"] > 0 for row in rows)
    for row in rows if cuda else ():
        found = f"{row['peak_gb']:.1f} GB (plan {row['plan_gb']:.1f})"
        record_property(row["part"], found + (f" MFU {row['mfu']:.0%}" if "mfu" in row else ""))
    for row in rows if cuda else ():
        assert row["peak_gb"] == pytest.approx(row["plan_gb"], rel=0.1), row["part"]


def test_two_processes(device, tmp_path, record_property):
    """A step of the fake score in two processes is that of one; a single GPU serves one process, and says so."""
    if device.type == "cpu":
        pytest.skip("test_scripts.py runs two processes on a CPU")
    flags = [*test_scripts.SMALL_1, "--steps", "1", "--device", "cuda", "--out", str(tmp_path / "two")]
    half = {name: int(flags[flags.index(name) + 1]) // 2 for name in ("--batch_size", "--consistency_batch")}
    flags += [str(part) for pair in half.items() for part in pair]  # the later counts
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*launcher, "acdmd.py", *flags], cwd=ROOT, capture_output=True, text=True)
    if torch.cuda.device_count() < 2:
        record_property("refused", "nccl wants a GPU a process, and there is one")
        assert done.returncode and "has no GPU, torch sees 1: give --nproc_per_node=1" in done.stderr
    else:
        assert done.returncode == 0, done.stderr[-2000:]
        one = test_scripts.stage_1(tmp_path / "one", "--steps", 1, "--device", "cuda")[0]
        two = test_scripts.log(tmp_path / "two")[0]
        for name in (name for name in one if name.startswith(("loss/", "grad_norm/"))):
            assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), name
