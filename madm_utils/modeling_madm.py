"""The MADM model: Stable Diffusion features and a segmenter on top; building, saving and loading it.

A saved model is one folder of safetensors and JSON. The base model (VAE, frozen UNet, text encoder) is referred to,
never copied:

    madm_config.json                     task, resolution, tuning, references to base model and small VAE decoder
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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from madm_utils import base_model, small_decoder
from madm_utils.base_model import BaseModelReference
from madm_utils.cli import UserError
from madm_utils.engines import gather_state
from madm_utils.feature_extractor import DiffusionFeatureExtractor
from madm_utils.model_folder import CONFIG_NAME, ModelConfig, read_config, replaced_decoders
from madm_utils.segmenter import Segmenter, check_classes, segmenter_config
from madm_utils.standalone import save_standalone
from madm_utils.tasks import Task

# One UNet carries the adapters of several modalities on purpose.
warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")

LORA_TARGET_MODULES = (
    "to_k", "to_q", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
    "conv1", "conv2", "conv_shortcut", "time_emb_proj", "conv",
)  # fmt: skip
"""Ends of the names of all layers in the UNet's blocks. With those of its attention alone, a LoRA of any rank adapts
less than the whole UNet does (docs/experiments.md)."""
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
        vae_decoder: folder or Hub id of the extractor's small decoder, where it has one.

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
        vae_decoder: str | None = None,
    ):
        super().__init__()
        self.extractor = extractor
        self.segmenter = segmenter
        self.task = task
        self.base = base
        self.resolution = resolution
        self.unet_tuning = unet_tuning
        self.vae_decoder = vae_decoder
        self.quantization: str | None = None
        """Of the UNet's weights: `int8` or `fp8` after `approximations.quantize_unet`."""
        base_unet = extractor.unet if unet_tuning == "lora" else None
        self.base_signature = base_model.base_signature(extractor.vae, extractor.scheduler, base_unet)

    @property
    def unet(self) -> nn.Module:
        return self.extractor.unet

    def activate(self) -> None:
        """Make this model's adapter the active one of a UNet that several models share."""
        if len(getattr(self.unet, "peft_config", ())) > 1 and self.unet.active_adapters() != [self.task.modality]:
            self.unet.set_adapter(self.task.modality)

    def forward(
        self,
        images: Tensor | None = None,
        timestep: int = 0,
        segmenter: Segmenter | None = None,
        latents: Tensor | None = None,
    ) -> MADMOutput:
        """Segment images (B, 3, H, W) in [0, 1], height and width multiples of 64.

        Args:
            images: the batch; not needed where `latents` are given.
            timestep: noise level of the latents; 0, the level of student and test, still adds a little noise.
            segmenter: the teacher's, to run the teacher (which shares this UNet); default the student's.
            latents: (B, C, h, w) of `extractor.encode`, where they are known already.
        """
        segmenter = segmenter or self.segmenter
        self.activate()
        if latents is None:
            latents = self.extractor.encode(images * 2 - 1)
        features, label_latent = self.extractor.extract(latents, timestep, *segmenter.condition())
        return MADMOutput(logits=segmenter(features), label_latent=label_latent, decoded=features[0])

    @classmethod
    def from_base(
        cls,
        base: BaseModelReference,
        task: Task,
        resolution: int,
        unet_tuning: str = "lora",
        rank: int = 32,
        lora_alpha: int | None = None,
        lora_layers: Sequence[str] | None = None,
        train_unet_output_layers: bool = False,
        noise_in_latent_dtype: bool = False,
        frozen_dtype: torch.dtype = torch.float32,
        quantize_base: str = "none",
        vae_decoder: str | None = None,
        shared: "MADMModel | None" = None,
        **head: int,
    ) -> "MADMModel":
        """A new model on a Stable Diffusion base; trainable parameters are float32 and have `requires_grad`.

        Args:
            base: Stable Diffusion folder or Hub id.
            task: gives the classes.
            resolution: side of the training crops, a multiple of 64.
            unet_tuning: `lora` adds a LoRA adapter named after the modality to a frozen UNet; `full` trains the UNet.
            rank, lora_alpha: of the LoRA; alpha defaults to the rank.
            lora_layers: ends of the names of the layers it changes; `LORA_TARGET_MODULES` by default.
            train_unet_output_layers: with `full`, also train `conv_norm_out` and `conv_out`, which the published
                code freezes by accident.
            noise_in_latent_dtype: see `DiffusionFeatureExtractor`.
            frozen_dtype: of the VAE, and of the UNet under LoRA.
            quantize_base: storage of the frozen UNet under LoRA: `none`, `int8` or `nf4`.
            vae_decoder: folder or Hub id of a small decoder in place of the VAE's own.
            shared: a LoRA model of another modality on the same base, whose VAE and UNet are used.
            head: `projection_channels` (the decoded image's projection takes a quarter), `bottleneck_channels`,
                `head_channels`, `head_resolution`; the published ones by default.
        """
        if shared is not None:
            vae, unet = shared.extractor.vae, shared.unet
        else:
            vae = base_model.load_vae(base, frozen_dtype)
            unet = base_model.load_unet(base, frozen_dtype if unet_tuning == "lora" else torch.float32, quantize_base)
        latent_size = resolution // base_model.vae_scale(vae)
        decoder = _load_decoder(vae_decoder, vae, () if shared is None else (shared,))
        scheduler = base_model.load_scheduler(base)
        extractor = DiffusionFeatureExtractor(vae, unet, scheduler, latent_size, noise_in_latent_dtype, decoder)
        embedding = base_model.empty_text_embedding(base)
        if embedding.shape[2] != unet.config.cross_attention_dim:
            raise UserError(
                f"base model {base.pretrained_model_name_or_path}: its text encoder has width {embedding.shape[2]}, "
                f"its UNet expects {unet.config.cross_attention_dim}; give a Stable Diffusion 1.x or 2.x model"
            )
        segmenter = Segmenter(
            **segmenter_config(extractor, task.num_classes, **head),
            num_tokens=embedding.shape[1],
            prompt_dim=embedding.shape[2],
        )
        segmenter.empty_text_embedding.copy_(embedding)
        model = cls(extractor, segmenter, task, base, resolution, unet_tuning, vae_decoder)
        if unet_tuning == "lora":
            _add_lora(unet, task.modality, rank, lora_alpha or rank, lora_layers or LORA_TARGET_MODULES)
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
        decoder = self.extractor.vae_decoder
        return ModelConfig(
            task=self.task,
            resolution=self.resolution,
            unet_tuning=self.unet_tuning,
            noise_in_latent_dtype=self.extractor.noise_in_latent_dtype,
            base=self.base,
            base_signature=self.base_signature,
            vae_decoder=self.vae_decoder,
            vae_decoder_signature=None if decoder is None else small_decoder.decoder_signature(decoder),
        ).to_dict()

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

        Raises:
            UserError: the UNet is quantised.
        """
        if self.quantization is not None:
            raise UserError(
                f"the UNet is stored in {self.quantization} and cannot be saved; load the model again, and save it "
                "before quantize_unet"
            )
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
        shared: "tuple[MADMModel, ...]" = (),
        vae_decoder: str | None = None,
    ) -> "MADMModel":
        """Load a saved model in evaluation mode.

        Args:
            folder: a run folder, one of its checkpoints, or a Hub id.
            weights: `student` (what the published system evaluates) or `teacher`.
            dtype: of all weights; float32 by default.
            base: Stable Diffusion folder or Hub id in place of the stored reference, e.g. on another machine.
            revision: of the Hub repository.
            shared: models loaded before; VAE and UNet of a LoRA model on the same base are used, and a decoder.
            vae_decoder: folder or Hub id in place of the stored reference to the small decoder.

        Raises:
            UserError: not a MADM folder, missing base, or tensors that are missing, unexpected or of another shape.
        """
        folder = base_model.local_folder(folder, revision, expected=CONFIG_NAME)
        config = read_config(folder)
        task, tuning = config.task, config.unet_tuning
        reference = config.base if base is None else BaseModelReference(base)
        if weights == "teacher" and not (folder / "teacher").is_dir():
            raise UserError(
                f"{folder} holds no teacher (source-only runs and saved pipelines have none); use --weights student"
            )
        (replaced,) = replaced_decoders([folder], vae_decoder)
        same = next((m for m in shared if tuning == m.unet_tuning == "lora" and m.base == reference), None)
        vae = base_model.load_vae(reference) if same is None else same.extractor.vae
        if tuning == "lora":
            unet = base_model.load_unet(reference) if same is None else same.unet
            base_model.load_lora(unet, folder, task.modality)
        else:
            unet = base_model.load_strict(UNet2DConditionModel, folder, "unet")
        segmenter = base_model.load_strict(Segmenter, folder, "segmenter" if weights == "student" else "teacher")
        check_classes(segmenter.config.num_classes, task.class_names, str(folder))
        latent_size = config.resolution // base_model.vae_scale(vae)
        scheduler = base_model.load_scheduler(reference)
        name = replaced or config.vae_decoder
        decoder = _load_decoder(name, vae, shared)
        extractor = DiffusionFeatureExtractor(vae, unet, scheduler, latent_size, config.noise_in_latent_dtype, decoder)
        model = cls(extractor, segmenter, task, reference, config.resolution, tuning, name)
        base_model.check_base(model.base_signature, config.base_signature, reference.pretrained_model_name_or_path)
        if decoder is not None:
            small_decoder.check_signature(decoder, config.vae_decoder_signature, name)
        model.to(dtype or torch.float32)
        # The cast has rounded the fixed noise too.
        model.extractor.shared_noise = model.extractor.draw_noise(latent_size, latent_size)
        return model.requires_grad_(False).eval()


def _add_lora(unet: UNet2DConditionModel, name: str, rank: int, alpha: int, layers: Sequence[str]) -> None:
    """Add a new adapter to the layers whose names end so, and make it active.

    Raises:
        UserError: there is no such layer, or it is of a kind that takes no LoRA.
    """
    from peft import LoraConfig

    # Where another adapter is already, the layer itself lies below it.
    modules = [key.removesuffix(".base_layer") for key, _ in unet.named_modules()]
    missing = [layer for layer in layers if not any(f".{key}".endswith(f".{layer}") for key in modules)]
    if missing:
        raise UserError(
            f"--lora_layers: no layer of the UNet is called {', '.join(missing)}; "
            "try to_k,to_q,to_v,to_out.0 (attention) or conv1,conv2 (residual blocks)"
        )
    config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=list(layers))
    try:
        unet.add_adapter(config, adapter_name=name)
    except ValueError as error:
        raise UserError(f"--lora_layers {','.join(layers)}: {' '.join(str(error).split())}") from None
    unet.set_adapter(name)


def _load_decoder(name: str | None, vae: AutoencoderKL, shared: tuple[MADMModel, ...]) -> AutoencoderTiny | None:
    """The small decoder `name`, in the precision of the VAE; that of a model in `shared` which has the same one."""
    if name is None:
        return None
    found = (m.extractor.vae_decoder for m in shared if m.extractor.vae is vae and m.vae_decoder == name)
    return next(found, None) or small_decoder.load_decoder(name, vae, vae.dtype)
