"""The evaluation loop of all processes, and the validation of a running training."""

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
from madm_utils.inference import finite, resized_rows
from madm_utils.interruption import ignore_stop_signals
from madm_utils.metrics import confusion_matrix, scores
from madm_utils.modeling_madm import MADMModel

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
    stop: Callable[[], bool] | None = None,
    **progress: Any,
) -> np.ndarray | None:
    """Confusion matrix of a model over labelled images. Collective: every process calls it, with equal arguments.

    The model is left as it was: its modes, its running statistics and all random states are untouched. Processes
    without images of their own compute too, because forward passes of a sharded model are collective.

    Args:
        model: the student or teacher model itself, not the wrapper that `accelerator.prepare` puts around it.
        dataset: labelled images, whole.
        batch_size, num_images, num_workers, stop, progress: see `each_batch`.

    Returns:
        Confusion matrix over all processes, int64 (K+1, K+1), as `metrics.scores` takes it; None after `stop`.

    Raises:
        UserError: an image that cannot be read, labels that are no class of the task, or an output that is not
            finite; on all processes.
    """
    num_classes = model.task.num_classes
    confusion = torch.zeros((num_classes + 1,) * 2, dtype=torch.int64, device=accelerator.device)

    def count(batch: dict[str, Any], counted: bool) -> None:
        with torch.no_grad(), accelerator.autocast():
            logits = finite(model(batch["image"].to(accelerator.device) / 255).logits)
        if not counted:
            return
        for label, index, one in zip(batch["label"], batch["index"], logits, strict=True):
            prediction = resized_rows(one, tuple(label.shape), 0, len(label)).argmax(0)
            confusion.add_(counted_pixels(prediction, label, num_classes, dataset.file_name(index)))

    with evaluation_mode(model), main_statistics(model, accelerator):
        if not each_batch(count, dataset, accelerator, batch_size, num_images, num_workers, stop, **progress):
            return None
    return accelerator.reduce(confusion, reduction="sum").cpu().numpy()


def counted_pixels(prediction: Tensor, label: Tensor, num_classes: int, file_name: str) -> Tensor:
    """`metrics.confusion_matrix` of one image on the device of the prediction; `UserError` names the file."""
    try:
        return confusion_matrix(prediction, label.to(prediction.device), num_classes)
    except UserError as error:
        raise UserError(f"{file_name}: {error}") from None


def each_batch(
    handle: Callable[[dict[str, Any], bool], None],
    dataset: EvaluationDataset,
    accelerator: Accelerator,
    batch_size: int = 1,
    num_images: int | None = None,
    num_workers: int = 0,
    stop: Callable[[], bool] | None = None,
    **progress: Any,
) -> bool:
    """Let the processes share the batches of a dataset. Collective: every process calls it, with equal arguments.

    Process r of n takes the batches r, r + n, r + 2n, ...: no image counts twice, every batch holds the same images
    for any n (rounding depends on the batch). A process whose batches run out is handed another one that does not
    count, so that all take part in what `handle` does together.

    Args:
        handle: called with a batch of `dataset.collate`, and whether it counts.
        dataset: labelled images.
        batch_size: images per batch.
        num_images: only the first so many; default: all.
        num_workers: loader processes.
        stop: asked after every batch; as soon as it is true on one process all of them give up.
        progress: of the progress bar (`tqdm`) of the main process.

    Returns:
        Whether all batches were handled; False after `stop`.

    Raises:
        UserError: of `handle` or of reading an image; on all processes.
    """
    loader, counted = _share_of_process(dataset, accelerator, batch_size, num_images or len(dataset), num_workers)
    options = {"desc": "evaluate", "unit": "image", "disable": not accelerator.is_main_process, **progress}
    with tqdm(total=sum(map(len, counted)), **options) as bar:
        arriving = iter(loader)
        for position in range(len(loader)):
            problem = ""
            try:
                handle(next(arriving), position < len(counted))
                if position < len(counted):
                    bar.update(len(counted[position]))
            except UserError as error:
                problem = str(error)
            status = _agree(_FAILED if problem else _STOP if stop is not None and stop() else _GO_ON, accelerator)
            if status == _FAILED:
                raise UserError(next(filter(None, gather_object([problem]))))
            if status == _STOP:
                return False
    return True


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
