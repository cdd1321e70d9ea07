"""Measure the model of `pretrain_small_diffusion.py` on scenes it has not seen, and write its model card.

The only place where labels come in: palette images of the synthetic datasets' validation scenes, to see whether the
autoencoder keeps them.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from benchmarks.common import markdown_table
from benchmarks.pretraining_images import CAPTIONS, HELD_OUT_SEED, KINDS, PICTURES_PER_SCENE, scene_pictures
from madm_utils.cli import UserError
from madm_utils.files import publish_folder
from madm_utils.label_spaces import STREET_CLASSES, STREET_PALETTE
from madm_utils.scenes import render_scene, scene_seed
from madm_utils.visualization import colorize, picture_grid

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionPipeline

TEMPLATE = Path(__file__).with_suffix(".md")
GUIDANCE = 3.0
PALETTE_GOAL = 97.0
"""Percent of the pixels that come back to the right colour of the palette."""
TRAININGS = {
    "vae": ("error", "VAE: mean absolute error, in [-1, 1]"),
    "decoder": ("error", "decoder: mean absolute error"),
    "unet": ("weighted noise error", "UNet: weighted squared error of noise"),
}
"""Stage -> the loss that the card plots, and what the plot is called."""
SUBJECT = "a street with cars and people"
"""In the captions of the samples."""


def measure_and_write(args: argparse.Namespace, device: "torch.device") -> None:
    """Fill the folder `card` with numbers (`measured.json`), pictures and the card, and put them beside the model."""
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    out = args.output_dir
    pipeline = StableDiffusionPipeline.from_pretrained(out / "model", dtype=torch.float32).to(device)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)

    def write(folder: Path) -> None:
        errors, shown = measure_reconstruction(pipeline, args.num_held_out)
        palette = measure_palette(pipeline, args.num_held_out)
        rows, captions = list(zip(*shown, strict=True)), list(KINDS)
        picture_grid(rows, captions).save(folder / "reconstruction.png", optimize=True)
        sample_grid(pipeline, args.num_samples, args.sampling_steps).save(folder / "samples.png", optimize=True)
        plot_losses(out, folder / "losses.png")
        size = sum(path.stat().st_size for path in (out / "model").rglob("*.safetensors"))
        parameters = {
            name: sum(p.numel() for p in getattr(pipeline, name).parameters())
            for name in ("vae", "unet", "text_encoder")
        }
        measured = {
            "settings": json.loads((out / "settings.json").read_text(encoding="utf-8")),
            "safetensors_mb": size / 1e6, "parameters": parameters,
            "trainings": {
                name: {key: _progress(out, name)[key] for key in ("seconds", "cpu_seconds", "device", "machine")}
                for name in TRAININGS
            },
            "psnr_db": errors, "palette": palette,
            "num_samples": args.num_samples, "sampling_steps": args.sampling_steps, "num_held_out": args.num_held_out,
            "final_losses": {name: _progress(out, name)["log"][-1] for name in TRAININGS},
        }  # fmt: skip
        (folder / "measured.json").write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(card_text(measured), encoding="utf-8")

    publish_folder(out / "card", write)
    # The card last: with it the stage is done.
    for path in sorted((out / "card").iterdir(), key=lambda path: path.name == "README.md"):
        shutil.copy(path, out / "model")


def _progress(out: Path, stage: str) -> dict:
    return json.loads((out / f"{stage}-state" / "progress.json").read_text(encoding="utf-8"))


def reconstruct(pipeline: "StableDiffusionPipeline", images: np.ndarray) -> np.ndarray:
    """Encode and decode pictures (N, H, W, 3) uint8, the mean of the posterior as latent."""
    import torch

    from benchmarks.pretrain_small_diffusion import as_input

    results = []
    with torch.no_grad():
        for start in range(0, len(images), 10):
            inputs = as_input(images[start : start + 10], pipeline.device)
            decoded = pipeline.vae.decode(pipeline.vae.encode(inputs).latent_dist.mean).sample
            results.append(((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(results)


def measure_reconstruction(
    pipeline: "StableDiffusionPipeline", num_scenes: int
) -> tuple[dict[str, float], list[tuple[np.ndarray, np.ndarray]]]:
    """Peak signal-to-noise ratio per kind in dB (of the mean squared error), and one example of each."""
    pictures = [picture for scene in range(num_scenes) for picture in scene_pictures(HELD_OUT_SEED + scene)]
    errors, shown = {}, []
    for kind in KINDS:
        found = [picture.image for picture in pictures if picture.kind == kind]
        if not found:
            raise UserError(f"no picture of kind '{kind}' in {num_scenes} scenes; give a larger --num_held_out")
        images = np.stack(found)
        decoded = reconstruct(pipeline, images)
        squared = np.mean((images.astype(np.float64) - decoded) ** 2)
        errors[kind] = float(10 * np.log10(255**2 / squared))
        shown.append((images[0], decoded[0]))
    return errors, shown


def measure_palette(pipeline: "StableDiffusionPipeline", num_labels: int) -> dict:
    """Percent of the pixels of palette images whose decoded colour is nearest to the right one; all, per class."""
    colors = [STREET_PALETTE[name] for name in STREET_CLASSES]
    labels = np.stack([render_scene(scene_seed(0, "val", "rgb", index), "rgb")[1] for index in range(num_labels)])
    decoded = reconstruct(pipeline, np.stack([colorize(label, colors) for label in labels])).astype(np.int32)
    distance = np.stack([((decoded - color) ** 2).sum(axis=3) for color in colors])
    right = distance.argmin(axis=0) == labels
    return {
        "all": 100 * float(right.mean()),
        "per_class": {name: 100 * float(right[labels == i].mean()) for i, name in enumerate(STREET_CLASSES)},
    }


def sample_grid(pipeline: "StableDiffusionPipeline", num_samples: int, sampling_steps: int) -> Image.Image:
    """Pictures drawn by the model, one row per caption."""
    import torch
    from tqdm.auto import tqdm

    pipeline.set_progress_bar_config(disable=True)
    rows = []
    captions = [caption.format(SUBJECT) for caption in CAPTIONS.values()]
    for caption in tqdm(captions, desc="samples", unit="caption"):
        drawn = pipeline(
            caption, num_images_per_prompt=num_samples, guidance_scale=GUIDANCE, num_inference_steps=sampling_steps,
            generator=torch.Generator().manual_seed(0), output_type="np",
        ).images  # fmt: skip
        rows.append(list((drawn * 255).round().astype(np.uint8)))
    return picture_grid(rows, row_captions=captions)


def plot_losses(out: Path, path: Path) -> None:
    """Loss curves of the trainings."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (stage, (key, title)) in zip(figure.subplots(1, len(TRAININGS)), TRAININGS.items(), strict=True):
        log = _progress(out, stage)["log"]
        axes.plot([entry["step"] for entry in log], [entry[key] for entry in log])
        axes.set(title=title, xlabel="step", yscale="log")
        axes.grid(which="both", alpha=0.3)
    figure.savefig(path, format="png", dpi=100)


def _hours(training: dict) -> str:
    """What a training took. A CPU was shared with other work, so its own time counts, not the clock's."""
    on_cpu = training["device"] == "cpu"
    return f"{training['cpu_seconds' if on_cpu else 'seconds'] / 3600:.1f} {'CPU hours' if on_cpu else 'hours'}"


def card_text(measured: dict) -> str:
    """The model card, from `small_diffusion_card.md`."""
    import jinja2

    palette = measured["palette"]
    template = jinja2.Template(TEMPLATE.read_text(encoding="utf-8"), undefined=jinja2.StrictUndefined)
    return template.render(
        **measured,
        hours={name: _hours(training) for name, training in measured["trainings"].items()},
        machines=", ".join(sorted({training["machine"] for training in measured["trainings"].values()})),
        pictures=measured["settings"]["num_scenes"] * PICTURES_PER_SCENE,
        guidance=GUIDANCE,
        palette_goal=PALETTE_GOAL,
        verdict="met" if palette["all"] >= PALETTE_GOAL else "**missed**",
        psnr_table=markdown_table(
            ["kind", "PSNR, dB"], [[kind, f"{db:.1f}"] for kind, db in measured["psnr_db"].items()]
        ),
        class_table=markdown_table(
            ["class", "%"], [[name, f"{share:.1f}"] for name, share in palette["per_class"].items()]
        ),
    )
