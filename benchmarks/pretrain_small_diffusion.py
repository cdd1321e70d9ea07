#!/usr/bin/env python
"""Pre-train the small Stable Diffusion of `assets/street-diffusion-small`, from nothing, on pictures drawn here.

    python benchmarks/pretrain_small_diffusion.py                        # all stages; the same command goes on
    python benchmarks/pretrain_small_diffusion.py --stages images vae    # up to the VAE
    python benchmarks/pretrain_small_diffusion.py --vae_steps 20 --unet_steps 20 --num_scenes 8 --output_dir /tmp/try

Stages, each of which is left out when its result lies in `--output_dir`:

    images   draw captioned, unlabelled pictures (`pretraining_images.py`)
    vae      train the autoencoder on crops of them, at the end on whole ones
    latents  encode every picture and its mirror image once
    unet     train UNet and text encoder to predict the noise in the latents
    decoder  train the decoder alone, from the same latents, for sharper edges
    export   write the model in diffusers layout, in half precision
    card     measure it on scenes it has not seen; pictures, numbers and the model card

A stage that is interrupted goes on at its last saved state with the very numbers it would have drawn. The seed fixes
everything on one CPU. Written for a CPU or one GPU; so far it has run on CPUs only.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import machine
from benchmarks.pretraining_images import FIRST_SEED, scene_pictures
from madm_utils.args import check_precision, formatter, fraction, positive_float, positive_int
from madm_utils.args import seed as seed_number
from madm_utils.cli import UserError, quiet_libraries, run
from madm_utils.files import publish_folder, replacing

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from diffusers.training_utils import EMAModel
    from torch import Tensor, nn

STAGES = ("images", "vae", "latents", "unet", "decoder", "export", "card")
SIDE = 128
"""Pixels of a picture."""
LATENT_SIDE = SIDE // 4
CROP = 64
"""Pixels of the crops that the first part of the VAE's training sees."""
SCENES_PER_FILE = 50
MODEL = {
    "unet_channels": (32, 64, 96, 128),
    "unet_layers": 1,
    "attention_levels": (1, 2),  # at the finest level it takes a third of the time of a step
    "vae_channels": (16, 32, 64),  # three levels: 4x4 pixels per latent pixel, so that poles of two pixels survive
    "prompt_dim": 64,
    "attention_heads": (1, 2, 3, 4),  # 32 channels each: attention of few channels takes a CPU most of its time
    "norm_groups": 8,
    "text_layers": 2,
}
"""Arguments of `build_small_stable_diffusion`."""
KL_WEIGHT = 1e-4
FIRST_LOG_VARIANCE = -6.0
"""Of the latents before training."""
CAPTION_DROPOUT = 0.15
"""Share of the captions replaced by "", which classifier-free guidance needs and whose embedding MADM starts from."""
EMA_DECAY = 0.999
LOGGED_STEPS = 50
CLOCKS = {"seconds": time.monotonic, "cpu_seconds": time.process_time}
"""What a training took, up to the last saved state: by the clock, and of the CPU, beside whatever other work."""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="what to do")
    parser.add_argument("--num_scenes", type=positive_int, default=2500, help="drawn, eight pictures of each")
    parser.add_argument("--vae_steps", type=positive_int, default=3000, help="optimiser steps of the VAE")
    parser.add_argument("--vae_batch_size", type=positive_int, default=16, help="crops per step")
    parser.add_argument("--vae_learning_rate", type=positive_float, default=1e-3, help="peak")
    parser.add_argument(
        "--vae_whole_share", type=fraction, default=0.15, help="share of the VAE's steps on whole pictures"
    )
    parser.add_argument(
        "--unet_steps", type=positive_int, default=10000, help="optimiser steps of UNet and text encoder"
    )
    parser.add_argument("--unet_batch_size", type=positive_int, default=16, help="latents per step")
    parser.add_argument("--unet_learning_rate", type=positive_float, default=8e-4, help="peak")
    parser.add_argument(
        "--snr_gamma", type=positive_float, default=5.0, help="Min-SNR weights of the UNet's loss (arXiv 2303.09556)"
    )
    parser.add_argument("--decoder_steps", type=positive_int, default=1000, help="steps of the decoder alone")
    parser.add_argument("--decoder_batch_size", type=positive_int, default=4, help="whole pictures per step")
    parser.add_argument("--decoder_learning_rate", type=positive_float, default=5e-4, help="peak")
    parser.add_argument("--checkpointing_steps", type=positive_int, default=250, help="save the state every N steps")
    parser.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), default="no", help="of all trainings")
    parser.add_argument("--num_held_out", type=positive_int, default=50, help="unseen scenes that the card measures")
    parser.add_argument("--num_samples", type=positive_int, default=6, help="pictures per caption in the card")
    parser.add_argument("--sampling_steps", type=positive_int, default=50, help="of these pictures")
    parser.add_argument("--num_proc", type=positive_int, default=2, help="processes that draw")
    parser.add_argument("--seed", type=seed_number, default=0, help="of weights, noise and order")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/street-diffusion-small"), help="all results")
    return parser.parse_args(argv)


# --- images ----------------------------------------------------------------------------------------------------------


def _draw_file(job: tuple[Path, int, int]) -> None:
    path, first, last = job
    pictures = [picture for scene in range(first, last) for picture in scene_pictures(scene, SIDE)]
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            images=np.stack([picture.image for picture in pictures]),
            captions=np.array([picture.caption for picture in pictures]),
        )


def draw_images(args: argparse.Namespace, accelerator: "Accelerator") -> None:
    """Stage `images`: the pictures of all scenes, some scenes per file; files that exist are kept."""
    from concurrent.futures import ProcessPoolExecutor

    from tqdm.auto import tqdm

    folder = args.output_dir / "images"
    folder.mkdir(exist_ok=True)
    jobs = [
        (folder / f"{start:06d}.npz", FIRST_SEED + start, FIRST_SEED + min(start + SCENES_PER_FILE, args.num_scenes))
        for start in range(0, args.num_scenes, SCENES_PER_FILE)
    ]
    missing = [job for job in jobs if not job[0].exists()]
    with ProcessPoolExecutor(args.num_proc) as pool:
        drawn = pool.map(_draw_file, missing)
        for _ in tqdm(drawn, desc=f"scenes, {SCENES_PER_FILE} per file", total=len(missing), unit="file"):
            pass


def read_images(out: Path) -> np.ndarray:
    """All pictures, (N, H, W, 3) uint8."""
    return np.concatenate([np.load(path)["images"] for path in sorted((out / "images").glob("*.npz"))])


def read_captions(out: Path) -> list[str]:
    """Captions of all pictures, in their order."""
    return [str(text) for path in sorted((out / "images").glob("*.npz")) for text in np.load(path)["captions"]]


def as_input(images: np.ndarray, device: "torch.device") -> "Tensor":
    """Pictures (N, H, W, 3) uint8 as (N, 3, H, W) float32 in [-1, 1]."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2).contiguous() / 127.5 - 1


# --- training --------------------------------------------------------------------------------------------------------


def step_generator(seed: int, step: int) -> "torch.Generator":
    """Random numbers of one step, the same whenever it is made."""
    import torch

    return torch.Generator().manual_seed(
        int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> 1)
    )


def train(
    name: str,
    modules: "Sequence[nn.Module]",
    loss: "Callable[[int, torch.Generator], dict[str, Tensor]]",
    steps: int,
    learning_rate: float,
    args: argparse.Namespace,
    accelerator: "Accelerator",
) -> "list[nn.Module]":
    """Minimise the sum of the losses; goes on from the state in `{name}-state`, if there is one.

    Args:
        name: of the stage; `progress.json` of its state holds the mean losses of every `LOGGED_STEPS` steps.
        modules: trained together; changed in place.
        loss: from step number and generator to named losses.
        steps: how many.
        learning_rate: peak; 2 % of the steps warm up, then half a cosine to zero.
        args: flags of the script.
        accelerator: places the modules and makes mixed precision.

    Returns:
        The modules with the exponential moving average of their weights.
    """
    import torch
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel
    from torch import nn
    from tqdm.auto import tqdm

    accelerator.free_memory()  # of the stage before, which it would save with this one's
    folder = args.output_dir / f"{name}-state"
    together = nn.ModuleList(modules)
    optimizer = torch.optim.AdamW(together.parameters(), lr=learning_rate, weight_decay=0.01, fused=True)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=max(1, steps // 50), num_training_steps=steps)
    together, optimizer, schedule = accelerator.prepare(together, optimizer, schedule)
    ema = EMAModel(
        together.parameters(), decay=EMA_DECAY, use_ema_warmup=True, inv_gamma=1.0, power=0.75, foreach=True
    )
    ema.to(accelerator.device)
    progress = load_state(folder, ema, accelerator)
    started, recent = [clock() - progress[key] for key, clock in CLOCKS.items()], []
    bar = tqdm(range(progress["step"], steps), desc=name, initial=progress["step"], total=steps, unit="step")
    for step in bar:
        with accelerator.autocast():
            losses = loss(step, step_generator(args.seed, step))
        accelerator.backward(sum(losses.values()))
        accelerator.clip_grad_norm_(together.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        ema.step(together.parameters())
        recent.append({key: value.detach() for key, value in losses.items()})
        saving = (step + 1) % args.checkpointing_steps == 0 or step + 1 == steps
        if len(recent) == LOGGED_STEPS or saving:
            means = mean_losses(name, step, recent)
            progress["log"].append({"step": step + 1, **means})
            bar.set_postfix(**{key: f"{value:.4f}" for key, value in means.items()})
            recent = []
        if saving:
            seconds = {key: clock() - start for (key, clock), start in zip(CLOCKS.items(), started, strict=True)}
            progress.update(step=step + 1, device=accelerator.device.type, machine=machine(), **seconds)
            save_state(folder, ema, progress, accelerator)
    ema.copy_to(together.parameters())
    return list(accelerator.unwrap_model(together))


def mean_losses(name: str, step: int, recent: "list[dict[str, Tensor]]") -> dict[str, float]:
    """Means over some steps; `UserError` where one is not finite, before that state is saved over a good one."""
    import torch

    means = {key: torch.stack([entry[key] for entry in recent]).mean().item() for key in recent[0]}
    if not np.isfinite(sum(means.values())):
        raise UserError(
            f"{name}: the loss is not finite at step {step + 1}; lower the learning rate, in another folder"
        )
    return means


def save_state(folder: Path, ema: "EMAModel", progress: dict, accelerator: "Accelerator") -> None:
    """Write everything a training needs to go on, whole or not at all."""
    import torch

    def write(target: Path) -> None:
        accelerator.save_state(str(target))
        torch.save(ema.state_dict(), target / "ema.pt")
        (target / "progress.json").write_text(json.dumps(progress), encoding="utf-8")

    publish_folder(folder, write)


def load_state(folder: Path, ema: "EMAModel", accelerator: "Accelerator") -> dict:
    """Restore what `save_state` wrote and return the progress; that of a new training where there is nothing."""
    import torch

    if not folder.exists():
        return {"step": 0, "seconds": 0.0, "cpu_seconds": 0.0, "log": []}
    accelerator.load_state(str(folder))
    ema.load_state_dict(torch.load(folder / "ema.pt", map_location=accelerator.device, weights_only=True))
    return json.loads((folder / "progress.json").read_text(encoding="utf-8"))


def untrained_model(args: argparse.Namespace) -> Path:
    """Folder of the model with random weights, made when it is not there."""
    from madm_utils.small_model import build_small_stable_diffusion

    folder = args.output_dir / "untrained"
    if not folder.exists():
        settings = {"captions": sorted(set(read_captions(args.output_dir))), "seed": args.seed, **MODEL}
        publish_folder(folder, lambda target: build_small_stable_diffusion(target, **settings))
    return folder


def train_vae(args: argparse.Namespace, accelerator: "Accelerator") -> None:
    """Stage `vae`: absolute and squared error of the picture, and a little divergence from a normal distribution.

    A linear map of the latents is to show the picture at their resolution (`preview`, thrown away afterwards). Without
    it details of grey pictures fill the latents first, and colour, which tells palette images apart, comes late or
    never.
    """
    import torch
    from diffusers import AutoencoderKL
    from torch.nn.functional import avg_pool2d, l1_loss, mse_loss

    images = read_images(args.output_dir)
    vae = AutoencoderKL.from_pretrained(untrained_model(args) / "vae").train()
    torch.manual_seed(args.seed)
    channels = vae.config.latent_channels
    preview = torch.nn.Conv2d(channels, 3, 1)
    with torch.no_grad():
        # A channel that starts as noise of deviation 1 around a small mean is ignored for long, and colour with it.
        vae.quant_conv.weight[:channels] *= 4
        vae.quant_conv.bias[channels:] = FIRST_LOG_VARIANCE
    crops_until = round(args.vae_steps * (1 - args.vae_whole_share))

    def loss(step: int, generator: "torch.Generator") -> "dict[str, Tensor]":
        side, count = (CROP, args.vae_batch_size) if step < crops_until else (SIDE, max(1, args.vae_batch_size // 4))
        which = torch.randint(len(images), (count,), generator=generator).tolist()
        offsets = torch.randint(SIDE - side + 1, (count, 2), generator=generator).tolist()
        mirrored = torch.randint(2, (count,), generator=generator).tolist()
        batch = np.stack(
            [
                images[i, y : y + side, x : x + side][:, :: -1 if flip else 1]
                for i, (y, x), flip in zip(which, offsets, mirrored, strict=True)
            ]
        )
        target = as_input(batch, accelerator.device)
        posterior = vae.encode(target).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(accelerator.device)
        latents = posterior.mean + posterior.std * noise
        decoded = vae.decode(latents).sample
        small = avg_pool2d(target, SIDE // LATENT_SIDE)
        divergence = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        return {
            "error": l1_loss(decoded, target), "squared": mse_loss(decoded, target),
            "preview": mse_loss(preview(latents), small), "divergence": KL_WEIGHT * divergence,
        }  # fmt: skip

    trained, _ = train("vae", [vae, preview], loss, args.vae_steps, args.vae_learning_rate, args, accelerator)
    publish_folder(args.output_dir / "vae", trained.save_pretrained)


def encode_latents(args: argparse.Namespace, accelerator: "Accelerator") -> None:
    """Stage `latents`: means of all pictures and mirror images, and the scaling factor to unit variance."""
    import torch
    from diffusers import AutoencoderKL
    from tqdm.auto import tqdm

    images = read_images(args.output_dir)
    vae = AutoencoderKL.from_pretrained(args.output_dir / "vae").to(accelerator.device).eval()
    latents = np.empty((len(images), 2, 4, LATENT_SIDE, LATENT_SIDE), np.float16)
    with torch.no_grad():
        for start in tqdm(range(0, len(images), 16), desc="latents", unit="batch"):
            batch = images[start : start + 16]
            for side, flipped in enumerate((batch, batch[:, :, ::-1])):
                means = vae.encode(as_input(flipped, accelerator.device)).latent_dist.mean
                latents[start : start + 16, side] = means.cpu().numpy()
    vae.register_to_config(scaling_factor=float(1 / latents.astype(np.float32).std()))
    publish_folder(args.output_dir / "vae", vae.save_pretrained)
    with replacing(args.output_dir / "latents.npy") as temporary, temporary.open("wb") as file:
        np.save(file, latents)


def train_unet(args: argparse.Namespace, accelerator: "Accelerator") -> None:
    """Stage `unet`: epsilon prediction as in Stable Diffusion, with a text encoder that learns with the UNet.

    Min-SNR weights (arXiv 2303.09556): little noise, easy and of little use for what a picture shows, counts less.
    """
    import torch
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from diffusers.training_utils import compute_snr
    from torch.nn.functional import mse_loss
    from transformers import CLIPTextModel, CLIPTokenizer

    captions = read_captions(args.output_dir)
    latents = np.load(args.output_dir / "latents.npy", mmap_mode="r")
    scale = AutoencoderKL.load_config(args.output_dir / "vae")["scaling_factor"]
    folder = untrained_model(args)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).train()
    unet = UNet2DConditionModel.from_pretrained(folder / "unet").train()
    texts = ["", *sorted(set(captions))]
    tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    tokens = tokens.to(accelerator.device)
    rank = {text: index for index, text in enumerate(texts)}
    caption_of = torch.tensor([rank[caption] for caption in captions])
    noiser = DDPMScheduler.from_pretrained(folder / "scheduler")

    def loss(step: int, generator: "torch.Generator") -> "dict[str, Tensor]":
        count = args.unet_batch_size
        which = torch.randint(len(latents), (count,), generator=generator)
        mirrored = torch.randint(2, (count,), generator=generator)
        clean = torch.from_numpy(latents[which.numpy(), mirrored.numpy()].astype(np.float32) * scale)
        noise = torch.randn(clean.shape, generator=generator)
        times = torch.randint(noiser.config.num_train_timesteps, (count,), generator=generator)
        silent = torch.rand(count, generator=generator) < CAPTION_DROPOUT
        used = torch.where(silent, 0, caption_of[which]).to(accelerator.device)
        noisy, noise, times = (x.to(accelerator.device) for x in (noiser.add_noise(clean, noise, times), noise, times))
        prompts, of_each = used.unique(return_inverse=True)
        states = text_encoder(tokens[prompts])[0][of_each]
        errors = mse_loss(unet(noisy, times, states).sample, noise, reduction="none").mean(dim=(1, 2, 3))
        ratios = compute_snr(noiser, times)
        return {"weighted noise error": (errors * (args.snr_gamma / ratios).clamp(max=1)).mean()}

    trained = train("unet", [unet, text_encoder], loss, args.unet_steps, args.unet_learning_rate, args, accelerator)

    publish_folder(args.output_dir / "unet", trained[0].save_pretrained)
    publish_folder(args.output_dir / "text_encoder", trained[1].save_pretrained)


def train_decoder(args: argparse.Namespace, accelerator: "Accelerator") -> None:
    """Stage `decoder`: the absolute error alone, which at an edge prefers one of two colours to a mixture of them.

    The encoder stays, and with it the latents that the UNet knows.
    """
    import torch
    from diffusers import AutoencoderKL
    from torch.nn.functional import l1_loss

    images = read_images(args.output_dir)
    latents = np.load(args.output_dir / "latents.npy", mmap_mode="r")
    vae = AutoencoderKL.from_pretrained(args.output_dir / "vae").train()

    def loss(step: int, generator: "torch.Generator") -> "dict[str, Tensor]":
        which = torch.randint(len(images), (args.decoder_batch_size,), generator=generator).tolist()
        mirrored = torch.randint(2, (args.decoder_batch_size,), generator=generator).tolist()
        target = np.stack([images[i][:, :: -1 if flip else 1] for i, flip in zip(which, mirrored, strict=True)])
        given = torch.from_numpy(latents[which, mirrored].astype(np.float32)).to(accelerator.device)
        return {"error": l1_loss(vae.decode(given).sample, as_input(target, accelerator.device))}

    parts = [vae.post_quant_conv, vae.decoder]
    train("decoder", parts, loss, args.decoder_steps, args.decoder_learning_rate, args, accelerator)
    publish_folder(args.output_dir / "decoder", vae.save_pretrained)


# --- the model -------------------------------------------------------------------------------------------------------


def export(args: argparse.Namespace, accelerator: "Accelerator") -> None:
    """Stage `export`: the folder that `--pretrained_model_name_or_path` takes, in half precision."""
    import torch
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    out = args.output_dir
    unet = UNet2DConditionModel.from_pretrained(out / "unet")
    unet.register_to_config(sample_size=LATENT_SIDE)
    pipeline = StableDiffusionPipeline.from_pretrained(
        untrained_model(args),
        vae=AutoencoderKL.from_pretrained(out / "decoder"),
        unet=unet,
        text_encoder=CLIPTextModel.from_pretrained(out / "text_encoder", dtype=torch.float32),
    )
    pipeline.to(torch.float16)

    def write(folder: Path) -> None:
        pipeline.save_pretrained(folder)
        for path in folder.rglob("*.json"):  # which name the folders on this machine that the parts came from
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.pop("_name_or_path", None) is not None:
                path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        # Else transformers loads the text encoder in half precision where diffusers loads the rest in single.
        config = folder / "text_encoder" / "config.json"
        content = json.loads(config.read_text(encoding="utf-8")) | {"dtype": "float32"}
        config.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    publish_folder(out / "model", write)


def write_card(args: argparse.Namespace, accelerator: "Accelerator") -> None:
    """Stage `card`: what the exported model does on scenes it has not seen."""
    from benchmarks.small_diffusion_card import measure_and_write

    measure_and_write(args, accelerator.device)


DO: "dict[str, tuple[Callable[[argparse.Namespace, Accelerator], None], str]]" = {
    "images": (draw_images, "images"),
    "vae": (train_vae, "vae"),
    "latents": (encode_latents, "latents.npy"),
    "unet": (train_unet, "text_encoder"),
    "decoder": (train_decoder, "decoder"),
    "export": (export, "model"),
    "card": (write_card, "model/README.md"),
}
"""Per stage: what does it, and the result that says it is done."""
OF_THE_RESULT = ("num_scenes", "vae_steps", "vae_batch_size", "vae_learning_rate", "vae_whole_share", "unet_steps",
                 "unet_batch_size", "unet_learning_rate", "snr_gamma", "decoder_steps",
                 "decoder_batch_size", "decoder_learning_rate", "mixed_precision", "seed")  # fmt: skip


def check_settings(args: argparse.Namespace) -> None:
    """Refuse to go on with other settings than those the folder was begun with."""
    path = args.output_dir / "settings.json"
    settings = {name: getattr(args, name) for name in OF_THE_RESULT}
    if path.exists():
        begun = json.loads(path.read_text(encoding="utf-8"))
        changed = [f"--{name} {begun.get(name)}" for name, value in settings.items() if begun.get(name) != value]
        if changed:
            raise UserError(
                f"{args.output_dir} was begun with {', '.join(changed)}; give the same, or another --output_dir"
            )
    args.output_dir.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def is_done(stage: str, args: argparse.Namespace) -> bool:
    """Whether the result of a stage is there, of the first one all its files."""
    if stage == "images":
        files = len(list((args.output_dir / "images").glob("*.npz")))
        return files == len(range(0, args.num_scenes, SCENES_PER_FILE))
    return (args.output_dir / DO[stage][1]).exists()


def main(argv: Sequence[str] | None = None) -> None:
    """Do the stages that are not done."""
    args = parse_args(argv)
    quiet_libraries()
    import filelock
    import torch
    from accelerate import Accelerator

    from madm_utils.cpu_memory import keep_freed_memory

    wanted = [stage for stage in STAGES if stage in args.stages and not is_done(stage, args)]
    for stage in wanted:
        for needed in STAGES[: STAGES.index(stage)]:
            if needed not in wanted and not is_done(needed, args):
                raise UserError(f"stage {stage} needs the result of {needed}; run that first (--stages {needed})")
    check_precision(args.mixed_precision, torch.cuda.is_available())
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    if accelerator.num_processes > 1:
        raise UserError("this script trains in one process; start it without accelerate launch")
    check_settings(args)
    keep_freed_memory()
    try:
        with filelock.FileLock(args.output_dir / ".lock", timeout=0):
            for stage in wanted:
                print(f"=== {stage}", flush=True)
                DO[stage][0](args, accelerator)
    except filelock.Timeout:
        raise UserError(f"another pre-training writes to {args.output_dir}; wait for it, or give another") from None
    if (args.output_dir / "model").exists():
        print(f"{args.output_dir / 'model'} holds the model")


if __name__ == "__main__":
    run(main)
