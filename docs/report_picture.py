#!/usr/bin/env python
"""Draw docs/images/report.png: the upper part of a report.html, with the pointer on an image, in headless Chromium.

python docs/report_picture.py --report outputs/comparison/report.html
"""

import argparse
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def main() -> None:
    """Draw as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", required=True, type=Path, help="report.html of eval_madm.py")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/images/report.png")
    args = parser.parse_args()
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        parser.error(f"needs a browser: none of {', '.join(BROWSERS)} is installed")

    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(args.report.resolve().as_uri())
        page.wait_for_selector("#panes[data-image]")
        frame = page.locator("#panes figure .frame").first.bounding_box()
        page.mouse.move(frame["x"] + 0.4 * frame["width"], frame["y"] + 0.47 * frame["height"])
        # Down to the end of the viewer, whatever its height is.
        viewer = page.locator("#viewer").bounding_box()
        height = viewer["y"] + viewer["height"] + 10
        page.screenshot(path=args.output, full_page=True, clip={"x": 0, "y": 0, "width": 1280, "height": height})
        browser.close()
    print(args.output)


if __name__ == "__main__":
    main()
