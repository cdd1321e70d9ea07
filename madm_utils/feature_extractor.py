"""Stable Diffusion as a feature extractor: frozen VAE, UNet with taps in its up path, one fixed noise.

Every width comes from the loaded configs; the latent size comes from the image and the VAE's down-sampling factor.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from madm_utils.cli import UserError

NOISE_SEED = 42
NUM_TAPS = 3


class DiffusionFeatureExtractor(nn.Module):
    """VAE and UNet of Stable Diffusion, read out at the last resnet/attention pair of the last three up blocks.

    In SD 1.x/2.x these are the pairs 5, 8 and 11 of 12, before the block's upsampler. The UNet's output is kept as a
    *label latent* (MADM, section 3.3), not as predicted noise.

    Args:
        vae: autoencoder; frozen here.
        unet: denoiser; its `requires_grad` flags are left as they are.
        scheduler: gives the cumulative alphas of the diffusion process.
        latent_size: height and width of the fixed noise; images of other sizes get their own draw.
        noise_in_latent_dtype: round the cumulative alphas of float16 latents to float16 before use, as the published
            code does under fp16 autocast (sigma at t=0 becomes 0.03125 instead of 0.02916). Otherwise float32.
        vae_decoder: a small decoder in place of the VAE's own (`small_decoder.py`); frozen here.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        unet: UNet2DConditionModel,
        scheduler: DDPMScheduler,
        latent_size: int,
        noise_in_latent_dtype: bool = False,
        vae_decoder: AutoencoderTiny | None = None,
    ):
        super().__init__()
        if len(unet.up_blocks) < NUM_TAPS:
            raise UserError(f"the UNet has {len(unet.up_blocks)} up blocks; features need at least {NUM_TAPS}")
        channels = (unet.config.in_channels, unet.config.out_channels, vae.config.latent_channels)
        if len(set(channels)) > 1:
            raise UserError(
                f"the UNet takes {channels[0]} and gives {channels[1]} channels, the VAE's latents have "
                f"{channels[2]}; give a text-to-image Stable Diffusion, not an inpainting or depth one"
            )
        self.vae = vae.requires_grad_(False)
        self.vae_decoder = None if vae_decoder is None else vae_decoder.requires_grad_(False)
        self.unet = unet
        self.scheduler = scheduler
        self.noise_in_latent_dtype = noise_in_latent_dtype
        self._drawn: dict[tuple, Tensor] = {}
        self.register_buffer("shared_noise", self.draw_noise(latent_size, latent_size), persistent=False)

    @property
    def decoder(self) -> AutoencoderKL | AutoencoderTiny:
        """The model that decodes latents: the VAE, or the small decoder in its place."""
        return self.vae if self.vae_decoder is None else self.vae_decoder

    @property
    def feature_channels(self) -> list[int]:
        """Channels of [decoded image, finest, middle, coarsest UNet feature]."""
        widths = self.unet.config.block_out_channels
        return [self.vae.config.out_channels, *widths[:NUM_TAPS]]

    def draw_noise(self, height: int, width: int) -> Tensor:
        """The fixed noise shared by all images, iterations, training and test: (1, C, height, width) on CPU."""
        generator = torch.Generator().manual_seed(NOISE_SEED)
        return torch.randn(1, self.vae.config.latent_channels, height, width, generator=generator)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> scaled mean latents (B, C, H/f, W/f), without sampling."""
        # Strided inputs (a permuted HWC array) make float32 GroupNorm on CPU inaccurate by up to 1e-2.
        images = images.to(self.vae.dtype).contiguous()
        latents = self._in_parts(lambda part: self.vae.encode(part).latent_dist.mode(), images)
        return latents * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) -> un-clipped images (B, 3, h*f, w*f), no gradient (MADM, feature `s0`)."""
        # A small decoder takes scaled latents: its own factor is 1. Both give images in about [-1, 1].
        latents = latents.detach().to(self.decoder.dtype).contiguous() / self.decoder.config.scaling_factor
        # In training beside the activations of the UNet, which leave no memory for more than one image.
        return self._in_parts(lambda part: self.decoder.decode(part).sample, latents, one_by_one=self.training)

    @staticmethod
    def _in_parts(function: Callable[[Tensor], Tensor], batch: Tensor, one_by_one: bool = False) -> Tensor:
        """`function(batch)`, where asked for and on a CPU one image after the other: exact, as the VAE's GroupNorm is
        per image, and on a CPU, whose caches hold the activations of one image better than of four, a third faster."""
        # A graph that is being exported has no loop over a batch of any size.
        if torch.compiler.is_compiling() or not (one_by_one or batch.device.type == "cpu"):
            return function(batch)
        return torch.cat([function(part) for part in batch.split(1)])

    def add_noise(self, latents: Tensor, timestep: int) -> Tensor:
        """`sqrt(abar_t) * latents + sqrt(1 - abar_t) * shared_noise`; t = 0 still adds noise (sigma 0.029)."""
        if not (self.noise_in_latent_dtype and latents.dtype == torch.float16):
            latents = latents.float()
        noise = self.shared_noise
        if noise.shape[-2:] != latents.shape[-2:]:
            noise = self._noise_like(latents)
        timesteps = torch.full((1,), timestep, device=latents.device, dtype=torch.long)
        return self.scheduler.add_noise(latents, noise.to(latents), timesteps)

    def _noise_like(self, latents: Tensor) -> Tensor:
        """The draw for another size than that of training; kept, because copying it to a device waits for that."""
        size = latents.shape[-2:]
        if torch.compiler.is_compiling():
            return self.draw_noise(*size)
        key = (*size, latents.device)
        if key not in self._drawn:
            self._drawn[key] = self.draw_noise(*size).to(latents.device)
        return self._drawn[key]

    def denoise(self, noisy: Tensor, timestep: int, prompt: Tensor, time: Tensor) -> tuple[list[Tensor], Tensor]:
        """Run the UNet once.

        Args:
            noisy: (B, C, h, w) noisy latents.
            timestep: diffusion step of the whole batch.
            prompt: (1, tokens, D) conditioning in place of the text embedding.
            time: (1, 1, T) added to the output of the UNet's time-embedding MLP.

        Returns:
            UNet features, finest first ((B, c_i, h_i, w_i)), and the label latent (B, C, h, w).
        """
        dtype = self.unet.dtype
        with self._read_out(time) as features:
            label_latent = self.unet(
                noisy.to(dtype),
                torch.full((1,), timestep, device=noisy.device, dtype=torch.long),
                # `shape`, not `len`, which an export would take for a constant
                encoder_hidden_states=prompt.to(dtype).expand(noisy.shape[0], -1, -1),
            ).sample
        return features[::-1], label_latent

    def extract(self, latents: Tensor, timestep: int, prompt: Tensor, time: Tensor) -> tuple[list[Tensor], Tensor]:
        """From latents to all features of the segmenter (MADM, section 3).

        Args:
            latents: (B, C, h, w) of `encode`; height and width of the images are multiples of 64.
            timestep: noise level of the latents; 0, the level of student and test, still adds a little noise.
            prompt, time: see `denoise`.

        Returns:
            [decoded label latent, un-clipped and without gradient; UNet features, finest first], and the label latent.
        """
        noisy = self.add_noise(latents, timestep)
        features, label_latent = self.denoise(noisy, timestep, prompt, time)
        return [self.decode(label_latent), *features], label_latent

    @contextmanager
    def _read_out(self, time: Tensor) -> Iterator[list[Tensor]]:
        """Collect the tapped features, coarsest first, and condition the time embedding, for one forward pass."""
        features: list[Tensor] = []

        def keep(module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
            features.append(output[0] if isinstance(output, tuple) else output)

        def condition(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            return output + time[:, 0].to(output.dtype)

        handles = [self.unet.time_embedding.register_forward_hook(condition)]
        for block in self.unet.up_blocks[-NUM_TAPS:]:
            pairs = getattr(block, "attentions", None) or block.resnets
            handles.append(pairs[-1].register_forward_hook(keep))
        try:
            yield features
        finally:
            for handle in handles:
                handle.remove()
