"""Backbone, adapters and state, on the committed classroom teacher."""

import errno
import json
import os

import bench
import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

import acdmd
import models
import rtdmd

PROMPTS = ["a red circle above a blue square", "three green crosses", "a cross"]


@pytest.fixture(scope="module")
def backbone():
    b = models.load("classroom")
    for name in ("generator", "fake"):
        parameters = models.add_adapter(b.transformer, name, rank=4, generator=models.seeded(name))
        with torch.no_grad():
            for p in parameters:
                p.copy_(0.05 * torch.randn(p.shape, generator=models.seeded(name, tuple(p.shape))))
    b.roles |= {"generator": ("generator",), "fake": ("fake",)}
    return b


def gradients(backbone, role, parameters):
    x = torch.randn(3, *backbone.latent_shape, generator=models.seeded("x"))
    v = backbone.velocity(role, x, 0.7, backbone.encode(PROMPTS))
    return torch.autograd.grad(v.square().sum(), parameters)


def test_many_step_sampling_equals_the_pipelines_own_call(backbone):
    noise = models.Noise(("sample", 5), range(3), backbone.latent_shape, "cpu").normal("start")
    call = dict(num_inference_steps=8, guidance_scale=3.0, max_sequence_length=backbone.text_tokens, latents=noise)
    backbone.pipe.set_progress_bar_config(disable=True)
    want = backbone.pipe(PROMPTS, output_type="pt", **call).images
    ours = models.sample_latents(backbone, PROMPTS, backbone.sigmas(8), 0.0, 3.0, seed=5, role="teacher")
    with torch.no_grad():
        assert (backbone.decode(ours) - want).abs().max() < 1e-4


def test_roles_differ_and_adapters_nest(backbone):
    x, cond = torch.randn(3, *backbone.latent_shape), backbone.encode(PROMPTS)
    teacher, generator, fake = (backbone.velocity(r, x, 0.5, cond) for r in ("teacher", "generator", "fake"))
    assert (teacher - generator).abs().max() > 1e-3 and (generator - fake).abs().max() > 1e-3
    with models.adapters(backbone.transformer, "fake"):
        with models.adapters(backbone.transformer):
            pass
        assert backbone.transformer.lora_switch.active == ("fake",)
    assert backbone.transformer.lora_switch.active == ()
    with pytest.raises(ValueError, match="no adapter named 'fakes'"), models.adapters(backbone.transformer, "fakes"):
        pass


@pytest.mark.parametrize("role", ["generator", "fake"])
def test_checkpointing_gives_the_same_gradients_even_if_another_role_ran_in_between(backbone, role):
    parameters = models.adapter_parameters(backbone.transformer, role)
    plain = gradients(backbone, role, parameters)
    models.enable_checkpointing(backbone.transformer)
    try:
        x = torch.randn(3, *backbone.latent_shape, generator=models.seeded("x"))
        v = backbone.velocity(role, x, 0.7, backbone.encode(PROMPTS))
        backbone.velocity("teacher", x, 0.2, backbone.encode(PROMPTS))
        with models.adapters(backbone.transformer, *backbone.roles["fake" if role == "generator" else "generator"]):
            recomputed = torch.autograd.grad(v.square().sum(), parameters)
    finally:
        backbone.transformer.disable_gradient_checkpointing()
    assert max(g.abs().max() for g in plain) > 0
    for a, b in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_teacher_is_bit_identical_through_training_and_the_base_is_held_once(backbone):
    x, cond = torch.randn(3, *backbone.latent_shape), backbone.encode(PROMPTS)
    with torch.no_grad():
        before = backbone.velocity("teacher", x, 0.5, cond)
    parameters = models.adapter_parameters(backbone.transformer, "generator")
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    loss = backbone.velocity("generator", x, 0.5, cond).square().mean()
    with torch.no_grad():
        assert torch.equal(backbone.velocity("teacher", x, 0.5, cond), before)
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        assert torch.equal(backbone.velocity("teacher", x, 0.5, cond), before)
        assert not torch.equal(backbone.velocity("generator", x, 0.5, cond), before)
    frozen = [p for p in backbone.transformer.parameters() if not p.requires_grad]
    storages = {p.untyped_storage().data_ptr() for p in frozen}
    folder = models.CLASSROOM / "teacher/transformer"
    published = models.load_transformer(type(backbone.transformer), folder, torch.float32)
    size = sum(p.untyped_storage().nbytes() for p in {p.data_ptr(): p for p in frozen}.values())
    assert len(storages) == len(frozen) == len(list(published.parameters()))
    assert size == sum(p.nbytes for p in published.parameters())


def test_a_base_in_8_bits_is_the_rounded_one_and_adapters_stay_exact():
    """Against a network whose weights are the 8-bit numbers times their scales, in float32."""
    x, grads, kept = torch.randn(3, *models.load("classroom").latent_shape, generator=models.seeded("x")), {}, {}
    for kind in ("float32", "rounded", "8 bits"):
        backbone = models.load("classroom", frozen_dtype=None if kind == "float32" else "float8_e4m3fn")
        layers = [m for m in backbone.transformer.modules() if type(m) is models.Float8Linear]
        assert (len(layers) > 40) == (kind != "float32")
        for m in layers if kind == "rounded" else ():
            assert m.weight.dtype == torch.float8_e4m3fn and (m.scale.log2() % 1 == 0).all()
            m.weight, m.__class__ = torch.nn.Parameter(m.weight.float() * m.scale[:, None], False), torch.nn.Linear
        parameters = models.add_adapter(backbone.transformer, "a", 4, generator=models.seeded("a"))
        for B in parameters[1::2]:
            torch.nn.init.normal_(B, std=0.01, generator=models.seeded("b"))
        backbone.roles["generator"] = ("a",)
        cond = backbone.encode(PROMPTS)
        with bench.LiveBytes(backbone.transformer) as live:
            v = backbone.velocity("generator", x.requires_grad_(), 0.7, cond)
        kept[kind] = live.now
        grads[kind] = [v.detach(), *torch.autograd.grad(v.square().sum(), [x, *parameters])]
    for a, b in zip(grads["8 bits"], grads["rounded"], strict=True):
        torch.testing.assert_close(a, b, atol=1e-4 * b.abs().max().item(), rtol=1e-4)
    assert 0 < kept["8 bits"] <= 1.1 * kept["rounded"]  # the converted weights do not wait for the backward
    gap = (grads["8 bits"][0] - grads["float32"][0]).norm() / grads["float32"][0].norm()
    assert 1e-3 < gap < 0.05


def test_a_compiled_layer_in_8_bits_keeps_8_bits_for_its_backward():
    """aot_eager_decomp_partition divides forward from backward as inductor does, and needs no C++ compiler."""
    network = torch.nn.Module()
    layer = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 64))
    network.transformer_blocks = torch.nn.ModuleList([layer.requires_grad_(False)])
    models.store_in_8_bits(network)
    compiled, kept = torch.compile(layer, backend="aot_eager_decomp_partition"), []
    x = torch.randn(3, 64, generator=models.seeded("x"), requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        with torch.autocast("cpu", torch.bfloat16):
            y = compiled(x)
    weights = [t for t in kept if t.numel() == 64 * 128]
    assert weights and all(t.dtype == torch.float8_e4m3fn for t in weights)
    with torch.autocast("cpu", torch.bfloat16):
        want = layer(x)
    torch.testing.assert_close(y, want, atol=0.02, rtol=0.02)
    slopes = [torch.autograd.grad(out.float().square().sum(), x)[0] for out in (y, want)]
    torch.testing.assert_close(*slopes, atol=0.02, rtol=0.05)


def test_checkpointing_covers_the_vae_and_leaves_its_gradient_as_it_is(backbone):
    x = torch.randn(2, *backbone.latent_shape, generator=models.seeded("x")).requires_grad_()
    kept, slopes = [], []
    for setting in ("off", "on"):
        models.set_up_blocks(backbone, setting, 1, compiled=False)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept[-1].append(t.nbytes) or t, lambda t: t):
            kept.append([])
            images = backbone.decode(x)
        slopes.append(torch.autograd.grad(images.square().sum(), x)[0])
    for network in (backbone.vae, backbone.transformer):
        network.disable_gradient_checkpointing()
    assert torch.equal(*slopes) and slopes[0].abs().max() > 0
    assert sum(kept[1]) < 0.5 * sum(kept[0])


def test_targets_that_match_no_layer_are_refused():
    transformer = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(8, 4)))
    with pytest.raises(models.UserError, match="no linear layer of Sequential ends in one of attn.to_q, to_k"):
        models.prepare_for_lora(transformer, ["attn.to_q", "to_k"])


def test_a_pipeline_may_overwrite_the_prompts_it_is_given(monkeypatch):
    backbone = models.load("classroom")
    prompts, wanted = ["a circle", "two red squares"], backbone.encode(["a circle"])
    encode = backbone.encode_texts

    def overwriting(texts):
        found = encode(texts)
        texts[:] = ["chat"] * len(texts)
        return found

    monkeypatch.setattr(backbone, "encode_texts", overwriting)
    backbone._embeddings.clear()
    got = backbone.encode(prompts)
    assert all(torch.equal(got[name][:1], value) for name, value in wanted.items())


def test_an_adapter_under_autocast_keeps_its_input_once():
    transformer = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(8, 4)))
    models.prepare_for_lora(transformer, ["0"])
    A, B = models.add_adapter(transformer, "a", 2, generator=models.seeded(0))
    B.data.fill_(0.5)
    x, kept = torch.randn(5, 8, generator=models.seeded(1), requires_grad=True), []
    with models.adapters(transformer, "a"), torch.autocast("cpu", torch.bfloat16):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            y = transformer(x)
    assert y.dtype == torch.bfloat16 and A.dtype == torch.float32
    of_x = [t for t in kept if t.shape == x.shape]
    assert of_x and all(t.dtype == torch.bfloat16 for t in of_x) and len({t.data_ptr() for t in of_x}) == 1
    y.float().sum().backward()
    base = transformer[0][0].base
    want = torch.nn.functional.linear(x, base.weight, base.bias) + 2 * (x @ A.T) @ B.T
    torch.testing.assert_close(y.float(), want, rtol=0.02, atol=0.05)
    torch.testing.assert_close(A.grad, 2 * (B.T @ torch.ones(4, 5)) @ x.detach(), rtol=0.02, atol=0.05)


def test_adapter_file_round_trip_and_refusals(backbone, tmp_path):
    models.save_adapter(backbone.transformer, "generator", tmp_path / "a")
    models.load_adapter(backbone.transformer, "again", tmp_path / "a")
    for a, b in zip(*(models.adapter_parameters(backbone.transformer, n) for n in ("generator", "again")), strict=True):
        assert torch.equal(a, b) and not b.requires_grad
    file = tmp_path / "a" / models.LORA_FILE
    tensors = models.load_file(file)
    path = next(iter(models.lora_modules(backbone.transformer)))
    key = f"transformer.{path}.lora_A.weight"

    def refused(tensors, match):
        models.save_file(tensors, file)
        with pytest.raises(ValueError, match=match):
            models.load_adapter(backbone.transformer, "broken", file)

    refused({k: v for k, v in tensors.items() if k != key}, f"{path}.lora_A.weight is missing")
    refused(tensors | {key: torch.zeros(4, 7)}, "has shape")
    nowhere = {f"transformer.nowhere.{k}.weight": torch.zeros(4, 4) for k in ("lora_A", "lora_B")}
    refused(tensors | nowhere, "nowhere is no layer of this backbone")
    refused(tensors | {"transformer.nowhere.alpha": torch.zeros(1)}, "nowhere.lora_A.weight is missing")
    refused(tensors | {key: torch.zeros(5, 128)}, "A of rank 5 and B of rank 4")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cut short"):
        models.load_adapter(backbone.transformer, "broken", file)
    with pytest.raises(ValueError, match="no adapter at"):
        models.load_adapter(backbone.transformer, "broken", tmp_path / "nowhere")


def foreign(folder, kind, tensors):
    """The adapter as another tool writes it; returns what load_adapter is given."""
    # our files hold 2 B and alpha = rank; those of other tools here B and alpha = 2 rank
    tensors = {key: value / 2 if "lora_B" in key else value for key, value in tensors.items()}
    bare = {key.removeprefix("transformer."): value for key, value in tensors.items()}
    if kind == "peft":  # model.save_pretrained of a PeftModel
        folder.mkdir()
        keyed = {f"base_model.model.{key}": value for key, value in bare.items()}
        models.save_file(keyed, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 8}')
        return folder
    prefix = {"authors": "", "ddp": "module.base_model.model.", "diffusers": "transformer."}[kind]
    state = {
        prefix + k.replace(".weight", ".default.weight" if kind != "diffusers" else ".weight"): v
        for k, v in bare.items()
    }
    torch.save(state, folder.with_suffix(".pt"))
    return folder.with_suffix(".pt")


@pytest.mark.parametrize("kind", ("peft", "authors", "ddp", "diffusers"))
def test_adapters_of_other_tools_load(backbone, tmp_path, kind):
    models.save_adapter(backbone.transformer, "generator", tmp_path / "a")
    source = foreign(tmp_path / "b", kind, models.load_file(tmp_path / "a" / models.LORA_FILE))
    models.load_adapter(backbone.transformer, kind, source)
    backbone.roles["again"] = (kind,)
    x, cond = torch.randn(3, *backbone.latent_shape, generator=models.seeded("x")), backbone.encode(PROMPTS)
    with torch.no_grad():
        v = {role: backbone.velocity(role, x, 0.5, cond) for role in ("generator", "again", "teacher")}
    assert torch.equal(v["generator"], v["again"]) and not torch.equal(v["generator"], v["teacher"])


def test_a_cpu_encodes_one_prompt_at_a_time_and_each_once(monkeypatch):
    """The neighbours in a batch may change the last digit, and a resumed run meets prompts with other neighbours."""
    backbone, parts = models.load("classroom"), []
    encode = backbone.encode_texts
    monkeypatch.setattr(backbone, "encode_texts", lambda part: parts.append(part) or encode(part))
    first, again = backbone.encode(["a", "b", "a"]), backbone.encode(["b", "c"])
    assert parts == [["a"], ["b"], ["c"]]
    for name in first:
        assert torch.equal(first[name][0], first[name][2]) and torch.equal(first[name][1], again[name][0])


def test_kept_embeddings_are_bounded(monkeypatch):
    backbone = models.load("classroom")
    size = sum(value.nbytes for value in backbone.encode(["a circle"]).values())
    monkeypatch.setattr(models, "CACHE_BYTES", 3 * size)
    wide = backbone.encode(["a circle", "a cross", "a square", "two circles", "two squares"])
    assert list(backbone._embeddings) == ["a square", "two circles", "two squares"]  # the newest stay
    again = backbone.encode(["a circle"])  # encoded anew
    assert all(torch.equal(again[name][0], wide[name][0]) for name in wide)


def test_pictures_are_decoded_a_few_at_a_time(backbone, monkeypatch):
    seen, decode = [], backbone.decode
    monkeypatch.setattr(backbone, "resolution", 1024)
    monkeypatch.setattr(backbone, "decode", lambda part: seen.append(len(part)) or decode(part))
    latents = torch.randn(5, *backbone.latent_shape)
    assert torch.allclose(models.decode_all(backbone, latents), decode(latents).detach(), atol=1e-5)
    assert seen == [2, 2, 1]


def test_a_malicious_adapter_is_refused_and_does_not_run(backbone, tmp_path):
    import pickle

    class Payload:
        def __reduce__(self):
            return (type(tmp_path).touch, (tmp_path / "executed",))

    (tmp_path / "a.pt").write_bytes(pickle.dumps({"x.lora_A.weight": Payload()}))
    with pytest.raises(models.UserError, match="a.pt is no complete file of tensors"):
        models.load_adapter(backbone.transformer, "evil", tmp_path / "a.pt")
    torch.save({"x.lora_A.weight": Payload()}, tmp_path / "b.pt")
    with pytest.raises(models.UserError, match="b.pt holds more than tensors, and pickled code is never run"):
        models.load_adapter(backbone.transformer, "evil", tmp_path / "b.pt")
    assert not (tmp_path / "executed").exists()


def test_equal_adapters_are_equal_files(backbone, tmp_path):
    for i in range(8):
        models.save_adapter(backbone.transformer, "generator", tmp_path / str(i))
    assert len({(tmp_path / str(i) / models.LORA_FILE).read_bytes() for i in range(8)}) == 1


def test_export_is_the_stack_merged(backbone, tmp_path):
    import sample

    for name in ("generator", "fake"):
        models.save_adapter(backbone.transformer, name, tmp_path / name)
    StableDiffusion3Pipeline.from_pretrained(models.CLASSROOM / "teacher").save_pretrained(tmp_path / "float32")
    flags = ["--lora", tmp_path / "generator", "--lora", tmp_path / "fake", "--export", tmp_path / "merged"]
    flags += ["--weights", tmp_path / "float32"]  # an export has its files' dtype, and the committed ones' rounds
    sample.main(sample.parse_args([*map(str, flags)]))
    merged = SD3Transformer2DModel.from_pretrained(tmp_path / "merged")
    pipe = StableDiffusion3Pipeline.from_pretrained(models.CLASSROOM / "teacher", transformer=merged)
    pipe.set_progress_bar_config(disable=True)
    noise = models.Noise(("sample", 0), range(3), backbone.latent_shape, "cpu").normal("start")
    call = dict(num_inference_steps=4, guidance_scale=1.0, max_sequence_length=backbone.text_tokens, latents=noise)
    want = pipe(PROMPTS, output_type="pt", **call).images
    backbone.roles["both"] = ("generator", "fake")
    latents = models.sample_latents(backbone, PROMPTS, backbone.sigmas(4), role="both")
    with torch.no_grad():
        assert (backbone.decode(latents) - want).abs().max() < 1e-4


def test_a_stack_is_written_as_one_adapter(backbone, tmp_path):
    """Of ranks 4 and 3, the second on some layers only; loaded by us, and by diffusers with and without settings."""
    import sample

    models.save_adapter(backbone.transformer, "generator", tmp_path / "a")
    some = {path: pair for path, pair in models.read_adapter(tmp_path / "a")[0].items() if path.endswith("to_q")}
    some = {path: (A[1:].flip(0), 3 * B[:, 1:]) for path, (A, B) in some.items()}
    models.write_adapter(some, tmp_path / "b.safetensors")
    stack, file = ["--lora", str(tmp_path / "a"), "--lora", str(tmp_path / "b.safetensors")], tmp_path / "c.safetensors"
    sample.main(sample.parse_args([*stack, "--export_lora", str(file)]))
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["a", "b.safetensors", "c.safetensors"]
    models.save_file(models.load_file(file), tmp_path / "bare.safetensors")
    x, cond = torch.randn(3, *backbone.latent_shape, generator=models.seeded("x")), backbone.encode(PROMPTS)
    models.load_adapter(backbone.transformer, "some", tmp_path / "b.safetensors")
    models.load_adapter(backbone.transformer, "one", file)
    assert {len(p) for p in models.adapter_parameters(backbone.transformer, "one")[::2]} == {7}
    backbone.roles |= {"stack": ("generator", "some"), "one": ("one",)}
    with torch.no_grad():
        v = {role: backbone.velocity(role, x, 0.5, cond) for role in ("stack", "one", "generator", "teacher")}
        assert (v["one"] - v["stack"]).abs().max() < 1e-5 < (v["stack"] - v["generator"]).abs().max()
        for name in ("c", "bare"):
            pipe = StableDiffusion3Pipeline.from_pretrained(models.CLASSROOM / "teacher")
            pipe.load_lora_weights(tmp_path / f"{name}.safetensors")
            theirs = backbone.predict(pipe.transformer, x, torch.full((3,), 0.5), cond, 1.0)
            assert (theirs - v["stack"]).abs().max() < 1e-5


def test_a_stack_that_cannot_be_written_leaves_nothing(backbone, tmp_path, monkeypatch, capsys):
    import sample

    models.save_adapter(backbone.transformer, "generator", tmp_path / "a")
    flags, file = ["--lora", str(tmp_path / "a"), "--export_lora"], tmp_path / "c.safetensors"

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(models, "save_file", full)
    with pytest.raises(models.UserError, match="cannot write --export_lora .*c.safetensors: .*No space left"):
        sample.main(sample.parse_args([*flags, str(file)]))
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    for wrong in ([*flags, str(tmp_path / "a")], [*flags, str(tmp_path / "c")], ["--export_lora", str(file)]):
        with pytest.raises(SystemExit):
            sample.parse_args(wrong)
        assert "needs --lora, no --export, and a new file that ends in .safetensors" in capsys.readouterr().err


def test_an_adapter_is_the_same_whatever_scale_its_file_tells(backbone, tmp_path):
    """Bit for bit, for scales that are powers of two; so is the hash that stage 2 remembers it by."""
    models.save_adapter(backbone.transformer, "generator", tmp_path)
    prints, parameters = [], models.adapter_parameters(backbone.transformer, "generator")
    tensors = models.load_file(tmp_path / models.LORA_FILE)
    for scale in (1, 2, 16):
        state = {key: t / scale if "lora_B" in key else t for key, t in tensors.items()}
        config = {"transformer.r": 4, "transformer.lora_alpha": 4.0 * scale}
        file = tmp_path / f"{scale}.safetensors"
        models.save_file(state, file, {"lora_adapter_metadata": json.dumps(config)})
        prints.append(models.fingerprint(file))
        for p, loaded in zip(parameters, models.load_adapter(backbone.transformer, f"x{scale}", file), strict=True):
            assert torch.equal(p, loaded)
    torch.save(
        {key: t / 2 if "lora_B" in key else t for key, t in tensors.items()}, tmp_path / "a.pt"
    )  # alpha = 2 rank
    assert {*prints, models.fingerprint(tmp_path / "a.pt")} == {models.fingerprint(tmp_path)}


def test_an_adapter_of_some_layers_is_told_and_is_not_trained(backbone, tmp_path, capsys):
    models.save_adapter(backbone.transformer, "generator", tmp_path)
    layers = dict(list(models.read_adapter(tmp_path)[0].items())[:5])
    models.write_adapter(layers, tmp_path / models.LORA_FILE)
    models.load_adapter(backbone.transformer, "part", tmp_path)
    n = len(models.lora_modules(backbone.transformer))
    assert f"an adapter of 5 of the {n} layers that take one; zero on the others" in capsys.readouterr().out
    with pytest.raises(models.UserError, match="lora_A.weight is missing, and to be trained it must have all layers"):
        models.load_adapter(backbone.transformer, "trained", tmp_path, trainable=True)


@pytest.mark.parametrize("what", ("folder", "file", "file inside"))
def test_what_may_not_be_read_is_not_called_missing(backbone, tmp_path, monkeypatch, what):
    models.save_adapter(backbone.transformer, "generator", tmp_path / "a")
    locked = tmp_path / "a" if what == "folder" else tmp_path / "a" / models.LORA_FILE
    source = tmp_path / "a" if what == "file inside" else locked

    def denied(*args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    if os.geteuid() == 0:  # root may read all
        call = {"folder": "os.listdir", "file": "pathlib.Path.open", "file inside": "builtins.open"}
        monkeypatch.setattr(call[what], denied)
    locked.chmod(0)
    with pytest.raises(models.UserError, match="(?i)permission denied"):
        models.read_adapter(source)
    locked.chmod(0o700)


def test_stage_2_losses_equal_stage_1_at_s_0(backbone):
    x0, x_fake, x_teacher, noise, n1, n2 = torch.randn(6, 3, *backbone.latent_shape, generator=models.seeded("s0"))
    sigma_t, delta = torch.tensor([0.02, 0.4, 0.98]), torch.tensor([200, 7, 100])
    x_t, target, sigma_ts = acdmd.renoise(x0, 0.0, sigma_t, noise)
    parameters = models.adapter_parameters(backbone.transformer, "fake")
    cond = {k: torch.cat([c, c]) for k, c in backbone.encode(PROMPTS).items()}

    def both(f_1, f_2, inputs):
        a, b = f_1(), f_2()
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
        one, two = torch.autograd.grad(a, inputs), torch.autograd.grad(b, inputs)
        assert max(g.abs().max() for g in one) > 0
        for g, h in zip(one, two, strict=True):
            torch.testing.assert_close(g, h, atol=1e-6, rtol=1e-4)

    v = lambda: backbone.velocity("fake", x_t, sigma_t, backbone.encode(PROMPTS))  # noqa: E731
    predict = lambda x, sigma: backbone.velocity("fake", x, sigma, cond)  # noqa: E731
    both(
        lambda: acdmd.fake_score_loss(v(), target, sigma_ts),
        lambda: rtdmd.fake_score_loss(v(), x0, noise, sigma_t),
        parameters,
    )
    pair = acdmd.consistency_loss, rtdmd.consistency_loss
    both(*(lambda f=f: f(predict, x_t, sigma_t, v(), delta, 0.9, n1, n2) for f in pair), parameters)
    x0.requires_grad_()
    pair = acdmd.distribution_matching_loss, rtdmd.distribution_matching_loss
    both(*(lambda f=f: f(x0, x_fake, x_teacher) for f in pair), [x0])


def test_whole_fake_loss_of_both_stages_is_equal_at_s_0(backbone):
    x0 = torch.randn(3, *backbone.latent_shape, generator=models.seeded("x0"))
    cond, noise = backbone.encode(PROMPTS), models.Noise((0, 1, "fake"), range(3), backbone.latent_shape, "cpu")
    sigma_t = acdmd.draw_t(noise.uniform("t"), 0.0)
    x_t, target, sigma_ts = acdmd.renoise(x0, 0.0, sigma_t, noise.normal("z"))
    for a, b in zip(rtdmd.noised(x0, noise), (x_t, sigma_t, noise.normal("z")), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    v = backbone.velocity("fake", x_t, sigma_t, cond)
    one = acdmd.fake_score_loss(v, target, sigma_ts)
    torch.testing.assert_close(one, rtdmd.fake_score_loss(v, x0, noise.normal("z"), sigma_t), atol=1e-6, rtol=1e-5)
    one = acdmd.consistency(backbone, cond, (x_t, sigma_t, v), noise[:2], 0.9)
    two = rtdmd.consistency(backbone, cond, (x_t, sigma_t, v), noise[:2], 0.9)
    torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)
    assert one != 0


def test_the_matching_gradient_of_stage_2_comes_from_the_right_roles(backbone):
    x0 = torch.randn(3, *backbone.latent_shape, generator=models.seeded("x0")).requires_grad_()
    cond, noise = backbone.encode(PROMPTS), models.Noise((0, 1, "generator"), range(3), backbone.latent_shape, "cpu")
    loss, gradient = rtdmd.matching_gradient(backbone, cond, x0, noise, 2.5)
    with torch.no_grad():  # the same by hand: g = (x0_fake - guided x0_teacher) / mean|x0 - x0_teacher|
        x_t, sigma_t, _ = rtdmd.noised(x0, noise)
        x_fake = x_t - models.per_sample(sigma_t, x_t) * backbone.velocity("fake", x_t, sigma_t, cond)
        v = backbone.velocity("teacher", x_t, sigma_t, cond, 2.5, backbone.encode([""]))
        x_teacher = x_t - models.per_sample(sigma_t, x_t) * v
        g = (x_fake - x_teacher) / (x0 - x_teacher).abs().mean((1, 2, 3), keepdim=True)
        want = acdmd.distribution_matching_loss(x0, x_fake, x_teacher)
    torch.testing.assert_close(gradient, g / g.numel(), atol=1e-7, rtol=1e-4)
    torch.testing.assert_close(loss.detach(), want)


def test_presets_equal_the_published_table(monkeypatch, tmp_path):
    (tmp_path / "generator_ema").mkdir(), (tmp_path / "fake").mkdir()
    table = {"sd3": (7.0, 16, 2, 1024), "sd35": (4.5, 24, 9, 512)}
    for model, (guidance, group_size, batch_size, resolution) in table.items():
        one = acdmd.parse_args(["--model", model, "--prompts", "p.txt"])
        assert (one.lr, one.lr_fake, one.batch_size, one.guidance_scale) == (3e-5, 3e-5, 9, guidance)
        assert (one.eta, one.gamma, acdmd.DELTA_MAX, one.fake_update_ratio, one.rank) == (0.9, 0.01, 200, 10, 32)
        flags = ["--model", model, "--prompts", "p.txt", "--distilled", str(tmp_path), "--rewards", "clipscore"]
        two = rtdmd.parse_args(flags)
        assert (two.lr, two.lr_fake, two.init_std, two.guidance_scale) == (3e-6, 3e-5, 1.0, guidance)
        assert (two.group_size, two.batch_size, two.batches) == (group_size, batch_size, 16)
        assert (two.n_chosen, rtdmd.CLIP_RANGE, two.ema_every) == (2, 1e-5, 8)
        assert (two.dm_weight, two.bp_weight, two.reward_margin) == (1e-3, 1e-4, 3.0)
        assert models.BACKBONES[model]["resolution"] == resolution


def test_decode_is_differentiable_and_in_range(backbone):
    z = torch.randn(2, *backbone.latent_shape, requires_grad=True)
    images = backbone.decode(z)
    assert images.shape == (2, 3, 64, 64) and images.min() >= 0 and images.max() <= 1
    assert torch.autograd.grad(images.mean(), z)[0].abs().max() > 0


def test_noise_of_a_sample_does_not_depend_on_its_batch(backbone):
    sigmas = backbone.sigmas()
    assert sigmas == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    whole = models.sample_latents(backbone, PROMPTS, sigmas, 0.9, seed=3)
    alone = models.sample_latents(backbone, PROMPTS[2:], sigmas, 0.9, seed=3, indices=[2])
    torch.testing.assert_close(whole[2:], alone, atol=1e-5, rtol=1e-5)


def test_resolution_and_model_are_checked(backbone):
    with pytest.raises(ValueError, match="does not divide by 16: try 48 or 64"):
        models.load("classroom", resolution=50)
    with pytest.raises(ValueError, match="unknown model 'sd4'; allowed: classroom"):
        models.load("sd4")
    with pytest.raises(ValueError, match="resolution 80: this transformer's table of positions ends at 64"):
        models.load("classroom", resolution=80)
    x, cond = torch.randn(3, *backbone.latent_shape), backbone.encode(PROMPTS)  # guidance is away from the empty prompt
    with torch.no_grad():
        v = [backbone.velocity("teacher", x, 0.5, cond, 2.0, *more) for more in ((), (backbone.encode([""]),))]
    assert torch.equal(*v)


def test_a_saved_stack_loads_in_diffusers_and_gives_the_same_image(backbone, tmp_path):
    pytest.importorskip("peft", reason="peft is in requirements-dev.txt")
    pipe = StableDiffusion3Pipeline.from_pretrained(models.CLASSROOM / "teacher")
    pipe.set_progress_bar_config(disable=True)
    for name in ("generator", "fake"):
        models.save_adapter(backbone.transformer, name, tmp_path / name)
        pipe.load_lora_weights(tmp_path / name, adapter_name=name)
    pipe.set_adapters(["generator", "fake"])
    noise = models.Noise(("sample", 0), range(3), backbone.latent_shape, "cpu").normal("start")
    call = dict(num_inference_steps=4, guidance_scale=1.0, max_sequence_length=backbone.text_tokens, latents=noise)
    want = pipe(PROMPTS, output_type="pt", **call).images
    backbone.roles["both"] = ("generator", "fake")
    latents = models.sample_latents(backbone, PROMPTS, backbone.sigmas(4), role="both")
    plain = models.sample_latents(backbone, PROMPTS, backbone.sigmas(4), role="teacher")
    with torch.no_grad():
        assert (backbone.decode(latents) - want).abs().max() < 1e-4
        assert (backbone.decode(plain) - want).abs().max() > 1e-2


def test_checkpointing_is_automatic_on_gpus_only(backbone):
    asked = [models.needs_checkpointing(backbone, setting, 10**9) for setting in ("auto", "on", "off")]
    assert asked == [False, True, False]
