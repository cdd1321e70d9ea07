"""Model card and upload."""

import platform
import shlex
from importlib.metadata import version
from pathlib import Path

from madm_utils import __version__
from madm_utils.cli import UserError
from madm_utils.tasks import Task

_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "datasets", "numpy", "pillow")

_PARTS = ("segmenter", "teacher", "unet")
_CARD = """# MADM: {task}

Semantic segmentation of **{modality}** images, adapted without target labels from `{source}` to `{target}` with
MADM (arXiv 2410.21708) on the Stable Diffusion base model `{base}`.

| | |
|---|---|
| classes | {classes} |
| resolution | {resolution} x {resolution} |
| UNet tuning | {tuning} |
| training steps | {steps} |
| adaptation | {adaptation} |
| seed | {seed} |

```python
from madm_utils import MADMPipeline

pipe = MADMPipeline.from_pretrained("{repo}")
label_map = pipe("image.png").label_maps[0]  # uint8 class ids, at the size of the image
```

The folder holds {weights} and refers to the base model for the rest. Settings and versions are in `run.json`. The base
model and the training data have licences of their own; they apply to these weights too.
"""


def versions() -> dict[str, str]:
    """Versions of this package, Python and the libraries that decide about numbers."""
    return {"madm_utils": __version__, "python": platform.python_version(), **{p: version(p) for p in _PACKAGES}}


def write_model_card(folder: Path, task: Task, base: str, settings: dict) -> None:
    """Write `README.md` with Hub metadata into the run folder."""
    from huggingface_hub import ModelCard, ModelCardData

    lora = settings["unet_tuning"] == "lora"
    is_hub_id = not Path(base).exists()
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="image-segmentation",
        tags=["madm", "domain-adaptation", "semantic-segmentation", task.modality, *(["lora"] if lora else [])],
        base_model=base if is_hub_id else None,
    )
    text = _CARD.format(
        task=task.name,
        modality=task.modality,
        source=task.source,
        target=task.target,
        base=base if is_hub_id else Path(base).name,
        classes=", ".join(task.class_names),
        resolution=settings["resolution"],
        tuning=f"LoRA, rank {settings['rank']}" if lora else "full",
        steps=settings["max_train_steps"],
        adaptation="none (source only)" if settings["source_only"] else "self-training with DPLG and LPLR",
        seed=settings["seed"],
        repo=settings["hub_model_id"] or folder.resolve().name,
        weights="a LoRA of the UNet, the segmentation head and the conditioning"
        if lora
        else "the tuned UNet, the segmentation head and the conditioning",
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(folder / "README.md")


def push_to_hub(folder: Path, repo_id: str | None, token: str | None) -> str:
    """Upload the final model (not its checkpoints and logs); returns the address.

    Raises:
        UserError: the upload failed; the message holds the command that finishes it by hand.
    """
    from huggingface_hub import create_repo, upload_folder

    repo_id = repo_id or folder.resolve().name
    model_files = [
        "README.md",
        "run.json",
        "madm_config.json",
        "pytorch_lora_weights.safetensors",
        *(f"{p}/*" for p in _PARTS),
    ]
    try:
        repo_id = create_repo(repo_id, exist_ok=True, token=token).repo_id
        upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message="End of training",
            allow_patterns=model_files,
            token=token,
        )
    except Exception as error:  # whatever the network and the Hub raise, the trained model must stay usable
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"the model is complete in {folder}, but uploading it to {repo_id} failed ({reason}). Finish with: "
            f"hf upload {repo_id} {shlex.quote(str(folder))} . "
            + " ".join(f"--include {shlex.quote(pattern)}" for pattern in model_files)
        ) from None
    return f"https://huggingface.co/{repo_id}"
