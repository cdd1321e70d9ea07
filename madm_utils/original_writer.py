"""A model folder of ours as a checkpoint of the published MADM code, and the proof that a conversion lost nothing."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from madm_utils import base_model
from madm_utils.cli import UserError
from madm_utils.feature_extractor import DiffusionFeatureExtractor
from madm_utils.merging import merge_lora
from madm_utils.model_folder import adapter_folders
from madm_utils.modeling_madm import MADMModel
from madm_utils.original_checkpoint import ORIGINAL_NAME, ConvertedModel, text_encoder_state
from madm_utils.segmenter import Segmenter

_EXTRACTOR = "backbone.feature_extractor."
_LATENT_SIZE = 64
LOGIT_TOLERANCE = 2e-3
"""Largest difference from the published code's logits (whose standard deviation is about 3) on any CPU."""
CLASS_TOLERANCE = 0.999
"""Share of pixels that have to get the class that the published code gives them."""
CHECK_SIDE = 64


@dataclass
class PublishedCheckpoint:
    """Content of a published `.pth` file."""

    state: dict[str, Tensor]
    """The published names in the published order."""
    iteration: int | None
    remarks: list[str]
    """What is not as training with the published code would have left it."""


def published_checkpoint(folder: str | Path, base: str | None = None) -> PublishedCheckpoint:
    """The model in `folder` in the published format; a LoRA is merged into the UNet.

    Args:
        folder: a run folder, one of its checkpoints, a converted checkpoint, or a Hub id.
        base: Stable Diffusion folder or Hub id in place of the stored reference; gives VAE and text encoder.

    Raises:
        UserError: several models in the folder, a resolution or an approximation that the published code cannot run,
            missing parts.
    """
    found = adapter_folders(folder)
    if len(found) > 1:
        raise UserError(f"{folder} holds models of {', '.join(found)}; give one of them: {folder}/{next(iter(found))}")
    folder = next(iter(found.values()), Path(folder))
    model = MADMModel.from_pretrained(folder, base=base)
    noise = model.extractor.shared_noise
    if noise.shape[-1] != _LATENT_SIZE:
        raise UserError(
            f"{folder} was trained at {model.resolution}x{model.resolution} pixels, latents of {noise.shape[-1]}; the "
            f"published code runs on latents of {_LATENT_SIZE} only (512x512 pixels). Train with --resolution 512"
        )
    changed = {"--head_resolution": model.segmenter.config.head_resolution, "--vae_decoder": model.vae_decoder}
    changed = {flag: value for flag, value in changed.items() if value not in (1, None)}
    if changed:
        raise UserError(
            f"{folder} was trained with {', '.join(f'{flag} {value}' for flag, value in changed.items())}; the "
            "published code has the head at the image's size and the VAE's own decoder, and would segment something "
            "else. Train without these flags"
        )
    student, remarks = model.segmenter, []
    if model.unet_tuning == "lora":
        merge_lora(model)
        remarks.append("the LoRA was merged into the UNet: the published format has no place for one")
    if not model.extractor.noise_in_latent_dtype:
        remarks.append("under fp16 the published code rounds the noise level to half precision; this model does not")
    if (folder / "teacher").is_dir():
        teacher = base_model.load_strict(Segmenter, folder, "teacher")
    else:
        teacher = student
        remarks.append("there is no teacher; the student's weights stand in its place")
    kept = base_model.read_safetensors(folder / ORIGINAL_NAME) if (folder / ORIGINAL_NAME).is_file() else {}
    iteration = kept["iteration"].item() if "iteration" in kept else None
    if iteration is None:
        remarks.append("it has no 'iteration', which is not known here")
    text_encoder = {k.removeprefix("text_encoder."): v for k, v in kept.items() if k.startswith("text_encoder.")}
    state = published_state(
        model.extractor,
        student,
        teacher,
        text_encoder or text_encoder_state(model.base),
        kept.get("shared_noise", noise),
    )
    return PublishedCheckpoint(state, iteration, remarks)


def published_state(
    extractor: DiffusionFeatureExtractor,
    student: Segmenter,
    teacher: Segmenter,
    text_encoder: dict[str, Tensor],
    noise: Tensor,
) -> dict[str, Tensor]:
    """All tensors under the published names, in the published order; the VAE in float16.

    Args:
        extractor: VAE and UNet.
        student, teacher: the segmenters.
        text_encoder: under its published names.
        noise: (1, C, 64, 64), the fixed noise.
    """
    state = {
        f"{_EXTRACTOR}ldm_extractor.shared_noise": noise,
        f"{_EXTRACTOR}ldm_extractor.uncond_inputs": student.empty_text_embedding,
    }
    for prefix, tensors in (
        ("ldm_extractor.vae.", {key: value.half() for key, value in extractor.vae.state_dict().items()}),
        ("ldm_extractor.unet.", extractor.unet.state_dict()),
        ("ldm_extractor.text_encoder.", text_encoder),
        ("clip_project_rgb.", student.conditioning.state_dict()),
        ("clip_project_others.", student.conditioning.state_dict()),
        ("ema_clip_project_others.", teacher.conditioning.state_dict()),
    ):
        state.update({f"{_EXTRACTOR}{prefix}{key}": value for key, value in tensors.items()})
    for prefix, segmenter in (("feature_projections", student), ("ema_feature_projections", teacher)):
        for key, value in segmenter.projections.state_dict().items():
            index, rest = key.split(".", 1)  # theirs are sequences of one block
            state[f"backbone.{prefix}.{index}.0.{rest}"] = value
    heads = {"sem_seg_head": student, "sem_seg_head_sec_modal": student, "ema_sem_seg_head": teacher}
    for prefix, segmenter in heads.items():
        # theirs begins with the classifier
        tensors = sorted(segmenter.head.state_dict().items(), key=lambda item: not item[0].startswith("conv_seg."))
        state.update({f"{prefix}.{key}": value for key, value in tensors})
    return {key: value.detach() for key, value in state.items()}


def write_checkpoint(checkpoint: PublishedCheckpoint, path: Path) -> None:
    """Write the `.pth` file; tensors that have two names are stored once, as by the published code."""
    content: dict[str, object] = {"model": checkpoint.state}
    if checkpoint.iteration is not None:
        content["iteration"] = checkpoint.iteration
    torch.save(content, path)


def digests(state: dict[str, Tensor], progress: Callable[[int], object]) -> dict[str, tuple]:
    """Dtype, shape and digest of the bits of every tensor; `progress` gets the bytes as they are read."""
    result = {}
    for key, tensor in state.items():
        bits = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        result[key] = (tensor.dtype, tuple(tensor.shape), hashlib.blake2b(bits, digest_size=16).hexdigest())
        progress(len(bits))
    return result


@torch.no_grad()
def check_logits(model: MADMModel, teacher: Segmenter) -> dict[str, Tensor]:
    """Logits of student and teacher on a fixed random image."""
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, CHECK_SIDE, CHECK_SIDE, generator=generator)
    return {"student": model(image).logits, "teacher": model(image, segmenter=teacher).logits}


class Verification:
    """Proof that a written folder holds what the file held; made before the tensors of the file are let go.

    Args:
        state: the file's tensors.
        iteration: the file's.
        converted: the model made of them.
        progress: gets the bytes as they are read.
    """

    def __init__(
        self,
        state: dict[str, Tensor],
        iteration: int | None,
        converted: ConvertedModel,
        progress: Callable[[int], object],
    ):
        self.progress = progress
        self.iteration = iteration
        self.digests = digests(state, progress)
        self.logits = check_logits(converted.model, converted.teacher)

    def run(self, folder: Path, golden: tuple[Tensor, Tensor] | None) -> list[str]:
        """Compare the folder with the file; returns what was and what was not verified, one sentence each.

        Raises:
            UserError: something differs.
        """
        back = published_checkpoint(folder)
        found = digests(back.state, self.progress)
        differing = sorted(k for k in self.digests.keys() | found.keys() if self.digests.get(k) != found.get(k))
        if differing or back.iteration != self.iteration:
            raise UserError(
                f"verification failed: {len(differing)} tensors of the written folder are not those of the file "
                f"({', '.join(differing[:5]) or 'the iteration differs'}); nothing was kept. Please report this"
            )
        del back
        lines = [
            f"verified: the folder gives back all {len(found)} tensors of the file, bit by bit and under their names"
        ]
        model = MADMModel.from_pretrained(folder)
        logits = check_logits(model, base_model.load_strict(Segmenter, folder, "teacher").eval())
        difference = max((logits[name] - self.logits[name]).abs().max().item() for name in logits)
        if not difference <= LOGIT_TOLERANCE:
            raise UserError(
                f"verification failed: the logits of the written folder are up to {difference:.2g} off those of the "
                "file's tensors; nothing was kept. Please report this"
            )
        lines.append(
            f"verified: student and teacher loaded from the folder give the logits of the file's tensors on a random "
            f"image of {CHECK_SIDE}x{CHECK_SIDE} pixels (largest difference {difference:.2g})"
        )
        if golden is None:
            lines.append(
                "not verified: that the published code gives these logits; --golden FILE compares with its own"
            )
        else:
            lines.append(_compare_with_golden(model, *golden))
        return lines


@torch.no_grad()
def _compare_with_golden(model: MADMModel, image: Tensor, expected: Tensor) -> str:
    logits = model(image[None].float() / 255).logits[0]
    stride = max(1, round(logits.shape[-1] / expected.shape[-1]))
    logits = logits[:, ::stride, ::stride]
    if logits.shape != expected.shape:
        raise UserError(
            f"--golden: for its image the model gives logits {tuple(logits.shape)}, the file holds "
            f"{tuple(expected.shape)}; is it of this checkpoint?"
        )
    difference = (logits - expected).abs().max().item()
    agreement = (logits.argmax(0) == expected.argmax(0)).double().mean().item()
    if not (difference <= LOGIT_TOLERANCE and agreement >= CLASS_TOLERANCE):
        raise UserError(
            f"verification failed: logits are up to {difference:.2g} off those of the published code (tolerance "
            f"{LOGIT_TOLERANCE:g}), {100 * agreement:.2f} % of the pixels have its class; nothing was kept"
        )
    return (
        f"verified: logits of the published code on the image of --golden, largest difference {difference:.2g}, "
        f"{100 * agreement:.2f} % of the pixels with the same class"
    )


def read_golden(path: str | Path) -> tuple[Tensor, Tensor]:
    """Image uint8 (3, H, W) and published logits (K, H, W), or every n-th pixel of them, of a `--golden` file.

    Raises:
        UserError: unreadable, or without these tensors.
    """
    path = Path(path)
    expected = "expected a .safetensors or .pt file with 'image' uint8 (3, H, W) and 'logits' float32 (K, H, W)"
    try:
        if path.suffix == ".safetensors":
            content = base_model.read_safetensors(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
        image, logits = content["image"], content["logits"].float()
    except UserError:
        raise
    except Exception as error:  # damaged files raise many types in torch.load
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise UserError(f"--golden {path} cannot be read ({reason}); {expected}") from None
    sides_fit = image.ndim == 3 and not any(side % 64 for side in image.shape[1:])
    if image.dtype != torch.uint8 or not sides_fit or image.shape[0] != 3 or logits.ndim != 3:
        raise UserError(
            f"--golden {path}: image {image.dtype} {tuple(image.shape)}, logits {tuple(logits.shape)}; {expected}, "
            "H and W multiples of 64"
        )
    return image, logits
