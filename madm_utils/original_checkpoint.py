"""Reading checkpoints of the published MADM code (detectron2 format) into our model.

The published file holds everything: VAE (float16), text encoder, UNet, student, teacher, and the head twice. Widths
are read from the tensors themselves.
"""

import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from madm_utils import base_model
from madm_utils.base_model import BaseModelReference, check_keys
from madm_utils.cli import UserError
from madm_utils.feature_extractor import NUM_TAPS, DiffusionFeatureExtractor
from madm_utils.modeling_madm import MADMModel
from madm_utils.segmenter import Segmenter
from madm_utils.tasks import Task

_EXTRACTOR = "backbone.feature_extractor.ldm_extractor."
_STUDENT = {
    "backbone.feature_extractor.clip_project_others.": "conditioning.",
    "backbone.feature_projections.": "projections.",
    "sem_seg_head.": "head.",
}
_TEACHER = {
    "backbone.feature_extractor.ema_clip_project_others.": "conditioning.",
    "backbone.ema_feature_projections.": "projections.",
    "ema_sem_seg_head.": "head.",
}
# The same tensors under a second name; a file in which they differ is not one this model can represent.
_DUPLICATES = {
    "sem_seg_head_sec_modal.": "sem_seg_head.",
    "backbone.feature_extractor.clip_project_rgb.": "backbone.feature_extractor.clip_project_others.",
}


@dataclass
class ConvertedModel:
    """A published checkpoint as our modules, both in evaluation mode."""

    model: MADMModel
    teacher: Segmenter


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], int | None]:
    """Model tensors and iteration of a published `.pth` file; nothing pickled beyond tensors is accepted."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:
        raise UserError(
            f"checkpoint {path} cannot be opened: {error.strerror}; give the published .pth file"
        ) from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(
            f"checkpoint {path} cannot be read as plain tensors ({str(error).splitlines()[0]}); expected a file of "
            "the published code: {'model': tensors, 'iteration': int}"
        ) from None
    state = content.get("model") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"checkpoint {path} has no 'model' entry with tensors; is it a published MADM checkpoint?")
    return state, content.get("iteration")


def convert(state: dict[str, Tensor], task: Task, base: BaseModelReference, where: str | Path) -> ConvertedModel:
    """Build our model from published tensors on `base`, whose VAE must be the one the checkpoint was trained with.

    Raises:
        UserError: number of classes of another task, another base model, or keys and shapes that do not fit.
    """
    state = dict(state)
    _drop_duplicates(state, where)
    student, teacher = _rename(state, _STUDENT), _rename(state, _TEACHER)
    unet_state = _rename(state, {f"{_EXTRACTOR}unet.": ""})
    vae_state = _rename(state, {f"{_EXTRACTOR}vae.": ""})
    _rename(state, {f"{_EXTRACTOR}text_encoder.": ""})  # frozen; its one output is `uncond_inputs`
    noise = state.pop(f"{_EXTRACTOR}shared_noise", None)
    embedding = state.pop(f"{_EXTRACTOR}uncond_inputs", None)
    if embedding is None or noise is None or state:
        missing = [n for n, t in (("uncond_inputs", embedding), ("shared_noise", noise)) if t is None]
        raise UserError(
            f"checkpoint {where} does not fit: missing {missing or 'nothing'}, unknown tensors {sorted(state)[:20]}"
        )
    student["empty_text_embedding"] = teacher["empty_text_embedding"] = embedding
    _check_classes(student, task, where)

    vae, unet, scheduler = _base_parts(base, unet_state, vae_state, where)
    # The published evaluation runs under fp16, whose rounding of the noise level this keeps.
    extractor = DiffusionFeatureExtractor(vae, unet, scheduler, noise.shape[-1], noise_in_latent_dtype=True)
    # torch draws from vectorised logarithms and cosines where the CPU has them; elsewhere equal up to rounding.
    drawn = extractor.shared_noise
    if drawn.shape != noise.shape or not torch.allclose(drawn, noise, rtol=0, atol=1e-5):
        raise UserError(f"checkpoint {where} was trained with another fixed noise; it cannot be reproduced here")
    segmenters = []
    for name, tensors in (("student", student), ("teacher", teacher)):
        segmenter = _segmenter_like(tensors, task.num_classes, extractor, f"{where} ({name})")
        check_keys(segmenter.state_dict(), tensors, f"{where} ({name})")
        segmenter.load_state_dict(tensors)
        segmenters.append(segmenter)
    resolution = noise.shape[-1] * base_model.vae_scale(vae)
    model = MADMModel(extractor, segmenters[0], task, base, resolution, "full")
    return ConvertedModel(model.eval(), segmenters[1].eval())


def _rename(state: dict[str, Tensor], prefixes: dict[str, str]) -> dict[str, Tensor]:
    """Take the tensors under `prefixes` out of `state`, with our names."""
    taken = {}
    for old, new in prefixes.items():
        for key in [k for k in state if k.startswith(old)]:
            name = new + key.removeprefix(old)
            # The published projections are one-element sequences: `0.0.conv1` is projection 0.
            if new == "projections.":
                index, _, rest = name.removeprefix(new).split(".", 2)
                name = f"{new}{index}.{rest}"
            taken[name] = state.pop(key)
    return taken


def _drop_duplicates(state: dict[str, Tensor], where: str | Path) -> None:
    for copy, original in _DUPLICATES.items():
        for key in [k for k in state if k.startswith(copy)]:
            twin = original + key.removeprefix(copy)
            if twin not in state or not torch.equal(state[key], state[twin]):
                raise UserError(f"checkpoint {where}: {key} and {twin} should be the same tensor and are not")
            del state[key]


def _check_classes(student: dict[str, Tensor], task: Task, where: str | Path) -> None:
    classifier = student.get("head.conv_seg.weight")
    if classifier is not None and len(classifier) != task.num_classes:
        raise UserError(
            f"checkpoint {where} has {len(classifier)} classes, task {task.name} has {task.num_classes}; "
            "it belongs to another --task"
        )


def _base_parts(base: BaseModelReference, unet_state: dict, vae_state: dict, where: str | Path):
    vae = base_model.load_vae(base)
    reference = {key: value.half() for key, value in vae.state_dict().items()}
    check_keys(reference, vae_state, f"{where} (vae)")
    differing = [key for key, value in reference.items() if not torch.equal(value, vae_state[key].half())]
    if differing:
        raise UserError(
            f"checkpoint {where} was trained on another base model than {base.pretrained_model_name_or_path}: "
            f"{len(differing)} VAE tensors differ, {differing[0]} first"
        )
    unet = UNet2DConditionModel.from_config(base_model.load_unet_config(base))
    check_keys(unet.state_dict(), unet_state, f"{where} (unet)")
    unet.load_state_dict(unet_state)
    return vae, unet, base_model.load_scheduler(base)


def _segmenter_like(
    tensors: dict[str, Tensor], num_classes: int, extractor: DiffusionFeatureExtractor, where: str
) -> Segmenter:
    """An untrained `Segmenter` whose widths are those of `tensors`."""
    try:
        num_tokens, prompt_dim = tensors["conditioning.prompt_embed"].shape[1:]
        return Segmenter(
            num_classes=num_classes,
            feature_channels=extractor.feature_channels,
            projection_channels=[len(tensors[f"projections.{i}.conv3.weight"]) for i in range(NUM_TAPS + 1)],
            bottleneck_channels=len(tensors["projections.0.conv1.weight"]),
            head_channels=len(tensors["head.fuse_layer.bottleneck.conv.weight"]),
            embed_channels=len(tensors["head.embed_layers.0.proj.weight"]),
            num_tokens=num_tokens,
            prompt_dim=prompt_dim,
            time_dim=len(tensors["conditioning.alpha_cond_time"]),
        )
    except KeyError as error:
        raise UserError(f"checkpoint {where} lacks {error.args[0]}; is it a published MADM checkpoint?") from None
