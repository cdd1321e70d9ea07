"""`MADMPipeline`: the pipeline of `segmentation_pipeline.py`, loaded from and saved to our model folders, strictly."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from madm_utils.approximations import approximate, check_approximation
from madm_utils.args import check_precision
from madm_utils.cli import UserError
from madm_utils.cpu_memory import keep_freed_memory
from madm_utils.files import publish_folder
from madm_utils.hub import stale_files
from madm_utils.model_card import write_pipeline_card
from madm_utils.model_folder import adapter_folders, replaced_decoders
from madm_utils.modeling_madm import MADMModel
from madm_utils.segmentation_pipeline import DiffusionSegmentationPipeline, MADMPipelineOutput

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["MADMPipeline", "MADMPipelineOutput", "inference_accelerator"]


class MADMPipeline(DiffusionSegmentationPipeline):
    """Segment images with a trained model.

    ```python
    from madm_utils import MADMPipeline

    pipe = MADMPipeline.from_pretrained("outputs/depth").to("cuda")
    output = pipe("street.png", return_overlay=True)
    output.label_maps[0]  # uint8, height x width of street.png
    output.overlay[0].save("overlay.png")
    ```

    The folder of a run over several modalities is loaded as one base with an adapter per modality:
    `pipe.set_adapters("infrared")` changes to another one. The memory switches of diffusers work: attention slicing,
    offloading, `pipe.vae.enable_slicing()`; `pipe.vae.enable_tiling()` changes the results.
    """

    def __init__(
        self, segmenter, vae=None, unet=None, scheduler=None, settings: dict[str, Any] | None = None, vae_decoder=None
    ):
        super().__init__(segmenter, vae, unet, scheduler, settings, vae_decoder)
        self._models: dict[str, MADMModel] = {}

    @classmethod
    def of_models(cls, *models: MADMModel) -> MADMPipeline:
        """The pipeline of models of different modalities, on the first of them."""
        first = models[0].eval()
        extractor = first.extractor
        parts = (extractor.vae, first.unet, extractor.scheduler, first.config(), extractor.vae_decoder)
        pipe = cls(first.segmenter, *parts)
        pipe._models = {model.task.modality: model.eval() for model in models}
        pipe.set_adapters(first.task.modality)
        return pipe

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        weights: str = "student",
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        base: str | None = None,
        revision: str | None = None,
        vae_decoder: str | None = None,
    ) -> MADMPipeline:
        """Load the model in a run folder, a checkpoint folder or a Hub repository.

        A LoRA folder refers to its base model, which is loaded from where it came from. Every tensor must fit.

        Args:
            path_or_id: folder, or id on the Hub.
            weights: `student` (published evaluation) or `teacher` (its moving average).
            dtype: of the weights; float32 by default.
            device: where to run; default: CPU until `to` is called.
            base: Stable Diffusion folder or Hub id in place of the stored reference.
            revision: of the Hub repository.
            vae_decoder: folder or Hub id in place of the stored reference, for the adapters with a small decoder.

        Raises:
            UserError: nothing there, not a model of this suite, its base model cannot be loaded, or `vae_decoder` is
                given and there is no small decoder.
        """
        folders = list(adapter_folders(path_or_id, revision).values())
        decoders = replaced_decoders(folders, vae_decoder) if folders else [vae_decoder]
        models: list[MADMModel] = []
        for folder, decoder in zip(folders or [path_or_id], decoders, strict=True):
            options = {"dtype": dtype, "base": base, "revision": revision, "vae_decoder": decoder}
            models.append(MADMModel.from_pretrained(folder, weights, shared=tuple(models), **options))
        pipe = cls.of_models(*models)
        return pipe if device is None else pipe.to(device)

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """The modalities that this pipeline can segment."""
        return tuple(self._models) or (self.modality,)

    def set_adapters(self, name: str) -> None:
        """Segment images of the modality `name` from now on.

        Raises:
            UserError: no such adapter.
        """
        if name not in self._models:
            raise UserError(f"no adapter '{name}'; this pipeline has {', '.join(self.adapter_names)}")
        model = self._models[name]
        extractor, current = model.extractor, self.segmenter
        parts = {"segmenter": model.segmenter, "vae": extractor.vae, "unet": model.unet}
        parts["vae_decoder"] = extractor.vae_decoder
        for part, module in parts.items():
            if module is None or module is getattr(self, part):
                continue
            # Not `self.device`: with offloading, that is where models wait.
            module.to(getattr(self, part).device if part in ("vae", "unet") else current.device)
            if module.dtype != current.dtype and not (part == "unet" and model.quantization):
                module.to(current.dtype)
        self.register_modules(**parts)
        self.register_to_config(settings=model.config())
        self.extractor = extractor
        model.activate()

    def merge_lora(self) -> None:
        """Add the LoRA to the UNet's own weights: the same results up to rounding, with less work per image.

        Raises:
            UserError: there is no LoRA, or several adapters share the UNet.
        """
        self._approximate(merge=True)

    def quantize_unet(self, quantization: str) -> None:
        """Store the UNet's weights in 8 bits, on the device where it is; an approximation. A LoRA is merged first.

        Args:
            quantization: `int8` or `fp8`, see `approximations.quantize_unet`.

        Raises:
            UserError: another quantisation, several adapters share the UNet, or it is quantised already.
        """
        self._approximate(quantization=quantization)

    def _approximate(self, **options: Any) -> None:
        for model in self._models.values():
            check_approximation(model, **options)
        for model in self._models.values():
            approximate(model, **options)
        self.set_adapters(self.modality)

    def save_pretrained(self, save_directory: str | Path, safe_serialization: bool = True, **options: Any) -> None:
        """Write the model folder that `from_pretrained` reads; with several adapters one sub-folder each.

        The base model is referred to, not copied. The segmenter that was loaded, student or teacher, becomes the
        student; there is no teacher beside it.

        Raises:
            UserError: the folder holds something already, or another format than safetensors was asked for.
        """
        asked = [name for name, value in options.items() if value]
        if not safe_serialization or asked:
            raise UserError(
                f"a model folder is plain safetensors; save_pretrained does not take "
                f"{', '.join(asked) or 'safe_serialization=False'} (to upload: pipe.push_to_hub(REPOSITORY))"
            )
        if not self._models:
            raise UserError("this pipeline was not loaded with MADMPipeline.from_pretrained and cannot be saved")
        folder = Path(save_directory)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} already holds something; two models in one folder would mix, give another one")
        publish_folder(folder, self._write)

    def push_to_hub(
        self,
        repo_id: str,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload MADMPipeline",
    ) -> str:
        """Upload what `save_pretrained` writes, with a card that says how to use it; returns the address.

        Files of an earlier model in the repository are removed.

        Raises:
            huggingface_hub.errors.HfHubHTTPError: no right to write, and other troubles of the Hub.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        names = tuple(self._models) if len(self._models) > 1 else ("",)
        with TemporaryDirectory() as folder:
            self._write(Path(folder))
            write_pipeline_card(Path(folder), repo_id, {n: m.config() for n, m in self._models.items()})
            api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=commit_message, delete_patterns=stale_files(names)
            )
        return f"{api.endpoint}/{repo_id}"

    def _write(self, folder: Path) -> None:
        """Write every adapter below `folder`."""
        for name, model in self._models.items():
            model.save_pretrained(folder / name if len(self._models) > 1 else folder)


def inference_accelerator(mixed_precision: str) -> Accelerator:
    """Device, autocast and processes for inference; `mixed_precision` is no, fp16 or bf16.

    Raises:
        UserError: the device cannot run this precision.
    """
    from accelerate import Accelerator

    has_gpu = torch.accelerator.is_available()
    check_precision(mixed_precision, has_gpu)
    keep_freed_memory()
    try:
        # `cpu`: without it, several processes on a machine without GPU would not form a group.
        return Accelerator(cpu=not has_gpu, mixed_precision=mixed_precision)
    except ValueError as error:
        raise UserError(f"--mixed_precision {mixed_precision} does not run here: {error} Use no.") from None
