"""What is read of a saved model's folder before its weights: which models it holds, and what `madm_config.json` says.

The layout is described in `modeling_madm.py`, which loads and saves the weights.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from madm_utils.base_model import BaseModelReference, local_folder
from madm_utils.cli import UserError
from madm_utils.tasks import Task, task_from_dict

CONFIG_NAME = "madm_config.json"
FORMAT = 2
"""Of the model folder. Format 1 did not say which base model it was trained on but by name."""


@dataclass(frozen=True)
class ModelConfig:
    """Content of `madm_config.json`."""

    task: Task
    resolution: int
    """Side of the training crops in pixels."""
    unet_tuning: str
    """`lora` or `full`."""
    noise_in_latent_dtype: bool
    base: BaseModelReference
    base_signature: list[float]
    """Of the base model it was trained on, see `base_model.base_signature`."""
    vae_decoder: str | None = None
    """Folder or Hub id of the small decoder; None: the VAE's own decoder."""
    vae_decoder_signature: list[float] | None = None
    """See `small_decoder.decoder_signature`."""

    def to_dict(self) -> dict[str, Any]:
        """JSON form; local folders become absolute, so that the saved model loads from any working directory."""
        decoder = self.vae_decoder
        return {
            "format": FORMAT,
            "task": self.task.to_dict(),
            "resolution": self.resolution,
            "unet_tuning": self.unet_tuning,
            "noise_in_latent_dtype": self.noise_in_latent_dtype,
            "base_model": self.base.to_dict(),
            "base_signature": self.base_signature,
            "vae_decoder": str(Path(decoder).resolve()) if decoder and Path(decoder).is_dir() else decoder,
            "vae_decoder_signature": self.vae_decoder_signature,
        }


def read_config(folder: Path) -> ModelConfig:
    """Read `madm_config.json`.

    Raises:
        UserError: it is missing, damaged, of another format, or its task is not valid.
    """
    config = _read_json(folder)
    try:
        signature = config.get("vae_decoder_signature")
        return ModelConfig(
            task=task_from_dict(config["task"], where=str(folder / CONFIG_NAME)),
            resolution=int(config["resolution"]),
            unet_tuning=str(config["unet_tuning"]),
            noise_in_latent_dtype=bool(config["noise_in_latent_dtype"]),
            base=BaseModelReference(**config["base_model"]),
            base_signature=list(config["base_signature"]),
            # Folders that were written before there was a choice have neither of them.
            vae_decoder=config.get("vae_decoder"),
            vae_decoder_signature=None if signature is None else list(signature),
        )
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise _unreadable(folder, error) from None


def built_in_approximations(folder: Path) -> dict[str, Any]:
    """What of the model in `folder` is approximate by its training: `head_resolution` (1: exact) and `vae_decoder`.

    Of a decoder in a local folder the name of that folder, whose place is not the model's affair.
    """
    path = folder / "segmenter" / "config.json"
    try:
        head_resolution = json.loads(path.read_text(encoding="utf-8")).get("head_resolution", 1)
    except (OSError, AttributeError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {error}); download or train again") from None
    return {"head_resolution": head_resolution, "vae_decoder": decoder_name(read_config(folder).vae_decoder)}


def decoder_name(reference: str | None) -> str | None:
    """A small decoder's Hub id, or the name of its local folder."""
    local = reference and (Path(reference).is_absolute() or Path(reference).is_dir())
    return Path(reference).name if local else reference


def replaced_decoders(folders: Sequence[Path], vae_decoder: str | None) -> list[str | None]:
    """What each model loads in place of the small decoder it refers to: `vae_decoder`, or None where it has none.

    Raises:
        UserError: `vae_decoder` is given, and no model has a small decoder.
    """
    found = [vae_decoder if vae_decoder and read_config(folder).vae_decoder else None for folder in folders]
    if vae_decoder and not any(found):
        raise UserError(
            f"--vae_decoder {vae_decoder} (in Python `vae_decoder=`) takes the place of the small decoder that a "
            f"model was trained with; there is none in {', '.join(map(str, folders))}: leave it out"
        )
    return found


def adapter_folders(folder: str | Path, revision: str | None = None) -> dict[str, Path]:
    """Modality -> model folder of what a run left: one folder, or one sub-folder per modality; a Hub id as well.

    Raises:
        UserError: no such folder, or several of its sub-folders are models of one modality.
    """
    folder = local_folder(folder, revision)
    if (folder / CONFIG_NAME).is_file():
        return {"": folder}
    found = {path.parent.name: path.parent for path in sorted(folder.glob(f"[!.]*/{CONFIG_NAME}"))}
    found = {name: path for name, path in found.items() if not name.startswith("checkpoint-")}
    modalities: dict[str, str] = {}
    for name, path in found.items() if len(found) > 1 else ():
        modality = _read_json(path)["task"]["modality"]
        if modality in modalities:
            raise UserError(
                f"{folder} holds several models for {modality}: {modalities[modality]}, {name}; give the folder of one"
            )
        modalities[modality] = name
    return found


def _read_json(folder: Path) -> dict[str, Any]:
    """The file as it is, with the fields that tell the format and the modality."""
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
