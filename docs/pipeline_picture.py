#!/usr/bin/env python
"""Draw docs/images/pipeline.png: an image and everything the pipeline returns for it.

python docs/pipeline_picture.py --model_path outputs/depth --image street.png
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def main() -> None:
    """Draw as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", required=True, help="trained model")
    parser.add_argument("--image", required=True, help="image of its modality")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/images/pipeline.png")
    args = parser.parse_args()

    import numpy as np

    from madm_utils import MADMPipeline
    from madm_utils.images import read_image
    from madm_utils.visualization import picture_grid

    pipe = MADMPipeline.from_pretrained(args.model_path)
    output = pipe(args.image, return_confidence=True, return_color=True, return_overlay=True)
    confidence = (255 * output.confidence[0]).round().astype(np.uint8)
    pictures = [read_image(args.image), output.color[0], output.overlay[0], confidence]
    captions = ["image", "label map", "overlay", "confidence (white: 1)"]
    legend = dict(zip(pipe.class_names, pipe.palette, strict=True))
    picture_grid([[np.asarray(p) for p in pictures]], captions, legend=legend, cell_width=256).save(args.output)
    print(args.output)


if __name__ == "__main__":
    main()
