"""Checkpoints of the published MADM code (detectron2 format): reading them into our model, and writing them from it.

The published file is `{"model": tensors, "iteration": int}`, with `"trainer"` (optimiser, scaler, learning rate) where
training had not ended. It holds everything: VAE (float16), text encoder, UNet, student, teacher, and the head twice.
Widths are read from the tensors themselves. What our folder has no place for is kept beside the model in
`original_checkpoint.safetensors`, so that the way back gives every bit again:

    shared_noise      (1, 4, 64, 64); ours is drawn again, which other CPUs round differently
    iteration         int64, where the file has one
    text_encoder.*    only where it is not the base model's

The file stays on the disk while it is read: its tensors are mapped, not copied, and no module is initialised.
"""

import pickle
import re
import zipfile
from collections.abc import Callable
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

ORIGINAL_NAME = "original_checkpoint.safetensors"

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
    original: dict[str, Tensor]
    """What `ORIGINAL_NAME` holds."""
    remark: str = ""
    """What the user should know about the file."""


def check_file(path: str | Path, progress: Callable[[int], object]) -> None:
    """Read a published file once and compare it with its checksums; `progress` gets the bytes as they are read.

    Raises:
        UserError: it cannot be opened, is empty, ends too early, or differs from its checksums.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(4)
    except OSError as error:
        raise UserError(
            f"checkpoint {path} cannot be opened: {error.strerror}; give the published .pth file"
        ) from None
    if not start:
        raise UserError(f"checkpoint {path} is empty (0 bytes); download it again")
    if not zipfile.is_zipfile(path):
        if start == b"PK\x03\x04":
            raise UserError(f"checkpoint {path} ends too early, as after an interrupted download; download it again")
        return  # the format of torch before 1.6, which has no checksums; or no checkpoint at all
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            try:
                with archive.open(record) as content:
                    while block := content.read(1 << 22):
                        progress(len(block))
            except (zipfile.BadZipFile, OSError, EOFError):
                raise UserError(
                    f"checkpoint {path} is damaged: {record.filename} differs from its checksum; download it again"
                ) from None


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], int | None]:
    """Model tensors, mapped from the file, and iteration of a published `.pth` file.

    Raises:
        UserError: see `check_file`; or something is pickled that is neither a tensor nor a plain container or value,
            even in a part that would be ignored.
    """
    try:
        mapped = zipfile.is_zipfile(path)  # the format of torch before 1.6 cannot be mapped
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except OSError as error:
        raise UserError(
            f"checkpoint {path} cannot be opened: {error.strerror}; give the published .pth file"
        ) from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        if foreign := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(
                f"checkpoint {path} holds a pickled {foreign[1]}, and unpickling can run code: only tensors, plain "
                "containers and numbers are read. If you trust the file, write it again without the rest, where it "
                "was made: c = torch.load(FILE); torch.save({'model': c['model'], 'iteration': c['iteration']}, NEW)"
            ) from None
        raise UserError(
            f"checkpoint {path} cannot be read as plain tensors ({(str(error) or 'no data').splitlines()[0]}); "
            "expected a file of the published code: {'model': tensors, 'iteration': int}"
        ) from None
    state = content.get("model") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"checkpoint {path} has no 'model' entry with tensors; is it a published MADM checkpoint?")
    iteration = content.get("iteration")
    return state, iteration if isinstance(iteration, int) else None


def convert(state: dict[str, Tensor], task: Task, base: BaseModelReference, where: str | Path) -> ConvertedModel:
    """Build our model from published tensors, which it shares, on `base`, the one that the checkpoint was trained on.

    Raises:
        UserError: number of classes of another task, another base model, or keys and shapes that do not fit.
    """
    state = dict(state)
    _drop_duplicates(state, where)
    student, teacher = _rename(state, _STUDENT), _rename(state, _TEACHER)
    unet_state = _rename(state, {f"{_EXTRACTOR}unet.": ""})
    vae_state = _rename(state, {f"{_EXTRACTOR}vae.": ""})
    text_state = _rename(state, {f"{_EXTRACTOR}text_encoder.": ""})
    noise = state.pop(f"{_EXTRACTOR}shared_noise", None)
    embedding = state.pop(f"{_EXTRACTOR}uncond_inputs", None)
    if embedding is None or noise is None or state:
        missing = [n for n, t in (("uncond_inputs", embedding), ("shared_noise", noise)) if t is None]
        raise UserError(
            f"checkpoint {where} does not fit: missing {missing or 'nothing'}, unknown tensors {sorted(state)[:20]}"
        )
    student["empty_text_embedding"], teacher["empty_text_embedding"] = embedding, embedding.clone()
    _check_classes(student, task, where)
    original = {"shared_noise": noise, **_own_text_encoder(base, text_state, where)}

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
        segmenter.load_state_dict(tensors, assign=True)
        segmenters.append(segmenter)
    resolution = noise.shape[-1] * base_model.vae_scale(vae)
    model = MADMModel(extractor, segmenters[0], task, base, resolution, "full")
    remark = (
        f"its text encoder is not that of {base.pretrained_model_name_or_path}; nothing here needs it (its one output "
        f"is in the file), and it is kept in {ORIGINAL_NAME} for --to_original"
        if len(original) > 1
        else ""
    )
    return ConvertedModel(model.eval(), segmenters[1].eval(), original, remark)


def save_converted(converted: ConvertedModel, folder: Path, iteration: int | None) -> None:
    """Write the model folder, and what only the published format holds beside it."""
    from safetensors.torch import save_file

    converted.model.save_pretrained(folder, converted.teacher)
    counted = {} if iteration is None else {"iteration": torch.tensor(iteration)}
    tensors = {key: tensor.contiguous() for key, tensor in {**converted.original, **counted}.items()}
    save_file(tensors, folder / ORIGINAL_NAME)


def text_encoder_state(base: BaseModelReference) -> dict[str, Tensor]:
    """The base model's text encoder, float32, under its published names."""
    return published_text_names(base_model.load_text_encoder(base).state_dict())


def published_text_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A `CLIPTextModel`'s tensors as the transformers version of the published code (4.26) names them."""
    # transformers 5.6 dropped the prefix, 4.31 the positions.
    state = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in state.items()}
    embedding = state["text_model.embeddings.position_embedding.weight"]
    positions = torch.arange(len(embedding), device=embedding.device)[None]
    return {"text_model.embeddings.position_ids": positions, **state}


def _own_text_encoder(base: BaseModelReference, found: dict[str, Tensor], where: str | Path) -> dict[str, Tensor]:
    """The file's text encoder, where it is not the base model's."""
    expected = text_encoder_state(base)
    check_keys(expected, found, f"{where} (text encoder)")
    if all(torch.equal(value, found[key]) for key, value in expected.items()):
        return {}
    return {f"text_encoder.{key}": value for key, value in found.items()}


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
    reference = vae.state_dict()
    check_keys(reference, vae_state, f"{where} (vae)")
    differing = [key for key, value in reference.items() if not torch.equal(value.half(), vae_state[key].half())]
    if differing:
        raise UserError(
            f"checkpoint {where} was trained on another base model than {base.pretrained_model_name_or_path}: "
            f"{len(differing)} VAE tensors differ, {differing[0]} first"
        )
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(base_model.load_unet_config(base))
    check_keys(unet.state_dict(), unet_state, f"{where} (unet)")
    unet.load_state_dict(unet_state, assign=True)
    return vae, unet, base_model.load_scheduler(base)


def _segmenter_like(
    tensors: dict[str, Tensor], num_classes: int, extractor: DiffusionFeatureExtractor, where: str
) -> Segmenter:
    """A `Segmenter` whose widths are those of `tensors`, without values."""
    try:
        num_tokens, prompt_dim = tensors["conditioning.prompt_embed"].shape[1:]
        with torch.device("meta"):
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
