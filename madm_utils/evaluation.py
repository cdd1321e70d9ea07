"""The evaluation loop, shared by `eval_madm.py` and the validation of a running training."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from madm_utils.cli import UserError
from madm_utils.datasets import EvaluationDataset
from madm_utils.distributed import share_statistics
from madm_utils.interruption import ignore_stop_signals
from madm_utils.metrics import confusion_matrix, scores
from madm_utils.modeling_madm import MADMModel
from madm_utils.pipeline_madm import finite, resize_logits

if TYPE_CHECKING:
    from train_madm import Run

logger = get_logger(__name__)

_GO_ON, _STOP, _FAILED = range(3)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put `model` into evaluation mode, and every part of it back into the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def main_statistics(model: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """Let every process use the BatchNorm statistics of the main one, which are those that are saved. Collective.

    In training each process gathers its own, as published.
    """
    if accelerator.num_processes == 1:
        yield
        return
    own = [buffer.clone() for buffer in model.segmenter.buffers()]
    share_statistics(model.segmenter, accelerator)
    try:
        yield
    finally:
        for buffer, value in zip(model.segmenter.buffers(), own, strict=True):
            buffer.copy_(value)


def evaluate(
    model: MADMModel,
    dataset: EvaluationDataset,
    accelerator: Accelerator,
    batch_size: int = 1,
    num_images: int | None = None,
    num_workers: int = 0,
    seen: Callable[[int, Tensor, Tensor, Tensor], None] | None = None,
    stop: Callable[[], bool] | None = None,
    **progress: Any,
) -> np.ndarray | None:
    """Run a model over labelled images. Collective: every process calls it, with equal arguments.

    Process r of n takes the batches r, r + n, r + 2n, ...: no image counts twice, every batch holds the same images
    for any n (rounding depends on the batch), and the int64 sum does not depend on the order. A process whose batches
    run out computes on without counting, because forward passes of a sharded model are collective too.

    The model is left as it was: its modes, its running statistics and all random states are untouched.

    Args:
        model: the student or teacher model itself, not the wrapper that `accelerator.prepare` puts around it.
        dataset: labelled images.
        batch_size: images per forward pass and process.
        num_images: only the first so many; default: all.
        num_workers: loader processes.
        seen: called with index, image (3, R, R) uint8, label and prediction (h, w) of each image of this process.
        stop: asked after every batch; as soon as it is true on one process all of them give up.
        progress: of the progress bar (`tqdm`) of the main process.

    Returns:
        Confusion matrix over all processes, int64 (K+1, K+1), as `metrics.scores` takes it; None after `stop`.

    Raises:
        UserError: an image that cannot be read, labels that are no class of the task, or an output that is not
            finite; on all processes.
    """
    loader, counted = _share_of_process(dataset, accelerator, batch_size, num_images or len(dataset), num_workers)
    confusion = torch.zeros((model.task.num_classes + 1,) * 2, dtype=torch.int64, device=accelerator.device)
    options = {"desc": "evaluate", "unit": "image", "disable": not accelerator.is_main_process, **progress}
    with (
        evaluation_mode(model),
        main_statistics(model, accelerator),
        tqdm(total=sum(map(len, counted)), **options) as bar,
    ):
        arriving = iter(loader)
        for position in range(len(loader)):
            problem = ""
            try:
                batch = next(arriving)
                with torch.no_grad(), accelerator.autocast():
                    logits = finite(model(batch["image"].to(accelerator.device) / 255).logits)
                if position < len(counted):
                    confusion += _count(logits, batch, dataset, model.task.num_classes, seen)
                    bar.update(len(logits))
            except UserError as error:
                problem = str(error)
            status = _agree(_FAILED if problem else _STOP if stop is not None and stop() else _GO_ON, accelerator)
            if status == _FAILED:
                raise UserError(next(filter(None, gather_object([problem]))))
            if status == _STOP:
                return None
    return accelerator.reduce(confusion, reduction="sum").cpu().numpy()


def _share_of_process(
    dataset: EvaluationDataset, accelerator: Accelerator, batch_size: int, num_images: int, num_workers: int
) -> tuple[DataLoader, list[range]]:
    """Loader with equally many batches on every process, and those of them that this process counts."""
    num_images = min(num_images, len(dataset))
    batches = [range(k, min(k + batch_size, num_images)) for k in range(0, num_images, batch_size)]
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    rounds = -(-len(batches) // accelerator.num_processes)
    loader = DataLoader(
        dataset,
        batch_sampler=mine + batches[:1] * (rounds - len(mine)),
        num_workers=min(num_workers, rounds),
        collate_fn=dataset.collate,
        worker_init_fn=ignore_stop_signals,
        generator=torch.Generator(),  # a loader without its own draws from the one that training uses
    )
    return loader, mine


def _count(logits: Tensor, batch: dict, dataset: EvaluationDataset, num_classes: int, seen: Callable | None) -> Tensor:
    """Confusion matrix of one batch, (K+1, K+1); the class is chosen at the size of each label."""
    confusion = torch.zeros((num_classes + 1,) * 2, dtype=torch.int64, device=logits.device)
    for image, label, index, one in zip(batch["image"], batch["label"], batch["index"], logits, strict=True):
        prediction = resize_logits(one, tuple(label.shape)).argmax(0)
        try:
            confusion += confusion_matrix(prediction, label.to(logits.device), num_classes)
        except UserError as error:
            raise UserError(f"{dataset.file_name(index)}: {error}") from None
        if seen is not None:
            seen(index, image, label, prediction)
    return confusion


def _agree(status: int, accelerator: Accelerator) -> int:
    """The largest status of all processes."""
    if accelerator.num_processes == 1:
        return status
    return int(accelerator.gather(torch.tensor([status], device=accelerator.device)).max())


def check_validation_split(run: "Run", split: str) -> None:
    """Open the split that `--validate_on` names, before training starts, and say what validating on it means.

    Raises:
        UserError: it is missing, unlabelled, or does not fit the task.
    """
    dataset = _validation_split(run, split)
    logger.warning(
        f"--validate_on {split}: scores on {len(dataset)} labelled images of {run.task.target} are logged. Choosing a "
        "checkpoint or a setting by target labels breaks the unsupervised protocol; report the last step's score."
    )


def validate(
    run: "Run", split: str, accelerator: Accelerator, stop: Callable[[], bool] | None = None
) -> dict[str, Any] | None:
    """Score the student of a run on a labelled split of its target, as `eval_madm.py` does by default. Collective.

    A trouble of the evaluation does not end the training: it is logged.

    Args:
        run: one task of the training.
        split: e.g. `test`.
        accelerator: of the training.
        stop: see `evaluate`.

    Returns:
        `split`, `num_images` and what `metrics.scores` returns; None without a score (stopped, or not finite).
    """
    dataset = _validation_split(run, split)
    model = accelerator.unwrap_model(run.model)
    text = f"validate {run.name or split}"
    try:
        # One image per batch, as eval_madm.py has it: rounding depends on the batch, the score should not.
        confusion = evaluate(
            model, dataset, accelerator, num_workers=run.args.dataloader_num_workers, stop=stop, desc=text, leave=False
        )
    except UserError as error:
        logger.warning(f"no score on {split} at step {run.step}: {error}")
        return None
    if confusion is None:
        return None
    result = scores(confusion, run.task.class_names)
    if result["miou"] is None:
        logger.warning(f"no score on {split} at step {run.step}: its labels hold no class of the task")
        return None
    return {"split": split, "num_images": len(dataset), **result}


def _validation_split(run: "Run", split: str) -> EvaluationDataset:
    return EvaluationDataset(run.args.data_dir, run.task, split, run.args.resolution, streaming=run.args.streaming)
