#!/usr/bin/env python
"""What each part of the method brings, on synthetic streets, with the small pre-trained model; writes result files.

    python benchmarks/ablation.py                                        # every row, modality and seed
    python benchmarks/ablation.py --rows source-only madm --modalities infrared --seeds 0
    python benchmarks/ablation.py --split val --seeds 0 --flags="--rank 64" --output_dir outputs/search
    python benchmarks/evidence.py                                         # docs/evidence.md from the result files

It runs the real prepare_datasets.py, train_madm.py and eval_madm.py. Settings are chosen on validation scenes
(`--split val`); the test scenes (the default) are for the final table. An interrupted call goes on where it stopped: a
row that has its result is kept, a training goes on from its last checkpoint.

Results lie in `--output_dir`/MODALITY/ROW/seed-N: result-SPLIT.json (scores, curve, seconds, settings), and training/
with the log, pictures of pseudo-labels every quarter of the steps, and the model. What was made with other settings,
another base model or other scenes is refused, not mixed in. The result files of docs/evidence.md are in
benchmarks/results/ablation; copied into `--output_dir` they count as done.
"""

import argparse
import functools
import hashlib
import json
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import ROOT, machine, run_script, stop_scripts_on_sigterm
from madm_utils.args import formatter, non_negative_int, positive_int
from madm_utils.args import seed as seed_number
from madm_utils.cli import UserError, quiet_libraries, run
from madm_utils.files import publish_folder, replacing
from madm_utils.scenes import render_scene, scene_seed
from madm_utils.tasks import TASKS

ASSET = ROOT / "assets" / "street-diffusion-small"
MODALITIES = ("depth", "infrared", "event")
SMALL_NETWORK = (
    "--unet_tuning", "full", "--projection_channels", "64", "--bottleneck_channels", "32", "--head_channels", "48",
    "--head_resolution", "2",
)  # fmt: skip
"""Flags for a network that is as small as the base model."""
TRAINING = (
    *SMALL_NETWORK, "--dataloader_num_workers", "0", "--report_to", "none", "--checkpoints_total_limit", "1",
)  # fmt: skip
"""Flags of every row; the rest are the defaults of the synthetic tasks."""
OWNED = {
    "--task", "--task_config", "--data_dir", "--pretrained_model_name_or_path", "--max_train_steps", "--seed",
    "--checkpointing_steps", "--validation_steps", "--validate_on", "--output_dir", "--resume_from_checkpoint",
    "--source_only", "--unet_tuning",
}  # fmt: skip
"""Flags of train_madm.py that `--flags` may not hold."""
DEFINING = {"--dplg_timestep", "--lplr_loss"}
"""Flags that `--flags` may hold only for rows that do not set them."""
UNLABELLED, LABELLED = "unlabelled", "labelled"
"""Folders of data whose target training scenes have no labels, or have them."""
DATA_LOCK, RESULTS_LOCK = ".data.lock", ".results.lock"
"""Files in `--data_dir` and `--output_dir`, held while something writes there that two ablations would both make."""
COST = "cost.json"
"""In the folder of a row and seed: settings, how often its training was started, and what it took."""
LOG_NAME = "training_log.jsonl"  # as in madm_utils.tracking, which takes seconds to import


@dataclass(frozen=True)
class Row:
    """One way to train: what it is, and the flags of train_madm.py that make it."""

    title: str
    flags: tuple[str, ...] = ()
    base: str = "pretrained"
    """Name of the base model: `pretrained`, or `random` for the same one with a new UNet."""
    on_target: bool = False
    """Trained on the labelled target instead of the source."""


# The defaults of train_madm.py, spelled out so that every record says what LoRA it was.
_LORA_LAYERS = (
    "to_k,to_q,to_v,to_out.0,proj_in,proj_out,ff.net.0.proj,ff.net.2,conv1,conv2,conv_shortcut,time_emb_proj,conv"
)
_LORA = ("--unet_tuning", "lora", "--rank", "32", "--lora_lr_multiplier", "10", "--lora_layers", _LORA_LAYERS)
_NO_DPLG, _NO_LPLR = ("--dplg_timestep", "0"), ("--lplr_loss", "none")
ROWS = {
    "source-only": Row("source only", ("--source_only", *_NO_LPLR)),
    "self-training": Row("mean-teacher self-training", _NO_DPLG + _NO_LPLR),
    "dplg": Row("self-training + DPLG", _NO_LPLR),
    "lplr": Row("self-training + LPLR", _NO_DPLG),
    "madm": Row("MADM (DPLG + LPLR), full tuning"),
    "madm-lora": Row("MADM with LoRA", _LORA),
    "madm-random": Row("MADM from a random UNet", base="random"),
    "supervised": Row("supervised on the target", ("--source_only", *_NO_LPLR), on_target=True),
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the ablation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="ways to train")
    parser.add_argument("--modalities", nargs="+", choices=MODALITIES, default=list(MODALITIES), help="targets")
    parser.add_argument("--seeds", nargs="+", type=seed_number, default=[0, 1, 2], help="of the trainings")
    parser.add_argument("--split", choices=("val", "test"), default="test", help="labelled target scenes to score on")
    parser.add_argument("--base_model", type=Path, default=ASSET, help="pre-trained model in diffusers layout")
    parser.add_argument("--num_train", type=positive_int, default=1000, help="training scenes per domain")
    parser.add_argument("--num_eval", type=positive_int, default=100, help="validation scenes, and test scenes")
    parser.add_argument("--max_train_steps", type=positive_int, help="of each training; default: the task's")
    parser.add_argument(
        "--validations", type=non_negative_int, default=4, help="scores and pictures during a training"
    )
    parser.add_argument(
        "--flags", type=shlex.split, default=[], help="more flags of train_madm.py, for all rows: --flags='--rank 64'"
    )
    parser.add_argument("--parallel", type=positive_int, default=2, help="rows side by side")
    parser.add_argument("--num_threads", type=positive_int, default=1, help="CPU threads of each")
    parser.add_argument(
        "--data_dir", type=Path, default=Path("outputs/ablation-data"), help="synthetic data, made once"
    )
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/ablation"), help="results")
    return parser.parse_args(argv)


def prepare_data(args: argparse.Namespace) -> None:
    """Draw what the rows need: source labelled and targets not; for the ceiling the same scenes, all labelled."""
    settings = {"num_train": args.num_train, "num_eval": args.num_eval, "scenes": scenes_digest()}
    extra = {UNLABELLED: (), LABELLED: ("--label_all",)}
    for name in {data_of(ROWS[row]): None for row in args.rows}:
        folder = args.data_dir / name
        marker = folder / "settings.json"
        if marker.exists():
            found = json.loads(marker.read_text(encoding="utf-8"))
            if found != settings:
                raise UserError(f"{folder} holds data made with {found}, asked for are {settings}; give another")
            continue
        print(f"drawing scenes into {folder}", flush=True)

        def write(target: Path, name: str = name) -> None:
            sizes = ("--num_train", args.num_train, "--num_val", args.num_eval, "--num_test", args.num_eval)
            command = ("prepare_datasets.py", "--dataset", "synthetic", *sizes, *extra[name])
            run_script(args.data_dir / f"{name}.txt", *command, "--output_dir", target / "prepared")
            (target / "settings.json").write_text(json.dumps(settings), encoding="utf-8")

        publish_folder(folder, write)


def data_of(row: Row) -> str:
    """Folder below `--data_dir` that a row is trained on."""
    return LABELLED if row.on_target else UNLABELLED


@functools.cache
def scenes_digest() -> str:
    """Digest of a scene of every modality: another one when the design of the scenes has changed."""
    digest = hashlib.sha256()
    for modality in ("rgb", *MODALITIES):
        for array in render_scene(scene_seed(0, "train", modality, 0), modality):
            digest.update(array.tobytes())
    return digest.hexdigest()[:16]


@functools.cache
def base_digest(folder: Path) -> str:
    """Digest of the weights of a base model."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def random_base(args: argparse.Namespace, seed: int) -> Path:
    """The base model with a UNet of random weights, others for every seed; VAE, text encoder and scheduler stay."""
    import filelock

    folder = args.data_dir / f"random-base-{base_digest(args.base_model)}-{seed}"

    def write(target: Path) -> None:
        import torch
        from diffusers import UNet2DConditionModel  # under the lock: its lazy import fails in two threads at a time

        shutil.copytree(args.base_model, target, dirs_exist_ok=True)
        torch.manual_seed(seed)
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(args.base_model / "unet"))
        shutil.rmtree(target / "unet")
        unet.save_pretrained(target / "unet")

    with filelock.FileLock(args.data_dir / DATA_LOCK):
        if not folder.exists():
            publish_folder(folder, write)
    return folder


def ceiling_task(args: argparse.Namespace, modality: str) -> Path:
    """Task file whose source is the labelled target."""
    task = TASKS[f"synthetic_to_{modality}"].to_dict()
    task |= {"name": f"supervised_{modality}", "source": task["target"], "source_label_map": task["target_label_map"]}
    path = args.output_dir / modality / "supervised.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(task, indent=1), encoding="utf-8")
    return path


def settings_of(args: argparse.Namespace, modality: str, name: str) -> dict:
    """What the result of a row depends on, its seed aside."""
    own = TASKS[f"synthetic_to_{modality}"].hyperparameters
    steps = args.max_train_steps or own["max_train_steps"]
    flags = [*TRAINING, "--max_train_steps", str(steps)]
    # The schedule of the teacher's noise is a part of the training, however long that is.
    flags += ["--dplg_end_step", str(round(own["dplg_end_step"] * steps / own["max_train_steps"]))]
    return {
        "steps": steps, "flags": flags, "more_flags": args.flags, "row_flags": list(ROWS[name].flags),
        "hyperparameters": json.loads(json.dumps(own)),  # as it comes back from a file
        "num_train": args.num_train, "num_eval": args.num_eval, "validations": args.validations,
        "base_model": base_digest(args.base_model), "scenes": scenes_digest(),
    }  # fmt: skip


def kept_result(path: Path, settings: dict) -> bool:
    """Whether a record of a result or a training is there; `UserError` where it is one of other settings."""
    if not path.exists():
        return False
    found = json.loads(path.read_text(encoding="utf-8"))["settings"]
    changed = [f"{key}: {found.get(key)} -> {value}" for key, value in settings.items() if found.get(key) != value]
    if changed:
        raise UserError(f"{path} was made with other settings ({'; '.join(changed)}); give another --output_dir")
    return True


def run_row(args: argparse.Namespace, modality: str, name: str, seed: int) -> None:
    """Train and evaluate one row with one seed, unless its result is there."""
    row, folder = ROWS[name], folder_of(args, modality, name, seed)
    training, log = folder / "training", folder / "log.txt"
    settings = settings_of(args, modality, name)
    if kept_result(folder / f"result-{args.split}.json", settings):
        return
    folder.mkdir(parents=True, exist_ok=True)
    task = ("--task", f"synthetic_to_{modality}")
    if row.on_target:
        task = ("--task_config", ceiling_task(args, modality))
    data = args.data_dir / data_of(row) / "prepared"
    base = random_base(args, seed) if row.base == "random" else args.base_model
    flags = [*settings["flags"], *row.flags, *args.flags, "--seed", str(seed)]
    flags += ["--checkpointing_steps", str(max(1, settings["steps"] // 2))]
    if args.validations:
        flags += ["--validation_steps", str(max(1, settings["steps"] // args.validations)), "--validate_on", "val"]
    cost_file = folder / COST
    cost = {"settings": settings, "starts": 0, "train_seconds": 0.0, "train_cpu_seconds": 0.0}
    if cost_file.exists():
        cost = json.loads(cost_file.read_text(encoding="utf-8"))
    if not (training / "madm_config.json").exists():  # what a training writes last
        resume = ("--resume_from_checkpoint", "latest") if list(training.glob("checkpoint-*")) else ()
        cost["starts"] += 1
        write_json(cost_file, cost)
        started = time.monotonic()
        cost["train_cpu_seconds"] += run_script(
            log, "train_madm.py", *task, "--data_dir", data, "--pretrained_model_name_or_path", base,
            *flags, "--output_dir", training, *resume, threads=args.num_threads,
        )  # fmt: skip
        cost["train_seconds"] += time.monotonic() - started
        write_json(cost_file, cost)
    evaluation = folder / args.split
    run_script(
        log, "eval_madm.py", "--model_path", training, "--data_dir", data, "--split", args.split,
        "--num_pictures", 0, "--num_cpu_threads", args.num_threads, "--output_dir", evaluation,
        threads=args.num_threads,
    )  # fmt: skip
    metrics = json.loads((evaluation / "metrics.json").read_text(encoding="utf-8"))
    record = {
        "modality": modality, "row": name, "seed": seed, "split": args.split, **cost,
        "miou": metrics["miou"],
        "iou": {label: values["iou"] for label, values in metrics["per_class"].items()},
        "curve": validation_curve(training / LOG_NAME),
        "num_threads": args.num_threads, "parallel": args.parallel, "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    write_json(folder / f"result-{args.split}.json", record)
    cpu = cost["train_cpu_seconds"]
    print(f"{modality:9} {name:14} seed {seed}  mIoU {metrics['miou']:6.2f}  {cpu:6.0f} CPU s", flush=True)


def folder_of(args: argparse.Namespace, modality: str, name: str, seed: int) -> Path:
    """Where a row with a seed keeps everything."""
    return args.output_dir / modality / name / f"seed-{seed}"


def write_json(path: Path, content: dict) -> None:
    """Write it whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def validation_curve(log: Path) -> list[tuple[int, float]]:
    """Step and mIoU of the validations of a training; one made again after an interruption counts once."""
    lines = (json.loads(line) for line in log.read_text(encoding="utf-8").splitlines())
    return sorted({line["step"]: line["validation"]["miou"] for line in lines if "validation" in line}.items())


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, and print the means; 1 where a row failed, after all others."""
    args = parse_args(argv)
    quiet_libraries()
    stop_scripts_on_sigterm()
    import filelock

    for name in ("rows", "modalities", "seeds"):
        setattr(args, name, list(dict.fromkeys(getattr(args, name))))  # the same twice would write to one folder
    for name in ("data_dir", "output_dir", "base_model"):
        setattr(args, name, getattr(args, name).resolve())
    if not (args.base_model / "model_index.json").exists():
        raise UserError(f"{args.base_model} holds no model; make it with benchmarks/pretrain_small_diffusion.py")
    owned = sorted({flag.split("=")[0] for flag in args.flags} & OWNED)
    if owned:
        raise UserError(f"--flags holds {', '.join(owned)}, which the ablation sets itself")
    for name in args.rows:
        clash = sorted({flag.split("=")[0] for flag in args.flags} & DEFINING & set(ROWS[name].flags))
        if clash:
            raise UserError(f"--flags holds {', '.join(clash)}, which is what the row '{name}' is made of")
    for folder in (args.data_dir, args.output_dir):
        folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(args.data_dir / DATA_LOCK):
        prepare_data(args)
    try:
        with filelock.FileLock(args.output_dir / RESULTS_LOCK, timeout=0):
            return run_jobs(args)
    except filelock.Timeout:
        raise UserError(f"another ablation writes to {args.output_dir}; wait for it, or give another") from None


def run_jobs(args: argparse.Namespace) -> int:
    """Every row, modality and seed; what `main` returns."""
    # Seed by seed: an interrupted suite has whole tables of fewer seeds.
    jobs = [(m, name, seed) for seed in args.seeds for m in args.modalities for name in args.rows]
    for modality, name, seed in jobs:  # before hours of training, not between them
        for record in (COST, f"result-{args.split}.json"):
            kept_result(folder_of(args, modality, name, seed) / record, settings_of(args, modality, name))
    failures = []
    with ThreadPoolExecutor(args.parallel) as pool:
        futures = {pool.submit(run_row, args, *job): job for job in jobs}
        try:
            for future in as_completed(futures):
                if isinstance(future.exception(), UserError):
                    failures.append(f"{' '.join(map(str, futures[future]))}: {future.exception()}")
                else:
                    future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    print_means(args)
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


def print_means(args: argparse.Namespace) -> None:
    """Mean mIoU and its standard deviation over the seeds that are there."""
    from statistics import mean, stdev

    print(f"\nmIoU in % on {args.split} scenes, mean and standard deviation of up to {len(args.seeds)} seeds")
    print(f"{'':16}" + "".join(f"{modality:>16}" for modality in args.modalities))
    for name in args.rows:
        cells = []
        for modality in args.modalities:
            paths = [folder_of(args, modality, name, s) / f"result-{args.split}.json" for s in args.seeds]
            scores = [json.loads(path.read_text(encoding="utf-8"))["miou"] for path in paths if path.exists()]
            text = f"{mean(scores):.2f}" if scores else "-"
            cells.append(text + (f" ± {stdev(scores):.2f}" if len(scores) > 1 else ""))
        print(f"{name:16}" + "".join(f"{cell:>16}" for cell in cells))


if __name__ == "__main__":
    run(main)
