#!/usr/bin/env python
"""Draw docs/images/demo_app.png: the page with an example and what two models see in it.

.venv-demo/bin/python demo_app.py --model_path outputs/demo/adapted outputs/demo/source_only
python docs/app_picture.py --address http://127.0.0.1:7860

Needs playwright (requirements-dev.txt) and a Chromium of the system.
"""

import argparse
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def main() -> None:
    """Draw as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", default="http://127.0.0.1:7860", help="address of the running page")
    parser.add_argument("--example", choices=("depth", "infrared", "event"), default="infrared")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/images/demo_app.png")
    args = parser.parse_args()
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        sys.exit(f"needs a browser: none of {', '.join(BROWSERS)} is installed")

    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1180, "height": 900})
        page.goto(args.address)
        page.click(f"#{args.example}")
        page.wait_for_selector("#viewer canvas")
        page.get_by_label("Compare with a second model").check()
        choose(page, "Modality to compare with", args.example)
        page.click("#run")
        page.wait_for_selector("#viewer .legend")
        page.wait_for_selector("#download3")
        canvas = page.locator("#viewer canvas").first
        box = canvas.bounding_box()
        canvas.hover(position={"x": box["width"] / 2, "y": 0.85 * box["height"]})  # names the class under the pointer
        page.screenshot(path=args.output, full_page=True)
        browser.close()
    print(args.output)


def choose(page, label: str, option: str) -> None:
    """Choose an entry of a drop-down list."""
    page.get_by_label(label, exact=True).click()
    page.get_by_role("option", name=option, exact=True).click()


if __name__ == "__main__":
    main()
