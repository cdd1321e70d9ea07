"""Pictures that users hand over, in every form that has a defined scale, as 8-bit RGB."""

import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from madm_utils.cli import UserError

ImageInput = Image.Image | np.ndarray | torch.Tensor | str | Path
_FORMS = "uint8, uint16 or floating point in 0..1, with 1, 3 or 4 channels"


def read_image(image: ImageInput) -> Image.Image:
    """Return `image` as 8-bit RGB.

    A single channel is repeated, alpha is dropped, 16 bits are scaled linearly to 8 (65535 -> 255), floating point
    from 0..1 (1 -> 255). Pixels stay where they are stored: an EXIF rotation is not applied, so that labels fit the
    file.

    Args:
        image: PIL image; path; array (H, W) or (H, W, C); tensor (H, W) or (C, H, W); C = 1, 3 or 4; uint8, uint16
            or floating point.

    Raises:
        UserError: unreadable file, or pixels without a defined scale (among them numbers that are not finite).
    """
    if isinstance(image, torch.Tensor):
        array = image.detach().cpu()
        array = array.float() if array.dtype == torch.bfloat16 else array
        pixels = array.permute(1, 2, 0).numpy() if array.ndim == 3 else array.numpy()
        return _from_array(pixels, "image tensor", tuple(array.shape))
    if isinstance(image, np.ndarray):
        return _from_array(image, "image array", image.shape)
    if isinstance(image, Image.Image):
        return _to_rgb(image, "image")
    try:
        with warnings.catch_warnings():
            # Pillow warns of the size, which needs no more than one copy of the pixels here; twice that it refuses.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(image) as opened:
                opened.load()
    except MemoryError:
        raise
    except FileNotFoundError:
        raise UserError(f"{image}: no such file") from None
    except Exception as error:  # Pillow's decoders raise many types on damaged files
        raise UserError(f"{image}: cannot be read as an image ({error})") from None
    return _to_rgb(opened, str(image))


def split_images(images: ImageInput | list[ImageInput] | tuple[ImageInput, ...]) -> list[ImageInput]:
    """One image, a list of them, an array (B, H, W, C) or a tensor (B, C, H, W): as a list of images."""
    if isinstance(images, (np.ndarray, torch.Tensor)):
        return list(images) if images.ndim == 4 else [images]
    return list(images) if isinstance(images, (list, tuple)) else [images]


def _from_array(array: np.ndarray, where: str, shape: tuple[int, ...]) -> Image.Image:
    channels = array.shape[2] if array.ndim == 3 else 1
    floating = np.issubdtype(array.dtype, np.floating)
    known = floating or array.dtype in (np.uint8, np.uint16)
    if not known or array.ndim not in (2, 3) or channels not in (1, 3, 4) or not array.size:
        raise UserError(f"{where} has dtype {array.dtype} and shape {shape}; expected {_FORMS}")
    if floating:
        array = _unit_to_8_bit(array, where)
    elif array.dtype == np.uint16:
        array = _16_to_8_bit(array)
    array = array.squeeze(2) if array.ndim == 3 and channels == 1 else array
    return _to_rgb(Image.fromarray(np.ascontiguousarray(array)), where)


def _16_to_8_bit(array: np.ndarray) -> np.ndarray:
    return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _unit_to_8_bit(array: np.ndarray, where: str) -> np.ndarray:
    if not np.isfinite(array).all():
        raise UserError(f"{where}: {np.count_nonzero(~np.isfinite(array))} values are not finite; fill them in first")
    if array.min() < 0 or array.max() > 1:
        raise UserError(
            f"{where}: floating-point values from {array.min():g} to {array.max():g}, whose scale is not known; scale "
            "them to 0..1, or convert to 8 or 16 bits"
        )
    return np.round(array * 255).astype(np.uint8)


def _to_rgb(image: Image.Image, where: str) -> Image.Image:
    if image.mode == "F":
        image = Image.fromarray(_unit_to_8_bit(np.asarray(image), where))
    elif image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise UserError(f"{where}: holds 32-bit pixels {values.min()}..{values.max()}; convert it to 8 or 16 bits")
        image = Image.fromarray(_16_to_8_bit(values))
    return image if image.mode == "RGB" else image.convert("RGB")
