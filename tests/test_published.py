"""The published checkpoints' keys and shapes, rebuilt on the meta device, against what is known of the files.

modelscope/DiffSynth-Studio (model_configs.py, commit fed7b18f) knows the files by the md5 of their keys and shapes; the
sha256 here are of lists with those md5. The transformers' numbers are the published config.json's.
"""

import hashlib
import json

import bench
import diffusers
import huggingface_hub
import pytest
import tiny_rewards
import torch
import transformers
from bench_rewards import qwen2vl_config

import models
import rewards


def digest(state, shapes=True):
    """(number of tensors, start of the sha256 of "key [shape]" lines, or of the keys alone) of {key: tensor}."""
    lines = "\n".join(f"{key} {list(state[key].shape)}" if shapes else key for key in sorted(state))
    return len(state), hashlib.sha256(lines.encode()).hexdigest()[:16]


def meta_state(cls, config, **options):
    with torch.device("meta"):
        return cls(config, **options).state_dict()


def position_ids(*names):
    """What older files hold beside the weights: 0, 1, 2, ... as [1, length]."""
    return {name: torch.empty(1, length, device="meta") for name, length in names}


def hpsv2():
    return tiny_rewards.open_clip_state(rewards.HPSv2.CONFIG)


def imagereward():
    return tiny_rewards.imagereward_state(rewards.ImageReward.VISION, rewards.ImageReward.TEXT, projection=256)


def hpsv3():
    state = tiny_rewards.qwen2vl_keys(meta_state(transformers.Qwen2VLForConditionalGeneration, qwen2vl_config()))
    return state | tiny_rewards.head_state("rm_head.", (3584, 1024, 16, 2), (0, 3, 5))


def clip_h():
    state = meta_state(transformers.CLIPModel, transformers.CLIPConfig(**rewards.HPSv2.CONFIG))
    names = ("text_model.embeddings.position_ids", 77), ("vision_model.embeddings.position_ids", 257)
    return state | position_ids(*names)


PUBLISHED = {  # what our side makes of the file -> (tensors, start of the sha256)
    hpsv2: (686, "2d21a943bdca7a55"),  # HPS_v2.1_compressed.pt
    hpsv3: (736, "71385686a70d1eff"),  # HPSv3.safetensors
    imagereward: (625, "b483298b77da9ee3"),  # ImageReward.pt
    clip_h: (912, "3e7dfbae763da2a8"),  # PickScore
}


@pytest.mark.parametrize("state", PUBLISHED)
def test_keys_and_shapes_are_the_published_ones(state):
    with torch.device("meta"):
        assert digest(state()) == PUBLISHED[state]


class PublishedWeights(rewards.Weights):
    """The published keys in place of the files; the networks they must fit are built on the meta device."""

    def open(self, cls, folder, size=None):
        return qwen2vl_config() if cls is transformers.Qwen2VLConfig else self

    def add_special_tokens(self, _):
        """This is the tokenizer too."""

    def convert_tokens_to_ids(self, token):
        return 151657

    def state(self, folder, name):
        with torch.device("meta"):
            return {"hpsv2": hpsv2, "hpsv3": hpsv3, "imagereward": imagereward}[folder]()

    def model(self, cls, folder, config=None, state=None, dtype=None, **options):
        config = config or transformers.CLIPConfig(**rewards.HPSv2.CONFIG)
        with torch.device("meta"):
            model = cls(config, **options)
        if state is None:  # transformers leaves out what older files hold beside the weights
            state = {key: value for key, value in clip_h().items() if "position_ids" not in key}
        shapes = [{key: list(value.shape) for key, value in s.items()} for s in (model.state_dict(), state)]
        assert shapes[0] == shapes[1]
        self.fitted = [*getattr(self, "fitted", []), cls.__name__]
        return model


@pytest.mark.parametrize(
    "name, networks",
    (
        ("hpsv2", ["CLIPModel"]),
        ("hpsv3", ["Qwen2VLModel"]),
        ("imagereward", ["BlipVisionModel", "BlipTextModel"]),
        ("pickscore", ["CLIPModel"]),
    ),
)
def test_every_published_key_finds_its_place(name, networks):
    """Nothing missing, nothing left over, after the scorers' own renaming; the heads are fitted by load_head."""
    weights = PublishedWeights()
    rewards.SCORERS[name](weights, "cpu")
    assert weights.fitted == networks


def test_numbers_that_no_key_shows():
    clip, vision = transformers.CLIPConfig(**rewards.HPSv2.CONFIG), rewards.ImageReward.VISION
    assert clip.vision_config.hidden_act == clip.text_config.hidden_act == "gelu"  # OpenAI's models: quick_gelu
    assert vision["layer_norm_eps"] == 1e-6 and rewards.ImageReward.TEXT["layer_norm_eps"] == 1e-12


FLUX = dict(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096)
SCHEDULERS = {"flux1": FLUX, "flux2-4b": FLUX, "flux2-9b": FLUX}  # beside shift 3, which all have
TRANSFORMERS = {  # tensors; numbers in them (SD3: with its table of positions); start of the sha256, with shapes or not
    "sd3": (None, 2_084_951_104, None, None),
    "sd35": (909, 2.47e9, None, None),  # the file has 4.94 GB in two bytes a number
    "flux1": (1160, 23_802_816_640 // 2, "17931a3e1a0300ec", False),  # the three shards' total_size is in bytes
    "flux2-4b": (169, None, "40f0bfd9af3b4564", True),
    "flux2-9b": (233, None, "293c43ce341a7032", True),
}
LEVELS = {  # of four steps; FLUX: at 512 x 512
    "sana": (1, 0.9, 0.75, 0.5),
    "prx": (1, 0.9, 0.75, 0.5),
    "sd3": (1, 0.9, 0.75, 0.5),
    "sd35": (1, 0.9, 0.75, 0.5),
    "flux1": (1, 0.849, 0.652, 0.385),
    "flux2-4b": (1, 0.958, 0.884, 0.717),
    "flux2-9b": (1, 0.958, 0.884, 0.717),
}


@pytest.mark.parametrize("model", TRANSFORMERS)
def test_transformers_have_the_published_tensors(model):
    tensors, numbers, sha, shapes = TRANSFORMERS[model]
    network = getattr(diffusers, models.BACKBONES[model]["family"].network_class)
    with torch.device("meta"):
        state = network(**bench.PUBLISHED[model]).state_dict()
    if sha:
        assert digest(state, shapes) == (tensors, sha)
    assert tensors in (len(state), None)
    assert numbers is None or sum(t.numel() for t in state.values()) == pytest.approx(
        numbers, rel=0.001 * (model == "sd35")
    )


# The files' keys and shapes as diffusers' scripts/convert_{sana,prx}_to_diffusers.py write them, in blocks and beside.
KEYS = {
    "sana": """
        scale_shift_table 6 1152
        attn1.to_q.weight 1152 1152, attn1.to_k.weight 1152 1152, attn1.to_v.weight 1152 1152
        attn1.to_out.0.weight 1152 1152, attn1.to_out.0.bias 1152
        attn2.to_q.weight 1152 1152, attn2.to_k.weight 1152 1152, attn2.to_v.weight 1152 1152
        attn2.to_q.bias 1152, attn2.to_k.bias 1152, attn2.to_v.bias 1152
        attn2.to_out.0.weight 1152 1152, attn2.to_out.0.bias 1152
        ff.conv_inverted.weight 5760 1152 1 1, ff.conv_inverted.bias 5760
        ff.conv_depth.weight 5760 1 3 3, ff.conv_depth.bias 5760, ff.conv_point.weight 1152 2880 1 1""",
    "prx": """
        attention.img_qkv_proj.weight 5376 1792, attention.txt_kv_proj.weight 3584 1792
        attention.to_out.0.weight 1792 1792
        attention.norm_q.weight 64, attention.norm_k.weight 64, attention.norm_added_k.weight 64
        gate_proj.weight 6272 1792, up_proj.weight 6272 1792, down_proj.weight 1792 6272
        modulation.lin.weight 10752 1792, modulation.lin.bias 10752""",
}
BESIDE = {
    "sana": """
        patch_embed.proj.weight 1152 32 1 1, patch_embed.proj.bias 1152
        caption_projection.linear_1.weight 1152 2304, caption_projection.linear_1.bias 1152
        caption_projection.linear_2.weight 1152 1152, caption_projection.linear_2.bias 1152
        time_embed.emb.timestep_embedder.linear_1.weight 1152 256, time_embed.emb.timestep_embedder.linear_1.bias 1152
        time_embed.emb.timestep_embedder.linear_2.weight 1152 1152, time_embed.emb.timestep_embedder.linear_2.bias 1152
        time_embed.linear.weight 6912 1152, time_embed.linear.bias 6912, caption_norm.weight 1152
        proj_out.weight 32 1152, proj_out.bias 32, scale_shift_table 2 1152""",
    "prx": """
        img_in.weight 1792 64, img_in.bias 1792, txt_in.weight 1792 2304, txt_in.bias 1792
        time_in.in_layer.weight 1792 256, time_in.in_layer.bias 1792
        time_in.out_layer.weight 1792 1792, time_in.out_layer.bias 1792
        final_layer.linear.weight 64 1792, final_layer.linear.bias 64
        final_layer.adaLN_modulation.1.weight 3584 1792, final_layer.adaLN_modulation.1.bias 3584""",
}


def shapes_of(text):
    rows = [row.split() for line in text.split("\n") for row in line.split(",") if row.strip()]
    return {key: [int(n) for n in shape] for key, *shape in rows}


@pytest.mark.parametrize("model, prefix, blocks", (("sana", "transformer_blocks", 28), ("prx", "blocks", 16)))
def test_the_small_transformers_have_the_keys_that_the_conversion_writes(model, prefix, blocks):
    network = getattr(diffusers, models.BACKBONES[model]["family"].network_class)
    with torch.device("meta"):
        state = network(**bench.PUBLISHED[model]).state_dict()
    want = shapes_of(BESIDE[model])
    for i in range(blocks):
        want |= {f"{prefix}.{i}.{key}": shape for key, shape in shapes_of(KEYS[model]).items()}
    assert {key: list(value.shape) for key, value in state.items()} == want


@pytest.mark.parametrize("steps", (4, 20))
def test_the_levels_that_stand_in_for_sanas_solver_are_its_own(steps):
    config = dict(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction")
    solver = diffusers.DPMSolverMultistepScheduler(**config)
    solver.set_timesteps(steps)
    ours = models.few_step_sigmas(
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), [1000 * (1 - i / steps) for i in range(steps)]
    )
    assert ours == pytest.approx(solver.sigmas.tolist(), abs=1.5e-3)  # which begins at .9997 and ends at 0


@pytest.mark.parametrize("model", LEVELS)
def test_few_step_levels_are_those_of_the_published_schedulers(model):
    options = dict(shift=3.0) | SCHEDULERS.get(model, {})
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, **options)
    family = models.BACKBONES[model]["family"].family
    levels = models.few_step_sigmas(scheduler, models.FEW_STEPS, (512 // 16) ** 2, family)
    assert levels == pytest.approx([*LEVELS[model], 0], abs=5e-4)


LAYOUTS = {  # files of a published transformer folder; what an index lists, if there is one
    "SD3-M": (["{}.safetensors", "{}.fp16.safetensors"], None),
    "FLUX.2-klein-4B": (["{}.safetensors"], None),
    "FLUX.1-dev": ([f"{{}}-0000{i}-of-00003.safetensors" for i in (1, 2, 3)], "{}.safetensors.index.json"),
    "with variants": (
        ["{}-00001-of-00002.safetensors", "{}-00002-of-00002.safetensors"]
        + ["{}.fp16-00001-of-00002.safetensors", "{}.fp16-00002-of-00002.safetensors"],
        "{}.safetensors.index.json",
    ),
}


def write_layout(folder, layout):
    """The classroom's transformer in such files; those of the variant hold zeros."""
    files, index = LAYOUTS[layout]
    source = models.CLASSROOM / "teacher/transformer"
    state = models.load_file(source / "diffusion_pytorch_model.safetensors")
    folder.mkdir()
    (folder / "config.json").write_text((source / "config.json").read_text())
    for variant in ("", ".fp16"):
        shards = [name.format("diffusion_pytorch_model") for name in files if (".fp16" in name) == bool(variant)]
        split = {key: shards[i % len(shards)] for i, key in enumerate(state)} if shards else {}
        for shard in shards:
            part = {key: t.half() * 0 if variant else t for key, t in state.items() if split[key] == shard}
            models.save_file(part, folder / shard)
        if index and shards:
            name = index.format("diffusion_pytorch_model").replace(".index", f".index{variant}")
            (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": split}))
    return state


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_transformer_is_what_the_index_lists(tmp_path, layout):
    state = write_layout(tmp_path / "a", layout)
    network = models.load_transformer(diffusers.SD3Transformer2DModel, tmp_path / "a", torch.float32)
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


def test_a_folder_without_its_weights_is_told_with_what_is_there(tmp_path):
    def refused(match):
        with pytest.raises(models.UserError, match=match) as error:
            models.load_transformer(diffusers.SD3Transformer2DModel, tmp_path / "a", torch.float32)
        assert "\n" not in str(error.value)

    write_layout(tmp_path / "a", "with variants")
    index = tmp_path / "a/diffusion_pytorch_model.safetensors.index.json"
    (tmp_path / "a/diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    refused("lacks diffusion_pytorch_model-00002-of-00002.safetensors; there: diffusion_pytorch_model-00001-of-00002")
    index.write_text("{}")
    refused("lacks its weight_map; there: ")
    index.write_text("{half")
    refused("index.json cannot be read: ")
    index.unlink()
    refused("lacks diffusion_pytorch_model.safetensors; there: .*fp16-00001")
    for file in (tmp_path / "a").glob("*.safetensors"):
        file.unlink()
    refused("lacks diffusion_pytorch_model.safetensors; there: no .safetensors|there: .*index.fp16.json")


def test_the_download_leaves_variants_and_single_file_weights_out(monkeypatch, tmp_path):
    wanted = """model_index.json tokenizer/vocab.json tokenizer/merges.txt tokenizer_3/spiece.model
        transformer/config.json transformer/diffusion_pytorch_model.safetensors.index.json
        transformer/diffusion_pytorch_model-00001-of-00003.safetensors vae/diffusion_pytorch_model.safetensors
        text_encoder/model.safetensors text_encoder_3/model-00002-of-00002.safetensors"""
    others = """flux1-dev.safetensors ae.safetensors text_encoder/model.fp16.safetensors
        text_encoder_3/model.fp16-00001-of-00002.safetensors transformer/diffusion_pytorch_model.fp16.safetensors
        transformer/diffusion_pytorch_model.bf16-00001-of-00002.safetensors vae/diffusion_pytorch_model.fp16.safetensors
        text_encoder/flax_model.msgpack text_encoder_4/model.safetensors"""
    patterns = {}

    def snapshot_download(source, **options):
        patterns.update(options)
        return tmp_path

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    models.fetch("somebody/something", "--weights")
    files = [*wanted.split(), *others.split()]
    assert list(huggingface_hub.utils.filter_repo_objects(files, **patterns)) == wanted.split()
