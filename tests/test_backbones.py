"""FLUX.1 and FLUX.2 as the scripts run them, on complete small pipelines of the same classes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import bench
import diffusers
import pytest
import tiny_pipelines
import torch

import acdmd
import models
import rtdmd
import sample

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    models.quiet_libraries()
    out = tmp_path_factory.mktemp("pipelines")
    tiny_pipelines.write_flux1(out / "flux1")
    tiny_pipelines.write_flux1(out / "flux1-plain", guidance_embeds=False)
    tiny_pipelines.write_flux2(out / "flux2-4b")
    tiny_pipelines.write_flux2(out / "flux2-4b-student", seed=3)
    return out


CASES = (
    ("flux1", "flux1", 3.5),
    ("flux1", "flux1-plain", 2.0),
    ("flux2-4b", "flux2-4b", 4.0),
    ("flux2-4b", "flux2-4b", 1.0),
)


@pytest.mark.parametrize("model, folder, guidance", CASES)
def test_many_step_sampling_is_the_pipelines_own(folders, model, folder, guidance):
    backbone = models.load(model, folders / folder, resolution=64, dtype=torch.float32)
    pipe = getattr(diffusers, backbone.pipeline).from_pretrained(folders / folder)
    pipe.set_progress_bar_config(disable=True)
    prompts = ["a red circle", "two blue squares"]
    noise = models.Noise("sample", 5, range(2), backbone.latent_shape, "cpu").normal("start")
    flux1 = model == "flux1"
    tokens = pipe._pack_latents(noise, 2, *backbone.latent_shape) if flux1 else noise
    call = dict(num_inference_steps=6, height=64, width=64, latents=tokens, output_type="pt")
    if folder == "flux1-plain":
        call |= dict(true_cfg_scale=guidance, negative_prompt=["", ""])
    want = pipe(prompt=prompts, guidance_scale=guidance, **call).images
    latents = models.sample_latents(backbone, prompts, backbone.sigmas(6), 0.0, guidance, seed=5, role="teacher")
    with torch.no_grad():
        got = backbone.decode(latents)
    assert got.shape == (2, 3, 64, 64) and want.std() > 0.01
    assert (got - want).abs().max() < 1e-4


SMALL = "--resolution 64 --batch_size 2 --dtype float32 --device cpu --sample_every 0 --eval_every 0".split()


@pytest.mark.parametrize("model", ("flux1", "flux2-4b"))
def test_both_stages_and_sampling(folders, tmp_path, model):
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": p} for p in ("a red circle", "two blue squares", "a cross")]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = [*SMALL, "--model", model, "--weights", folders / model, "--prompts", prompts]
    if model == "flux2-4b":
        common += ["--generator_weights", folders / f"{model}-student"]
    flags = [*common, "--steps", 2, "--fake_update_ratio", 1, "--lr", 1e-2, "--log_every", 1, "--rank", 2]
    acdmd.main(acdmd.parse_args([*map(str, flags), "--out", str(tmp_path / "one")]))
    flags = [*common, "--epochs", 2, "--batches", 2, "--group_size", 2, "--lr", 1e-2, "--rewards", "clipscore=1"]
    flags += ["--reward_dir", models.CLASSROOM, "--distilled", tmp_path / "one/final", "--out", tmp_path / "two"]
    rtdmd.main(rtdmd.parse_args([*map(str, flags)]))
    for out in ("one", "two"):
        log = [json.loads(line) for line in (tmp_path / out / "log.jsonl").read_text().splitlines()]
        assert len(log) == 2 and log[1]["grad_norm/generator"] > 0, out
    for name in ("one/final/generator_ema", "one/final/fake", "two/final/rl", "two/final/fake_rl"):
        tensors = models.load_file(tmp_path / name / models.LORA_FILE)
        assert any(t.abs().max() > 0 for key, t in tensors.items() if "lora_B" in key), name
    start = folders / (model if model == "flux1" else f"{model}-student")
    stack = ["--lora", tmp_path / "one/final/generator", "--lora", tmp_path / "two/final/rl"]
    sampled = {}
    for name, lora in (("plain", []), ("stack", stack)):
        flags = ["--model", model, "--weights", start, "--resolution", 64, "--prompts", prompts, "--device", "cpu"]
        sample.main(sample.parse_args([*map(str, [*flags, *lora, "--out", tmp_path / name])]))
        assert json.loads((tmp_path / name / "metadata.json").read_text())["nfe"] == 4
        sampled[name] = (tmp_path / name / "grid.png").read_bytes()
    assert sampled["plain"] != sampled["stack"]


@pytest.mark.parametrize("steps, folder", ((4, "flux2-4b-student"), (3, "flux2-4b")))
def test_sampling_flux2_takes_the_generators_weights_or_the_teachers_alone(
    folders, tmp_path, monkeypatch, steps, folder
):
    ours = dict(repo=str(folders / "flux2-4b"), student=str(folders / "flux2-4b-student"))
    monkeypatch.setitem(models.BACKBONES, "flux2-4b", models.BACKBONES["flux2-4b"] | ours)
    flags = ["--model", "flux2-4b", "--resolution", "64", "--device", "cpu", "--prompt", "a cat", "--steps", str(steps)]
    loaded, load = [], models.load_transformer
    monkeypatch.setattr(
        models, "load_transformer", lambda cls, path, dtype: loaded.append(path) or load(cls, path, dtype)
    )
    sample.main(sample.parse_args([*flags, "--out", str(tmp_path)]))
    assert loaded == [folders / folder / "transformer"] and (tmp_path / "grid.png").is_file()


def test_flux2_keeps_two_frozen_transformers_and_each_role_its_own(folders):
    backbone = models.load(
        "flux2-4b", folders / "flux2-4b", resolution=64, generator_weights=folders / "flux2-4b-student"
    )
    assert backbone.student is not backbone.transformer and len(backbone.networks()) == 2
    models.add_adapter(backbone.student, "generator", 2)
    models.add_adapter(backbone.transformer, "fake", 2)
    backbone.roles |= {"generator": ("generator",), "fake": ("fake",)}
    x, cond = torch.randn(1, *backbone.latent_shape), backbone.encode(["a circle"])
    with torch.no_grad():
        v = {role: backbone.velocity(role, x, 0.5, cond) for role in ("teacher", "fake", "generator")}
        for name in ("flux2-4b", "flux2-4b-student"):
            alone = models.load("flux2-4b", folders / name, resolution=64)
            assert alone.student is alone.transformer
            v[name] = alone.velocity("teacher", x, 0.5, cond)
    assert torch.equal(v["teacher"], v["flux2-4b"]) and torch.equal(v["fake"], v["flux2-4b"])  # B is 0
    assert torch.equal(v["generator"], v["flux2-4b-student"]) and not torch.equal(v["teacher"], v["generator"])


@pytest.mark.parametrize("model", ("flux1", "flux2-4b"))
def test_adapters_load_in_diffusers(folders, tmp_path, model):
    backbone = models.load(model, folders / model, resolution=64)
    for p in models.add_adapter(backbone.student, "mine", 2, generator=models.seeded("a")):
        p.data += 0.1 * torch.randn(p.shape, generator=models.seeded("b", tuple(p.shape)))
    backbone.roles["generator"] = ("mine",)
    models.save_adapter(backbone.student, "mine", tmp_path)
    pipe = getattr(diffusers, backbone.pipeline).from_pretrained(folders / model)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(tmp_path)
    noise = models.Noise("sample", 5, range(1), backbone.latent_shape, "cpu").normal("start")
    tokens = pipe._pack_latents(noise, 1, *backbone.latent_shape) if model == "flux1" else noise
    call = dict(num_inference_steps=3, height=64, width=64, latents=tokens, output_type="pt", guidance_scale=1.0)
    want = pipe(prompt=["a circle"], **call).images
    with torch.no_grad():
        plain, got = (
            backbone.decode(models.sample_latents(backbone, ["a circle"], backbone.sigmas(3), 0.0, 1.0, 5, role=role))
            for role in ("teacher", "generator")
        )
    assert (got - want).abs().max() < 1e-4 < (plain - want).abs().max()


BILLIONS = {"sd3": 2.03, "sd35": 2.24, "flux1": 11.90, "flux2-4b": 3.88, "flux2-9b": 9.08}


@pytest.mark.parametrize("model", BILLIONS)
def test_published_architectures(model):
    """Sizes on the meta device, and which layers the adapters take."""
    config, family = bench.PUBLISHED[model], models.BACKBONES[model]["family"]
    with torch.device("meta"):
        network = getattr(diffusers, family.network_class)(**config)
        assert sum(p.numel() for p in network.parameters()) / 1e9 == pytest.approx(BILLIONS[model], abs=0.005)
        linears = {n for n, m in network.named_modules() if isinstance(m, torch.nn.Linear)}
        models.prepare_for_lora(network, family.lora_targets)
    wrapped = set(models.lora_modules(network))
    double = {"to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}
    want = {f"transformer_blocks.{i}.attn.{name}" for i in range(config.get("num_layers", 19)) for name in double}
    if family is models.SD3:  # the last block has no text side to write to
        want -= {f"transformer_blocks.{config['num_layers'] - 1}.attn.to_add_out"}
    if model == "flux1":
        want |= {f"single_transformer_blocks.{i}.attn.{n}" for i in range(38) for n in ("to_q", "to_k", "to_v")}
    if family is models.Flux2:
        n = config["num_single_layers"]
        want |= {f"single_transformer_blocks.{i}.attn.{n}" for i in range(n) for n in ("to_qkv_mlp_proj", "to_out")}
    assert wrapped == want and wrapped <= linears
    assert not any("attn2" in name for name in wrapped)


@pytest.mark.parametrize("model", ("sd35", "flux1", "flux2-4b"))
def test_bench_runs_with_random_weights(model, monkeypatch, capsys, tmp_path):
    """The published VAE, a transformer of the published class made small."""
    small = dict(num_layers=1, num_attention_heads=1, attention_head_dim=16)
    if model == "sd35":
        small |= dict(joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=8, sample_size=8)
        small |= dict(pos_embed_max_size=8, dual_attention_layers=(0,))
    else:
        small |= dict(
            num_single_layers=1, joint_attention_dim=16, axes_dims_rope=(4, 6, 6) if model == "flux1" else (4,) * 4
        )
    monkeypatch.setitem(bench.PUBLISHED, model, bench.PUBLISHED[model] | small)
    flags = dict(resolution=64, batch_size=1, repeat=1, warmup=0, device="cpu", out=tmp_path / "rows.jsonl")
    flags |= dict(only="stage", rank=4, dtype=None, frozen_dtype=None, shard="none", predict=False)
    bench.main(SimpleNamespace(model=model, random_weights=True, compile=False, checkpointing="on", **flags))
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 6 and all(row["images_per_s"] > 0 for row in rows)
    assert "stage 2, last step" in capsys.readouterr().out


@pytest.mark.parametrize("model", ("classroom", "flux1", "flux2-4b"))
def test_networks_in_bf16_are_told_the_noise_level_exactly(folders, model):
    """Two units in 1000 are lost where time is rounded to bf16."""
    backbone = models.load(
        model, None if model == "classroom" else folders / model, resolution=64, dtype=torch.bfloat16
    )
    seen = []
    for module in backbone.transformer.modules():
        if isinstance(module, diffusers.models.embeddings.Timesteps):
            module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    sigma = torch.tensor([0.8491, 0.9731])
    backbone.velocity(
        "generator",
        torch.randn(2, *backbone.latent_shape),
        sigma,
        backbone.encode(["a", "b"]),
        3.5,
        backbone.encode([""]),
    )
    levels = 1000 * (sigma if backbone.embedded_guidance else torch.cat([sigma, sigma]))
    torch.testing.assert_close(seen[0].float(), levels, rtol=1e-6, atol=0)
    assert len(seen) == 1 + backbone.embedded_guidance and all((guidance == 3500).all() for guidance in seen[1:])


@pytest.fixture
def strict_dynamo():
    """Fail where dynamo recompiles too often. (monkeypatch.setattr would delete these settings when it ends.)"""
    config, new = torch._dynamo.config, hasattr(torch._dynamo.config, "recompile_limit")  # torch 2.6 has other names
    limit, fail = "recompile_limit", "fail_on_recompile_limit_hit"
    limit, fail = (limit, fail) if new else ("cache_size_limit", "fail_on_cache_limit_hit")
    with config.patch({limit: getattr(config, limit), fail: True}):
        yield


def test_compiled_blocks_compute_the_same_for_every_role(monkeypatch, strict_dynamo):
    """dynamo traces the blocks with the adapters that are on (no compiler needed), also after FLOP were counted."""
    compile_, ran = torch.compile, []

    def traced(graph, inputs):
        return lambda *args: ran.append(1) or graph(*args)

    monkeypatch.setattr(torch, "compile", lambda f: compile_(f, backend=traced))
    backbone = models.load("classroom")
    for name in ("generator", "fake"):
        for p in models.add_adapter(backbone.transformer, name, 4, generator=models.seeded(name)):
            p.data += 0.05 * torch.randn(p.shape, generator=models.seeded("B", name, tuple(p.shape)))
        backbone.roles[name] = (name,)
    x, cond = torch.randn(3, *backbone.latent_shape, generator=models.seeded("x")), backbone.encode(["a circle"] * 3)

    def run():
        twice, both = torch.cat([x, x]), {k: torch.cat([c, c]) for k, c in cond.items()}
        for grad in (False, True):  # what a training step asks for, and more than dynamo's default limit of 8
            with torch.set_grad_enabled(grad):
                v = {role: backbone.velocity(role, x, 0.5, cond) for role in ("teacher", "generator", "fake")}
                for role in ("teacher", "fake"):
                    backbone.velocity(role, twice, 0.5, both)
        fake = models.adapter_parameters(backbone.transformer, "fake")
        return [*v.values(), *torch.autograd.grad(v["fake"].square().mean(), fake)]

    want = run()
    backbone.dtype = torch.bfloat16
    want_mixed = backbone.velocity("generator", x, 0.5, cond)
    models.compile_blocks(backbone)
    assert backbone.flops > 0
    torch.testing.assert_close(backbone.velocity("generator", x, 0.5, cond), want_mixed, rtol=0, atol=2e-2)
    backbone.dtype = torch.float32
    for _ in range(2):
        ran.clear()
        for a, b in zip(run(), want, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
        assert len(ran) == 10 * len(models.blocks(backbone.transformer))


def test_weights_of_another_family_are_refused(folders):
    with pytest.raises(models.UserError, match="holds a FluxPipeline, and --model flux2-4b needs a Flux2KleinPipeline"):
        models.load("flux2-4b", folders / "flux1")


@pytest.mark.parametrize(
    ("broken", "said"),
    (
        ("model_index.json", "--weights .* is no whole pipeline folder"),
        ("vae", "--weights .* is no whole pipeline folder"),
        ("transformer/config.json", "--weights .* is no whole pipeline folder"),
        ("student", "--generator_weights .* is no whole pipeline folder"),
        ("other", "transformer holds a FluxTransformer2DModel, and this backbone needs a Flux2Transformer2DModel"),
    ),
)
def test_a_pipeline_folder_that_is_not_whole_is_named(folders, tmp_path, broken, said):
    shutil.copytree(folders / "flux2-4b", tmp_path / "a")
    student = folders / "flux1" if broken == "other" else tmp_path / "student"
    (tmp_path / "student").mkdir()
    path = tmp_path / "a" / broken
    if broken == "vae":
        shutil.rmtree(path)
    elif path.is_file():
        path.write_text('{"half')
    with pytest.raises(models.UserError, match=said) as error:
        models.load("flux2-4b", tmp_path / "a", student)
    assert "\n" not in str(error.value)


def test_a_repository_that_cannot_be_fetched_says_so(tmp_path):
    command = [sys.executable, "sample.py", "--model", "flux1", "--prompt", "a cat", "--out", str(tmp_path)]
    env = {"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    said = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and "cannot fetch black-forest-labs/FLUX.1-dev" in said and "--weights" in said
