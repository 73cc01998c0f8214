"""`bench.py --plan`: what it predicts on fake tensors against the resident memory of the same step on real ones."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import bench
import pytest
import torch

import acdmd
import models

ROOT = Path(__file__).resolve().parent.parent
SMALL = dict(num_layers=2, num_attention_heads=8, attention_head_dim=64, joint_attention_dim=256, sample_size=64)
SMALL |= dict(caption_projection_dim=512, pooled_projection_dim=64, pos_embed_max_size=64, dual_attention_layers=(0,))
ARGS = dict(resolution=None, checkpointing="auto", shard="none", offload_frozen=False, offload_encoders=False)
ARGS |= dict(offload_rewards=False, last_step_batch=None, frozen_dtype=None, batch_size=None)
ARGS |= dict(gb=80.0, gpus=1, mfu=0.35, peak=989e12)


def backbone_on(device, model):
    """The classroom's or a small SD3, float32, with the embeddings of "a prompt" and ""."""
    if model == "small":
        bench.PUBLISHED["sd35"] = bench.PUBLISHED["sd35"] | SMALL
        return bench.random_backbone("sd35", device, torch.float32, 512)
    backbone = models.load("classroom")
    backbone.encode(["a prompt", ""])
    for module in (*backbone.networks(), backbone.vae):
        module.to(device)
    return backbone


def measured(model, part, n):
    """Bytes by which a part's peak of resident memory lies above what is resident before it. A process of its own."""
    torch.set_num_threads(1)
    backbone, one, optimizers = backbone_on("cpu", model), acdmd.parse_args([]), {}
    one.consistency_batch = n
    for name in ("generator", "fake"):
        optimizers[name] = bench.NoOptimizer(models.add_adapter(backbone.transformer, name, 32))
        backbone.roles[name] = (name,)
    _ = backbone.uncond
    step = bench.steps_of(backbone, optimizers, n, one, backbone.sigmas())[part]
    step()  # what is allocated once
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    step()
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024 - before


CASES = (
    ("small", 2, "stage 1, fake score"),
    ("small", 2, "stage 2, last step"),
    ("classroom", 200, "stage 1, fake score"),
)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("model, n, part", CASES)
def test_the_predicted_peak_is_the_measured_one(model, n, part, monkeypatch):
    monkeypatch.setitem(bench.PUBLISHED, "sd35", bench.PUBLISHED["sd35"])  # put back at the end
    one = acdmd.parse_args([])
    one.consistency_batch = n
    predicted, _ = bench.peaks(backbone_on("meta", model), n, one, None, only=part)[part]
    call = f"import test_plan; print(test_plan.measured({model!r}, {part!r}, {n}))"
    env = {"PYTHONPATH": f"{ROOT}:{ROOT}/tests", "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    assert predicted == pytest.approx(int(done.stdout.split()[-1]), rel=0.15)


def test_a_base_in_8_bits_takes_half_the_memory():
    """Resident memory of a process with a random SD3 of 0.2 billion parameters, bf16, before and after."""
    call = "import test_plan; print(*test_plan.resident_in_8_bits())"
    env = {"PYTHONPATH": f"{ROOT}:{ROOT}/tests", "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    size, saved = map(int, done.stdout.split())
    assert size > 300e6 and 0.4 * size < saved < 0.5 * size


def resident_in_8_bits():
    """(bytes of the weights in bf16, bytes of resident memory that 8 bits saved)"""
    bench.PUBLISHED["sd35"] |= dict(num_layers=8, num_attention_heads=12, caption_projection_dim=768, sample_size=64)
    backbone = bench.random_backbone("sd35", "cpu", torch.bfloat16, 512)
    resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096  # noqa: E731
    size, before = bench.size_of(*backbone.networks()), resident()
    models.store_in_8_bits(backbone.transformer)
    return size, before - resident()


@pytest.mark.parametrize(
    "flags, said", (("--gb 24", "--gb: only of a plan; give --plan too"), ("--model sd3", "give --random_weights"))
)
def test_what_cannot_be_measured_is_refused(flags, said):
    done = subprocess.run([sys.executable, bench.__file__, *flags.split()], capture_output=True, text=True)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_a_plan_adds_up_and_says_what_fits(monkeypatch, capsys):
    monkeypatch.setitem(bench.PUBLISHED, "sd35", bench.PUBLISHED["sd35"] | SMALL)
    mean = SimpleNamespace(scorers=[], differentiable=lambda images, prompts, about: images.mean((1, 2, 3)))
    monkeypatch.setattr(bench, "Differentiable", lambda: mean)  # the gradient through the VAE, and no reward model
    monkeypatch.setitem(models.BACKBONES["sd35"], "resolution", 128)
    rows = bench.plan("sd35", SimpleNamespace(**ARGS))
    terms = ("frozen", "vae", "encoders", "rewards", "adapters", "activations")
    for row in rows:
        assert row["sum"] == pytest.approx(sum(row[term] for term in terms)) and row["largest"] >= row["batch"] == 9
        assert not row["checkpointing"] and row["hours"] > 0
    assert (rows[0]["rewards"], rows[1]["rewards"]) == (0.0, sum(bench.REWARDS))
    full = bench.plan("sd35", SimpleNamespace(**ARGS | dict(gb=rows[0]["sum"] + 0.1)))[0]  # but 30% are not free then
    assert full["checkpointing"] and full["activations"] < rows[0]["activations"]
    least = bench.plan("sd35", SimpleNamespace(**ARGS | dict(gb=full["sum"] / 0.91, checkpointing="on")))[0]
    assert least["largest"] < 9  # 10% are left
    tight = bench.plan("sd35", SimpleNamespace(**ARGS | dict(gb=rows[0]["sum"] + 0.1, offload_encoders=True)))[0]
    assert tight["encoders"] == 0.0 and not tight["checkpointing"]
    assert bench.plan("sd35", SimpleNamespace(**ARGS | dict(offload_frozen=True)))[0]["checkpointing"]
    saved = bench.plan("sd35", SimpleNamespace(**ARGS | dict(checkpointing="off", frozen_dtype="float8_e4m3fn")))[0]
    assert 0.4 * rows[0]["frozen"] < saved["frozen"] < 0.7 * rows[0]["frozen"]  # positions and ends are not in blocks
    flags = dict(checkpointing="off", batch_size=20, last_step_batch=2, offload_rewards=True)
    few = bench.plan("sd35", SimpleNamespace(**ARGS | flags))[1]
    assert few["in"] != "last step" and few["rewards"] == max(bench.REWARDS)
    assert rows[1]["in"] == "last step"
    monkeypatch.setattr(bench, "plan", lambda *_: rows)
    bench.print_plan(SimpleNamespace(model="sd35", **ARGS))
    assert "| sd35 | 2 |" in capsys.readouterr().out
