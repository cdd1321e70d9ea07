"""The public datasets: classes, official layouts, encodings of the labels, licences, and where they come from.

A further dataset is a further entry of `RAW_DATASETS`; `raw_search` finds and pairs its files by this description.
Modalities and label sets of one public dataset are entries of their own, because each is prepared data of its own;
`dataset_name` finds them by what they differ in.
"""

from functools import partial

import numpy as np

from madm_utils.cli import UserError
from madm_utils.label_spaces import (
    CITYSCAPES_CLASSES,
    DELIVER_CLASSES,
    FMB_CLASSES,
    GTA5_NUM_LABEL_IDS,
    STREET_CLASSES,
    SYNTHIA_NUM_IDS,
    cityscapes_train_ids,
    deliver_class_ids,
    synthia_train_ids,
)
from madm_utils.raw_descriptions import PUBLISHED, LabelFiles, Licence, RawDataset, RawFile, RawOptions, RawSplit
from madm_utils.raw_labels import palette_ids, polygon_ids, red_16_bit_ids, red_channel_ids
from madm_utils.raw_search import find_files, find_labels, find_root, match_listed_file

__all__ = [
    "PUBLISHED", "RAW_DATASETS", "LabelFiles", "Licence", "RawDataset", "RawFile", "RawOptions", "RawSplit",
    "dataset_name", "find_files", "find_labels", "find_root", "match_listed_file",
]  # fmt: skip

NUM_CITYSCAPES_LABEL_IDS = 34

_ALL_IDS = np.arange(256, dtype=np.uint8)
_TRAIN_IDS = tuple(cityscapes_train_ids(_ALL_IDS).tolist())
_SYNTHIA_TRAIN_IDS = tuple(synthia_train_ids(_ALL_IDS).tolist())
_DELIVER_IDS = tuple(deliver_class_ids(_ALL_IDS).tolist())

_CITYSCAPES_LICENCE = Licence(
    "Non-commercial use; neither the data nor modified versions of it may be passed on, trained models may.",
    "https://www.cityscapes-dataset.com/license/",
    redistribution=False,
)
# Terms that could not be read again while this was written say so; what is unclear counts as forbidden.
_DELIVER_LICENCE = Licence(
    "The code is Apache-2.0, the data has no licence of its own; the owners ask to be contacted about commercial use.",
    "https://github.com/jamycheung/DELIVER",
    redistribution=False,
)
_FMB_LICENCE = Licence(
    "No licence is stated, so it may not be passed on.",
    "https://github.com/JinyuanLiu-CV/SegMiF",
    redistribution=False,
)
_DSEC_LICENCE = Licence(
    "Said to be CC BY-SA 4.0, which is to be verified on the owners' page before anything is passed on.",
    "https://dsec.ifi.uzh.ch",
    redistribution=False,
)
_DARK_ZURICH_LICENCE = Licence(
    "Non-commercial research, not to be passed on, as far as is known; read the terms on the owners' page.",
    "https://www.trace.ethz.ch/publications/2019/GCMA_UIoU/",
    redistribution=False,
)
_GTA5_LICENCE = Licence(
    "Research and education only, as far as is known; the pictures show a commercial game.",
    "https://download.visinf.tu-darmstadt.de/data/from_games/",
    redistribution=False,
)
_SYNTHIA_LICENCE = Licence(
    "CC BY-NC-SA 3.0, as far as is known; read the terms on the owners' page before anything is passed on.",
    "https://synthia-dataset.net",
    redistribution=False,
)


def _cityscapes(split: str, **options) -> RawSplit:
    labels = f"gtFine/{split}/{{sequence}}/{{frame}}_gtFine_"
    return RawSplit(
        f"leftImg8bit/{split}/{{sequence}}/{{frame}}_leftImg8bit.png",
        (
            LabelFiles(labels + "labelTrainIds.png", len(CITYSCAPES_CLASSES)),
            LabelFiles(labels + "labelIds.png", NUM_CITYSCAPES_LABEL_IDS, _TRAIN_IDS),
            LabelFiles(labels + "polygons.json", len(CITYSCAPES_CLASSES), decode=polygon_ids),
        ),
        **options,
    )


def _deliver(name: str, modality: str, folder: str, ending: str) -> RawDataset:
    def split(split: str, labelled: bool, **options) -> RawSplit:
        path = f"{{condition}}/{split}/{{sequence}}/{{frame}}"
        labels = LabelFiles(
            f"semantic/{path}_semantic_front.png", len(DELIVER_CLASSES) + 1, _DELIVER_IDS, red_channel_ids
        )
        return RawSplit(f"{folder}/{path}_{ending}_front.png", (labels,) if labelled else (), **options)

    return RawDataset(
        name,
        "DELIVER",
        DELIVER_CLASSES,
        {
            "train": split("train", False, stored_size=(712, 712), trained=True, published_count=3983),
            "val": split("val", True, published_count=2005, optional=True),
            "test": split("test", True, published_count=1897),
        },
        _DELIVER_LICENCE,
        "DELIVER is a download of about 12 GB that the repository jamycheung/DELIVER on GitHub links to.",
        modality=modality,
        base="deliver",
    )


def _fmb(name: str, modality: str, folder: str) -> RawDataset:
    return RawDataset(
        name,
        "FMB",
        FMB_CLASSES,
        {
            "train": RawSplit(
                f"train/{folder}/{{frame}}.png", stored_size=(512, 683), trained=True, published_count=1220
            ),
            "test": RawSplit(
                f"test/{folder}/{{frame}}.png",
                (LabelFiles("test/Label/{frame}.png", len(FMB_CLASSES)),),
                published_count=280,
            ),
        },
        _FMB_LICENCE,
        "FMB is linked to in the repository JinyuanLiu-CV/SegMiF on GitHub.",
        modality=modality,
        base="fmb",
    )


def _find_recordings(finder: str, *args) -> list[RawFile]:
    from madm_utils import dsec

    return getattr(dsec, finder)(*args)


def _dsec(name: str, class_names: tuple[str, ...]) -> RawDataset:
    labels = f"{len(class_names)}classes"
    return RawDataset(
        name,
        "DSEC",
        class_names,
        {
            "train": RawSplit(
                "69mask_train_edges/{sequence}/{frame}.png",
                stored_size=(512, 768),
                trained=True,
                first_frame=2,
                frame_step=2,
                published_count=4037,
            ),
            "test": RawSplit(
                "69mask_test_edges/{sequence}/{frame}.png",
                # As the published file lists name them, then as the official archives unpack.
                tuple(
                    LabelFiles(f"{folder}/{{frame}}.png", len(class_names))
                    for folder in (
                        f"test_semantic_labels/{{sequence}}/{labels}",
                        f"test_semantic_labels/{{sequence}}/{labels}/data",
                        f"test/{{sequence}}/{labels}/data",
                    )
                ),
                # No events precede the first label, so the published selection leaves frame 0 out.
                first_frame=1,
                published_count=2806,
            ),
        },
        _DSEC_LICENCE,
        "The recordings and semantic labels are at dsec.ifi.uzh.ch, the ready-made edge pictures are shared by MADM's "
        "authors.",
        partial(_find_recordings, "find_dsec_events"),
        modality="event",
        base="dsec",
        landmarks=("{sequence}/events/left/events.h5",),
    )


_DSEC_NIGHT = RawDataset(
    "dsec_night",
    "DSEC_Night",
    CITYSCAPES_CLASSES,
    {
        # CMDA trains on random windows of the native 480x640 pictures.
        "train": RawSplit("", trained=True, fixed_size=True, condition="night", published_count=1692),
        # 18 classes are annotated: truck does not occur.
        "test": RawSplit(
            "",
            (
                LabelFiles(
                    "{sequence}/labels/{name}_{number}_grey_gtFine_labelTrainIds.png",
                    len(CITYSCAPES_CLASSES),
                ),
            ),
            fixed_size=True,
            condition="night",
            published_count=150,
        ),
    },
    _DSEC_LICENCE,
    "The recordings of zurich_city_09_a to 09_e are at dsec.ifi.uzh.ch; warped images and labels are shared by CMDA's "
    "authors (XiaRho/CMDA on GitHub).",
    partial(_find_recordings, "find_dsec_night"),
    other_folders=("DSEC-Night",),
    landmarks=("{sequence}/warp_images/{number}.png", "{sequence}/events/left/events.h5"),
)  # fmt: skip


def _dark_zurich(split: str, labelled: bool, **options) -> RawSplit:
    labels = f"gt/{split}/night/{{sequence}}/{{frame}}_gt_"
    return RawSplit(
        f"rgb_anon/{split}/night/{{sequence}}/{{frame}}_rgb_anon.png",
        (
            LabelFiles(labels + "labelTrainIds.png", len(CITYSCAPES_CLASSES)),
            LabelFiles(labels + "labelIds.png", NUM_CITYSCAPES_LABEL_IDS, _TRAIN_IDS),
        )
        if labelled
        else (),
        condition="night",
        **options,
    )


RAW_DATASETS: dict[str, RawDataset] = {
    dataset.name: dataset
    for dataset in (
        RawDataset(
            "cityscapes",
            "Cityscapes",
            CITYSCAPES_CLASSES,
            {
                "train": _cityscapes("train", stored_size=(512, 1024), trained=True, published_count=2975),
                "val": _cityscapes("val", published_count=500, optional=True),
            },
            _CITYSCAPES_LICENCE,
            "After registration, cityscapes-dataset.com has leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip.",
        ),
        _deliver("deliver", "depth", "depth", "depth"),
        _deliver("deliver_event", "event", "event", "event"),
        _deliver("deliver_lidar", "lidar", "lidar", "lidar"),
        # Depth in three channels: disparity, height, angle.
        _deliver("deliver_hha", "hha", "hha", "depth"),
        _deliver("deliver_rgb", "rgb", "img", "rgb"),
        _fmb("fmb", "infrared", "Infrared"),
        _fmb("fmb_visible", "visible", "Visible"),
        _dsec("dsec", STREET_CLASSES),
        # The ids of the 19classes folders are Cityscapes' trainIds.
        _dsec("dsec_19", CITYSCAPES_CLASSES),
        _DSEC_NIGHT,
        RawDataset(
            "dark_zurich",
            "Dark_Zurich",
            CITYSCAPES_CLASSES,
            {
                # The counts of Dark Zurich are from memory.
                "train": _dark_zurich(
                    "train", False, stored_size=(540, 960), trained=True, published_count=2416
                ),
                "val": _dark_zurich("val", True, published_count=50, optional=True),
                # Its labels are kept on the owners' server.
                "test": _dark_zurich("test", False, published_count=151, optional=True),
            },
            _DARK_ZURICH_LICENCE,
            "trace.ethz.ch has Dark_Zurich_train_anon.zip, Dark_Zurich_val_anon.zip and Dark_Zurich_test_anon.zip.",
        ),
        RawDataset(
            "gta5",
            "GTA5",
            CITYSCAPES_CLASSES,
            {
                # The published resize to 1280x720 keeps the proportions of 1914x1052, which gives 1280x704.
                # The count is from memory.
                "train": RawSplit(
                    "images/{number}.png",
                    (
                        LabelFiles(
                            "labels/{number}.png", GTA5_NUM_LABEL_IDS, _TRAIN_IDS, palette_ids
                        ),
                    ),
                    stored_size=(704, 1280),
                    trained=True,
                    published_count=24966,
                ),
            },
            _GTA5_LICENCE,
            "download.visinf.tu-darmstadt.de/data/from_games has ten zip files of images and ten of labels.",
            other_folders=("gta", "GTAV"),
        ),
        RawDataset(
            "synthia",
            "RAND_CITYSCAPES",
            CITYSCAPES_CLASSES,
            {
                # Trained at its native 1280x760. The count is from memory.
                "train": RawSplit(
                    "RGB/{number}.png",
                    (LabelFiles("GT/LABELS/{number}.png", SYNTHIA_NUM_IDS, _SYNTHIA_TRAIN_IDS, red_16_bit_ids),),
                    trained=True,
                    published_count=9400,
                ),
            },
            _SYNTHIA_LICENCE,
            "synthia-dataset.net has SYNTHIA-RAND-CITYSCAPES as a .rar archive, which has to be unpacked.",
            other_folders=("SYNTHIA", "SYNTHIA-RAND-CITYSCAPES"),
        ),
    )
}  # fmt: skip
"""Name of the prepared data -> layout. The published selections of DELIVER, FMB and DSEC are those of the MADM file
lists (DELIVER and FMB: every file; DSEC: see the frame numbers), those of DSEC_Night CMDA's."""


def dataset_name(dataset: str, modality: str | None = None, label_classes: int | None = None) -> str:
    """Return the entry of `RAW_DATASETS` for a public dataset in one of its modalities and label sets.

    `deliver` in the modality `event` is `deliver_event`, `dsec` with 19 classes `dsec_19`. What is not asked for is as
    in the entry that has the dataset's plain name.

    Raises:
        UserError: there is no such dataset, modality or label set; the message lists what there is.
    """
    if dataset not in RAW_DATASETS:
        raise UserError(f"unknown dataset '{dataset}'; known: {', '.join(RAW_DATASETS)}")
    variants = [entry for entry in RAW_DATASETS.values() if dataset in (entry.name, entry.base)]
    fitting = [
        entry.name
        for entry in variants
        if modality in (None, entry.modality) and label_classes in (None, len(entry.class_names))
    ]
    if not fitting:
        there = ", ".join(f"{entry.modality} with {len(entry.class_names)} classes" for entry in variants)
        asked = [f"modality '{modality}'"] * (modality is not None)
        asked += [f"{label_classes} classes"] * (label_classes is not None)
        raise UserError(f"{dataset} has no {' with '.join(asked)}; there is {there}")
    return dataset if dataset in fitting else fitting[0]
