"""The pipeline itself: components of Stable Diffusion and a segmenter, from images to label maps.

This module and all it needs of the package travel with every saved model as one file (`standalone.py`), so that a
machine without this package can run it. Loading and saving our own folders is `pipeline_madm.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.utils import BaseOutput
from huggingface_hub import hf_hub_download
from PIL import Image

from madm_utils.base_model import base_signature, check_base
from madm_utils.cli import UserError
from madm_utils.feature_extractor import DiffusionFeatureExtractor
from madm_utils.images import ImageInput, read_image, split_images
from madm_utils.inference import InferenceSettings, Predictor
from madm_utils.segmenter import check_classes
from madm_utils.small_decoder import check_signature, load_decoder
from madm_utils.visualization import colorize, overlay

_LORA = "pytorch_lora_weights.safetensors"


@dataclass
class MADMPipelineOutput(BaseOutput):
    """Predictions, one entry per input image, each of the height and width of its input.

    Args:
        label_maps: class ids, uint8 (H, W).
        confidence: softmax probability of the predicted class, float32 (H, W) in [0, 1]; `None` unless asked for.
        probabilities: of every class, float32 (K, H, W); `None` unless asked for.
        color: PIL images in the colours of the classes; `None` unless asked for.
        overlay: PIL images, the colours over the input; `None` unless asked for.
    """

    label_maps: list[np.ndarray]
    confidence: list[np.ndarray] | None = None
    probabilities: list[np.ndarray] | None = None
    color: list[Image.Image] | None = None
    overlay: list[Image.Image] | None = None


class DiffusionSegmentationPipeline(DiffusionPipeline):
    """Semantic segmentation with the features of a diffusion UNet (MADM, arXiv 2410.21708).

    Args:
        segmenter: conditioning, projections and head.
        vae, unet, scheduler: of Stable Diffusion, the UNet with its LoRA. Those that are left out are loaded: the base
            model by the reference in `settings`, the LoRA from the folder above the segmenter's.
        settings: what `madm_config.json` holds.
        vae_decoder: the small decoder of models that were trained with one; left out, it is loaded by reference.

    Raises:
        UserError: the base model cannot be loaded, or the LoRA does not fit it.
    """

    # The segmenter's conditioning is read outside of its forward pass, where offloading would not bring it back.
    model_cpu_offload_seq = "vae->unet->vae_decoder"
    _exclude_from_cpu_offload = ["segmenter"]
    _optional_components = ["vae", "unet", "scheduler", "vae_decoder"]

    def __init__(
        self,
        segmenter: torch.nn.Module,
        vae: AutoencoderKL | None = None,
        unet: UNet2DConditionModel | None = None,
        scheduler: DDPMScheduler | None = None,
        settings: dict[str, Any] | None = None,
        vae_decoder: AutoencoderTiny | None = None,
    ):
        super().__init__()
        if not settings:
            raise UserError("the pipeline needs `settings`: what madm_config.json of the model's folder holds")
        check_classes(segmenter.config.num_classes, settings["task"]["class_names"], "this model")
        base, lora = settings["base_model"], settings["unet_tuning"] == "lora"
        name = base["pretrained_model_name_or_path"]
        vae = vae or _from_base(AutoencoderKL, "vae", base, segmenter.dtype)
        scheduler = scheduler or _from_base(DDPMScheduler, "scheduler", base)
        unet = unet or _from_base(UNet2DConditionModel, "unet", base, segmenter.dtype)
        if lora and settings["task"]["modality"] not in getattr(unet, "peft_config", ()):
            _add_lora(unet, Path(segmenter.config._name_or_path).parent, settings["task"]["modality"])
        check_base(base_signature(vae, scheduler, unet if lora else None), settings["base_signature"], name)
        # Folders that were written before there was a choice say nothing about a decoder.
        decoder = settings.get("vae_decoder")
        if decoder:
            vae_decoder = vae_decoder or load_decoder(decoder, vae, vae.dtype)
            check_signature(vae_decoder, settings["vae_decoder_signature"], decoder)
        elif vae_decoder is not None:
            raise UserError("this model was trained with the VAE's own decoder; leave `vae_decoder` out")
        self.register_modules(segmenter=segmenter, vae=vae, unet=unet, scheduler=scheduler, vae_decoder=vae_decoder)
        self.register_to_config(settings=settings)
        latent_size = settings["resolution"] // 2 ** (len(vae.config.block_out_channels) - 1)
        self.extractor = DiffusionFeatureExtractor(
            vae, unet, scheduler, latent_size, settings["noise_in_latent_dtype"], vae_decoder
        )

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names; the position is the class id of the label maps."""
        return tuple(self.config.settings["task"]["class_names"])

    @property
    def palette(self) -> tuple[tuple[int, int, int], ...]:
        """One RGB colour per class."""
        return tuple(tuple(color) for color in self.config.settings["task"]["palette"])

    @property
    def modality(self) -> str:
        """The kind of images that are segmented, e.g. `depth`: the name of the adapter in use."""
        return self.config.settings["task"]["modality"]

    @property
    def resolution(self) -> int:
        """Side of the training crops, to which a whole image is stretched."""
        return self.config.settings["resolution"]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, h, w) in [0, 1], sides multiples of 64 -> logits (B, K, h, w)."""
        latents = self.extractor.encode(images * 2 - 1)
        features, _ = self.extractor.extract(latents, 0, *self.segmenter.condition())
        return self.segmenter(features)

    def predictor(
        self,
        settings: InferenceSettings | None = None,
        ensemble: Sequence["DiffusionSegmentationPipeline"] = (),
        batch_size: int = 1,
    ) -> Predictor:
        """This model, or the mean of it and those of `ensemble`, for images of any size.

        Raises:
            UserError: a model of the ensemble has other classes or another resolution.
        """
        for other in ensemble:
            if not isinstance(other, DiffusionSegmentationPipeline):
                raise UserError(f"an ensemble is a list of loaded pipelines, got {other!r}")
            if (other.class_names, other.resolution) != (self.class_names, self.resolution):
                raise UserError(
                    "an ensemble needs equal classes and resolutions: "
                    f"{', '.join(self.class_names)} at {self.resolution} pixels and "
                    f"{', '.join(other.class_names)} at {other.resolution}"
                )
        forwards = [pipe.forward for pipe in (self, *ensemble)]
        device = self._execution_device
        return Predictor(forwards, self.resolution, device, settings, batch_size, self.segmenter.dtype)

    @torch.no_grad()
    def __call__(
        self,
        images: ImageInput | Sequence[ImageInput],
        batch_size: int = 1,
        window: int | None = None,
        stride: int | None = None,
        tta: Sequence[str] = (),
        ensemble: Sequence["DiffusionSegmentationPipeline"] = (),
        return_confidence: bool = False,
        return_probabilities: bool = False,
        return_color: bool = False,
        return_overlay: bool = False,
        overlay_alpha: float = 0.5,
        return_dict: bool = True,
    ) -> MADMPipelineOutput | tuple:
        """Segment one image or several, which may differ in size.

        By default each image is resized to the training resolution (PIL bilinear, aspect ratio not kept, as
        published), and its logits are brought back to its own size (bilinear) before the class is chosen.

        Args:
            images: PIL images, paths, arrays or tensors, as `read_image` takes them; a batch as one array
                (B, H, W, C) or tensor (B, C, H, W), too.
            batch_size: images, or windows, per forward pass in reduced precision; float32 takes one at a time, so
                that a result does not depend on what else is in the batch.
            window, stride: slide a square window over the image at its own size, in pixels (`InferenceSettings`).
            tta: test-time augmentation: `flip`, `scales`, or both.
            ensemble: further pipelines with equal classes, whose probabilities are averaged with this one's.
            return_confidence, return_probabilities, return_color, return_overlay: what to return beside label maps.
            overlay_alpha: share of the colours in the overlay, 0..1.
            return_dict: `False` gives a tuple of what was asked for.

        Raises:
            UserError: an image that cannot be used, settings that do not go together, or a model output that is not
                finite.
        """
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}")
        if not 0 <= overlay_alpha <= 1:
            raise UserError(f"overlay_alpha is a share from 0 to 1, got {overlay_alpha}")
        predict = self.predictor(InferenceSettings.named(window, stride, tta), ensemble, batch_size)
        images = split_images(images)
        keys = ("label_maps", "confidence", "probabilities", "color", "overlay")
        asked = (True, return_confidence, return_probabilities, return_color, return_overlay)
        output = MADMPipelineOutput(*([] if wanted else None for wanted in asked))
        kept = {key: getattr(output, key) for key, wanted in zip(keys, asked, strict=True) if wanted}
        with self.progress_bar(total=len(images)) as bar:
            bar.unit_scale = window is not None  # shows shares of an image as 0.25, not as 0.25000000000000006
            for start in range(0, len(images), batch_size):
                batch = [read_image(image) for image in images[start : start + batch_size]]
                predictions = predict(
                    batch, confidence=return_confidence, probabilities=return_probabilities, progress=bar.update
                )
                for image, prediction in zip(batch, predictions, strict=True):
                    label_map = prediction.label_map.cpu().numpy()
                    output.label_maps.append(label_map)
                    if return_confidence:
                        output.confidence.append(prediction.confidence.cpu().numpy())
                    if return_probabilities:
                        output.probabilities.append(prediction.probabilities.cpu().numpy())
                    color = colorize(label_map, self.palette) if return_color or return_overlay else None
                    if return_color:
                        output.color.append(Image.fromarray(color))
                    if return_overlay:
                        output.overlay.append(Image.fromarray(overlay(np.asarray(image), color, overlay_alpha)))
        self.maybe_free_model_hooks()
        return output if return_dict else tuple(kept.values())

    def save_pretrained(self, *args: Any, **options: Any) -> None:
        """Refused: what this class was loaded from is a complete repository, and copying it is exact.

        Raises:
            UserError: always.
        """
        raise UserError(
            "this pipeline came from a repository that is complete: copy or download that (`hf download`). The MADM "
            "suite's MADMPipeline can save what it loads"
        )


def _from_base(cls: type, part: str, base: dict[str, Any], dtype: torch.dtype | None = None) -> Any:
    """One part of the base model, by reference."""
    name = base["pretrained_model_name_or_path"]
    options = {key: base[key] for key in ("revision", "variant") if base.get(key)}
    if cls is DDPMScheduler:
        options.pop("variant", None)
    elif dtype is not None:
        options["torch_dtype"] = dtype
    try:
        return cls.from_pretrained(name, subfolder=part, **options)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"this model needs '{part}' of its base model {name}, which cannot be loaded ({reason}). Check the "
            "network and the rights to it, or load the part yourself from where the base model lies and pass it: "
            f"from_pretrained(..., {part}={cls.__name__}.from_pretrained(FOLDER, subfolder='{part}'))"
        ) from None


def _add_lora(unet: UNet2DConditionModel, folder: Path, adapter: str) -> None:
    """Add the adapter saved in `folder`, in the format of diffusers, and make it active."""
    try:
        folder = _with_lora(folder)
        unet.load_lora_adapter(
            str(folder), weight_name=_LORA, prefix="unet", adapter_name=adapter, use_safetensors=True,
            low_cpu_mem_usage=False,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"the LoRA in {folder} cannot be put into the UNet of the base model: {reason}. (Private "
            "repositories: log in with `hf auth login` or set HF_TOKEN)"
        ) from None
    if adapter not in getattr(unet, "peft_config", {}):
        raise UserError(f"the LoRA in {folder} holds no tensor of the UNet; download the model again")


def _with_lora(folder: Path) -> Path:
    """A folder that holds the LoRA of the model in `folder`.

    Of a repository on the Hub, diffusers downloads the components and no more. What it downloads lies in the Hub's
    cache, at <cache>/models--<user>--<name>/snapshots/<commit>, which says where to get the rest.
    """
    if (folder / _LORA).is_file() or folder.parent.name != "snapshots":
        return folder
    repo_id = folder.parents[1].name.removeprefix("models--").replace("--", "/")
    return Path(hf_hub_download(repo_id, _LORA, revision=folder.name, cache_dir=folder.parents[2])).parent
