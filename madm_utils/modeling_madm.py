"""The MADM model: Stable Diffusion features and a segmenter on top; building, saving and loading it.

A saved model is one folder of safetensors and JSON. The base model (VAE, frozen UNet, text encoder) is referred to,
never copied:

    madm_config.json                     task, resolution, tuning, reference to the base model
    segmenter/                           conditioning, projections, head of the student
    teacher/                             the same of the mean teacher (absent in source-only runs)
    pytorch_lora_weights.safetensors     LoRA of the UNet in diffusers format (`unet_tuning` lora)
    unet/                                the whole UNet (`unet_tuning` full)
    original_checkpoint.safetensors      of a converted model: what only the published format holds
    model_index.json, pipeline.py        the same model for machines without this package (`standalone.py`)

A run over several modalities has one such folder per modality; `load_adapters` loads them on one shared base.
"""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from madm_utils import base_model
from madm_utils.base_model import BaseModelReference
from madm_utils.cli import UserError
from madm_utils.engines import gather_state
from madm_utils.feature_extractor import DiffusionFeatureExtractor
from madm_utils.segmenter import Segmenter, check_classes
from madm_utils.standalone import save_standalone
from madm_utils.tasks import Task, task_from_dict

# One UNet carries the adapters of several modalities on purpose.
warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")

CONFIG_NAME = "madm_config.json"
FORMAT = 2
"""Of the model folder. Format 1 did not say which base model it was trained on but by name."""
LORA_TARGET_MODULES = ("to_k", "to_q", "to_v", "to_out.0")
UNET_OUTPUT_LAYERS = ("conv_norm_out", "conv_out")


@dataclass
class MADMOutput(BaseOutput):
    """Output of `MADMModel`.

    Args:
        logits: (B, K, H, W) class logits at the size of the images.
        label_latent: (B, C, h, w) output of the UNet, read as the latent of the label's palette image.
        decoded: (B, 3, H, W) un-clipped decoding of the label latent, without gradient.
    """

    # Without defaults, accelerate cannot rebuild the output in float32 under mixed precision.
    logits: Tensor = None
    label_latent: Tensor = None
    decoded: Tensor = None


class MADMModel(nn.Module):
    """Segmentation with a diffusion UNet (MADM, section 3).

    Args:
        extractor: frozen VAE and tuned UNet.
        segmenter: conditioning, projections and head of the student.
        task: classes, palette and label maps.
        base: where the frozen parts came from.
        resolution: side of the training crops in pixels.
        unet_tuning: `lora` or `full`.

    Models of several modalities may share an extractor's VAE and UNet: a forward pass first makes the LoRA adapter of
    its own modality the active one. Gradients of one model must be computed before another one runs.
    """

    def __init__(
        self,
        extractor: DiffusionFeatureExtractor,
        segmenter: Segmenter,
        task: Task,
        base: BaseModelReference,
        resolution: int,
        unet_tuning: str,
    ):
        super().__init__()
        self.extractor = extractor
        self.segmenter = segmenter
        self.task = task
        self.base = base
        self.resolution = resolution
        self.unet_tuning = unet_tuning
        base_unet = extractor.unet if unet_tuning == "lora" else None
        self.base_signature = base_model.base_signature(extractor.vae, extractor.scheduler, base_unet)

    @property
    def unet(self) -> nn.Module:
        return self.extractor.unet

    def activate(self) -> None:
        """Make this model's adapter the active one of a UNet that several models share."""
        if len(getattr(self.unet, "peft_config", ())) > 1 and self.unet.active_adapters() != [self.task.modality]:
            self.unet.set_adapter(self.task.modality)

    def forward(self, images: Tensor, timestep: int = 0, segmenter: Segmenter | None = None) -> MADMOutput:
        """Segment images (B, 3, H, W) in [0, 1], height and width multiples of 64.

        Args:
            images: the batch.
            timestep: noise level of the latents; 0, the level of student and test, still adds a little noise.
            segmenter: the teacher's, to run the teacher (which shares this UNet); default the student's.
        """
        segmenter = segmenter or self.segmenter
        self.activate()
        features, label_latent = self.extractor.extract(images, timestep, *segmenter.condition())
        return MADMOutput(logits=segmenter(features), label_latent=label_latent, decoded=features[0])

    @classmethod
    def from_base(
        cls,
        base: BaseModelReference,
        task: Task,
        resolution: int,
        unet_tuning: str = "lora",
        rank: int = 16,
        lora_alpha: int | None = None,
        train_unet_output_layers: bool = False,
        noise_in_latent_dtype: bool = False,
        frozen_dtype: torch.dtype = torch.float32,
        quantize_base: str = "none",
        shared: "MADMModel | None" = None,
        **widths: int,
    ) -> "MADMModel":
        """A new model on a Stable Diffusion base; trainable parameters are float32 and have `requires_grad`.

        Args:
            base: Stable Diffusion folder or Hub id.
            task: gives the classes.
            resolution: side of the training crops, a multiple of 64.
            unet_tuning: `lora` adds a LoRA adapter named after the modality to a frozen UNet; `full` trains the UNet.
            rank, lora_alpha: of the LoRA; alpha defaults to the rank.
            train_unet_output_layers: with `full`, also train `conv_norm_out` and `conv_out`, which the published
                code freezes by accident.
            noise_in_latent_dtype: see `DiffusionFeatureExtractor`.
            frozen_dtype: of the VAE, and of the UNet under LoRA.
            quantize_base: storage of the frozen UNet under LoRA: `none`, `int8` or `nf4`.
            shared: a LoRA model of another modality on the same base, whose VAE and UNet are used.
            widths: `projection_channels` (the decoded image's projection takes a quarter), `bottleneck_channels`,
                `head_channels`; the published ones by default.
        """
        if shared is not None:
            vae, unet = shared.extractor.vae, shared.unet
        else:
            vae = base_model.load_vae(base, frozen_dtype)
            unet = base_model.load_unet(base, frozen_dtype if unet_tuning == "lora" else torch.float32, quantize_base)
        extractor = DiffusionFeatureExtractor(
            vae, unet, base_model.load_scheduler(base), resolution // base_model.vae_scale(vae), noise_in_latent_dtype
        )
        embedding = base_model.empty_text_embedding(base)
        if embedding.shape[2] != unet.config.cross_attention_dim:
            raise UserError(
                f"base model {base.pretrained_model_name_or_path}: its text encoder has width {embedding.shape[2]}, "
                f"its UNet expects {unet.config.cross_attention_dim}; give a Stable Diffusion 1.x or 2.x model"
            )
        segmenter = Segmenter(
            **segmenter_config(extractor, task.num_classes, **widths),
            num_tokens=embedding.shape[1],
            prompt_dim=embedding.shape[2],
        )
        segmenter.empty_text_embedding.copy_(embedding)
        model = cls(extractor, segmenter, task, base, resolution, unet_tuning)
        if unet_tuning == "lora":
            from peft import LoraConfig

            unet.add_adapter(
                LoraConfig(
                    r=rank,
                    lora_alpha=lora_alpha or rank,
                    init_lora_weights="gaussian",
                    target_modules=list(LORA_TARGET_MODULES),
                ),
                adapter_name=task.modality,
            )
            unet.set_adapter(task.modality)
        model.set_trainable(train_unet_output_layers)
        return model

    def set_trainable(self, train_unet_output_layers: bool = False) -> None:
        """Set `requires_grad` by name, and float32 master weights for everything that trains."""
        for name, parameter in self.named_parameters():
            if name.startswith("segmenter."):
                trainable = True
            elif not name.startswith("extractor.unet."):
                trainable = False
            elif self.unet_tuning == "lora":
                trainable = "lora_" in name and f".{self.task.modality}." in name
            else:
                trainable = train_unet_output_layers or name.split(".")[2] not in UNET_OUTPUT_LAYERS
            parameter.requires_grad_(trainable)
            if trainable:
                parameter.data = parameter.data.float()

    def config(self) -> dict[str, Any]:
        """What `madm_config.json` holds."""
        return {
            "format": FORMAT,
            "task": self.task.to_dict(),
            "resolution": self.resolution,
            "unet_tuning": self.unet_tuning,
            "noise_in_latent_dtype": self.extractor.noise_in_latent_dtype,
            "base_model": self.base.to_dict(),
            "base_signature": self.base_signature,
        }

    def trained_state(self, keep: bool = True) -> dict[str, dict[str, Tensor]]:
        """Whole tensors of the student that a checkpoint holds, by part: `segmenter` and `unet` (or its LoRA).

        Where an engine has sharded the model, every process has to call; `keep` is False for those that do not write.
        """
        lora = self.unet_tuning == "lora"
        unet = base_model.lora_state(self.unet, self.task.modality) if lora else self.unet.state_dict()
        return gather_state({"segmenter": self.segmenter.state_dict(), "unet": unet}, keep)

    def save_pretrained(
        self,
        folder: str | Path,
        teacher: Segmenter | None = None,
        state: dict[str, dict[str, Tensor]] | None = None,
    ) -> None:
        """Write the model into `folder` (layout in the module docstring).

        Args:
            folder: created where it is missing.
            teacher: the mean teacher's segmenter, where there is one.
            state: `trained_state`, where it takes all processes to gather it.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = state or self.trained_state()
        base_model.save_part(self.segmenter, folder / "segmenter", state["segmenter"])
        if teacher is not None:
            base_model.save_part(teacher, folder / "teacher", teacher.state_dict())
        if self.unet_tuning == "lora":
            base_model.save_lora(self.unet, folder, self.task.modality, state["unet"])
        else:
            base_model.save_part(self.unet, folder / "unet", state["unet"])
        save_standalone(folder, self.config())
        (folder / CONFIG_NAME).write_text(json.dumps(self.config(), indent=2) + "\n", encoding="utf-8")

    def restore(self, folder: str | Path, teacher: Segmenter | None = None) -> None:
        """Put the weights of a checkpoint of the same run into this model (and `teacher`), to go on training."""
        folder = Path(folder)
        base_model.restore_strict(self.segmenter, folder, "segmenter")
        if teacher is not None:
            base_model.restore_strict(teacher, folder, "teacher")
        if self.unet_tuning == "lora":
            base_model.restore_lora(self.unet, folder, self.task.modality)
        else:
            base_model.restore_strict(self.unet, folder, "unet")

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        weights: str = "student",
        dtype: torch.dtype | None = None,
        base: str | None = None,
        revision: str | None = None,
        shared: "MADMModel | None" = None,
    ) -> "MADMModel":
        """Load a saved model in evaluation mode.

        Args:
            folder: a run folder, one of its checkpoints, or a Hub id.
            weights: `student` (what the published system evaluates) or `teacher`.
            dtype: of all weights; float32 by default.
            base: Stable Diffusion folder or Hub id in place of the stored reference, e.g. on another machine.
            revision: of the Hub repository.
            shared: a loaded LoRA model of another modality whose VAE and UNet are used when its base is the same.

        Raises:
            UserError: not a MADM folder, missing base, or tensors that are missing, unexpected or of another shape.
        """
        folder = base_model.local_folder(folder, revision, expected=CONFIG_NAME)
        config = _read_config(folder)
        try:
            task = task_from_dict(config["task"], where=str(folder / CONFIG_NAME))
            reference = BaseModelReference(**config["base_model"])
            tuning, rounding = str(config["unet_tuning"]), bool(config["noise_in_latent_dtype"])
            resolution, signature = int(config["resolution"]), list(config["base_signature"])
        except UserError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise _unreadable(folder, error) from None
        if base is not None:
            reference = BaseModelReference(base)
        if weights == "teacher" and not (folder / "teacher").is_dir():
            raise UserError(
                f"{folder} holds no teacher (source-only runs and saved pipelines have none); use --weights student"
            )
        if shared is not None and tuning == "lora" and shared.base == reference:
            vae, unet = shared.extractor.vae, shared.unet
        else:
            vae = base_model.load_vae(reference)
            unet = base_model.load_unet(reference) if tuning == "lora" else None
        if tuning == "lora":
            base_model.load_lora(unet, folder, task.modality)
        else:
            unet = base_model.load_strict(UNet2DConditionModel, folder, "unet")
        segmenter = base_model.load_strict(Segmenter, folder, "segmenter" if weights == "student" else "teacher")
        check_classes(segmenter.config.num_classes, task.class_names, str(folder))
        latent_size = resolution // base_model.vae_scale(vae)
        scheduler = base_model.load_scheduler(reference)
        extractor = DiffusionFeatureExtractor(vae, unet, scheduler, latent_size, rounding)
        model = cls(extractor, segmenter, task, reference, resolution, tuning)
        base_model.check_base(model.base_signature, signature, reference.pretrained_model_name_or_path)
        model.to(dtype or torch.float32)
        # The cast has rounded the fixed noise too.
        model.extractor.shared_noise = model.extractor.draw_noise(latent_size, latent_size)
        return model.requires_grad_(False).eval()


def adapter_folders(folder: str | Path, revision: str | None = None) -> dict[str, Path]:
    """Modality -> model folder of what a run left: one folder, or one sub-folder per modality; a Hub id as well.

    Raises:
        UserError: no such folder, or several of its sub-folders are models of one modality.
    """
    folder = base_model.local_folder(folder, revision)
    if (folder / CONFIG_NAME).is_file():
        return {"": folder}
    found = {path.parent.name: path.parent for path in sorted(folder.glob(f"[!.]*/{CONFIG_NAME}"))}
    found = {name: path for name, path in found.items() if not name.startswith("checkpoint-")}
    modalities: dict[str, str] = {}
    for name, path in found.items() if len(found) > 1 else ():
        modality = _read_config(path)["task"]["modality"]
        if modality in modalities:
            raise UserError(
                f"{folder} holds several models for {modality}: {modalities[modality]}, {name}; give the folder of one"
            )
        modalities[modality] = name
    return found


def _read_config(folder: Path) -> dict[str, Any]:
    """What `madm_config.json` holds, with the fields that tell the format and the modality."""
    try:
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        number, _ = config["format"], config["task"]["modality"]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise _unreadable(folder, error) from None
    if number != FORMAT:
        raise UserError(
            f"{folder / CONFIG_NAME} is of format {number}, this version reads and writes {FORMAT}; use the version "
            "that wrote it, or train again"
        )
    return config


def _unreadable(folder: Path, error: Exception) -> UserError:
    return UserError(
        f"{folder / CONFIG_NAME} cannot be read ({type(error).__name__}: {error}); download or train again"
    )


def segmenter_config(
    extractor: DiffusionFeatureExtractor,
    num_classes: int,
    projection_channels: int = 512,
    bottleneck_channels: int = 128,
    head_channels: int = 256,
) -> dict[str, Any]:
    """Arguments of `Segmenter` for this extractor; only the three widths are free."""
    image_channels = max(32, projection_channels // 4)
    return {
        "num_classes": num_classes,
        "feature_channels": extractor.feature_channels,
        "projection_channels": [image_channels, *[projection_channels] * 3],
        "bottleneck_channels": bottleneck_channels,
        "head_channels": head_channels,
        "embed_channels": head_channels,
        "time_dim": extractor.unet.time_embedding.linear_2.out_features,
    }
