#!/usr/bin/env python
"""What each approximation costs in mIoU on the synthetic benchmark, and what it gains; prints a Markdown table.

    python benchmarks/bench_approximations.py
    python benchmarks/bench_approximations.py --seeds 0 1 2 --rows exact head-4 --output_dir outputs/head

Quality: the real scripts prepare synthetic scenes, train a small model from random weights once per row and seed, and
evaluate it. Costs are paired: the same test images and seeds, the mean over the seeds, and the 95 % interval of a
bootstrap over images. Seeds differ as well, so each one's difference is shown. An approximation passes where the
interval ends above -`--margin`. `small decoder` is distilled here from the base model's own.

Speed: the time of a training step and of a segmented image, both with random weights at a quarter of the widths of
Stable Diffusion, as a ratio to the exact model, with which it takes turns in processes of their own. Nothing else
should run then; `--cpu_time` helps where that cannot be.

What is done lies in `--output_dir`: an interrupted run goes on with the same command; remove the folder after a change
of the code. Where bf16 is only emulated, the row trained in bf16 takes the first seed alone, and rows in bf16 have no
time. The exit code is 1 where bf16 is inferior.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.common import ROOT, machine, run_script
from benchmarks.measuring import Worker, clock, goal, heading, in_turns, is_bf16_fast, serve
from madm_utils import __version__
from madm_utils.args import formatter, positive_float, positive_int
from madm_utils.args import seed as seed_number
from madm_utils.bootstrap import paired_difference
from madm_utils.cli import UserError, quiet_libraries, run
from madm_utils.cpu_memory import keep_freed_memory
from madm_utils.files import publish_folder, replacing
from madm_utils.metrics import mean_scores

if TYPE_CHECKING:
    import numpy as np
    from diffusers import AutoencoderKL, AutoencoderTiny

    from madm_utils.modeling_madm import MADMModel

TASK = "synthetic_to_infrared"
UNET_CHANNELS, VAE_CHANNELS, ATTENTION_HEADS = (32, 32, 64, 64), (8, 16, 32), 2
# Rates and thresholds with which a short training from random weights learns something; those of the synthetic tasks
# are for a pre-trained UNet.
TRAINING = (
    "--projection_channels", 64, "--bottleneck_channels", 32, "--head_channels", 16, "--learning_rate", "2e-3",
    "--head_lr_multiplier", 1, "--lora_lr_multiplier", 1, "--pseudo_label_threshold", "0.6", "--pseudo_label_weight",
    "batch", "--lplr_mask", "pseudo", "--train_batch_size", 2, "--rare_class_min_pixels", 100,
    "--dataloader_num_workers", 0, "--report_to", "none",
)  # fmt: skip
TIMED_SIZE, TIMED_RESOLUTION = "medium", 128


@dataclass(frozen=True)
class Row:
    """One way to train and evaluate."""

    head_resolution: int = 1
    small_decoder: bool = False
    tuning: str = "full"
    training: str = "no"
    """Mixed precision of the training."""
    evaluation: str = "no"
    merge_lora: bool = False
    quantize_unet: str | None = None
    of: str = ""
    """Row whose trained model is evaluated; empty: one of its own."""
    reference: str = "exact"

    def train_flags(self, decoder: Path) -> list[str]:
        """Of `train_madm.py`."""
        flags = ["--unet_tuning", self.tuning, "--head_resolution", str(self.head_resolution)]
        flags += ["--mixed_precision", self.training]
        return flags + (["--vae_decoder", str(decoder)] if self.small_decoder else [])

    def eval_flags(self) -> list[str]:
        """Of `eval_madm.py`."""
        flags = ["--mixed_precision", self.evaluation] + ["--merge_lora"] * self.merge_lora
        return flags + (["--quantize_unet", self.quantize_unet] if self.quantize_unet else [])

    def is_timed(self, kind: str, bf16: bool) -> bool:
        """Whether `training` or `inference` differs from the reference's; bf16 is timed where it is not emulated."""
        if kind == "training":
            return not self.of and (bf16 or self.training == "no")
        return self.training == "no" and (bf16 or self.evaluation == "no")


ROWS = {
    "exact": Row(),
    "head-2": Row(head_resolution=2),
    "head-4": Row(head_resolution=4),
    "small-decoder": Row(small_decoder=True),
    "head-4-small-decoder": Row(head_resolution=4, small_decoder=True),
    "trained-in-bf16": Row(training="bf16"),
    "evaluated-in-bf16": Row(evaluation="bf16", of="exact"),
    "unet-int8": Row(quantize_unet="int8", of="exact"),
    "unet-fp8": Row(quantize_unet="fp8", of="exact"),
    "lora": Row(tuning="lora", reference="lora"),
    "merged-lora": Row(tuning="lora", merge_lora=True, of="lora", reference="lora"),
}


# --- quality ---------------------------------------------------------------------------------------------------------


def once(folder: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill `folder`, unless an earlier run did."""
    if not folder.is_dir():
        print(f"making {folder}", file=sys.stderr)
        publish_folder(folder, write)


def prepare(out: Path, args: argparse.Namespace) -> None:
    """Synthetic scenes, the base model of random weights, and the small decoder."""
    from madm_utils.small_model import build_small_stable_diffusion

    numbers = ("--num_train", args.num_train, "--num_test", args.num_test, "--resolution", args.resolution)
    command = (ROOT / "prepare_datasets.py", "--task", TASK, *numbers, "--num_proc", 1, "--output_dir")
    once(out / "data", lambda folder: run_script(out / "log.txt", *command, folder / "prepared"))
    once(
        out / "base",
        lambda folder: build_small_stable_diffusion(
            folder, UNET_CHANNELS, VAE_CHANNELS, attention_heads=ATTENTION_HEADS
        ),
    )
    once(out / "decoder", lambda folder: distil_decoder(out, args.resolution, args.distillation_steps, folder))


def distil_decoder(out: Path, resolution: int, steps: int, folder: Path) -> None:
    """Write a small decoder that imitates the base model's own, on latents of training images and on noise."""
    import torch
    import torch.nn.functional as F

    from madm_utils.base_model import BaseModelReference, load_vae
    from madm_utils.datasets import AdaptationDataset
    from madm_utils.tasks import TASKS

    torch.manual_seed(0)
    vae = load_vae(BaseModelReference(str(out / "base"))).requires_grad_(False)
    samples = AdaptationDataset(out / "data" / "prepared", TASKS[TASK], resolution, 128, 0, rare_class_sampling=False)
    images = torch.stack([samples[index]["source_image"] for index in range(128)]).float() / 127.5 - 1
    with torch.no_grad():
        known = torch.cat([vae.encode(part).latent_dist.mode() for part in images.split(8)])
        known *= vae.config.scaling_factor
    small = small_decoder(vae, known.std().item())
    optimizer = torch.optim.AdamW(small.decoder.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        # The label latents that it is to decode are like those of images, but for errors of the UNet.
        latents = known[torch.randint(len(known), (8,))]
        latents = latents + known.std() * torch.rand(8, 1, 1, 1) * torch.randn_like(latents)
        with torch.no_grad():
            expected = vae.decode(latents / vae.config.scaling_factor).sample
        loss = F.mse_loss(small.decode(latents / small.config.scaling_factor).sample, expected)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    explained = 1 - loss.item() / expected.var().item()
    print(f"the small decoder explains {explained:.1%} of the variance of the VAE's own", file=sys.stderr)
    small.save_pretrained(folder)


def small_decoder(vae: "AutoencoderKL", scaling_factor: float = 1.0) -> "AutoencoderTiny":
    """An untrained decoder for the latents of `vae` with the layout of TAESD: half the width of the finest level.

    Args:
        vae: gives the shapes.
        scaling_factor: standard deviation of the latents; about 1 of a trained VAE, not of one with random weights.
    """
    from diffusers import AutoencoderTiny

    levels = len(vae.config.block_out_channels)
    widths, blocks = [max(8, vae.config.block_out_channels[0] // 2)] * levels, [3] * (levels - 1) + [1]
    return AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=blocks[::-1],
        num_decoder_blocks=blocks,
        latent_channels=vae.config.latent_channels,
        scaling_factor=scaling_factor,
    )


def train_and_evaluate(out: Path, seed: int, name: str, rows: Sequence[str], args: argparse.Namespace) -> None:
    """Train row `name`, and write the counts of those of `rows` that evaluate this model."""
    model, log = out / f"seed-{seed}" / name, out / f"seed-{seed}" / f"{name}.txt"
    log.parent.mkdir(exist_ok=True)
    if not (model / "madm_config.json").is_file():
        shutil.rmtree(model, ignore_errors=True)  # an interrupted training
        print(f"training {name}, seed {seed}", file=sys.stderr)
        steps = ("--max_train_steps", args.steps, "--dplg_end_step", args.steps // 2)
        run_script(
            log, ROOT / "train_madm.py", "--task", TASK, "--data_dir", out / "data" / "prepared",
            "--pretrained_model_name_or_path", out / "base", "--resolution", args.resolution, *TRAINING, *steps,
            "--seed", seed, *ROWS[name].train_flags(out / "decoder"), "--output_dir", model,
        )  # fmt: skip
    for row in rows:
        counts = counts_file(out, seed, row)
        if (ROWS[row].of or row) == name and not counts.is_file():
            print(f"evaluating {row}, seed {seed}", file=sys.stderr)
            flags = ("--model_path", model, "--data_dir", out / "data" / "prepared", *ROWS[row].eval_flags())
            run_script(log, Path(__file__).resolve(), "--counts", counts, *flags)


def counts_file(out: Path, seed: int, row: str) -> Path:
    """Where the counts of a row are: int64 (images, 3, classes) of `metrics.class_counts`."""
    return out / f"seed-{seed}" / f"{row}.npy"


def write_counts(path: Path, flags: Sequence[str]) -> None:
    """Evaluate as `eval_madm.py` with `flags` does, and write the counts per image."""
    import numpy as np
    import torch

    import eval_madm
    from madm_utils.args import inference_settings
    from madm_utils.pipeline_madm import inference_accelerator

    torch.set_num_threads(1)
    args = eval_madm.parse_args([*flags, "--output_dir", str(path.parent), "--num_pictures", "0"])
    accelerator = inference_accelerator(args.mixed_precision)
    [model] = eval_madm.checked_models(args, None)
    dataset = eval_madm.open_dataset(model, args)
    evaluation = eval_madm.evaluate_model(
        model, dataset, set(), accelerator, inference_settings(args), args, "evaluate"
    )
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, evaluation.measurement.stacked("pixels"))


def seeds_of(name: str, seeds: Sequence[int], bf16: bool) -> list[int]:
    """With which seeds a row is trained: where bf16 is emulated, a step takes ten times as long."""
    return list(seeds) if bf16 or ROWS[name].training == "no" else list(seeds[:1])


def mean_miou(counts: "np.ndarray") -> "np.ndarray":
    """(..., seeds, 3, K) -> (...): mean over the seeds of the mIoU in percent."""
    return mean_scores(counts)["miou"].mean(-1)


def quality(out: Path, name: str, seeds: Sequence[int]) -> dict:
    """mIoU of a row and of its reference, their paired difference with its interval, and the difference per seed."""
    import numpy as np

    own, reference = (
        np.stack([np.load(counts_file(out, seed, row)) for seed in seeds], axis=1)
        for row in (name, ROWS[name].reference)
    )
    per_seed = mean_scores(own.sum(0))["miou"] - mean_scores(reference.sum(0))["miou"]
    paired = paired_difference(mean_miou, reference, own)
    scores = {"miou": mean_miou(own.sum(0)), "reference": mean_miou(reference.sum(0))}
    return {**scores, **paired, "per_seed": per_seed.tolist(), "seeds": len(seeds)}


# --- speed -----------------------------------------------------------------------------------------------------------


def serve_timed(name: str, kind: str, cpu_time: bool) -> None:
    """Make a training step, or segment an image, whenever asked."""
    import torch
    from accelerate import Accelerator

    from benchmarks.common import build_model, training_settings, training_step
    from madm_utils.approximations import approximate

    keep_freed_memory()
    row = ROWS[name]
    accelerator = Accelerator(mixed_precision=row.training if kind == "training" else row.evaluation)
    precision = {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    torch.manual_seed(0)
    model = with_small_parts(build_model(TIMED_SIZE, TIMED_RESOLUTION, row.tuning, precision), row)
    if kind == "training":
        timed = training_step(model, training_settings(model), accelerator)
    else:
        model.requires_grad_(False).to(accelerator.device).eval()
        approximate(model, row.merge_lora, row.quantize_unet)
        images = torch.rand(1, 3, TIMED_RESOLUTION, TIMED_RESOLUTION, device=accelerator.device)

        def timed() -> None:
            with torch.no_grad(), accelerator.autocast():
                model(images).logits.argmax(dim=1)

    serve(timed, dict, clock(accelerator.device.type, cpu_time))


def with_small_parts(model: "MADMModel", row: Row) -> "MADMModel":
    """Give a model with random weights the head's resolution and the decoder of a row."""
    model.segmenter.register_to_config(head_resolution=row.head_resolution)
    if row.small_decoder:
        decoder = small_decoder(model.extractor.vae).to(model.extractor.vae.dtype)
        model.extractor.vae_decoder = decoder.requires_grad_(False)
    return model


def speed(out: Path, name: str, kind: str, args: argparse.Namespace) -> dict:
    """Seconds of a row and of its reference, and their ratio; from an earlier run where it was measured."""
    path = out / f"{name}-{kind}-{'cpu' if args.cpu_time else 'wall'}.json"
    if not path.is_file():
        print(f"timing {kind} of {name}", file=sys.stderr)
        flags = ("--kind", kind, *["--cpu_time"] * args.cpu_time)
        with (
            Worker(__file__, "--measure", name, *flags) as own,
            Worker(__file__, "--measure", ROWS[name].reference, *flags) as reference,
        ):
            seconds, expected = in_turns([own, reference], args.repeats)
        result = {"seconds": seconds, "reference_seconds": expected, "speed": expected / seconds}
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(result) + "\n", encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


# --- the table -------------------------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="what to measure")
    parser.add_argument("--seeds", nargs="+", type=seed_number, default=[0, 1], help="of the trainings [0 1]")
    parser.add_argument("--margin", type=positive_float, default=1.0, help="mIoU in percent that may be lost")
    parser.add_argument("--steps", type=positive_int, default=150, help="of each training")
    parser.add_argument("--resolution", type=positive_int, default=64, help="side of the images, a multiple of 64")
    parser.add_argument("--num_train", type=positive_int, default=300, help="training images per domain")
    parser.add_argument("--num_test", type=positive_int, default=100, help="labelled test images")
    parser.add_argument("--distillation_steps", type=positive_int, default=400, help="of the small decoder")
    parser.add_argument("--parallel", type=positive_int, default=2, help="trainings side by side, one thread each")
    parser.add_argument("--repeats", type=positive_int, default=3, help="timed calls, after a first one")
    parser.add_argument("--skip_speed", action="store_true", help="measure the quality alone")
    parser.add_argument("--cpu_time", action="store_true", help="CPU seconds, for a machine that does other work too")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/approximations"), help="what is done so far")
    parser.add_argument("--measure", choices=ROWS, help=argparse.SUPPRESS)
    parser.add_argument("--kind", choices=("training", "inference"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def check_settings(out: Path, args: argparse.Namespace) -> None:
    """Raise `UserError` where `out` holds results of other settings or of another machine; they would be mixed."""
    names = ("steps", "resolution", "num_train", "num_test", "distillation_steps")
    settings = {name: getattr(args, name) for name in names}
    settings |= {"machine": machine(), "torch": version("torch"), "suite": __version__}
    path = out / "settings.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else settings
    if found != settings:
        raise UserError(f"{out} holds results of {found}, asked for are {settings}; give another --output_dir")
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings) + "\n", encoding="utf-8")


def needed(rows: Sequence[str]) -> list[str]:
    """The rows, their references, and the rows whose models they evaluate, in the order of `ROWS`."""
    wanted = {*rows, *(ROWS[name].reference for name in rows), *(ROWS[name].of or name for name in rows)}
    return [name for name in ROWS if name in wanted]


def line(out: Path, name: str, bf16: bool, args: argparse.Namespace) -> str:
    """A row of the table."""
    q = quality(out, name, seeds_of(name, args.seeds, bf16))
    cells = [name, ROWS[name].reference, f"{q['reference']:.2f}", f"{q['miou']:.2f}"]
    low, high = q["interval"]
    cells += [f"{q['difference']:+.2f} [{low:+.2f}, {high:+.2f}]", ", ".join(f"{d:+.2f}" for d in q["per_seed"])]
    cells.append("yes" if low > -args.margin else "no")
    for kind in ("training", "inference"):
        if args.skip_speed or not ROWS[name].is_timed(kind, bf16):
            cells.append("-")
            continue
        s = speed(out, name, kind, args)
        number = f"{s['seconds']:.3g} s / step" if kind == "training" else f"{1 / s['seconds']:.3g} images / s"
        cells.append(f"{s['speed']:.2f} x, {number}")
    return f"| {' | '.join(cells)} |"


def main(argv: Sequence[str] | None = None) -> int:
    """Train and evaluate what is missing, then time, and print the table; 1 where bf16 is inferior."""
    argv = sys.argv[1:] if argv is None else list(argv)
    quiet_libraries()
    if argv[:1] == ["--counts"]:
        write_counts(Path(argv[1]), argv[2:])
        return 0
    args = parse_args(argv)
    if args.measure:
        serve_timed(args.measure, args.kind, args.cpu_time)
        return 0
    out = args.output_dir.resolve()
    check_settings(out, args)
    prepare(out, args)
    bf16, names = is_bf16_fast(), needed(args.rows)
    trainings = [name for name in names if not ROWS[name].of]
    jobs = [(seed, name) for name in trainings for seed in seeds_of(name, args.seeds, bf16)]
    jobs.sort(key=lambda job: ROWS[job[1]].training == "no")  # the longest first
    with ThreadPoolExecutor(args.parallel) as pool:
        list(pool.map(lambda job: train_and_evaluate(out, *job, names, args), jobs))
    print(heading())
    print(f"{TASK} at {args.resolution} pixels, {args.steps} steps, {args.num_test} test images, seeds {args.seeds}; ")
    print(f"times at a quarter of Stable Diffusion's widths, {TIMED_RESOLUTION} pixels, batch 1\n")
    title = f"| row | against | its mIoU | mIoU | cost | by seed | within {args.margin:g} | training | inference |"
    print(f"{title}\n{'|---' * 9}|", flush=True)
    for name in args.rows:
        if name != ROWS[name].reference:
            print(line(out, name, bf16, args), flush=True)
    written = sorted(path.stat().st_mtime for path in out.glob("seed-*/*.npy"))
    dates = [time.strftime("%Y-%m-%d", time.localtime(written[i])) for i in (0, -1)]
    print(f"\nTrained and evaluated from {dates[0]} to {dates[1]}.")
    if "exact" in names and len(args.seeds) > 1:
        spread = quality_spread(out, args.seeds)
        print(f"The exact model alone moves by up to {spread:.2f} mIoU from seed to seed.")
    print()
    return verdicts(out, bf16, args)


def verdicts(out: Path, bf16: bool, args: argparse.Namespace) -> int:
    """Non-inferiority of the rows in bf16, which is to be as good as float32; returns the exit code."""
    missed = 0
    for name in args.rows:
        if "bf16" in (ROWS[name].training, ROWS[name].evaluation):
            seeds = seeds_of(name, args.seeds, bf16)
            q = quality(out, name, seeds)
            met = q["interval"][0] > -args.margin
            missed += not met
            what = f"{name} is not inferior by {args.margin:g} mIoU to {ROWS[name].reference}, {len(seeds)} seeds"
            goal(what, met, f"{q['difference']:+.2f}, at least {q['interval'][0]:+.2f}")
    return 1 if missed else 0


def quality_spread(out: Path, seeds: Sequence[int]) -> float:
    """Largest difference in mIoU between two seeds of the exact model."""
    import numpy as np

    scores = [mean_scores(np.load(counts_file(out, seed, "exact")).sum(0))["miou"] for seed in seeds]
    return float(max(scores) - min(scores))


if __name__ == "__main__":
    run(main)
