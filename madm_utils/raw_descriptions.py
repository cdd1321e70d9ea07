"""How a dataset and its files are described: `raw_datasets` has the descriptions, `raw_search` finds files by them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image

from madm_utils.raw_files import RawPath
from madm_utils.raw_labels import single_channel_ids

if TYPE_CHECKING:
    from madm_utils.events import EventSettings, EventWindow
    from madm_utils.raw_files import RawTree


@dataclass(frozen=True)
class LabelFiles:
    """Label files of one kind: where they lie and what their pixel values mean."""

    template: str
    num_ids: int
    """The files hold ids 0..num_ids-1 and 255; anything else is an error."""
    class_ids: tuple[int, ...] | None = None
    """Id 0..255 of the file -> class id, 255 = ignore; `None`: they are the same."""
    decode: Callable[[RawPath], Image.Image] = single_channel_ids
    """File -> 8-bit single-channel picture of its ids; one of `raw_labels`."""


@dataclass(frozen=True)
class RawSplit:
    """One split of a dataset in its official layout."""

    images: str
    """Template of the images; empty where they are only made from event recordings."""
    labels: tuple[LabelFiles, ...] = ()
    """Alternatives, the preferred one first; empty: the split is used without labels and none are looked for."""
    stored_size: tuple[int, int] | None = None
    """(height, width) of the prepared images, the published training size; `None`: native size."""
    trained: bool = False
    """Whether training reads it; splits that are only evaluated are always stored at native size."""
    fixed_size: bool = False
    """Whether it cannot be stored at another size, because its events have the size of the images."""
    first_frame: int = 0
    frame_step: int = 1
    """Of a numbered `{frame}`, the published selection: `first_frame` and every `frame_step`-th after it."""
    published_count: int | None = None
    """Images of the published selection; another number is worth a note, not an error."""
    optional: bool = False
    """Skipped when its images are not there, because neither training nor the published test needs it."""
    condition: str = ""
    """Of all images, where it is no field of the template."""

    def label_endings(self) -> dict[str, LabelFiles]:
        """What the names of each kind of label file end in, e.g. `_gtFine_labelIds.png`."""
        return {files.template.split("}")[-1]: files for files in self.labels}

    def selects(self, frame: str) -> bool:
        """Whether the published selection has this frame."""
        if (self.first_frame, self.frame_step) == (0, 1):
            return True
        offset = int(frame) - self.first_frame if frame.isdecimal() else -1
        return offset >= 0 and offset % self.frame_step == 0


@dataclass(frozen=True)
class Licence:
    """Under which terms the owners give a dataset away."""

    summary: str
    """One sentence."""
    url: str
    redistribution: bool
    """Whether the terms let users pass the (converted) data on; `False` also where nothing says so."""


@dataclass(frozen=True)
class RawOptions:
    """What the user chose about how images are made."""

    events: "EventSettings | None" = None
    """Given: images of event datasets are made from the recordings, even where ready-made ones are there."""


PUBLISHED = RawOptions()


@dataclass(frozen=True)
class RawFile:
    """One image to prepare, with its label where the split has labels."""

    image: "RawPath | EventWindow"
    file_name: str
    """POSIX path of the image relative to the dataset's root, the same on disk and in archives."""
    sequence: str = ""
    frame: str = ""
    condition: str = ""
    label: RawPath | None = None
    label_files: LabelFiles | None = None
    """How `label` is decoded."""
    events: "EventWindow | None" = None
    """What the column `events` is made from, where there is one."""


@dataclass(frozen=True)
class RawDataset:
    """One public dataset in its official layout; one modality of it where it has several."""

    name: str
    """Of the prepared data."""
    folder: str
    """Official name of the dataset's folder; any upper or lower case is accepted."""
    class_names: tuple[str, ...]
    splits: dict[str, RawSplit]
    licence: Licence
    download: str
    """Where the files come from, a sentence."""
    find: "Callable[[RawDataset, str, RawTree, str, RawOptions], list[RawFile]] | None" = None
    """Makes images from recordings: (dataset, split, tree, root as `find_root` gives it, options) -> files."""
    modality: str = "rgb"
    base: str = ""
    """Name of the public dataset, where several entries are made from it."""
    other_folders: tuple[str, ...] = ()
    """Further names under which the folder is known."""
    landmarks: tuple[str, ...] = ()
    """Templates of further files by which the root is recognised."""
