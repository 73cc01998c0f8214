"""Adapters as other tools write them: loaded as PEFT or diffusers load them, or refused by name."""

import json
import re
import shutil
import subprocess
import sys

import diffusers
import pytest
import tiny_pipelines
import torch
from safetensors.torch import load_file, save_file

import models

peft = pytest.importorskip("peft", reason="peft is in requirements-dev.txt")
SAFE, SETTINGS = "adapter_model.safetensors", "adapter_config.json"


class Tiny:
    """A small pipeline: fresh networks of it, and their velocities for one input."""

    def __init__(self, model, folder):
        self.folder, self.backbone = folder, models.load(model, folder, resolution=64)
        self.x = torch.randn(2, *self.backbone.latent_shape, generator=models.seeded("x"))
        self.cond = self.backbone.encode(["a red circle", "a cross"])

    def network(self):
        cls = getattr(diffusers, self.backbone.network_class)
        return models.load_transformer(cls, self.folder / "transformer", torch.float32)

    @torch.no_grad()
    def velocity(self, network):
        self.backbone.evaluations = 0
        network.requires_grad_(False)
        return self.backbone.predict(network, self.x, torch.full((2,), 0.7), self.cond, 3.5)

    def ours(self, source):
        network = self.network()
        models.prepare_for_lora(network, self.backbone.lora_targets)
        models.load_adapter(network, "a", source)
        with models.adapters(network, "a"):
            return self.velocity(network)

    def theirs(self, source):
        """Loaded by PEFT where its settings lie beside the weights, else by diffusers."""
        network = self.network()
        if (source / SETTINGS).is_file():
            return self.velocity(peft.PeftModel.from_pretrained(network, source).eval())
        return self.velocity(self.in_diffusers(source).transformer)

    def in_diffusers(self, source):
        pipe = self.backbone.pipe
        pipe.register_modules(transformer=self.network())
        pipe.load_lora_weights(source, adapter_name="default")
        return pipe

    def peft(self, folder, name="default", r=4, alpha=12, layers=models.ATTENTION, loud=0.2, **options):
        """A PEFT adapter with random B, saved as a PeftModel saves itself."""
        options = (
            dict(r=r, lora_alpha=alpha, target_modules=layers if isinstance(layers, str) else list(layers)) | options
        )
        network = peft.get_peft_model(self.network(), peft.LoraConfig(**options), adapter_name=name)
        for key, p in network.named_parameters():
            if "lora_B" in key:
                p.data += loud * torch.randn(p.shape, generator=models.seeded(key))
        network.save_pretrained(folder)
        return network


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    models.quiet_libraries()
    out = tmp_path_factory.mktemp("pipelines")
    return {
        "sd3": Tiny("classroom", models.CLASSROOM / "teacher"),
        "flux1": Tiny("flux1", tiny_pipelines.write_flux1(out / "flux1")),
        "flux2": Tiny("flux2-4b", tiny_pipelines.write_flux2(out / "flux2")),
    }


# each writes into `folder` and returns what our side is given and, if that is to be equal, what theirs is given


def as_peft(**options):
    def write(tiny, folder):
        tiny.peft(folder / "a", **options)
        return folder / "a", folder / "a"

    return write


def as_pickle(kind):
    """adapter_model.bin or .pt beside PEFT's settings; a folder or, for .pt, the file."""

    def write(tiny, folder):
        tiny.peft(folder / "a")
        shutil.copytree(folder / "a", folder / "b")
        file = folder / f"a/adapter_model.{kind}"
        torch.save(load_file(folder / "a" / SAFE), file)
        (folder / "a" / SAFE).unlink()
        return file if kind == "pt" else file.parent, folder / "b"

    return write


def as_nested(*names):
    def write(tiny, folder):
        for name in names:
            tiny.peft(folder / "a", name)
        return folder / "a", folder / "a" / names[0]

    return write


def renamed(rename, layers=models.ATTENTION):
    """A .pt of keys as a training script's state dict has them, alpha twice the rank."""

    def write(tiny, folder):
        tiny.peft(folder / "a", alpha=8, layers=layers)
        bare = {key.removeprefix("base_model.model."): t for key, t in load_file(folder / "a" / SAFE).items()}
        state = {}
        for key, t in bare.items():
            state |= {new: t for new in rename(key)}
        torch.save(state, folder / "a.pt")
        return folder / "a.pt", folder / "a"

    return write


def wrapped(key):
    """As torch.compile, FSDP, checkpointing and DDP name it, within PEFT and around it."""
    key = key.replace(".attn.", "._fsdp_wrapped_module._checkpoint_wrapped_module.attn._orig_mod.")
    return [f"_orig_mod.module.base_model.model._fsdp_wrapped_module.{key}".replace(".weight", ".default.weight")]


def converted(tiny, folder):
    """PiSSA, which PEFT turned into plain LoRA: twice the rank."""
    tiny.peft(folder / "start", init_lora_weights="pissa", loud=0)
    network = tiny.peft(folder / "pissa", init_lora_weights="pissa", loud=0.02)
    settings = json.loads((folder / "start" / SETTINGS).read_text()) | {"init_lora_weights": True}
    (folder / "start" / SETTINGS).write_text(json.dumps(settings))
    network.save_pretrained(folder / "a", path_initial_model_for_weight_conversion=str(folder / "start"))
    return folder / "a", folder / "a"


def settings(**changes):
    """PEFT's settings changed after the fact."""

    def write(tiny, folder):
        tiny.peft(folder / "a")
        file = folder / "a" / SETTINGS
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        return folder / "a", None

    return write


def tensors(change, layers=models.ATTENTION, alpha=4, **options):
    """A .safetensors without any settings, its {key as diffusers writes it: tensor} changed."""

    def write(tiny, folder):
        tiny.peft(folder / "a", layers=layers, alpha=alpha, **options)
        bare = {key.removeprefix("base_model.model."): t for key, t in load_file(folder / "a" / SAFE).items()}
        state = change({f"transformer.{key}": t for key, t in bare.items()})
        save_file({key: t.contiguous() for key, t in state.items()}, folder / "b.safetensors")
        return folder / "b.safetensors", folder / "b.safetensors"

    return write


def saved_by_diffusers(tiny, folder):
    network = tiny.peft(folder / "a", alpha=6, alpha_pattern={"to_q": 20}, rank_pattern={"to_k": 2})
    settings = {key: v for key, v in network.peft_config["default"].to_dict().items() if v is not None}
    layers = peft.get_peft_model_state_dict(network)
    layers = {key.removeprefix("base_model.model."): t for key, t in layers.items()}
    pipeline = getattr(diffusers, tiny.backbone.pipeline)
    metadata = dict(transformer_lora_adapter_metadata=settings)
    pipeline.save_lora_weights(folder / "b", transformer_lora_layers=layers, **metadata)
    return folder / "b", folder / "a"


def with_alphas(state):
    layers = sorted({key.partition(".lora_")[0] for key in state})
    return state | {f"{layer}.alpha": torch.tensor(2.0 + i) for i, layer in enumerate(layers)}


def for_comfyui(state):
    return {key.replace("transformer.", "diffusion_model.", 1): t for key, t in state.items()}


def kohya(state):
    """sd-scripts' names of FLUX.1's output projections, with an alpha."""
    out = {}
    for ours, theirs in (("to_out.0", "img_attn_proj"), ("to_add_out", "txt_attn_proj")):
        layer = f"lora_unet_double_blocks_0_{theirs}"
        out[f"{layer}.lora_down.weight"] = state[f"transformer.transformer_blocks.0.attn.{ours}.lora_A.weight"]
        out[f"{layer}.lora_up.weight"] = state[f"transformer.transformer_blocks.0.attn.{ours}.lora_B.weight"]
        out[f"{layer}.alpha"] = torch.tensor(2.0)
    return out


def kohya_fused(state):
    """The same with query, key and value in one, and alpha other than the rank."""
    out, block = kohya(state), "transformer.transformer_blocks.0.attn."
    for layer, (q, k, v) in (("img_attn", ("to_q", "to_k", "to_v")), ("txt_attn", ("add_q_proj",) * 3)):
        down, up = (state[f"{block}{q}.lora_{x}.weight"] for x in "AB")
        up = torch.cat([up, 2 * state[f"{block}{k}.lora_B.weight"], -state[f"{block}{v}.lora_B.weight"]])
        layer = f"lora_unet_double_blocks_0_{layer}_qkv"
        out |= {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up, f"{layer}.alpha": torch.tensor(7.0)}
    return out


def kohya_with_texts(state):
    """Its layers of CLIP and of T5, which diffusers converts and drops."""
    out, (matrix, *_) = kohya_fused(state), state.values()
    for layer in ("lora_te1_text_model_encoder_layers_0_self_attn_q_proj", "lora_te3_encoder_block_0_layer_0_q"):
        out |= {f"{layer}.lora_down.weight": matrix.clone(), f"{layer}.lora_up.weight": matrix.T.clone()}
    return out


def original_flux2(state):
    """The original repository's names, query, key and value in one."""
    out = {}
    for kind in ("lora_A", "lora_B"):
        attn = {n: state[f"transformer.transformer_blocks.0.attn.{n}.{kind}.weight"] for n in ("to_q", "to_out.0")}
        qkv = attn["to_q"] if kind == "lora_A" else torch.cat([attn["to_q"], 2 * attn["to_q"], -attn["to_q"]])
        out[f"diffusion_model.double_blocks.0.img_attn.qkv.{kind}.weight"] = qkv
        out[f"diffusion_model.double_blocks.0.img_attn.proj.{kind}.weight"] = attn["to_out.0"]
    return out


def as_the_refusal_says(write, pipeline="FluxPipeline"):
    """Converted by the command that the refusal names, without peft; the reference is diffusers' own loader."""

    def converted(tiny, folder):
        source, _ = write(tiny, folder)
        with pytest.raises(models.UserError) as error:
            tiny.ours(source)
        (code,) = re.findall('python -c "(.*)"$', str(error.value))
        code = "import sys; sys.modules['peft'] = None; " + code.replace("FluxPipeline", pipeline)
        subprocess.run([sys.executable, "-c", code], check=True)
        network = {key: t for key, t in load_file(source).items() if not key.startswith("lora_te")}
        save_file(network, folder / "network.safetensors")
        return folder / "b_converted.safetensors", folder / "network.safetensors"

    return converted


def ours_of_old(tiny, folder):
    return (models.CLASSROOM / "adapters/acdmd/generator_ema",) * 2


def ours(tiny, folder):
    network = tiny.network()
    models.prepare_for_lora(network, tiny.backbone.lora_targets)
    for p in models.add_adapter(network, "a", 4, generator=models.seeded("a")):
        p.data += 0.1 * torch.randn(p.shape, generator=models.seeded("b", tuple(p.shape)))
    models.save_adapter(network, "a", folder / "a")
    with models.adapters(network, "a"):
        assert torch.equal(tiny.velocity(network), tiny.ours(folder / "a"))
    return folder / "a", folder / "a"


def ours_without_settings(tiny, folder):
    source, _ = ours(tiny, folder)
    save_file(load_file(source / models.LORA_FILE), folder / "b.safetensors")
    return source, folder / "b.safetensors"


def first(state, value):
    return {key: value(t) if i == 0 else t for i, (key, t) in enumerate(state.items())}


SOME = ("attn.to_q", "attn.to_add_out")
FLUX2 = r"single_.*\.attn\.(to_qkv_mlp_proj|to_out)|transformer_blocks.*\.attn\.(to_[qkv]|to_out\.0|(add|to_add)_.*)"
HALF = dict(rank_pattern={"to_k": 2}, alpha_pattern={"to_k": 2})
DIALECTS = (
    # tool and what is special, pipeline, how it is written, "equal" or what the refusal says
    ("PEFT", "sd3", as_peft(), "equal"),
    ("PEFT", "flux1", as_peft(), "equal"),
    ("PEFT", "flux2", as_peft(layers=FLUX2), "equal"),
    ("PEFT, .bin", "flux1", as_pickle("bin"), "equal"),
    ("PEFT, .pt, the file", "flux1", as_pickle("pt"), "equal"),
    ("PEFT, one named adapter", "flux1", as_nested("rl"), "equal"),
    ("PEFT, two named adapters", "flux1", as_nested("rl", "sft"), "itself: give one of .*a/rl, .*a/sft"),
    ("PEFT, rsLoRA", "flux1", as_peft(use_rslora=True), "equal"),
    (
        "PEFT, patterns",
        "flux1",
        as_peft(rank_pattern={"to_q": 2, ".*0.attn.to_k": 6}, alpha_pattern={"to_k": 3}),
        "equal",
    ),
    ("PEFT, patterns and rsLoRA", "flux1", as_peft(rank_pattern={"to_v": 9}, use_rslora=True), "equal"),
    ("PEFT, some layers", "flux1", as_peft(layers=SOME), "equal"),
    ("PEFT, other layers", "flux1", as_peft(layers=("ff.net.2",)), r"ff\.net\.2 is no layer of this backbone"),
    ("PEFT, orthogonal start", "flux1", as_peft(init_lora_weights="orthogonal"), "equal"),
    ("PEFT, PiSSA", "flux1", as_peft(init_lora_weights="pissa"), "=pissa changed the base .*_for_weight_conversion"),
    (
        "PEFT, PiSSA by iteration",
        "flux1",
        as_peft(init_lora_weights="pissa_niter_4"),
        "=pissa_niter_4 changed the base",
    ),
    ("PEFT, OLoRA", "flux1", as_peft(init_lora_weights="olora"), "=olora changed the base"),
    ("PEFT, CorDA", "flux1", settings(init_lora_weights="corda"), "=corda changed the base"),
    ("PEFT, LoftQ", "flux1", settings(init_lora_weights="loftq"), "=loftq changed the base"),
    ("PEFT, PiSSA converted", "flux1", converted, "equal"),
    ("PEFT, DoRA", "flux1", as_peft(use_dora=True), "its use_dora True is not supported"),
    ("PEFT, not LoRA", "flux1", settings(peft_type="LOHA"), "its LOHA is not supported"),
    ("PEFT, alpha null", "flux1", settings(lora_alpha=None), "lora_alpha is None, and must be a number"),
    ("PEFT, alpha a text", "flux1", settings(lora_alpha="8"), "lora_alpha is '8', and must be a number"),
    ("PEFT, rank a text", "flux1", settings(r="four"), "r is 'four', and must be a number"),
    ("PEFT, a broken pattern", "flux1", settings(alpha_pattern={"to_(q": 3}), "alpha_pattern is no table of patterns"),
    ("PEFT, a list of patterns", "flux1", settings(rank_pattern=["to_q"]), "rank_pattern is no table of patterns"),
    ("PEFT, another rank", "flux1", settings(r=8), "has A of rank 4 and B of rank 4; its settings say 8"),
    ("state dict", "flux1", renamed(lambda key: [key]), "equal"),
    ("state dict, wrapped", "flux1", renamed(wrapped), "equal"),
    (
        "state dict, twice",
        "flux1",
        renamed(lambda key: [key, f"transformer.{key}"]),
        "transformer.* and transformer.* are of",
    ),
    (
        "state dict, two adapters",
        "flux1",
        renamed(lambda key: [key.replace(".weight", f".{n}.weight") for n in ("default", "other")]),
        "lora_A.default.weight and .*lora_A.other.weight are of two adapters",
    ),
    ("diffusers, with settings", "sd3", saved_by_diffusers, "equal"),
    ("diffusers, with settings", "flux1", saved_by_diffusers, "equal"),
    ("diffusers, alpha untold", "sd3", tensors(dict), "equal"),
    ("diffusers, ranks mixed", "flux1", tensors(dict, **HALF), "equal"),
    ("diffusers, bf16", "flux1", tensors(lambda state: {key: t.bfloat16() for key, t in state.items()}), "equal"),
    ("diffusers, alpha tensors", "flux1", tensors(with_alphas), "equal"),
    ("ComfyUI, diffusers' layers", "flux2", tensors(for_comfyui), "equal"),
    (
        "ComfyUI, its own layers",
        "flux2",
        tensors(original_flux2),
        "is another tool's naming. Diffusers converts FLUX.1's, so",
    ),
    ("ComfyUI, converted", "flux2", as_the_refusal_says(tensors(original_flux2), "Flux2KleinPipeline"), "equal"),
    ("kohya", "flux1", tensors(kohya), "lora_unet_double_blocks_0.* is another tool's naming. Diffusers converts"),
    ("kohya, converted", "flux1", as_the_refusal_says(tensors(kohya)), "equal"),
    ("kohya, fused, converted", "flux1", as_the_refusal_says(tensors(kohya_fused)), "equal"),
    ("kohya, fused, converted", "flux2", as_the_refusal_says(tensors(kohya_fused), "Flux2KleinPipeline"), "equal"),
    ("kohya, texts too", "flux1", tensors(kohya_with_texts), r"FLUX.1's, without lora_te1_.* \(4 keys\)"),
    ("kohya, texts too, converted", "flux1", as_the_refusal_says(tensors(kohya_with_texts)), "equal"),
    (
        "NaN",
        "flux1",
        tensors(lambda s: first(s, lambda t: t / 0)),
        "b.safetensors: .* numbers that are not finite",
    ),
    ("integers", "flux1", tensors(lambda s: first(s, torch.Tensor.char)), "is no LoRA matrix"),
    ("half of a pair", "flux1", tensors(lambda s: dict(list(s.items())[1:])), "lora_A.weight is missing"),
    ("ours, alpha 64 of rank 32", "sd3", ours_of_old, "equal"),
    ("ours", "sd3", ours, "equal"),
    ("ours, settings not read", "sd3", ours_without_settings, "equal"),
    ("ours, settings not read", "flux2", ours_without_settings, "equal"),
)


@pytest.mark.parametrize(
    "model, write, outcome", [row[1:] for row in DIALECTS], ids=[f"{name}-{model}" for name, model, *_ in DIALECTS]
)
def test_dialect(tiny, tmp_path, model, write, outcome):
    tiny = tiny[model]
    source, reference = write(tiny, tmp_path)
    if outcome != "equal":
        with pytest.raises(models.UserError, match=outcome) as error:
            tiny.ours(source)
        assert "\n" not in str(error.value)
        return
    got, want, plain = tiny.ours(source), tiny.theirs(reference), tiny.velocity(tiny.network())
    difference, effect = (got - want).abs().max(), (want - plain).abs().max()
    print(f"difference {difference:.1e}, effect of the adapter {effect:.1e}")
    assert difference < 2e-5 * max(1, want.abs().max()) and effect > 1e-2
