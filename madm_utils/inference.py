"""From a network that segments one size to label maps of any image: windows, augmented views, ensembles, own size.

Full precision runs one image or window per forward pass: sums in another order round differently, and a pixel between
two classes would depend on its neighbours in the batch. Reduced precision makes no such promise and is batched.

Nothing at the size of the image is kept but what is returned: scores exist for a band of rows at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from madm_utils.cli import UserError
from madm_utils.transforms import resize_image

GRID = 64
"""Sides of what enters the network are multiples of this: 8 of the VAE, 8 of the UNet."""
TTA_SCALES = (0.75, 1.0, 1.25)
_BAND = 2**22
"""Scores that exist at a time, as a number of values."""

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class InferenceSettings:
    """How an image becomes inputs of the network.

    Raises:
        UserError: a window that is not a multiple of 64, or a stride that leaves gaps.
    """

    window: int | None = None
    """Side of the sliding window in pixels of the image; None: the whole image, stretched to the training
    resolution as published."""
    stride: int | None = None
    """Step from window to window in pixels; None: three quarters of the window."""
    flip: bool = False
    """Average with the scores of the mirrored image."""
    scales: tuple[float, ...] = (1.0,)
    """Average over inputs enlarged by these factors, each rounded to a multiple of 64 pixels."""

    def __post_init__(self):
        if self.window is None and self.stride is not None:
            raise UserError(f"a stride of {self.stride} means nothing without a window; give the window too")
        if self.window is not None and (self.window < GRID or self.window % GRID):
            raise UserError(f"the window must be a multiple of {GRID} pixels, got {self.window}")
        if self.stride is not None and not 1 <= self.stride <= self.window:
            raise UserError(f"the stride must be from 1 to the window of {self.window} pixels, got {self.stride}")
        if not self.scales or min(self.scales) <= 0:
            raise UserError(f"scales must be positive, got {self.scales}")

    @classmethod
    def named(
        cls, window: int | None = None, stride: int | None = None, tta: Sequence[str] = ()
    ) -> "InferenceSettings":
        """Settings with test-time augmentation by name: `flip`, `scales` (0.75, 1, 1.25) or both.

        Raises:
            UserError: another name, or see the class.
        """
        if isinstance(tta, str):
            raise UserError(f"test-time augmentation is a list of names, e.g. ['flip', 'scales'], got {tta!r}")
        unknown = sorted(set(tta) - {"flip", "scales"})
        if unknown:
            raise UserError(f"test-time augmentation knows flip and scales, got {', '.join(map(repr, unknown))}")
        return cls(window, stride, "flip" in tta, TTA_SCALES if "scales" in tta else (1.0,))

    def step(self) -> int:
        """Pixels from one window to the next."""
        return self.stride or max(1, self.window * 3 // 4)

    def input_sides(self, side: int) -> list[int]:
        """Sides of the inputs made from a square of `side` pixels, one per scale, without repetitions."""
        return list(dict.fromkeys(max(GRID, int(scale * side / GRID + 0.5) * GRID) for scale in self.scales))


@dataclass
class Prediction:
    """What is known about one image, at the size asked for, on the device of the network."""

    label_map: Tensor
    """Class ids, uint8 (H, W)."""
    confidence: Tensor | None = None
    """Probability of the predicted class, float32 (H, W) in [0, 1]."""
    probabilities: Tensor | None = None
    """Of every class, float32 (K, H, W), summing to 1."""


class Predictor:
    """Applies a network, or the mean of several, to images of any size.

    Args:
        forwards: from images (B, 3, h, w) in [0, 1] to logits (B, K, h, w); several are an ensemble, whose
            probabilities are averaged.
        resolution: side to which a whole image is stretched.
        device: of the networks.
        settings: windows and augmented views.
        batch_size: images or windows per forward pass in reduced precision.
        dtype: of the weights.
    """

    def __init__(
        self,
        forwards: Sequence[Forward],
        resolution: int,
        device: str | torch.device,
        settings: InferenceSettings | None = None,
        batch_size: int = 1,
        dtype: torch.dtype = torch.float32,
    ):
        self.forwards = tuple(forwards)
        self.resolution = resolution
        self.device = torch.device(device)
        self.settings = settings or InferenceSettings()
        self.batch_size = batch_size
        self.dtype = dtype

    @torch.no_grad()
    def __call__(
        self,
        images: Sequence[Image.Image],
        sizes: Sequence[tuple[int, int]] | None = None,
        confidence: bool = False,
        probabilities: bool = False,
        progress: Callable[[float], object] = lambda share: None,
    ) -> list[Prediction]:
        """Segment 8-bit RGB images.

        Args:
            images: of any sizes.
            sizes: (height, width) of each result; default: that of the image.
            confidence, probabilities: what to return beside label maps.
            progress: called with the share of an image that has been done, as it is done.

        Raises:
            UserError: the output of a network is not finite.
        """
        sizes = [(image.height, image.width) for image in images] if sizes is None else sizes
        if self.settings.window is None:
            bands = self._stretched(images, sizes, progress)
        else:
            bands = (self._windowed(resize_image(*pair), progress) for pair in zip(images, sizes, strict=True))
        return [_collect(band, size, confidence, probabilities) for band, size in zip(bands, sizes, strict=True)]

    def _stretched(
        self, images: Sequence[Image.Image], sizes: Sequence[tuple[int, int]], progress: Callable[[float], object]
    ) -> Iterator[Iterator[tuple[Tensor, bool]]]:
        """Scores of each whole image in bands of rows."""
        for start in range(0, len(images), self._per_pass()):
            part = slice(start, start + self._per_pass())
            views = self._views(images[part], self.resolution)
            for k, size in enumerate(sizes[part]):
                yield _bands([view[k] for view in views], size)
                progress(1)

    def _windowed(self, image: Image.Image, progress: Callable[[float], object]) -> Iterator[tuple[Tensor, bool]]:
        """Probabilities of one image in bands of rows: overlapping windows, blended smoothly.

        Holds the scores of one row of windows. An image smaller than the window is continued by its last pixels.
        """
        window, step = self.settings.window, self.settings.step()
        height, width = image.height, image.width
        pixels = np.asarray(image)
        if height < window or width < window:
            pixels = np.pad(pixels, ((0, max(0, window - height)), (0, max(0, window - width)), (0, 0)), mode="edge")
        tops, lefts = window_starts(pixels.shape[0], window, step), window_starts(pixels.shape[1], window, step)
        weight = blending_weight(window).to(self.device)
        scores = weights = None
        for row, top in enumerate(tops):
            for start in range(0, len(lefts), self._per_pass()):
                group = lefts[start : start + self._per_pass()]
                crops = [Image.fromarray(pixels[top : top + window, left : left + window]) for left in group]
                views = self._views(crops, window)
                for k, left in enumerate(group):
                    probability, _ = next(_bands([view[k] for view in views], (window, window), window, True))
                    if scores is None:
                        scores = probability.new_zeros(len(probability), window, pixels.shape[1])
                        weights = probability.new_zeros(window, pixels.shape[1])
                    scores[:, :, left : left + window] += weight * probability
                    weights[:, left : left + window] += weight
                    progress(1 / (len(tops) * len(lefts)))
            done = (tops[row + 1] if row + 1 < len(tops) else height) - top
            yield (scores[:, :done, :width] / weights[:done, :width], True)
            # The rows that further windows reach move to the top.
            scores = F.pad(scores[:, done:], (0, 0, 0, done))
            weights = F.pad(weights[done:], (0, 0, 0, done))

    def _per_pass(self) -> int:
        """Images or windows per forward pass (module docstring)."""
        reduced = self.dtype != torch.float32 or torch.is_autocast_enabled(self.device.type)
        return self.batch_size if reduced else 1

    def _views(self, images: Sequence[Image.Image], side: int) -> list[Tensor]:
        """Logits (B, K, s, s) of every view of the images and every network, mirrored views mirrored back."""
        views = []
        for input_side in self.settings.input_sides(side):
            batch = to_network_input(images, input_side).to(self.device)
            for forward in self.forwards:
                views.append(finite(forward(batch)))
                if self.settings.flip:
                    views.append(finite(forward(batch.flip(-1))).flip(-1))
        return views


def to_network_input(images: Sequence[Image.Image], side: int) -> Tensor:
    """RGB images -> float32 (B, 3, side, side) in [0, 1]; PIL bilinear, aspect ratio not kept, as published."""
    pixels = np.stack([np.asarray(resize_image(image, (side, side))) for image in images])
    # contiguous: float32 GroupNorm on CPU loses accuracy on a permuted array
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous() / 255


def window_starts(length: int, window: int, step: int) -> list[int]:
    """First pixels of the windows that cover `length` >= `window` pixels; the last one ends where the image ends."""
    return [*range(0, length - window, step), length - window]


def blending_weight(window: int) -> Tensor:
    """Weight of a window's pixels, (window, window) in (0, 1]: a raised cosine that falls off towards the edges.

    Never zero, so that the corner of an image, which only one window sees, keeps its scores.
    """
    ramp = torch.sin(torch.pi * (torch.arange(window) + 0.5) / window) ** 2
    ramp = ramp.clamp(min=1e-3)
    return ramp[:, None] * ramp


def resized_rows(logits: Tensor, size: tuple[int, int], start: int, stop: int) -> Tensor:
    """Rows `start` to `stop` of logits (K, h, w) resized to `size`: (K, stop - start, size[1]) float32.

    Bilinear as `F.interpolate(..., align_corners=False)`; the identity at equal size.
    """
    logits = logits.float()
    height, width = size
    if logits.shape[1] != height:
        y = ((torch.arange(start, stop, dtype=torch.float64) + 0.5) * logits.shape[1] / height - 0.5).clamp(min=0)
        above = y.long()
        below = (above + 1).clamp(max=logits.shape[1] - 1)
        share = (y - above).to(logits)[:, None]
        logits = torch.lerp(logits[:, above.to(logits.device)], logits[:, below.to(logits.device)], share)
    else:
        logits = logits[:, start:stop]
    if logits.shape[2] == width:
        return logits
    return F.interpolate(logits[None], size=(stop - start, width), mode="bilinear", align_corners=False)[0]


def finite(logits: Tensor) -> Tensor:
    """Return `logits`, or raise `UserError`: the argmax of NaN would look like a prediction."""
    if not torch.isfinite(logits).all():
        raise UserError(
            "the model's output is not finite. With --mixed_precision fp16 (range +-65504) use bf16 or no; otherwise "
            "the weights are damaged: train or download them again."
        )
    return logits


def _bands(
    views: Sequence[Tensor], size: tuple[int, int], rows: int = 0, probabilities: bool = False
) -> Iterator[tuple[Tensor, bool]]:
    """Logits (K, h, w) of the views of one image -> bands of rows of scores (K, rows, W) at `size`.

    A single view gives its logits, several give the mean of their probabilities; the second value says which.
    """
    probabilities = probabilities or len(views) > 1
    rows = rows or max(1, _BAND // (len(views[0]) * size[1]))
    for start in range(0, size[0], rows):
        parts = (resized_rows(view, size, start, min(start + rows, size[0])) for view in views)
        if not probabilities:
            yield next(parts), False
            continue
        total = next(parts).softmax(0)
        for part in parts:
            total += part.softmax(0)
        yield total / len(views), True


def _collect(
    bands: Iterator[tuple[Tensor, bool]], size: tuple[int, int], confidence: bool, probabilities: bool
) -> Prediction:
    """Choose the class of every pixel, band by band."""
    result = None
    top = 0
    for scores, are_probabilities in bands:
        if result is None:
            result = Prediction(
                scores.new_empty(size, dtype=torch.uint8),
                scores.new_empty(size) if confidence else None,
                scores.new_empty((len(scores), *size)) if probabilities else None,
            )
        rows = slice(top, top + scores.shape[1])
        top = rows.stop
        result.label_map[rows] = scores.argmax(0)
        if confidence or probabilities:
            scores = scores if are_probabilities else scores.softmax(0)
        if confidence:
            result.confidence[rows] = scores.amax(0)
        if probabilities:
            result.probabilities[:, rows] = scores
    return result
