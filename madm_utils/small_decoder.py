"""A small decoder in place of the VAE's own, for the decoded label latent: diffusers' `AutoencoderTiny` (TAESD).

Only its decoder is used; images are encoded by the VAE of the base model. It is an approximation: the decoded feature
is a little different, so a model is trained with the decoder that it is used with.
"""

import hashlib

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors import SafetensorError

from madm_utils.base_model import same_weights, vae_scale, weight_samples
from madm_utils.cli import UserError


def load_decoder(name: str, vae: AutoencoderKL, dtype: torch.dtype = torch.float32) -> AutoencoderTiny:
    """The decoder in the folder or Hub repository `name`, checked against the VAE whose latents it decodes.

    Raises:
        UserError: not to be had, incomplete, or for latents of another shape.
    """
    try:
        decoder, info = AutoencoderTiny.from_pretrained(name, torch_dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"VAE decoder {name} cannot be loaded: {reason}. Give a folder or Hub id in the AutoencoderTiny format of "
            "diffusers, such as madebyollin/taesd (--vae_decoder, in Python `vae_decoder=`); so, too, where that of a "
            "trained model has moved"
        ) from None
    absent = [key for key in (*info["missing_keys"], *map(str, info["mismatched_keys"])) if "decoder." in key]
    if absent:
        raise UserError(
            f"VAE decoder {name} lacks {len(absent)} tensors of an AutoencoderTiny, or has them in another shape: "
            f"{', '.join(absent[:5])}; give one in that format, such as madebyollin/taesd"
        )
    check_decoder(decoder, vae, name)
    # Its encoder takes images, which the VAE of the base model encodes.
    del decoder.encoder
    return decoder


def check_decoder(decoder: AutoencoderTiny, vae: AutoencoderKL, name: str) -> None:
    """Raise `UserError` unless `decoder` makes of the latents of `vae` images of the same size and channels."""
    config = decoder.config
    scale = config.upsampling_scaling_factor ** (len(config.num_decoder_blocks) - 1)
    found = (config.latent_channels, scale, config.out_channels)
    expected = (vae.config.latent_channels, vae_scale(vae), vae.config.out_channels)
    if found != expected:
        raise UserError(
            f"VAE decoder {name} does not fit the base model: it makes {found[2]} channels of latents with {found[0]} "
            f"channels at 1/{found[1]} of the image; the base model's VAE has {expected[2]}, {expected[0]} and "
            f"1/{expected[1]}"
        )


def decoder_signature(decoder: AutoencoderTiny) -> list[float]:
    """A few of its weights, by which `check_signature` knows it again; empty on the meta device."""
    return weight_samples([decoder.decoder.layers[0], decoder.decoder.layers[-1]])


def check_signature(decoder: AutoencoderTiny, expected: list[float] | None, name: str) -> None:
    """Raise `UserError` unless this is, up to the rounding of its precision, the decoder a model was trained with."""
    signature = decoder_signature(decoder)
    if signature and not same_weights(signature, expected or []):
        raise UserError(
            f"this model was trained with another VAE decoder than {name}, whose weights differ; give the one that "
            "its madm_config.json was written with"
        )


def decoder_fingerprint(decoder: AutoencoderTiny) -> str:
    """Digest of all its weights, which tells decoders apart when a run goes on."""
    digest = hashlib.sha256()
    for _, tensor in sorted(decoder.decoder.state_dict().items()):
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
