"""Complete small random pipelines of the published families in their own classes, tokenizers included."""

import importlib
import importlib.util
import sys

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    PRXPipeline,
    PRXTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
)
from tiny_rewards import loud, qwen_tokenizer
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5GemmaConfig,
)
from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

import models

BLOCKS = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
BLOCKS |= dict(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=4)
CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CHAT += "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
GEMMA = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
GEMMA |= dict(head_dim=8, query_pre_attn_scalar=8)


def scheduler():
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, shift=3.0, base_shift=0.5, max_shift=1.15, max_image_seq_len=4096
    )


def write_flux1(folder, guidance_embeds=True):
    """FluxPipeline: 64x64 px are 16 tokens."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        tokenizer = CLIPTokenizer.from_pretrained(models.CLASSROOM / "clip")
        ids = dict(eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id)
        text = CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
        )
        text.update(ids | dict(pad_token_id=tokenizer.pad_token_id, max_position_embeddings=14, projection_dim=8))
        t5 = T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        transformer = FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=8,
            axes_dims_rope=(4, 6, 6),
            guidance_embeds=guidance_embeds,
        )
        pipe = FluxPipeline(
            scheduler=scheduler(),
            vae=AutoencoderKL(**BLOCKS, scaling_factor=0.36, shift_factor=0.12),
            text_encoder=loud(CLIPTextModel(text)),
            tokenizer=tokenizer,
            text_encoder_2=loud(T5EncoderModel(t5)),
            tokenizer_2=tokenizer,
            transformer=loud(transformer),
        )
        pipe.save_pretrained(folder)
    return folder


def write_flux2(folder, seed=2):
    """Flux2KleinPipeline: 64x64 px are 16 tokens. Other seeds: another transformer, for the generator."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        tokenizer = qwen_tokenizer()
        tokenizer.pad_token, tokenizer.chat_template = "<|endoftext|>", CHAT
        text = Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=28,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=8,
            bos_token_id=None,
            eos_token_id=None,
        )
        vae = AutoencoderKLFlux2(**BLOCKS)
        vae.bn.running_mean.normal_(), vae.bn.running_var.uniform_(0.5, 2.0)
        encoder = Qwen3ForCausalLM(text)
        torch.manual_seed(seed)
        transformer = Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            timestep_guidance_channels=32,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        )
        pipe = Flux2KleinPipeline(
            scheduler=scheduler(), vae=vae, text_encoder=encoder, tokenizer=tokenizer, transformer=loud(transformer)
        )
        pipe.save_pretrained(folder)
    return folder


def write_sana(folder):
    """SanaPipeline: 64x64 px are 16 tokens."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        tokenizer = CLIPTokenizer.from_pretrained(models.CLASSROOM / "clip")
        text = Gemma2Config(**GEMMA, vocab_size=len(tokenizer))
        levels = 5  # 1/16
        sides = [
            {f"{side}_block_out_channels": (8,) * levels, f"{side}_layers_per_block": (1,) * levels}
            | {f"{side}_block_types": ("ResBlock",) * 4 + ("EfficientViTBlock",)}
            | {f"{side}_qkv_multiscales": ((), (), (), (), (5,))}
            for side in ("encoder", "decoder")
        ]
        vae = AutoencoderDC(**sides[0], **sides[1], latent_channels=4, attention_head_dim=4, scaling_factor=0.41)
        transformer = SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=16,
            cross_attention_dim=32,
            caption_channels=16,
            sample_size=4,
        )
        pipe = SanaPipeline(
            tokenizer=tokenizer,
            text_encoder=loud(Gemma2Model(text)),
            vae=vae,
            transformer=loud(transformer),
            scheduler=DPMSolverMultistepScheduler(
                flow_shift=3.0, use_flow_sigmas=True, prediction_type="flow_prediction"
            ),
        )
        pipe.save_pretrained(folder)
    return folder


def write_prx(folder):
    """PRXPipeline with FLUX.1's kind of VAE: 64x64 px are 16 tokens."""
    stand_in_for_ftfy(folder)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        tokenizer = CLIPTokenizer.from_pretrained(models.CLASSROOM / "clip")
        text = T5GemmaConfig(encoder=GEMMA | dict(vocab_size=len(tokenizer)), decoder=GEMMA)
        transformer = PRXTransformer2DModel(
            in_channels=4, context_in_dim=16, hidden_size=32, num_heads=2, depth=2, axes_dim=[8, 8], mlp_ratio=2.0
        )
        pipe = PRXPipeline(
            transformer=loud(transformer),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            text_encoder=loud(T5GemmaEncoder(text.encoder)),
            tokenizer=tokenizer,
            vae=AutoencoderKL(**BLOCKS, scaling_factor=0.36, shift_factor=0.12),
        )
        pipe.save_pretrained(folder)
        text.save_pretrained(folder / "text_encoder")  # the config of both halves, which diffusers reads
    return folder


def stand_in_for_ftfy(folder):
    """A package that need not be here cleans PRX's prompts; it leaves ASCII as it is, which is all the tests have."""
    if importlib.util.find_spec("ftfy") is None:
        folder.mkdir()
        (folder / "ftfy.py").write_text("def fix_text(text):\n    return text\n")
        sys.path.append(str(folder))
        importlib.import_module(PRXPipeline.__module__).ftfy = importlib.import_module("ftfy")
