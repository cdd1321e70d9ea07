"""What is measured of one model on one split: counts per image, and the numbers of `metrics.json` that follow.

Every score is a function of counts that add up over images: pixels per class, pixels per class near outlines, pixels
per confidence. An image needs 6 K + 45 numbers of 8 bytes (K = 11: 0.9 kB; 1897 images: 1.7 MB), and nothing else of
it is kept but a few compressed pictures.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from madm_utils.bootstrap import LEVEL, RESAMPLES, SEED, interval, resampled_sums
from madm_utils.boundary_iou import BAND_WIDTH, boundary_counts
from madm_utils.calibration import BINS, calibration_counts, calibration_error, reliability_table
from madm_utils.datasets import EvaluationDataset
from madm_utils.evaluation import counted_pixels, each_batch
from madm_utils.inference import Predictor
from madm_utils.metrics import class_counts, class_iou, count_scores, defined, mean_scores, scores
from madm_utils.sample_pictures import NUM_WORST, Sample, SampleKeeper

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class ImageCounts:
    """Counts of one image, int64."""

    index: int
    file_name: str
    condition: str
    sequence: str
    pixels: np.ndarray
    """(3, K) of `metrics.class_counts`."""
    boundary: np.ndarray
    """(3, K) of `boundary_iou.boundary_counts`."""
    calibration: np.ndarray
    """(3, BINS) of `calibration.calibration_counts`."""

    def iou(self) -> float:
        """Mean IoU in percent over the classes that are labelled in this image; NaN without labels."""
        iou = class_iou(self.pixels)
        return float(np.nanmean(iou)) if np.isfinite(iou).any() else float("nan")


@dataclass(frozen=True)
class Measurement:
    """One model on the images of one split."""

    confusion: np.ndarray
    """int64 (K+1, K+1) of `metrics.confusion_matrix` over all images."""
    images: list[ImageCounts]
    """In the order of the split."""
    samples: dict[int, Sample]
    """Compressed pictures by index: those asked for and the worst ones."""

    def stacked(self, name: str) -> np.ndarray:
        """`pixels`, `boundary` or `calibration` of all images, (N, 3, ...)."""
        return np.stack([getattr(image, name) for image in self.images])

    def worst(self) -> list[ImageCounts]:
        """The images with the lowest IoU, lowest first; pictures of them are in `samples`."""
        labelled = [image for image in self.images if not np.isnan(image.iou())]
        return sorted(labelled, key=lambda image: (image.iou(), image.index))[:NUM_WORST]


def measure(
    predictor: Predictor,
    num_classes: int,
    dataset: EvaluationDataset,
    accelerator: "Accelerator",
    pictures_of: Collection[int] = (),
    **loop: Any,
) -> Measurement:
    """Run a model over labelled images. Collective; every process returns the same, for any number of processes.

    Args:
        predictor: of the model.
        num_classes: K of its task.
        dataset: labelled images of the task.
        accelerator: says which of the processes this is.
        pictures_of: indices of images whose pictures are kept.
        loop: further arguments of `evaluation.each_batch`.

    Raises:
        UserError: an image that cannot be read, labels that are no class of the task, or an output that is not
            finite; on all processes.
    """
    from accelerate.utils import gather_object

    confusion = torch.zeros((num_classes + 1,) * 2, dtype=torch.int64, device=accelerator.device)
    mine: list[ImageCounts] = []
    keeper = SampleKeeper(pictures_of)

    def count(batch: dict[str, Any], counted: bool) -> None:
        if not counted:
            return
        images = [Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()) for image in batch["image"]]
        with accelerator.autocast():
            predictions = predictor(images, [tuple(label.shape) for label in batch["label"]], confidence=True)
        for k, prediction in enumerate(predictions):
            index, label = batch["index"][k], batch["label"][k].to(accelerator.device)
            file_name, classes = dataset.file_name(index), prediction.label_map
            of_image = counted_pixels(classes, label, num_classes, file_name)
            confusion.add_(of_image)
            image = ImageCounts(
                index,
                file_name,
                batch["condition"][k],
                batch["sequence"][k],
                class_counts(of_image),
                boundary_counts(classes, label, num_classes).cpu().numpy(),
                calibration_counts(prediction.confidence, classes, label).cpu().numpy(),
            )
            mine.append(image)
            keeper.offer(image.iou(), index, file_name, batch["image"][k], label, classes)

    each_batch(count, dataset, accelerator, **loop)
    total = accelerator.reduce(confusion, reduction="sum").cpu().numpy()
    everyone = gather_object([(mine, keeper.samples())])
    images = sorted((image for part, _ in everyone for image in part), key=lambda image: image.index)
    samples = {index: sample for _, part in everyone for index, sample in part.items()}
    wanted = {*pictures_of, *(image.index for image in Measurement(total, images, {}).worst())}
    return Measurement(total, images, {index: samples[index] for index in sorted(wanted)})


def metrics_of(measurement: Measurement, class_names: Sequence[str]) -> dict[str, Any]:
    """What `metrics.json` says about a measurement, beside what was measured."""
    boundary = count_scores(measurement.stacked("boundary").sum(0), class_names)
    calibration = measurement.stacked("calibration").sum(0)
    return {
        **scores(measurement.confusion, class_names),
        "confusion_matrix": measurement.confusion[:-1, :-1].tolist(),
        "class_names": list(class_names),
        "boundary_iou": {
            "miou": boundary["miou"],
            "per_class": {name: row["iou"] for name, row in boundary["per_class"].items()},
            "band_width": BAND_WIDTH,
        },
        "calibration": {
            "ece": defined(calibration_error(calibration)),
            "num_bins": BINS,
            "bins": reliability_table(calibration),
        },
        "confidence_intervals": confidence_intervals(measurement),
        "conditions": condition_scores(measurement, class_names),
        "worst_images": [
            {"index": image.index, "file_name": image.file_name, "iou": image.iou()} for image in measurement.worst()
        ],
    }


def confidence_intervals(measurement: Measurement) -> dict[str, Any]:
    """[low, high] in percent of the scores of a split, by bootstrap over its images."""
    resampled: dict[str, np.ndarray] = mean_scores(resampled_sums(measurement.stacked("pixels")))
    resampled["boundary_iou"] = mean_scores(resampled_sums(measurement.stacked("boundary")))["miou"]
    resampled["ece"] = calibration_error(resampled_sums(measurement.stacked("calibration")))
    return {
        "level": LEVEL,
        "num_resamples": RESAMPLES,
        "seed": SEED,
        **{name: interval(values) for name, values in resampled.items()},
    }


def condition_scores(measurement: Measurement, class_names: Sequence[str]) -> dict[str, Any] | None:
    """Scores of the images of each weather or time of day, or else of each sequence; `None` where all are alike.

    `column` says which it is; `groups` has `num_images` and the scores of `metrics.scores` by name.
    """
    for column in ("condition", "sequence"):
        names = sorted({getattr(image, column) for image in measurement.images})
        if len(names) > 1:
            break
    else:
        return None
    groups = {}
    for name in names:
        counts = [image.pixels for image in measurement.images if getattr(image, column) == name]
        groups[name or "(none)"] = {"num_images": len(counts), **count_scores(np.sum(counts, axis=0), class_names)}
    return {"column": column, "groups": groups}
