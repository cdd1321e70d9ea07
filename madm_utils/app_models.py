"""The models of the page: loading them under the names it shows, and one prediction at a time."""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image

from madm_utils.app_viewer import Segmentation
from madm_utils.cli import UserError
from madm_utils.pipeline_madm import MADMPipeline


@dataclass
class AppModels:
    """Pipelines that many visitors share."""

    pipelines: dict[str, MADMPipeline] = field(default_factory=dict)
    """By the name shown on the page."""
    failures: list[str] = field(default_factory=list)
    """Why other models are missing."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held during a prediction: choosing the adapter changes the pipeline for everybody."""

    def segment(self, image: Image.Image, name: str, modality: str) -> Segmentation:
        """Raises `UserError` when the model cannot segment the image."""
        pipe = self.pipelines[name]
        with self.lock:
            pipe.set_adapters(modality)
            names, palette = pipe.class_names, pipe.palette
            start = time.perf_counter()
            try:
                output = pipe(image, return_confidence=True)
            except torch.OutOfMemoryError:
                raise UserError(f"{image.width} x {image.height} pixels need more memory than there is.") from None
            seconds = time.perf_counter() - start
        title = f"{name} · {modality}"
        return Segmentation(title, output.label_maps[0], output.confidence[0], names, palette, seconds)


def load_models(paths: Sequence[str], device: str | None = None, keep_going: bool = False) -> AppModels:
    """Load the models of folders or Hub ids.

    Args:
        device: where they run; default: an accelerator when there is one.
        keep_going: what cannot be loaded is noted in `failures`, in place of an error.

    Raises:
        UserError: a device that cannot be used, one folder twice, or a model that cannot be loaded.
    """
    device = _usable_device(device)
    models = AppModels()
    for name, path in zip(shown_names(paths), paths, strict=True):
        print(f"loading {path}", flush=True)
        try:
            pipe = MADMPipeline.from_pretrained(path, device=device)
        except UserError as error:
            if not keep_going:
                raise
            models.failures.append(str(error))
        else:
            pipe.set_progress_bar_config(disable=True)
            models.pipelines[name] = pipe
    return models


def _usable_device(name: str | None) -> str:
    if name is None:
        return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:  # torch builds without a backend raise either
        raise UserError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from None
    return name


def shown_names(paths: Sequence[str]) -> list[str]:
    """The shortest ends of the paths that tell them apart: what lies above is nobody's business on a public page.

    Raises:
        UserError: the same folder twice.
    """
    parts = [Path(path).resolve().parts if Path(path).exists() else Path(path).parts for path in paths]
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(one[-length:]) for one in parts]
        if len(set(names)) == len(names):
            return names
    if not paths:
        return []
    raise UserError(f"--model_path {' '.join(paths)} names a model more than once")
