#!/usr/bin/env python
"""Draw docs/images/events.png: one window of simulated events in every representation.

python docs/event_pictures.py
"""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).parent.parent))

from madm_utils.event_recording import close_recording
from madm_utils.event_simulation import FIRST_TIMESTAMP_US, FRAME_US, MovingView, simulate_events, write_recording
from madm_utils.event_simulation import lens_map as simulated_lens
from madm_utils.events import EventSettings, EventWindow
from madm_utils.raw_files import RawPath

OUTPUT = Path(__file__).parent / "images/events.png"
SEED = 12
REPRESENTATIONS = {
    "edge": EventSettings("edge"),
    "count": EventSettings("count"),
    "polarity": EventSettings("polarity"),
    "voxel": EventSettings("voxel"),
    "voxel --event_bins 5": EventSettings("voxel", bins=5),
}
PANEL = (300, 206)
CAPTION, GAP, COLUMNS = 22, 6, 3


def panels() -> dict[str, Image.Image]:
    """Caption -> picture of 640x440."""
    view = MovingView(SEED)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        events = simulate_events(view, 2 * FRAME_US, SEED)
        write_recording(folder, events, FIRST_TIMESTAMP_US, simulated_lens())
        files = [RawPath.on_disk(folder / name) for name in ("events.h5", "rectify_map.h5")]
        start = FIRST_TIMESTAMP_US + FRAME_US
        window = EventWindow(*files, start, start + FRAME_US, height=440)
        shown = {"what the camera sees": Image.fromarray(view.picture(2 * FRAME_US / 1e6)[:440])}
        for caption, settings in REPRESENTATIONS.items():
            shown[caption] = replace(window, settings=settings).load(folder)
        close_recording()
    return shown


def main() -> None:
    """Put the panels side by side and save them."""
    shown = panels()
    width, height = PANEL[0] + GAP, PANEL[1] + CAPTION + GAP
    sheet = Image.new("RGB", (COLUMNS * width - GAP, -(-len(shown) // COLUMNS) * height - GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for number, (caption, picture) in enumerate(shown.items()):
        x, y = number % COLUMNS * width, number // COLUMNS * height
        draw.text((x + 2, y + 2), caption, fill="black", font=font)
        sheet.paste(picture.convert("RGB").resize(PANEL, Image.Resampling.BOX), (x, y + CAPTION))
    # 128 colours look the same and halve the file.
    sheet.quantize(128, dither=Image.Dither.NONE).save(OUTPUT, optimize=True)
    print(f"{OUTPUT}: {OUTPUT.stat().st_size // 1024} KB")


if __name__ == "__main__":
    main()
