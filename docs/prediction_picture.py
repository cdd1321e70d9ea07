#!/usr/bin/env python
"""Draw docs/images/prediction.png: images of a folder and what `predict_madm.py --save_confidence` wrote for them.

python docs/prediction_picture.py --input photos --predictions predictions
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def main() -> None:
    """Draw as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, type=Path, help="folder of PNG images")
    parser.add_argument("--predictions", required=True, type=Path, help="--output_dir of predict_madm.py")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/images/prediction.png")
    args = parser.parse_args()

    import numpy as np
    from PIL import Image

    from madm_utils.visualization import picture_grid

    rows, names = [], []
    for path in sorted(args.input.glob("*.png")):
        start = args.predictions / path.stem
        files = [path, *(start.with_name(f"{start.name}_{kind}.png") for kind in ("color", "overlay", "confidence"))]
        rows.append([np.asarray(Image.open(file)) for file in files])
        names.append(path.name)
    legend = json.loads((args.predictions / "legend.json").read_text())
    colors = {entry["name"]: entry["color"] for entry in legend.values()}
    captions = ["image", "_color.png", "_overlay.png", "_confidence.png"]
    picture_grid(rows, captions, names, colors, cell_width=256).save(args.output, optimize=True)
    print(args.output)


if __name__ == "__main__":
    main()
