"""The whole job in small, on two CPU cores and without any download: prepare, train twice, evaluate, compare.

    make demo

Every part is a call of the real scripts. The base model is the small Stable Diffusion in `assets/`, pre-trained on
procedural pictures without labels; the data are procedural streets, other ones. docs/experiments.md tells what else
was trained from it; the numbers printed here at the end are what this run measured.

The trainings run side by side, one core each. Everything lies under outputs/demo and replaces earlier results:

    data/            synthetic street scenes: labelled RGB (source), unlabelled target images, labelled target test
    source_only/     model trained on the source alone, and its evaluation (what they printed: source_only*.log)
    adapted/         model trained with MADM, and its evaluation
    comparison.png   test images: input, label, source-only, adapted
    index.html       all results in one page: gain, pictures, scores per class, curves
    results.json     scores of both, settings, seconds of each part, commands
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.ablation import ASSET, SMALL_NETWORK
from madm_utils import cli
from madm_utils.args import formatter, positive_int, seed
from madm_utils.tasks import TASKS, load_task
from recipes.demo_page import write_page

ROOT = Path(__file__).resolve().parent.parent
NUM_PICTURES = 5
# The task's own threshold suits longer runs; in a short one few pixels would reach that confidence.
OPTIMISATION = ("--pseudo_label_threshold", "0.8")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the demo; `make demo` gives none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    tasks = [name for name in TASKS if name.startswith("synthetic_")]
    parser.add_argument("--task", choices=tasks, default="synthetic_to_infrared", help="what to adapt to")
    parser.add_argument("--steps", type=positive_int, default=150, help="training steps of each model")
    parser.add_argument("--num_train", type=positive_int, default=300, help="training images per domain")
    parser.add_argument("--num_test", type=positive_int, default=60, help="labelled test images")
    parser.add_argument("--batch_size", type=positive_int, default=2, help="image pairs per step")
    parser.add_argument("--seed", type=seed, default=42, help="of training")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("outputs/demo"), help="its earlier results are replaced"
    )
    return parser.parse_args(argv)


def call(title: str, *commands: Sequence[object], logs: Sequence[Path] = ()) -> tuple[float, list[str]]:
    """Run the suite's scripts side by side; leaves if one fails.

    Args:
        title: printed first.
        commands: script and arguments of each.
        logs: files for the output of all commands but the last, whose output is shown.

    Returns:
        seconds of all, and their command lines.
    """
    print(f"\n=== {title}")
    started, running, lines = time.monotonic(), [], []
    for command, log in zip(commands, [*logs, None], strict=True):
        script, *arguments = map(str, command)
        lines.append(f"python {script} {shlex.join(arguments)}")
        print(f"$ {lines[-1]}" + (f" > {log}" if log else ""), flush=True)
        # One thread each: several would wait for one another wherever something else runs on the cores, for longer
        # than they compute. It also makes the numbers independent of the number of cores.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        output = log.open("w", encoding="utf-8") if log else None
        arguments = [sys.executable, str(ROOT / script), *arguments]
        running.append((subprocess.Popen(arguments, env=environment, stdout=output, stderr=output), script, log))
    try:
        for process, script, log in reversed(running):
            if process.wait():
                where = f"see the end of {log}" if log else "its message is above"
                sys.exit(f"error: {script} ended with exit code {process.returncode}; {where}")
    finally:
        for process, _, _ in running:
            process.terminate()
    return time.monotonic() - started, lines


def write_comparison(path: Path, models: dict[str, Path], data_dir: Path, task_name: str) -> None:
    """Write rows of input, label and each model's prediction for test images spread over the split."""
    import numpy as np

    from madm_utils.datasets import EvaluationDataset
    from madm_utils.pipeline_madm import MADMPipeline
    from madm_utils.sampling import evenly_spaced
    from madm_utils.visualization import colorize, picture_grid

    task = load_task(task_name)
    dataset = EvaluationDataset(data_dir, task, "test", task.resolution, "native")
    samples = [dataset[i] for i in evenly_spaced(len(dataset), NUM_PICTURES)]
    images = [np.ascontiguousarray(sample["image"].permute(1, 2, 0).numpy()) for sample in samples]
    columns = [images, [colorize(sample["label"].numpy(), task.palette) for sample in samples]]
    for folder in models.values():
        label_maps = MADMPipeline.from_pretrained(folder)(images).label_maps
        columns.append([colorize(label_map, task.palette) for label_map in label_maps])
    legend = dict(zip(task.class_names, task.palette, strict=True)) | {"not labelled": (0, 0, 0)}
    captions = [f"input ({task.modality})", "label", *models]
    picture_grid(list(zip(*columns, strict=True)), captions, legend=legend, cell_width=256).save(path, optimize=True)


def format_table(metrics: dict[str, dict]) -> str:
    """IoU per class and the means of every model, in percent."""
    names = list(metrics)
    first = metrics[names[0]]
    rows = [(name, [m["per_class"][name]["iou"] for m in metrics.values()]) for name in first["class_names"]]
    rows += [(f"-- {key}", [m[key] for m in metrics.values()]) for key in ("miou", "pacc")]
    lines = [f"{'IoU in %':16}" + "".join(f"{name:>14}" for name in names)]
    for name, values in rows:
        lines.append(f"{name:16}" + "".join(f"{'-' if v is None else format(v, '.2f'):>14}" for v in values))
    return "\n".join(lines)


def format_gain(metrics: dict[str, dict]) -> str:
    """What adaptation brought, in mIoU."""
    before, after = metrics["source-only"]["miou"], metrics["adapted"]["miou"]
    return f"Adaptation: {after - before:+.2f} mIoU ({before:.2f} -> {after:.2f})"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the four steps."""
    args = parse_args(argv)
    out, seconds, started = args.output_dir, {}, time.monotonic()
    if out.is_file():
        raise cli.UserError(f"--output_dir {out} is a file; give a folder")
    for name in ("data", "source_only", "adapted", "comparison.png", "index.html", "results.json"):
        shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink(missing_ok=True)
    data = out / "data"
    seconds["data"], prepared = call(
        "1/4 synthetic street scenes",
        ("prepare_datasets.py", "--task", args.task, "--output_dir", data, "--num_train", args.num_train,
         "--num_test", args.num_test),
    )  # fmt: skip
    # The teacher's noise ends half-way: of the few steps, enough are left without it.
    train = (
        "train_madm.py", "--task", args.task, "--data_dir", data,
        "--pretrained_model_name_or_path", os.path.relpath(ASSET), *SMALL_NETWORK, *OPTIMISATION,
        "--max_train_steps", args.steps, "--train_batch_size", args.batch_size, "--dplg_end_step", args.steps // 2,
        "--validation_steps", max(1, args.steps // 4), "--dataloader_num_workers", 0, "--seed", args.seed,
        "--output_dir",
    )  # fmt: skip
    models = {"source-only": out / "source_only", "adapted": out / "adapted"}
    seconds["train"], trained = call(
        "2/4 training on the source alone, and beside it with adaptation (MADM)",
        (*train, models["source-only"], "--source_only", "--lplr_loss", "none"),
        (*train, models["adapted"]),
        logs=[out / "source_only.log"],
    )
    seconds["evaluate"], evaluated = call(
        "3/4 evaluating both",
        *(
            ("eval_madm.py", "--model_path", folder, "--data_dir", data, "--batch_size", 4, "--num_cpu_threads", 1,
             "--num_pictures", 0, "--output_dir", folder / "evaluation")
            for folder in models.values()
        ),
        logs=[out / "source_only_evaluation.log"],
    )  # fmt: skip
    print("\n=== 4/4 comparison", flush=True)
    write_comparison(out / "comparison.png", models, data, args.task)
    metrics = {
        name: json.loads((folder / "evaluation" / "metrics.json").read_text(encoding="utf-8"))
        for name, folder in models.items()
    }
    seconds["total"] = time.monotonic() - started
    settings = {key: value for key, value in vars(args).items() if key != "output_dir"}
    results = {
        "settings": settings, "seconds": {k: round(v, 1) for k, v in seconds.items()}, "metrics": metrics,
        "commands": prepared + trained + evaluated,
    }  # fmt: skip
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    write_page(out / "index.html", results, models, out / "comparison.png")
    print(f"\n{args.task}: {args.num_test} test images, {args.steps} steps of {args.batch_size}\n")
    print(format_table(metrics))
    print(f"\n{format_gain(metrics)}")
    print(f"\n{seconds['total']:.0f} s in all. Open:")
    for path in (out / "index.html", out / "comparison.png", out / "results.json"):
        print(f"  {path}")


if __name__ == "__main__":
    cli.run(main)
