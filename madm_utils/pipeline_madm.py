"""Inference: images of any size to label maps of the same size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from madm_utils.args import check_precision
from madm_utils.cli import UserError
from madm_utils.modeling_madm import MADMModel, adapter_folders
from madm_utils.transforms import resize_image

if TYPE_CHECKING:
    from accelerate import Accelerator

ImageInput = Image.Image | np.ndarray | str | Path


@dataclass
class MADMPipelineOutput:
    """Predictions, one entry per input image, each of the height and width of its input."""

    label_maps: list[np.ndarray]
    """Class ids, uint8 (H, W)."""
    confidence: list[np.ndarray] | None = None
    """Softmax probability of the predicted class, float32 (H, W) in [0, 1]; `None` unless asked for."""


class MADMPipeline:
    """Segment images with a trained model.

    ```python
    from madm_utils import MADMPipeline

    pipe = MADMPipeline.from_pretrained("outputs/depth").to("cuda")
    label_map = pipe("street.png").label_maps[0]  # uint8, height x width of street.png
    ```

    The folder of a run over several modalities is loaded as one base with an adapter per modality:
    `pipe.set_adapters("infrared")` changes to another one.
    """

    def __init__(self, models: MADMModel | Mapping[str, MADMModel]):
        if isinstance(models, MADMModel):
            models = {models.task.modality: models}
        self.models = {name: model.eval() for name, model in models.items()}
        self.model = next(iter(self.models.values()))

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """The modalities that this pipeline can segment."""
        return tuple(self.models)

    def set_adapters(self, name: str) -> None:
        """Segment images of the modality `name` from now on.

        Raises:
            UserError: no such adapter.
        """
        if name not in self.models:
            raise UserError(f"no adapter '{name}'; this pipeline has {', '.join(self.models)}")
        self.model = self.models[name]

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        weights: str = "student",
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        base: str | None = None,
    ) -> MADMPipeline:
        """Load the model in a run folder, a checkpoint folder or a Hub repository.

        Args:
            path_or_id: folder, or id on the Hub.
            weights: `student` (published evaluation) or `teacher` (its moving average).
            dtype: of the weights; default: as `MADMModel.from_pretrained`.
            device: where to run; default: CPU until `to` is called.
            base: Stable Diffusion folder or Hub id in place of the stored reference.

        Raises:
            UserError: nothing there, or not a model of this suite.
        """
        models: dict[str, MADMModel] = {}
        for folder in adapter_folders(path_or_id).values() or (path_or_id,):
            shared = next(iter(models.values()), None)
            model = MADMModel.from_pretrained(folder, weights=weights, dtype=dtype, base=base, shared=shared)
            models[model.task.modality] = model
        pipe = cls(models)
        return pipe if device is None else pipe.to(device)

    def to(self, device: str | torch.device) -> MADMPipeline:
        """Move the models; returns the pipeline itself."""
        for model in self.models.values():
            model.to(device)
        return self

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names; the position is the class id of the label maps."""
        return self.model.task.class_names

    @property
    def palette(self) -> tuple[tuple[int, int, int], ...]:
        """One RGB colour per class."""
        return self.model.task.palette

    @torch.no_grad()
    def __call__(
        self, images: ImageInput | Sequence[ImageInput], batch_size: int = 1, return_confidence: bool = False
    ) -> MADMPipelineOutput:
        """Segment one image or a list of images, which may differ in size.

        Each image is resized to the training resolution (PIL bilinear, aspect ratio not kept, as published), and its
        logits are brought back to its own size (bilinear) before the class is chosen.

        Args:
            images: PIL images, paths, or arrays as `read_image` takes them.
            batch_size: images per forward pass.
            return_confidence: also fill `confidence`.

        Raises:
            UserError: an image that cannot be used, or a model output that is not finite.
        """
        if isinstance(images, ImageInput):
            images = [images]
        output = MADMPipelineOutput([], [] if return_confidence else None)
        for start in range(0, len(images), batch_size):
            batch = [read_image(image) for image in images[start : start + batch_size]]
            logits = self.model(self.preprocess(batch).to(self.device)).logits
            for one, image in zip(finite(logits), batch, strict=True):
                one = resize_logits(one, (image.height, image.width))
                output.label_maps.append(one.argmax(0).to(torch.uint8).cpu().numpy())
                if return_confidence:
                    output.confidence.append(one.softmax(0).amax(0).cpu().numpy())
        return output

    def preprocess(self, images: Sequence[Image.Image]) -> Tensor:
        """RGB images -> float32 (B, 3, R, R) in [0, 1], R the training resolution."""
        size = (self.model.resolution, self.model.resolution)
        pixels = np.stack([np.asarray(resize_image(image, size)) for image in images])
        # contiguous: float32 GroupNorm on CPU loses accuracy on a permuted array
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous() / 255


def read_image(image: ImageInput) -> Image.Image:
    """Return `image` as 8-bit RGB.

    A single channel is repeated, alpha is dropped, 16 bits are scaled linearly to 8 (65535 -> 255). Pixels stay where
    they are stored: an EXIF rotation is not applied, so that labels fit the file.

    Args:
        image: PIL image, path, or array uint8/uint16 (H, W) or (H, W, C) with C = 1, 3 or 4.

    Raises:
        UserError: unreadable file, or an array or pixel format without a defined scale.
    """
    if isinstance(image, np.ndarray):
        return _image_from_array(image)
    if isinstance(image, Image.Image):
        return _to_rgb(image, "image")
    try:
        with Image.open(image) as opened:
            opened.load()
    except FileNotFoundError:
        raise UserError(f"{image}: no such file") from None
    except Exception as error:  # Pillow's decoders raise many types on damaged files
        raise UserError(f"{image}: cannot be read as an image ({error})") from None
    return _to_rgb(opened, str(image))


def _image_from_array(array: np.ndarray) -> Image.Image:
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype not in (np.uint8, np.uint16) or array.ndim not in (2, 3) or channels not in (1, 3, 4):
        raise UserError(
            f"image array has dtype {array.dtype} and shape {array.shape}; "
            "expected uint8 or uint16, (H, W) or (H, W, C) with C = 1, 3 or 4"
        )
    if array.dtype == np.uint16:
        array = _to_8_bit(array)
    array = array.squeeze(2) if array.ndim == 3 and channels == 1 else array
    return _to_rgb(Image.fromarray(np.ascontiguousarray(array)), "image array")


def _to_8_bit(array: np.ndarray) -> np.ndarray:
    return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _to_rgb(image: Image.Image, where: str) -> Image.Image:
    if image.mode == "F":
        raise UserError(f"{where}: holds floating-point pixels, whose range is not known; convert it to 8 or 16 bits")
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise UserError(f"{where}: holds 32-bit pixels {values.min()}..{values.max()}; convert it to 8 or 16 bits")
        image = Image.fromarray(_to_8_bit(values))
    return image.convert("RGB")


def resize_logits(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """(K, h, w) -> float32 (K, *size), bilinear with align_corners=False; the identity at equal size."""
    return F.interpolate(logits[None].float(), size=size, mode="bilinear", align_corners=False)[0]


def finite(logits: Tensor) -> Tensor:
    """Return `logits`, or raise `UserError`: the argmax of NaN would look like a prediction."""
    if not torch.isfinite(logits).all():
        raise UserError(
            "the model's output is not finite. With --mixed_precision fp16 (range +-65504) use bf16 or no; otherwise "
            "the weights are damaged: train or download them again."
        )
    return logits


def inference_accelerator(mixed_precision: str) -> Accelerator:
    """Device, autocast and processes for inference; `mixed_precision` is no, fp16 or bf16.

    Raises:
        UserError: the device cannot run this precision.
    """
    from accelerate import Accelerator

    has_gpu = torch.accelerator.is_available()
    check_precision(mixed_precision, has_gpu)
    try:
        # `cpu`: without it, several processes on a machine without GPU would not form a group.
        return Accelerator(cpu=not has_gpu, mixed_precision=mixed_precision)
    except ValueError as error:
        raise UserError(f"--mixed_precision {mixed_precision} does not run here: {error} Use no.") from None
