"""`bench.py --plan`: what it predicts on fake tensors against the resident memory of the same step on real ones."""

import json
import re
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
ARGS = vars(bench.parse_args(["--plan"]))


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
    backbone = backbone_on("meta", model)
    predicted, _ = bench.peaks(backbone, n, one, None, only=part)[part]
    predicted += bench.adapter_bytes(backbone) / 2  # its gradients, which come with the step
    call = f"import test_plan; print(test_plan.measured({model!r}, {part!r}, {n}))"
    env = {"PYTHONPATH": f"{ROOT}:{ROOT}/tests", "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    assert predicted == pytest.approx(int(done.stdout.split()[-1]), rel=0.15)


def test_a_base_takes_the_memory_that_the_plan_says_and_half_in_8_bits():
    """Resident memory of a process with a random SD3 of 0.2 billion parameters and a large table of positions, bf16."""
    call = "import test_plan; print(*test_plan.resident_in_8_bits())"
    env = {"PYTHONPATH": f"{ROOT}:{ROOT}/tests", "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    size, table, vae, taken, saved = map(int, done.stdout.split())
    assert taken == pytest.approx(size + vae, rel=0.1) and table > 200e6
    assert size - table > 300e6 and 0.4 * (size - table) < saved < 0.5 * (size - table)


def resident_in_8_bits():
    """Bytes: predicted of a network in bf16, of its table, of the VAE; resident memory that they took; 8 bits saved."""
    bench.PUBLISHED["sd35"] |= dict(num_layers=8, num_attention_heads=12, caption_projection_dim=768, sample_size=64)
    resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096  # noqa: E731
    start = resident()
    backbone = bench.random_backbone("sd35", "cpu", torch.bfloat16, 512)
    network, before = backbone.transformer, resident()
    sizes = bench.size_of(network), bench.size_of_buffers(network), bench.size_of(backbone.vae)
    models.store_in_8_bits(network)
    return *sizes, before - start, before - resident()


@pytest.mark.parametrize(
    "flags, said", (("--gb 24", "--gb: only of a plan; give --plan too"), ("--model sd3", "give --random_weights"))
)
def test_what_cannot_be_measured_is_refused(flags, said):
    done = subprocess.run([sys.executable, bench.__file__, *flags.split()], capture_output=True, text=True)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def plan(**flags):
    """{stage: row} of the small SD3's plan."""
    return {row["stage"]: row for row in bench.plan("sd35", SimpleNamespace(**ARGS | flags))}


def test_a_plan_adds_up_and_says_what_fits(monkeypatch, capsys):
    monkeypatch.setitem(bench.PUBLISHED, "sd35", bench.PUBLISHED["sd35"] | SMALL)
    monkeypatch.setattr(bench, "reward_bytes", lambda *_: 0)  # the gradient through the VAE, and no reward model
    monkeypatch.setitem(models.BACKBONES["sd35"], "resolution", 128)
    facts, counted = {}, bench.counted

    def once(model, args, one, *how):
        key = args.dtype, args.frozen_dtype, args.rank, args.batch_size, *how[1:]
        return facts[key] if key in facts else facts.setdefault(key, counted(model, args, one, *how))

    monkeypatch.setattr(bench, "counted", once)
    rows, scorers = plan(), 1.71 + 2 * 3.94 + 0.28
    monkeypatch.setattr(bench, "plan_sample", lambda *_: rows["sample.py"])
    assert list(rows) == ["1", "1, grid", "2", "2, grid", "sample.py"]
    terms = ("frozen", "vae", "encoders", "rewards", "adapters", "activations")
    for row in rows.values():
        assert row["sum"] == pytest.approx(sum(row[term] for term in terms))
    for row in (rows["1"], rows["2"]):
        assert row["largest"] >= row["batch"] == 9 and not row["checkpointing"] and row["hours"] > 0
    assert (rows["1"]["rewards"], rows["2"]["rewards"]) == (0.0, pytest.approx(scorers))
    full = plan(gb=rows["1"]["sum"] + 0.1)["1"]  # but 30% are not free then
    assert full["checkpointing"] and full["activations"] < rows["1"]["activations"]
    least = plan(gb=full["sum"] / 0.91, checkpointing="on")["1"]
    assert least["largest"] < 9  # 10% are left
    tight = plan(gb=rows["1"]["sum"] + 0.1, offload_encoders=True)["1"]
    assert not tight["checkpointing"] and tight["activations"] < 11.16  # the encoders need more, at another time
    assert tight["encoders"] + tight["activations"] == pytest.approx(11.16)
    many = plan(offload_encoders=True, batch_size=1000)["1"]
    assert many["activations"] > 11.16 and many["encoders"] == 0.0
    apart = plan(offload_encoders=True, offload_rewards=True, batch_size=1)["2"]
    assert apart["encoders"] == pytest.approx(11.16 - 3.94 - apart["activations"])
    for row in (tight, many, apart):
        assert row["sum"] == pytest.approx(sum(row[term] for term in terms))
    for gb, fit in ((tight["sum"] / 0.9 + 0.01, True), (tight["sum"] / 0.9 - 0.01, False)):  # if they do not, no image
        assert (plan(offload_encoders=True, gb=gb)["1"]["largest"] > 0) == fit
    grid = plan(offload_encoders=True)["1, grid"]
    assert grid["encoders"] + grid["activations"] == pytest.approx(11.16)
    assert plan(offload_frozen=True)["1"]["checkpointing"]
    by_block, all_of_it = (plan(shard=mode, gpus=8)["1"]["frozen"] for mode in ("full", "grad"))  # gathered
    assert by_block < rows["1"]["frozen"] < all_of_it
    saved = plan(checkpointing="off", frozen_dtype="float8_e4m3fn", rank=64, gpus=8)
    assert 0.4 * rows["1"]["frozen"] < saved["1"]["frozen"] < 0.7 * rows["1"]["frozen"]  # some is not in blocks
    assert saved["1"]["adapters"] == pytest.approx(2 * rows["1"]["adapters"])
    assert saved["1"]["host"] == pytest.approx(8 * rows["1"]["host"])  # the 8 bits are made of the loaded weights
    flags = dict(checkpointing="off", batch_size=20, last_step_batch=2, offload_rewards=True)
    few = plan(**flags, dtype="float32")["2"]
    assert few["in"] != "last step" and few["rewards"] == 3.94 and few["frozen"] == 2 * rows["2"]["frozen"]
    assert rows["2"]["in"] == "last step"
    # a grid of 16 of 128 pixels is decoded at once (8 of 512), and of sample.py's of 1024 pixels 2 at a time
    one = facts["bfloat16", None, 32, None, False]
    grid = 16 * (one["sample, decoding"] + one["latents"]) / 1e9
    assert rows["1, grid"]["activations"] == rows["2, grid"]["activations"] == pytest.approx(grid)
    assert rows["sample.py"]["in"] == "decoding" and rows["sample.py"]["batch"] == 8
    assert rows["sample.py"]["adapters"] == pytest.approx(2 / 8 * rows["1"]["adapters"])
    monkeypatch.delitem(bench.GPUS, "sd35")  # no published run, no hours
    assert rows["2"]["hours"] > 0 and plan()["2"]["hours"] is None
    monkeypatch.setattr(bench, "plan", lambda *_: list(rows.values()))
    bench.print_plan(SimpleNamespace(**ARGS | dict(model="sd35")))
    printed = capsys.readouterr().out
    assert "| sd35 | 2 |" in printed and "| sd35 | sample.py |" in printed


@pytest.mark.parametrize("reward", (0, 10**8), ids=("no rewards", "a reward"))  # whose peak is above the networks'
@pytest.mark.parametrize("checkpointing", (False, True))
def test_counting_few_blocks_of_each_kind_is_counting_all(checkpointing, reward, monkeypatch):
    """Within 1%, a network of 4 blocks with two attentions and 3 plain ones, each step of both stages and velocity."""
    deep = SMALL | dict(num_layers=7, dual_attention_layers=(0, 1, 2, 3), num_attention_heads=2)
    deep |= dict(caption_projection_dim=128)
    monkeypatch.setitem(bench.PUBLISHED, "sd35", bench.PUBLISHED["sd35"] | deep)
    one, args = acdmd.parse_args([]), SimpleNamespace(**ARGS | dict(rewards={"clipscore": 1.0} if reward else {}))
    monkeypatch.setattr(bench, "reward_bytes", lambda *_: reward)
    scorers = bench.Transient(reward) if reward else None
    few = bench.counted("sd35", args, one, 256, checkpointing, "stage|velocity")
    whole = bench.random_backbone("sd35", "meta", torch.bfloat16, 256)
    assert few["frozen"] == few["loaded"] == bench.size_of(whole.transformer)
    for part, (size, evaluations) in bench.peaks(whole, 8, one, scorers, checkpointing, "stage|velocity").items():
        assert 8 * few[part] == pytest.approx(size, rel=0.01), part
        assert 8 * few[f"{part}, evaluations"] == evaluations
    assert few["adapter"] == bench.adapter_bytes(whole) / 2 and few["flops"] == whole.flops
    assert whole.flops == bench.flops_by_hand(whole)


TINY = {  # of the other families
    "sd3": dict(num_layers=2, num_attention_heads=2, attention_head_dim=8, caption_projection_dim=16, sample_size=32),
    "flux1": dict(num_layers=2, num_single_layers=3, num_attention_heads=2, attention_head_dim=16)
    | dict(axes_dims_rope=(4, 6, 6)),
    "flux2-4b": dict(num_layers=2, num_single_layers=3, num_attention_heads=2, attention_head_dim=16)
    | dict(axes_dims_rope=(4, 4, 4, 4)),
}


@pytest.mark.parametrize("model", TINY)
def test_flop_as_torch_counts_them_are_flop_by_hand(model, monkeypatch):
    monkeypatch.setitem(bench.PUBLISHED, model, bench.PUBLISHED[model] | TINY[model])
    backbone = bench.random_backbone(model, "cpu", torch.float32, 128)
    assert backbone.flops == bench.flops_by_hand(backbone)


def test_a_published_network_is_measured_beside_its_plan(monkeypatch, capsys, tmp_path):
    """A forward and backward of one FLUX.2 in 8 bits, whose layers never lie in memory in float32 all at once."""
    monkeypatch.setitem(bench.PUBLISHED, "flux2-4b", bench.PUBLISHED["flux2-4b"] | TINY["flux2-4b"])
    flags = "--model flux2-4b --random_weights --predict --only velocity --frozen_dtype float8_e4m3fn --dtype float32 "
    flags += "--checkpointing off --rank 4 --resolution 64 --batch_size 1 --warmup 0 --repeat 1 --device cpu"
    file = tmp_path / "rows.jsonl"
    bench.main(bench.parse_args([*flags.split(), "--out", str(file)]))
    row, said = json.loads(file.read_text()), capsys.readouterr().out
    assert row["part"] == "velocity, generator" and row["grad_norm"] > 0 and "plan GB" in said
    hand, counted = re.search(r"([\d.e+]+) GFLOP a forward, ([\d.e+]+) by hand", said).groups()
    assert hand == counted


def test_random_weights_repeat_no_row():
    with torch.device("meta"):
        linear = torch.nn.Linear(2000, 1500)  # three million numbers, of which one million are drawn
    bench.fill(linear, "cpu", torch.float32)
    assert len(linear.weight.unique(dim=0)) == 1500
    assert linear.weight.std() == pytest.approx(0.02, rel=0.01) and not linear.weight.requires_grad
