"""Complete small random pipelines of the FLUX families in their own classes, tokenizers included."""

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
)
from tiny_rewards import loud, qwen_tokenizer
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
)

import models

BLOCKS = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
BLOCKS |= dict(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=4)
CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CHAT += "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"


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
