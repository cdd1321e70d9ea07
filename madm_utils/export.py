"""A trained model as one graph, ONNX or `torch.export`, that runs without this package.

The graph takes images and gives logits; LoRA, conditioning and noise are constants in it. The noise of an image's size
is torch's draw with a fixed seed: `randn` fills memory in order, so the draw for a small latent is the beginning of
the draw for a large one, and one long table serves every size up to its own.
"""

import logging
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from madm_utils.base_model import vae_scale
from madm_utils.cli import UserError
from madm_utils.model_folder import decoder_name
from madm_utils.modeling_madm import MADMModel

FILE_NAMES = {"onnx": "model.onnx", "torch_export": "model.pt2"}
PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "torch_export": ()}
STRIDE = 64
"""Height and width of the images are multiples of this."""
LARGEST_BATCH = 63
"""diffusers copies batches from 64 on before it enlarges them; one graph cannot do both."""


@dataclass(frozen=True)
class ExportShape:
    """Sizes that a graph takes; `None` is dynamic."""

    batch_size: int | None
    size: tuple[int, int] | None
    """(height, width) in pixels."""
    max_pixels: int
    """Largest height * width where the size is dynamic."""

    def check_shapes(self) -> list[tuple[int, int, int]]:
        """(batch, height, width) to compare with PyTorch, the least and another one where something is dynamic."""
        batches = [1, 3] if self.batch_size is None else [self.batch_size]
        sizes = [(STRIDE, STRIDE), (STRIDE, 2 * STRIDE)] if self.size is None else [self.size]
        return [(batches[min(i, len(batches) - 1)], *sizes[min(i, len(sizes) - 1)])
                for i in range(max(len(batches), len(sizes)))]  # fmt: skip

    def names(self) -> list[int | str]:
        """The input's shape for people: `["batch", 3, "height", "width"]` or numbers."""
        height, width = self.size or ("height", "width")
        return [self.batch_size or "batch", 3, height, width]


class SegmentationGraph(nn.Module):
    """Images (B, 3, H, W) float32 in [0, 1] -> logits (B, K, H, W) float32, at timestep 0 as in the published test.

    Args:
        model: in evaluation mode, its LoRA merged; shared, not copied.
        max_pixels: largest H * W.
    """

    def __init__(self, model: MADMModel, max_pixels: int):
        super().__init__()
        extractor = model.extractor
        self.extractor, self.segmenter = extractor, model.segmenter
        self.dtype = extractor.vae.dtype
        prompt, time = model.segmenter.condition()
        latent_pixels = max_pixels // vae_scale(extractor.vae) ** 2
        noise = extractor.draw_noise(1, latent_pixels).flatten()
        # as in `DiffusionFeatureExtractor.add_noise`
        in_half = extractor.noise_in_latent_dtype and self.dtype == torch.float16
        noise_dtype = torch.float16 if in_half else torch.float32
        alpha = extractor.scheduler.alphas_cumprod[0].to(noise_dtype)
        for name, tensor in (("prompt", prompt), ("time", time), ("noise", noise.to(noise_dtype))):
            self.register_buffer(name, tensor.detach().clone())
        self.signal_rate, self.noise_rate = (alpha**0.5).item(), ((1 - alpha) ** 0.5).item()

    def forward(self, images: Tensor) -> Tensor:
        latents = self.extractor.encode(images.to(self.dtype) * 2 - 1).to(self.noise.dtype)
        channels, height, width = latents.shape[1:]
        noise = self.noise[: channels * height * width].view(1, channels, height, width)
        noisy = self.signal_rate * latents + self.noise_rate * noise
        features, label_latent = self.extractor.denoise(noisy, 0, self.prompt, self.time)
        return self.segmenter([self.extractor.decode(label_latent), *features]).float()


def check_packages(format: str) -> None:
    """Raise `UserError` naming the packages that `format` needs and that are not installed."""
    missing = [name for name in PACKAGES[format] if find_spec(name) is None]
    if missing:
        raise UserError(
            f"--format {format} needs packages that are not installed: {', '.join(missing)}. "
            "pip install -r requirements-export.txt, or use --format torch_export, which needs none"
        )


@torch.no_grad()
def trace(model: MADMModel, shape: ExportShape) -> torch.export.ExportedProgram:
    """The model as a graph for the sizes of `shape`."""
    graph = SegmentationGraph(model, shape.max_pixels if shape.size is None else math.prod(shape.size)).eval()
    # Examples of dynamic sizes differ from one another and from 1, which would be taken for a constant.
    height, width = shape.size or (2 * STRIDE, 3 * STRIDE)
    dynamic: dict[int, Any] = {}
    if shape.batch_size is None:
        dynamic[0] = torch.export.Dim("batch", min=1, max=LARGEST_BATCH)
    if shape.size is None:
        longest = shape.max_pixels // STRIDE**2
        dynamic[2] = STRIDE * torch.export.Dim("rows", min=1, max=longest)
        dynamic[3] = STRIDE * torch.export.Dim("columns", min=1, max=longest)
    images = torch.rand(shape.batch_size or 2, 3, height, width)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(graph, (images,), dynamic_shapes=(dynamic,) if dynamic else None)


def write(program: torch.export.ExportedProgram, path: Path, format: str, opset: int) -> None:
    """Write the graph; ONNX weights beyond 2 GB go into `<path>.data`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if format == "torch_export":
            torch.export.save(program, path)
            return
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        size = sum(tensor.nbytes for tensor in program.state_dict.values())
        names = {"input_names": ["images"], "output_names": ["logits"], "opset_version": opset}
        onnx_program = torch.onnx.export(program, dynamo=True, verbose=False, **names)
        onnx_program.save(path, external_data=size > 1.5e9)


def load(path: Path, format: str) -> Callable[[Tensor], Tensor]:
    """The written graph as a function images (B, 3, H, W) -> logits (B, K, H, W), on the CPU, without this package."""
    if format == "torch_export":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.no_grad()(torch.export.load(path).module())
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


@torch.no_grad()
def largest_difference(
    model: MADMModel, graph: Callable[[Tensor], Tensor], shapes: Sequence[tuple[int, int, int]]
) -> float:
    """Largest absolute difference of the graph's logits from the model's in PyTorch, on random images."""
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for batch, height, width in shapes:
        images = torch.rand(batch, 3, height, width, generator=generator)
        expected = model(images.to(model.extractor.vae.dtype)).logits.float()
        found = graph(images)
        if found.shape != expected.shape:
            raise UserError(f"the graph gives logits {tuple(found.shape)} for {tuple(images.shape)}; report this")
        # NaN in either must not pass for a small difference
        worst = max(worst, (found - expected).abs().nan_to_num(nan=math.inf).max().item())
    return worst


def description(model: MADMModel, shape: ExportShape, format: str, opset: int) -> dict[str, Any]:
    """What a reader of the file has to know, for `model.json`."""
    task, side = model.task, model.resolution
    height, width = shape.size or (side, side)
    batch, _, *sides = shape.names()
    return {
        "format": format,
        "file": FILE_NAMES[format],
        **({"opset": opset} if format == "onnx" else {}),
        "task": task.name,
        "modality": task.modality,
        "class_names": list(task.class_names),
        "palette": [list(color) for color in task.palette],
        "input": {
            "name": "images",
            "dtype": "float32",
            "shape": shape.names(),
            "range": [0, 1],
            "multiple_of": STRIDE,
            **({"max_pixels": shape.max_pixels} if shape.size is None else {}),
            **({"max_batch": LARGEST_BATCH} if shape.batch_size is None else {}),
        },
        "preprocessing": [
            "8-bit RGB; a single channel is repeated three times, alpha is dropped, 16 bits are divided by 257",
            f"resize to {width}x{height} (width x height), bilinear with antialiasing as Pillow's BILINEAR; the "
            "aspect ratio is not kept",
            "divide by 255, channels first: float32 (batch, 3, height, width)",
        ],
        "trained_at": [side, side],
        "head_resolution": model.segmenter.config.head_resolution,
        "vae_decoder": decoder_name(model.vae_decoder),
        "output": {"name": "logits", "dtype": "float32", "shape": [batch, task.num_classes, *sides]},
        "postprocessing": [
            "resize the logits to the size of the image, bilinear (align_corners false)",
            "argmax over axis 1: class ids, positions in class_names and palette",
        ],
    }  # fmt: skip
