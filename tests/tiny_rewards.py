"""A --reward_dir of small random models in the layouts in which the nine scorers' checkpoints are published."""

import json
import shutil

import bench_rewards
import torch
from safetensors.torch import save_file
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    Mask2FormerConfig,
    PPOCRV5MobileDetConfig,
    PPOCRV5MobileDetForObjectDetection,
    PPOCRV5MobileRecForTextRecognition,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SwinConfig,
)

import models
import rewards

CLIP_CONFIG = dict(
    projection_dim=24,
    vision_config=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    | dict(patch_size=8, image_size=32, hidden_act="gelu"),
    text_config=dict(hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    | dict(max_position_embeddings=20, hidden_act="gelu"),
)
VISION = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, patch_size=8)
VISION |= dict(image_size=32, layer_norm_eps=1e-6)
TEXT = dict(vocab_size=64, hidden_size=48, encoder_hidden_size=32, intermediate_size=64, num_hidden_layers=2)
TEXT |= dict(num_attention_heads=2, max_position_embeddings=40, layer_norm_eps=1e-12)

WIDTHS = 1024, 128, 64, 16, 1  # of the published heads


def shrink(setattr=setattr):
    """Make the architectures that are constants in rewards.py as small as the files written here."""
    setattr(rewards.HPSv2, "CONFIG", clip_config())
    setattr(rewards.ImageReward, "VISION", VISION)
    setattr(rewards.ImageReward, "TEXT", TEXT)


def clip_config():
    tokenizer = AutoTokenizer.from_pretrained(models.CLASSROOM / "clip")
    ids = dict(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    ids |= dict(bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id)
    return CLIP_CONFIG | {"text_config": CLIP_CONFIG["text_config"] | ids}


def normal(*shape, scale=0.2):
    return torch.randn(shape) * scale


def write_all(folder):
    """One folder a name in rewards.SOURCES."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shutil.copytree(models.CLASSROOM / "clip", folder / "clip")
        loud(CLIPModel(CLIPConfig(**clip_config()))).save_pretrained(folder / "pickscore")
        AutoTokenizer.from_pretrained(folder / "clip").save_pretrained(folder / "pickscore")
        for name, state in (
            ("hpsv2/HPS_v2.1_compressed.pt", {"state_dict": open_clip_state()}),
            ("aesthetic/sac+logos+ava1-l14-linearMSE.pth", head_state("layers.", (64, *WIDTHS))),
            ("imagereward/ImageReward.pt", imagereward_state()),
        ):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            torch.save(state, folder / name)
        (folder / "bert").mkdir()
        letters = "abcdefghijklmnopqrstuvwxyz"
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + c for c in letters)]
        words += [f"[unused{i}]" for i in range(TEXT["vocab_size"] - 2 - len(words))]
        (folder / "bert" / "vocab.txt").write_text("\n".join(words) + "\n")
        (folder / "bert" / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
        write_qwen(folder)
        write_ocr(folder)
        write_mask2former(folder / "mask2former")
    return folder


def loud(model):
    """Random weights large enough that no path through the network is lost in rounding."""
    for name, p in model.named_parameters():
        if "norm" not in name and p.ndim:
            torch.nn.init.normal_(p, std=0.2)
    return model


def head_state(prefix, widths, indices=(0, 2, 4, 6, 7)):
    state = {}
    for i, a, b in zip(indices, widths, widths[1:], strict=False):
        state |= {f"{prefix}{i}.weight": normal(b, a), f"{prefix}{i}.bias": normal(b)}
    return state


def open_clip_state(config=None):
    """open_clip's keys and shapes for a CLIPConfig's numbers."""
    config = config or clip_config()
    state = {"logit_scale": torch.tensor(2.0)}
    for prefix, c in (("visual.", config["vision_config"]), ("", config["text_config"])):
        d, hidden = c["hidden_size"], c["intermediate_size"]
        for i in range(c["num_hidden_layers"]):
            block = f"{prefix}transformer.resblocks.{i}."
            state |= {block + "attn.in_proj_weight": normal(3 * d, d), block + "attn.in_proj_bias": normal(3 * d)}
            state |= linear(block + "attn.out_proj", d, d) | linear(block + "mlp.c_fc", hidden, d)
            state |= linear(block + "mlp.c_proj", d, hidden) | norm(block + "ln_1", d) | norm(block + "ln_2", d)
    d, patch = config["vision_config"]["hidden_size"], config["vision_config"]["patch_size"]
    tokens = (config["vision_config"]["image_size"] // patch) ** 2 + 1
    state |= {"visual.class_embedding": normal(d), "visual.positional_embedding": normal(tokens, d)}
    state |= {"visual.conv1.weight": normal(d, 3, patch, patch), "visual.proj": normal(d, config["projection_dim"])}
    state |= norm("visual.ln_pre", d) | norm("visual.ln_post", d)
    c = config["text_config"]
    d = c["hidden_size"]
    state |= {
        "token_embedding.weight": normal(c["vocab_size"], d),
        "text_projection": normal(d, config["projection_dim"]),
    }
    state |= {"positional_embedding": normal(c["max_position_embeddings"], d)} | norm("ln_final", d)
    return state


def imagereward_state(vision_config=VISION, text_config=TEXT, projection=16):
    """ImageReward.pt's keys and shapes."""
    d, hidden, state = vision_config["hidden_size"], vision_config["intermediate_size"], {}
    patch = vision_config["patch_size"]
    tokens = (vision_config["image_size"] // patch) ** 2 + 1
    vision = "blip.visual_encoder."
    state |= {vision + "cls_token": normal(1, 1, d), vision + "pos_embed": normal(1, tokens, d)}
    state |= {
        vision + "patch_embed.proj.weight": normal(d, 3, patch, patch),
        vision + "patch_embed.proj.bias": normal(d),
    }
    for i in range(vision_config["num_hidden_layers"]):
        block = f"{vision}blocks.{i}."
        state |= norm(block + "norm1", d) | norm(block + "norm2", d) | linear(block + "attn.qkv", 3 * d, d)
        state |= linear(block + "attn.proj", d, d) | linear(block + "mlp.fc1", hidden, d)
        state |= linear(block + "mlp.fc2", d, hidden)
    state |= norm(vision + "norm", d)
    text, e = "blip.text_encoder.", text_config["hidden_size"]
    names = (
        ("word_embeddings", text_config["vocab_size"]),
        ("position_embeddings", text_config["max_position_embeddings"]),
    )
    state |= {f"{text}embeddings.{name}.weight": normal(n, e) for name, n in names}
    state |= norm(text + "embeddings.LayerNorm", e)
    state[text + "embeddings.position_ids"] = torch.arange(text_config["max_position_embeddings"])[None]
    for i in range(text_config["num_hidden_layers"]):
        layer = f"{text}encoder.layer.{i}."
        for kind, width in (("attention", e), ("crossattention", d)):
            state |= linear(f"{layer}{kind}.self.query", e, e) | linear(f"{layer}{kind}.output.dense", e, e)
            state |= linear(f"{layer}{kind}.self.key", e, width) | linear(f"{layer}{kind}.self.value", e, width)
            state |= norm(f"{layer}{kind}.output.LayerNorm", e)
        state |= linear(layer + "intermediate.dense", text_config["intermediate_size"], e)
        state |= linear(layer + "output.dense", e, text_config["intermediate_size"]) | norm(
            layer + "output.LayerNorm", e
        )
    state |= linear("blip.vision_proj", projection, d) | linear("blip.text_proj", projection, e)
    return state | head_state("mlp.layers.", (e, *WIDTHS))


def linear(name, rows, columns):
    return {f"{name}.weight": normal(rows, columns), f"{name}.bias": normal(rows)}


def norm(name, width):
    return {f"{name}.weight": 1 + normal(width), f"{name}.bias": normal(width)}


def qwen_tokenizer():
    """Every byte a token, and the special tokens of Qwen-VL's chats."""
    from tokenizers import pre_tokenizers

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    return tokenizer


def qwen2vl_keys(state):
    """A state dict of Qwen2-VL in the published naming."""
    old = lambda key: key.replace("model.visual.", "visual.").replace("model.language_model.", "model.")  # noqa: E731
    return {old(key): value for key, value in state.items()}


def write_qwen(folder):
    tokenizer = qwen_tokenizer()
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "vision_start", "vision_end")}
    common = dict(image_token_id=ids["image_pad"], video_token_id=len(tokenizer) + 5)
    common |= dict(vision_start_token_id=ids["vision_start"], vision_end_token_id=ids["vision_end"])
    text = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    text |= dict(num_key_value_heads=1, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    rope = dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3])
    vision = dict(depth=2, embed_dim=32, num_heads=2, mlp_ratio=2, hidden_size=32)
    config = Qwen2VLConfig(
        text_config=text | dict(vocab_size=400, rope_parameters=rope), vision_config=vision, **common
    )
    config.save_pretrained(folder / "qwen2vl")
    tokenizer.save_pretrained(folder / "qwen2vl")
    config.text_config.vocab_size = len(tokenizer) + 1  # the table ends with <|Reward|>
    model = loud(Qwen2VLForConditionalGeneration(config))
    state = {key: value.clone() for key, value in qwen2vl_keys(model.state_dict()).items()}
    (folder / "hpsv3").mkdir()
    state |= head_state("rm_head.", (32, 1024, 16, 2), (0, 3, 5))
    save_file(state, folder / "hpsv3" / "HPSv3.safetensors")

    vision = dict(depth=2, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=32, patch_size=16)
    vision |= dict(deepstack_visual_indexes=[0, 1], num_position_embeddings=64)
    rope = dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 2, 2], mrope_interleaved=True)
    text |= dict(vocab_size=len(tokenizer), rope_parameters=rope, head_dim=16)
    config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **common)
    loud(Qwen3VLForConditionalGeneration(config)).save_pretrained(folder / "qwen3vl")
    tokenizer.save_pretrained(folder / "qwen3vl")


def write_ocr(folder):
    detector = PPOCRV5MobileDetForObjectDetection(PPOCRV5MobileDetConfig())
    detector.save_pretrained(folder / "ocr_det")
    characters = ["blank", *"0123456789abcdefghijklmnopqrstuvwxyz", " "]
    config = bench_rewards.ocr_rec_config()
    config.head_out_channels = len(characters)
    PPOCRV5MobileRecForTextRecognition(config).save_pretrained(folder / "ocr_rec")
    (folder / "ocr_rec" / "preprocessor_config.json").write_text(json.dumps({"character_list": characters}))


def write_mask2former(folder):
    swin = SwinConfig(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4)
    swin.out_features = ["stage1", "stage2", "stage3", "stage4"]
    small = dict(feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32, encoder_layers=1)
    small |= dict(decoder_layers=2, num_attention_heads=2, dim_feedforward=16, num_queries=100)
    config = Mask2FormerConfig(backbone_config=swin, num_labels=80, **small)
    model = rewards.segmenter_class()(config)
    model.save_pretrained(folder)  # in the hub's naming
    new = models.load_file(folder / "model.safetensors")
    state = {key: value for key, value in new.items() if "encoder.swin.layernorm" not in key}  # not in older files
    blocks = [key for key in state if key.endswith("relative_position_bias_table")]
    assert len(new) == len(state) + 2 and len(blocks) == 4  # else the names have changed, and this layout with them
    state |= {key.replace("bias_table", "index"): torch.zeros(16, 16, dtype=torch.int64) for key in blocks}
    state["criterion.empty_weight"] = torch.ones(81)  # of the training loss
    save_file(state, folder / "model.safetensors", {"format": "pt"})
