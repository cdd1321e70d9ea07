"""A small, randomly initialised Stable Diffusion in diffusers layout, made of the real classes.

It stands in for the gigabytes of the real weights in tests and benchmarks, and goes through the same
loading code.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch

_MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "scheduler": ["diffusers", "DDPMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "feature_extractor": [None, None],
    "safety_checker": [None, None],
    "requires_safety_checker": False,
}


def build_small_stable_diffusion(
    folder: str | Path,
    unet_channels: Sequence[int] = (32, 64, 64, 64),
    vae_channels: Sequence[int] = (16, 32, 32),
    prompt_dim: int = 32,
    attention_heads: int | Sequence[int] = 4,
    norm_groups: int = 8,
    unet_layers: int = 2,
    attention_levels: Sequence[int] = (0, 1, 2),
    text_layers: int = 1,
    captions: Sequence[str] = (),
    seed: int = 0,
) -> Path:
    """Write VAE, UNet, text encoder, tokenizer and scheduler into `folder` and return it.

    Args:
        folder: created; an existing one is overwritten part by part.
        unet_channels: `block_out_channels` of the UNet (SD 1.x: 320, 640, 1280, 1280).
        vae_channels: `block_out_channels` of the VAE; n entries mean 2**(n-1) image pixels per latent pixel.
        prompt_dim: width of the text embedding.
        attention_heads: heads (SD 1.x: 8), of each level where they differ.
        norm_groups: GroupNorm groups of UNet and VAE.
        unet_layers: `layers_per_block` of the UNet.
        attention_levels: of the UNet, 0 being the finest, that have attention (SD 1.x: all but the coarsest).
        text_layers: of the text encoder.
        captions: the tokenizer gets tokens for their words; without any it spells everything.
        seed: of the weights.
    """
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

    folder = Path(folder)
    devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        levels = len(vae_channels)
        kinds = ["CrossAttn" if level in attention_levels else "" for level in range(len(unet_channels))]
        AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * levels,
            up_block_types=["UpDecoderBlock2D"] * levels,
            block_out_channels=list(vae_channels),
            layers_per_block=1 if levels < 4 else 2,
            norm_num_groups=norm_groups,
            latent_channels=4,
        ).save_pretrained(folder / "vae")
        UNet2DConditionModel(
            sample_size=64,
            block_out_channels=list(unet_channels),
            cross_attention_dim=prompt_dim,
            attention_head_dim=attention_heads,
            norm_num_groups=norm_groups,
            layers_per_block=unet_layers,
            down_block_types=[f"{kind}DownBlock2D" for kind in kinds],
            up_block_types=[f"{kind}UpBlock2D" for kind in reversed(kinds)],
        ).save_pretrained(folder / "unet")
        _save_text_parts(folder, prompt_dim, text_layers, captions)
    DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    ).save_pretrained(folder / "scheduler")
    index = json.dumps(_MODEL_INDEX, indent=2) + "\n"
    (folder / "model_index.json").write_text(index, encoding="utf-8")
    return folder


def _save_text_parts(folder: Path, prompt_dim: int, layers: int, captions: Sequence[str]) -> None:
    """A CLIP text encoder, and a byte-level tokenizer that knows the words of `captions`."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)
    if captions:
        tokenizer = tokenizer.train_new_from_iterator([captions], 2 * len(vocabulary), show_progress=False)
    tokenizer.save_pretrained(folder / "tokenizer")
    CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=prompt_dim,
            intermediate_size=2 * prompt_dim,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).save_pretrained(folder / "text_encoder")
