#!/usr/bin/env python
"""Draw docs/images/data_synthetic.jpg: three synthetic scenes as every sensor sees them, and their labels.

python docs/scenes_picture.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from madm_utils.label_spaces import STREET_CLASSES, STREET_PALETTE
from madm_utils.scenes import MODALITIES, render_scene
from madm_utils.visualization import colorize, picture_grid

OUTPUT = Path(__file__).parent / "images/data_synthetic.jpg"
SEEDS = (1, 4, 6)
WIDTH = 184


def main() -> None:
    rows = []
    palette = [STREET_PALETTE[name] for name in STREET_CLASSES]
    for seed in SEEDS:
        pictures = [render_scene(seed, modality, WIDTH) for modality in MODALITIES]
        rows.append([image for image, _ in pictures] + [colorize(pictures[0][1], palette)])
    picture_grid(rows, [*MODALITIES, "label"], legend=STREET_PALETTE).save(OUTPUT, quality=90)


if __name__ == "__main__":
    main()
