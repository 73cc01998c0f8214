"""Every family as the scripts run it, against its own pipeline in diffusers, on complete small random pipelines."""

import importlib.util
import inspect
import itertools
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


# A family a row, and all that is asked of a backbone is asked of each: add yours, then `pytest -k its_name` this file
# (docs/backbones.md). model: of --model; write: makes a small random pipeline of the published classes in a folder, 16
# tokens at 64 pixels; guidance: one above 1; call: what the pipeline's own call is told beside, of guidance g; prompts:
# how many it takes at once; noise, latents: ours as the pipeline takes and gives them, where it packs.
ROWS = {
    "sd3": dict(model="classroom", write=None, guidance=3.0, call=lambda g: dict(max_sequence_length=2)),
    "sana": dict(
        model="sana",
        write=tiny_pipelines.write_sana,
        guidance=4.5,
        call=lambda g: dict(sigmas=[1.0, 0.75, 0.5, 0.25], use_resolution_binning=False),
    ),
    "prx": dict(
        model="prx",
        write=tiny_pipelines.write_prx,
        guidance=5.0,
        call=lambda g: dict(use_resolution_binning=False, tokenizer_max_length=256),
        prompts=1,  # with guidance it makes time for two rows, whatever their number
    ),
    "flux1": dict(
        model="flux1",
        write=tiny_pipelines.write_flux1,
        guidance=3.5,
        noise=lambda pipe, x: pipe._pack_latents(x, *x.shape),
        latents=lambda backbone, x: backbone.pipe._pack_latents(x, *x.shape),
    ),
    "flux1-plain": dict(
        model="flux1",
        write=lambda folder: tiny_pipelines.write_flux1(folder, guidance_embeds=False),
        guidance=2.0,
        call=lambda g: dict(true_cfg_scale=g, negative_prompt=["", ""]),
        noise=lambda pipe, x: pipe._pack_latents(x, *x.shape),
        latents=lambda backbone, x: backbone.pipe._pack_latents(x, *x.shape),
    ),
    "flux2-4b": dict(
        model="flux2-4b",
        write=tiny_pipelines.write_flux2,
        guidance=4.0,
        latents=lambda backbone, x: backbone.vae_latents(x),
        student=lambda folder: tiny_pipelines.write_flux2(folder, seed=3),
    ),
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Path by row name, and by name-student where the generator has weights of its own."""
    models.quiet_libraries()
    out = tmp_path_factory.mktemp("pipelines")

    def folder(name):
        row = ROWS[name.removesuffix("-student")]
        write = row["student"] if name.endswith("-student") else row["write"]
        if write and not (out / name).exists():
            write(out / name)
        return out / name if write else Path(models.BACKBONES[row["model"]]["repo"])

    return folder


@pytest.fixture(params=ROWS)
def row(request, folders):
    """A row, with its folder, its backbone and its pipeline, on its own copies of the weights."""
    row = SimpleNamespace(name=request.param, **dict(student=None, prompts=2, call=lambda g: {}) | ROWS[request.param])
    row.prompts = ["a red circle", "two blue squares"][: row.prompts]
    row.folder = folders(row.name)
    row.backbone = models.load(row.model, row.folder, resolution=64)
    row.pipe = getattr(diffusers, row.backbone.pipeline).from_pretrained(row.folder)
    row.pipe.set_progress_bar_config(disable=True)
    # where the pipeline's own solver takes no levels of ours, Euler stands in
    row.pipe.scheduler = type(row.backbone.scheduler).from_config(row.backbone.scheduler.config)
    return row


def theirs(row, guidance, output_type):
    """What the pipeline itself makes of the prompts in four Euler steps: latents or pictures."""
    noise = models.Noise(("sample", 5), range(len(row.prompts)), row.backbone.latent_shape, "cpu").normal("start")
    noise = row.noise(row.pipe, noise) if hasattr(row, "noise") else noise
    call = dict(guidance_scale=guidance, num_inference_steps=4, height=64, width=64) | row.call(guidance)
    return row.pipe(prompt=[*row.prompts], latents=noise, output_type=output_type, **call).images


def ours(row, guidance, role="teacher"):
    return models.sample_latents(row.backbone, row.prompts, row.backbone.sigmas(4), 0.0, guidance, seed=5, role=role)


def handed_over(network, run):
    """What `run` hands to the network, call by call: {argument: tensor}."""
    found, arguments = [], inspect.signature(network.forward)

    def note(module, args, kwargs):
        bound = dict(arguments.bind(*args, **kwargs).arguments)
        for name, value in [*bound.items()]:
            if isinstance(value, list):  # an image or a text each
                bound |= {f"{name}[{i}]": part for i, part in enumerate(value)}
        found.append({name: value for name, value in bound.items() if isinstance(value, torch.Tensor)})

    handle = network.register_forward_pre_hook(note, with_kwargs=True)
    run()
    handle.remove()
    return found


def test_the_network_is_asked_as_the_pipeline_asks_it(row):
    """Every argument of every step, without guidance: the texts, their masks, the time, and the latents walked so far.

    The first that differs says where a new family is wrong; the latents of the second step, that v has another sign.
    """
    want = handed_over(row.pipe.transformer, lambda: theirs(row, 1.0, "latent"))
    got = handed_over(row.backbone.transformer, lambda: ours(row, 1.0))
    assert len(got) == len(want) == 4
    for step, (a, b) in enumerate(zip(got, want, strict=True)):
        more = "not the same arguments, or no tensors; twice as many: the pipeline guides at scale 1, see `call`"
        assert set(a) == set(b) and len(a) > 2, more
        for name in a:
            value = b[name].expand_as(a[name]) if b[name].numel() == 1 else b[name]  # some pass one time for all
            at = f"{name}, step {step}: "
            torch.testing.assert_close(
                a[name], value, rtol=1e-4, atol=1e-4, check_dtype=False, msg=lambda said, at=at: at + said
            )


@pytest.mark.parametrize("guided", (False, True))
def test_sampling_and_decoding_are_the_pipelines_own(row, guided):
    guidance = row.guidance if guided else 1.0
    want, latents = theirs(row, guidance, "latent"), ours(row, guidance)
    as_theirs = row.latents(row.backbone, latents) if hasattr(row, "latents") else latents
    assert (as_theirs - want).abs().max() < 1e-4 and want.std() > 0.1
    with torch.no_grad():
        got = row.backbone.decode(latents)
    want = theirs(row, guidance, "pt")
    assert got.shape == (len(row.prompts), 3, 64, 64) and want.std() > 0.01
    assert (got - want).abs().max() < 1e-4
    if guided:
        assert (ours(row, 1.0) - latents).abs().max() > 1e-3


def test_adapters_and_what_is_merged_load_in_diffusers(row, tmp_path):
    """Equal pictures through the pipeline's own loader, if it has one, and with the exported transformer."""
    network, role = row.backbone.student, "generator"
    for p in models.add_adapter(network, "mine", 2, generator=models.seeded("a")):
        p.data += 0.1 * torch.randn(p.shape, generator=models.seeded("b", tuple(p.shape)))
    row.backbone.roles[role] = ("mine",)
    with torch.no_grad():
        plain, got = (row.backbone.decode(ours(row, 1.0, r)) for r in ("teacher", role))
    models.save_adapter(network, "mine", tmp_path / "adapter")
    again = models.load(row.model, row.folder, resolution=64)
    for p, q in zip(
        models.load_adapter(again.student, "mine", tmp_path / "adapter"),
        models.adapter_parameters(network, "mine"),
        strict=True,
    ):
        torch.testing.assert_close(p, q)
    sample.export(row.backbone, tmp_path / "merged")
    merged = type(row.pipe.transformer).from_pretrained(tmp_path / "merged")
    base, row.pipe.transformer = row.pipe.transformer, merged
    pictures = [theirs(row, 1.0, "pt")]
    row.pipe.transformer = base
    if row.backbone.lora_loader:
        row.pipe.load_lora_weights(tmp_path / "adapter")
        pictures.append(theirs(row, 1.0, "pt"))
    for want in pictures:
        assert (got - want).abs().max() < 1e-4 < (plain - want).abs().max()


def test_networks_in_bf16_are_told_the_noise_level_exactly(row, monkeypatch):
    """What time is embedded, as in float32: two units in 1000 are lost where it is rounded to bf16."""
    seen = []

    def spy(owner, name):
        embed = getattr(owner, name)

        def spied(timesteps, *args, **kwargs):
            seen[-1].append(timesteps.float() * kwargs.get("scale", 1))
            return embed(timesteps, *args, **kwargs)

        monkeypatch.setattr(owner, name, staticmethod(spied))

    network = sys.modules[type(row.backbone.transformer).__module__]
    owners = (diffusers.models.embeddings, network, getattr(network, "TimestepEmbedder", None))
    for owner, name in itertools.product(owners, ("get_timestep_embedding", "timestep_embedding")):
        if hasattr(owner, name):
            spy(owner, name)
    sigma, x = torch.tensor([0.8491, 0.9731]), torch.randn(2, *row.backbone.latent_shape)
    for backbone in (row.backbone, models.load(row.model, row.folder, resolution=64, dtype=torch.bfloat16)):
        seen.append([])
        backbone.velocity("generator", x, sigma, backbone.encode(["a", "b"]), 3.5, backbone.encode([""]))
    assert seen[0], "no time embedding was seen: does the network have its own? Add it to what is spied on"
    assert len(seen[0]) == len(seen[1]) == 1 + row.backbone.embedded_guidance
    for exact, rounded in zip(*seen, strict=True):
        torch.testing.assert_close(rounded, exact, rtol=1e-6, atol=0)


SMALL = "--resolution 64 --batch_size 2 --dtype float32 --device cpu --sample_every 0 --eval_every 0".split()
SMALL += "--checkpointing on --log_every 1 --save_every 1 --lr 1e-2".split()
PACE = ("seconds", "images_per_s", "peak_gb")


def logged(folder):
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in PACE} for row in rows]


def test_both_stages_train_resume_and_sample(row, folders, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\ntwo blue squares\na cross\n")
    common = [*SMALL, "--model", row.model, "--weights", row.folder, "--prompts", prompts]
    start = row.folder
    if row.student:
        start = folders(f"{row.name}-student")
        common += ["--generator_weights", start]
    flags = [*common, "--steps", 2, "--fake_update_ratio", 1, "--rank", 2]
    acdmd.main(acdmd.parse_args([*map(str, flags), "--out", str(tmp_path / "one")]))
    flags = [*common, "--epochs", 2, "--batches", 2, "--group_size", 2, "--rewards", "clipscore=1"]
    flags += ["--reward_dir", models.CLASSROOM, "--distilled", tmp_path / "one/final", "--out", tmp_path / "two"]
    rtdmd.main(rtdmd.parse_args([*map(str, flags)]))
    for stage, out in ((acdmd, "one"), (rtdmd, "two")):
        log = logged(tmp_path / out)
        assert len(log) == 2 and log[1]["grad_norm/generator"] > 0, out
        again = tmp_path / f"{out}-again"
        shutil.copytree(tmp_path / out / "step_000001", again / "step_000001")
        stage.main(stage.parse_args(["--resume", str(again / "step_000001")]))
        assert logged(again) == log[1:]
    for name in ("one/final/generator_ema", "one/final/fake", "two/final/rl", "two/final/fake_rl"):
        tensors = models.load_file(tmp_path / name / models.LORA_FILE)
        assert any(t.abs().max() > 0 for key, t in tensors.items() if "lora_B" in key), name
    stack = ["--lora", tmp_path / "one/final/generator", "--lora", tmp_path / "two/final/rl"]
    sampled = {}
    for name, lora in (("plain", ["--sampler", "student"]), ("stack", stack)):
        flags = ["--model", row.model, "--weights", start, "--resolution", 64, "--prompts", prompts, "--device", "cpu"]
        sample.main(sample.parse_args([*map(str, [*flags, *lora, "--out", tmp_path / name])]))
        assert json.loads((tmp_path / name / "metadata.json").read_text())["nfe"] == 4
        sampled[name] = (tmp_path / name / "grid.png").read_bytes()
    assert sampled["plain"] != sampled["stack"]


@pytest.mark.parametrize("sampler, folder", (("student", "flux2-4b-student"), ("teacher", "flux2-4b")))
def test_sampling_flux2_takes_the_generators_weights_or_the_teachers_alone(
    folders, tmp_path, monkeypatch, sampler, folder
):
    ours = dict(repo=str(folders("flux2-4b")), student=str(folders("flux2-4b-student")))
    monkeypatch.setitem(models.BACKBONES, "flux2-4b", models.BACKBONES["flux2-4b"] | ours)
    flags = ["--model", "flux2-4b", "--resolution", "64", "--device", "cpu", "--prompt", "a cat", "--sampler", sampler]
    loaded, load = [], models.load_transformer
    monkeypatch.setattr(
        models, "load_transformer", lambda cls, path, dtype: loaded.append(path) or load(cls, path, dtype)
    )
    sample.main(sample.parse_args([*flags, "--out", str(tmp_path)]))
    assert loaded == [folders(folder) / "transformer"] and (tmp_path / "grid.png").is_file()


def test_flux2_keeps_two_frozen_transformers_and_each_role_its_own(folders):
    backbone = models.load(
        "flux2-4b", folders("flux2-4b"), resolution=64, generator_weights=folders("flux2-4b-student")
    )
    assert backbone.student is not backbone.transformer and len(backbone.networks()) == 2
    models.add_adapter(backbone.student, "generator", 2)
    models.add_adapter(backbone.transformer, "fake", 2)
    backbone.roles |= {"generator": ("generator",), "fake": ("fake",)}
    x, cond = torch.randn(1, *backbone.latent_shape), backbone.encode(["a circle"])
    with torch.no_grad():
        v = {role: backbone.velocity(role, x, 0.5, cond) for role in ("teacher", "fake", "generator")}
        for name in ("flux2-4b", "flux2-4b-student"):
            alone = models.load("flux2-4b", folders(name), resolution=64)
            assert alone.student is alone.transformer
            v[name] = alone.velocity("teacher", x, 0.5, cond)
    assert torch.equal(v["teacher"], v["flux2-4b"]) and torch.equal(v["fake"], v["flux2-4b"])  # B is 0
    assert torch.equal(v["generator"], v["flux2-4b-student"]) and not torch.equal(v["teacher"], v["generator"])


BILLIONS = {"sana": 0.59, "prx": 1.17, "sd3": 2.03, "sd35": 2.24, "flux1": 11.90, "flux2-4b": 3.88, "flux2-9b": 9.08}


SMALLER = {  # path of a layer that takes adapters, in how many blocks, its names there
    "sana": ("transformer_blocks.{}.attn{}", 28, "1.to_q 1.to_k 1.to_v 1.to_out.0 2.to_q 2.to_k 2.to_v 2.to_out.0"),
    "prx": ("blocks.{}.attention.{}", 16, "img_qkv_proj txt_kv_proj to_out.0"),
}


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
    in_blocks = {m for block in models.blocks(network) for m in block.modules()}
    assert in_blocks.issuperset(models.lora_modules(network).values())  # which are sharded, compiled, kept in 8 bits
    if model in SMALLER:
        path, n, names = SMALLER[model]
        assert wrapped == {path.format(i, name) for i in range(n) for name in names.split()} and wrapped <= linears
        return
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


@pytest.mark.parametrize("model", ("sana", "prx", "sd35", "flux1", "flux2-4b"))
def test_bench_runs_with_random_weights(model, monkeypatch, capsys, tmp_path):
    """The published VAE, a transformer of the published class made small."""
    small = dict(num_layers=1, num_attention_heads=1, attention_head_dim=16)
    if model == "prx":
        small = dict(depth=1, num_heads=1, hidden_size=16, axes_dim=(8, 8))
    elif model == "sana":
        small |= dict(num_cross_attention_heads=1, cross_attention_head_dim=16, cross_attention_dim=16)
    elif model == "sd35":
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
        models.load("flux2-4b", folders("flux1"))


def test_tables_that_no_file_holds_have_numbers_after_loading(tmp_path):
    """SANA's of 2K and 4K have one of positions, which is not saved."""
    sizes = dict(num_attention_heads=1, attention_head_dim=16, num_layers=1, num_cross_attention_heads=1)
    sizes |= dict(cross_attention_head_dim=16, cross_attention_dim=16, caption_channels=8, sample_size=4)
    network = diffusers.SanaTransformer2DModel(**sizes, interpolation_scale=1.0)
    network.save_pretrained(tmp_path)
    loaded = models.load_transformer(type(network), tmp_path, torch.float32)
    assert torch.equal(loaded.patch_embed.pos_embed, network.patch_embed.pos_embed)
    for key, value in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)


def test_the_dc_ae_is_checkpointed_too(folders):
    """Its class has no checkpointing of its own: the same gradient, with less kept for it."""
    found = []
    for setting in ("off", "on"):
        backbone, kept = models.load("sana", folders("sana"), resolution=64), []
        models.set_up_blocks(backbone, setting, 1, compiled=False)
        z = torch.randn(1, *backbone.latent_shape, generator=models.seeded("z")).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.nbytes) or t, lambda t: t):
            loss = backbone.decode(z).square().mean()
        found.append((*torch.autograd.grad(loss, z), sum(kept)))
    (want, whole), (got, less) = found
    torch.testing.assert_close(got, want)
    assert want.abs().max() > 0 and less < 0.6 * whole


def test_a_package_that_a_pipeline_needs_is_asked_for_before_anything_loads(monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "ftfy" else find(name, *more))
    with pytest.raises(models.UserError, match="--model prx needs a package: pip install ftfy"):
        models.load("prx", tmp_path / "nothing is there")


@pytest.mark.parametrize("model, said", (("sana", "diffusers' load_lora_weights read it"), ("prx", "--export")))
def test_the_way_out_is_told_where_diffusers_has_no_lora_loader(folders, tmp_path, capsys, model, said):
    backbone = models.load(model, folders(model), resolution=64)
    models.add_adapter(backbone.transformer, "mine", 2)
    models.save_adapter(backbone.transformer, "mine", tmp_path / "mine")
    flags = ["--model", model, "--lora", str(tmp_path / "mine"), "--export_lora", str(tmp_path / "one.safetensors")]
    sample.main(sample.parse_args(flags))
    assert said in capsys.readouterr().out
    assert backbone.lora_loader == hasattr(type(backbone.transformer), "load_lora_adapter")


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
    shutil.copytree(folders("flux2-4b"), tmp_path / "a")
    student = folders("flux1") if broken == "other" else tmp_path / "student"
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
