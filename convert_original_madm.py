#!/usr/bin/env python
"""Convert a checkpoint of the published MADM code (.pth) into a model folder of this suite, and back.

    python convert_original_madm.py --task cityscapes_to_deliver_depth --checkpoint_path model_final.pth \\
        --pretrained_model_name_or_path CompVis/stable-diffusion-v1-4 --output_dir models/madm-depth --verify

The file is read as plain tensors; every key and shape is checked, and the widths come from the tensors themselves.
The result holds the tuned UNet, student and teacher, and refers to the base model for the frozen parts. Optimiser
state is not converted. Memory: at most one copy of the file, plus VAE and text encoder of the base model.

    python convert_original_madm.py --model_path models/madm-depth --to_original model_again.pth

writes the published format, to check results with the published code. For a converted model every tensor has the bits
of the file it came from; the LoRA of a model trained here is merged into the UNet.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from madm_utils import cli
from madm_utils.args import add_task_arguments, formatter
from madm_utils.cli import UserError
from madm_utils.files import check_writable, publish_folder, replacing, writing
from madm_utils.tasks import Task, load_task

_FROM_ORIGINAL = ("checkpoint_path", "pretrained_model_name_or_path", "output_dir")
_ONLY_FROM_ORIGINAL = ("task", "task_config", "checkpoint_path", "output_dir", "revision", "variant", "golden")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the conversion, checked for each direction."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    add_task_arguments(parser)
    group = parser.add_argument_group("base model")
    group.add_argument(
        "--pretrained_model_name_or_path", metavar="BASE",
        help="the Stable Diffusion it was trained on (published: CompVis/stable-diffusion-v1-4): Hub id or folder; "
        "with --to_original in place of the one stored with the model",
    )  # fmt: skip
    group.add_argument("--revision", help="revision of the base model on the Hub")
    group.add_argument("--variant", help="weight variant of the base model")
    group = parser.add_argument_group("from the published format")
    group.add_argument("--checkpoint_path", metavar="FILE", help="published .pth file")
    group.add_argument("--output_dir", metavar="DIR", help="model folder to write")
    group.add_argument("--golden", metavar="FILE", help="image and logits of the published code to --verify against")
    group = parser.add_argument_group("to the published format")
    group.add_argument("--model_path", metavar="DIR", help="model folder of this suite, or id on the Hub")
    group.add_argument("--to_original", metavar="FILE", help=".pth file to write")
    parser.add_argument("--verify", action="store_true", help="read back what was written, and compare")
    args = parser.parse_args(argv)
    if args.to_original:
        others = [name for name in _ONLY_FROM_ORIGINAL if getattr(args, name)]
        if others or not args.model_path:
            parser.error(
                "--to_original FILE takes --model_path DIR"
                + (f", not {', '.join('--' + name for name in others)}" if others else "")
            )
    else:
        missing = [name for name in _FROM_ORIGINAL if not getattr(args, name)]
        if missing or args.model_path:
            parser.error(
                f"missing {', '.join('--' + name for name in missing)}; or give --model_path DIR --to_original FILE"
                if missing
                else "--model_path belongs to --to_original FILE"
            )
        if args.golden and not args.verify:
            parser.error("--golden is what --verify compares with; give both")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Convert as the command line says."""
    args = parse_args(argv)
    if args.to_original:
        to_original(args.model_path, Path(args.to_original), args.pretrained_model_name_or_path, args.verify)
        return
    task = load_task(args.task, args.task_config)
    output_dir = Path(args.output_dir)
    check_writable(output_dir)
    if output_dir.exists() and any(output_dir.iterdir()):
        raise UserError(f"--output_dir {output_dir} already holds something; give another folder or delete this one")
    report: list[str] = []
    with writing(output_dir):
        publish_folder(output_dir, lambda folder: report.extend(from_original(args, task, folder)))
    print(*report, f"converted {args.checkpoint_path} (task {task.name}) to {output_dir}", sep="\n")


def from_original(args: argparse.Namespace, task: Task, folder: Path) -> list[str]:
    """Convert the file into `folder`; returns what to tell the user. Nothing of the file stays in memory."""
    from tqdm import tqdm

    from madm_utils.base_model import BaseModelReference
    from madm_utils.original_checkpoint import check_file, convert, read_checkpoint, save_converted
    from madm_utils.original_writer import Verification, read_golden

    golden = read_golden(args.golden) if args.golden else None
    path = Path(args.checkpoint_path)
    with tqdm(total=path.stat().st_size if path.is_file() else 0, desc="check", unit="B", unit_scale=True) as bar:
        check_file(path, bar.update)
    state, iteration = read_checkpoint(path)
    base = BaseModelReference(args.pretrained_model_name_or_path, args.revision, args.variant)
    converted = convert(state, task, base, path)
    written = sum(t.nbytes for part in (converted.model.unet, converted.model.segmenter, converted.teacher)
                  for t in part.state_dict().values())  # fmt: skip
    with growing(folder, written, "write"):
        save_converted(converted, folder, iteration)
    report = [f"iteration {'unknown' if iteration is None else iteration}, {len(state)} tensors"]
    if converted.remark:
        report.append(f"note: {converted.remark}")
    if args.verify:
        total = 2 * sum(tensor.nbytes for tensor in state.values())
        with tqdm(total=total, desc="verify", unit="B", unit_scale=True) as bar:
            verification = Verification(state, iteration, converted, bar.update)
            del state, converted  # the mapped file leaves memory before the folder is loaded
            report.extend(verification.run(folder, golden))
    return report


def to_original(model_path: str, output: Path, base: str | None, verify: bool) -> None:
    """Write the model in `model_path` as the published `.pth` file `output`."""
    check_writable(output.parent)
    if output.exists():
        raise UserError(f"--to_original {output} exists; give another name or delete it")
    from tqdm import tqdm

    from madm_utils.original_checkpoint import read_checkpoint
    from madm_utils.original_writer import digests, published_checkpoint, write_checkpoint

    checkpoint = published_checkpoint(model_path, base)
    output.parent.mkdir(parents=True, exist_ok=True)
    total = sum(tensor.nbytes for tensor in checkpoint.state.values())
    with writing(output.parent), replacing(output) as temporary:
        with growing(temporary, total, "write"):
            write_checkpoint(checkpoint, temporary)
        if verify:
            found, iteration = read_checkpoint(temporary)
            with tqdm(total=2 * total, desc="verify", unit="B", unit_scale=True) as bar:
                same = digests(found, bar.update) == digests(checkpoint.state, bar.update)
            if not same or iteration != checkpoint.iteration:
                raise UserError(f"verification failed: {output} does not hold what was written; check the disk")
            print(f"verified: all {len(found)} tensors read back bit by bit")
    for remark in checkpoint.remarks:
        print(f"note: {remark}")
    print("note: there is no optimiser state; the published code can test this file, but not go on with its training")
    print(f"wrote {model_path} in the published format: {output}")


@contextmanager
def growing(path: Path, total: int, description: str) -> Iterator[None]:
    """A bar of the bytes of the file or folder `path` while a library writes it."""
    import threading

    from tqdm import tqdm

    def size() -> int:
        files: Callable = path.rglob if path.is_dir() else lambda _: [path]
        return sum(file.stat().st_size for file in files("*") if file.is_file())

    done = threading.Event()
    with tqdm(total=total, desc=description, unit="B", unit_scale=True) as bar:

        def watch() -> None:
            while not done.wait(0.5):
                bar.update(min(size(), total) - bar.n)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
            bar.update(total - bar.n)
        finally:
            done.set()
            watcher.join()


if __name__ == "__main__":
    cli.run(main)
