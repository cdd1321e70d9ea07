"""The page: in headless Chromium on an app that was started from what `space/upload.sh` puts onto a Space.

gradio lives in an environment of its own (`make venv-demo`): MADM_DEMO_PYTHON names its interpreter, the default is
`.venv-demo/bin/python`. Without it, without playwright or without a browser, the tests of the page are skipped; those
of uploads, of what the browser is sent and of the Space's files are not.
"""

import base64
import io
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import browser
import numpy as np
import pytest
import yaml
from hub_server import WRITE_TOKEN, HubServer
from PIL import Image
from tiny_model import write_model

import demo_app
from madm_utils import MADMPipeline
from madm_utils.app_files import read_upload, write_downloads
from madm_utils.app_models import load_models, shown_names
from madm_utils.app_viewer import DISPLAY_SIDE, Segmentation, message_value, viewer_value
from madm_utils.cli import UserError
from madm_utils.scenes import render_scene, scene_seed

chromium = browser.chromium  # a fixture
REPOSITORY = Path(demo_app.__file__).parent
RAMP = np.array([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]])  # viridis


START = """
import gc, runpy, signal

def an_hour_passes(*_):
    import gradio
    from gradio.route_utils import delete_files_created_by_app
    for page in [each for each in gc.get_objects() if isinstance(each, gradio.Blocks)]:
        assert page.delete_cache == (900, 3600)
        delete_files_created_by_app(page, age=0)

signal.signal(signal.SIGUSR1, an_hour_passes)
runpy.run_path("demo_app.py", run_name="__main__")
"""  # the page as on a Space; SIGUSR1 has gradio clean up as if all it holds were older than the age


def png(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def scene(modality: str, index: int, height: int = 48, width: int = 64) -> np.ndarray:
    return render_scene(scene_seed(11, "test", modality, index), modality, height, width)[0]


# --- the app, started once ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A local Hub after `space/upload.sh` has put the page onto it."""
    with HubServer() as server:
        home = tmp_path_factory.mktemp("home")
        environment = {
            **os.environ, **server.environment(), "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0", "HF_TOKEN": WRITE_TOKEN,
            "HF_HOME": str(home), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }  # fmt: skip
        command = ["bash", REPOSITORY / "space" / "upload.sh", "me/page", "me/depth", "me/infrared"]
        done = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        yield server


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Paths by name: `several` has a depth and an infrared adapter, `alone` the depth one alone; `broken` is none."""
    folder = tmp_path_factory.mktemp("models")
    write_model(folder / "several" / "alone", "synthetic_to_depth", "lora")
    write_model(folder / "several" / "second", "synthetic_to_infrared", "lora")
    (folder / "broken").mkdir()
    return {"several": folder / "several", "alone": folder / "several" / "alone", "broken": folder / "broken"}


@pytest.fixture(scope="module")
def demo_python():
    python = Path(os.environ.get("MADM_DEMO_PYTHON", REPOSITORY / ".venv-demo" / "bin" / "python")).absolute()
    if not python.exists():
        pytest.skip("needs the environment of the page: make venv-demo, or MADM_DEMO_PYTHON")
    return python


@pytest.fixture(scope="module")
def starting_app(demo_python, chromium, hub, models, tmp_path_factory):
    """Address, process, log and folder for temporary files of the page, which runs from the files of the Space."""
    folder, temporary = tmp_path_factory.mktemp("space"), tmp_path_factory.mktemp("temporary")
    for name, content in hub.repos["spaces/me/page"].files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = " ".join(map(str, models.values()))
    environment = {
        **os.environ, "SPACE_ID": "me/page", "MADM_MODELS": paths,
        "GRADIO_SERVER_PORT": str(port), "GRADIO_SERVER_NAME": "127.0.0.1", "OMP_NUM_THREADS": "1",
        "TMPDIR": str(temporary), "HF_HUB_OFFLINE": "1", "PYTHONPATH": "",
    }  # fmt: skip
    log = folder / "log.txt"
    with log.open("w") as output:
        process = subprocess.Popen(
            [demo_python, "-c", START], cwd=folder, env=environment, stdout=output, stderr=output
        )
    try:
        yield f"http://127.0.0.1:{port}", process, log, temporary
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=20)
    assert "Traceback" not in log.read_text(), log.read_text()
    assert list(temporary.glob("madm-demo-*")) == []  # no upload outlives the app


@pytest.fixture(scope="module")
def expected(models, starting_app):
    """The pipeline of `several`, to compare with; its depth adapter is `alone`. Loaded while the app starts."""
    return MADMPipeline.from_pretrained(models["several"])


@pytest.fixture(scope="module")
def app(starting_app, expected):
    """Address of the page, which answers."""
    address, process, log, _ = starting_app
    for _ in range(600):
        if process.poll() is not None or answers(address):
            break
        time.sleep(0.2)
    assert process.poll() is None, log.read_text()
    return address


@pytest.fixture(scope="module")
def page(chromium, app):
    """The page of one visitor, opened once: what a test chooses stays for the next. `problems` as in `browser.page`.

    Drawing costs the processor much: the window is small, and there are no animations.
    """
    context = chromium.new_context(viewport={"width": 900, "height": 600}, reduced_motion="reduce")
    context.set_default_timeout(15_000)
    page = context.new_page()
    page.problems = []
    page.on("console", lambda note: page.problems.append(note.text) if note.type == "error" else None)
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("request", lambda request: page.problems.extend(browser._leaving(request.url)))
    open_page(page, app)
    yield page
    context.close()


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5) as reply:
            return reply.status == 200
    except OSError:
        return False


def run_pipeline(pipe: MADMPipeline, modality: str, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    pipe.set_adapters(modality)
    pipe.set_progress_bar_config(disable=True)
    output = pipe(Image.fromarray(image), return_confidence=True)
    return output.label_maps[0], output.confidence[0]


def open_page(page, address):
    page.goto(address)
    page.wait_for_selector("#run")


def clear(page) -> None:
    if page.get_by_label("Clear").count():
        page.get_by_label("Clear").click()
        page.wait_for_selector("#viewer .hint")


def upload(page, name: str, content: bytes) -> None:
    clear(page)  # the component takes a file only while it has none
    file = {"name": name, "mimeType": "application/octet-stream", "buffer": content}
    page.locator("#upload input[type=file]").set_input_files(file)


def segment(page, name: str, content: bytes, panels: int = 1) -> None:
    upload(page, name, content)
    page.wait_for_selector("#viewer canvas")
    page.click("#run")
    page.wait_for_selector("#viewer .legend")
    assert page.locator("#viewer figure").count() == panels


def choose(page, label: str, option: str) -> None:
    page.get_by_label(label, exact=True).click()
    page.get_by_role("option", name=option, exact=True).click()


def shown(page, panel: int = 0) -> np.ndarray:
    """Pixels on the canvas, uint8 (H, W, 3)."""
    script = "c => [c.width, c.height, Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data)]"
    width, height, data = page.locator("#viewer canvas").nth(panel).evaluate(script)
    return np.array(data, np.uint8).reshape(height, width, 4)[..., :3]


def set_opacity(page, percent: int) -> None:
    page.get_by_label("Opacity").fill(str(percent))


def download(page, button: str) -> tuple[str, np.ndarray]:
    with page.expect_download() as started:
        page.get_by_role("button", name=button, exact=True).click()
    return started.value.suggested_filename, np.asarray(Image.open(started.value.path()))


# --- the page --------------------------------------------------------------------------------------------------------


def test_result_is_the_pipelines_in_every_view(page, expected):
    image = scene("depth", 0)
    segment(page, "street.png", png(image))
    pipe = expected
    label, confidence = run_pipeline(pipe, "depth", image)
    assert len(np.unique(label)) > 2  # otherwise the comparisons below would prove little

    name, pixels = download(page, "Label PNG")
    assert name == "street_label.png" and np.array_equal(pixels, label)
    name, pixels = download(page, "Colour PNG")
    assert name == "street_color.png" and np.array_equal(pixels, np.array(pipe.palette, np.uint8)[label])

    caption = page.locator("#viewer figcaption").inner_text()
    assert "several · depth" in caption and "street.png: 64 × 48 pixels" in caption
    assert re.search(r"model \d+\.\d\d s", caption) and f"mean confidence {100 * confidence.mean():.1f} %" in caption
    legend = page.locator("#viewer .legend label").all_inner_texts()
    assert [line.split("\n")[0] for line in legend] == list(pipe.class_names)
    shares = np.bincount(label.ravel(), minlength=len(pipe.class_names)) / label.size
    for line, share in zip(legend, shares, strict=True):
        assert line.endswith("< 0.1 %" if 0 < share < 0.001 else f"{100 * share:.1f} %")

    # Opacity, classes and views change in the browser alone.
    requests = []

    def note(request):
        requests.append(request.url)

    page.on("request", note)

    set_opacity(page, 0)
    base = shown(page)
    assert np.abs(base.astype(int) - image).mean() < 3  # lossy, but the image
    set_opacity(page, 100)
    color = np.array(pipe.palette, np.uint8)[label]
    assert np.array_equal(shown(page), color)
    set_opacity(page, 50)
    assert np.abs(shown(page) - (base / 2 + color / 2)).max() <= 0.5

    set_opacity(page, 100)
    most = int(np.bincount(label.ravel()).argmax())
    box = page.get_by_role("checkbox", name=pipe.class_names[most])
    box.press("Space")  # by keyboard, as some people have to
    assert np.array_equal(shown(page), np.where((label == most)[..., None], base, color))
    page.get_by_text("Hide all").click()
    assert np.array_equal(shown(page), base)
    page.get_by_text("Show all").click()
    assert box.is_checked() and np.array_equal(shown(page), color)

    page.get_by_label("Confidence", exact=True).check()
    position = np.round(255 * confidence) / 255 * (len(RAMP) - 1)
    heat = np.stack([np.interp(position, range(len(RAMP)), channel) for channel in RAMP.T], axis=-1)
    assert np.abs(shown(page) - heat).max() <= 0.5 + 1e-3
    page.get_by_label("Image only").check()
    assert np.array_equal(shown(page), base)
    page.remove_listener("request", note)
    assert requests == [] and page.problems == []


def test_compares_models_and_modalities(page, expected):
    image = scene("infrared", 0)
    choose(page, "Modality", "infrared")
    page.get_by_label("Compare with a second model").check()
    assert page.get_by_label("Model to compare with").input_value() == "alone"
    segment(page, "heat.png", png(image), panels=2)
    labels, class_names, palettes = [], [], []
    for modality in ("infrared", "depth"):
        labels.append(run_pipeline(expected, modality, image)[0])
        class_names.append(np.array(expected.class_names))
        palettes.append(np.array(expected.palette, np.uint8))
    for letter, label in zip("AB", labels, strict=True):
        name, pixels = download(page, f"Label PNG of {letter}")
        assert name == f"heat_{letter}_label.png" and np.array_equal(pixels, label)
    assert download(page, "Colour PNG of B")[0] == "heat_B_color.png"

    # The two have different lists of classes: what counts is the name.
    same = class_names[0][labels[0]] == class_names[1][labels[1]]
    assert 0 < same.mean() < 1
    assert f"{100 * same.mean():.1f} % of the pixels" in page.locator("#viewer .agreement").inner_text()
    set_opacity(page, 0)
    base = shown(page)
    set_opacity(page, 100)
    page.get_by_label("Differences").check()
    for panel in range(2):
        assert np.array_equal(shown(page, panel), np.where(same[..., None], base, np.uint8([214, 39, 140])))

    # Another model offers its own modalities, and hides the difference that no second panel shows.
    choose(page, "Model", "alone")
    page.wait_for_function("document.querySelector('#modality0 input').value == 'depth'")
    page.get_by_label("Compare with a second model").uncheck()
    segment(page, "heat.png", png(image))
    assert np.array_equal(download(page, "Label PNG")[1], labels[1])
    assert np.array_equal(shown(page), palettes[1][labels[1]])
    assert page.locator("#download2").count() == 0 and page.problems == []


def test_examples_and_messages(page, models):
    clear(page)
    missing = page.locator("#failures").inner_text()
    assert "Models that could not be loaded" in missing and str(models["broken"]) in missing

    page.click("#run")
    assert "Choose an image first" in page.get_by_role("alert").inner_text()
    page.locator("#infrared").click()
    page.wait_for_selector("#viewer canvas")
    assert page.get_by_label("Modality", exact=True).input_value() == "infrared"
    assert "infrared.png" in page.locator("#viewer figcaption").inner_text()

    upload(page, "cut.png", png(scene("depth", 0))[:400])
    alert = page.locator("#viewer [role=alert]")
    alert.wait_for()
    text = alert.inner_text()
    assert text.startswith("cut.png: cannot be read as an image") and "/" not in text
    page.click("#run")
    page.wait_for_timeout(300)
    assert page.locator("#viewer canvas").count() == 0 and alert.inner_text() == text
    # and the page goes on
    segment(page, "one.png", png(np.full((1, 1), 7, np.uint8)))
    assert download(page, "Label PNG")[1].shape == (1, 1)


def test_two_visitors_at_once_get_their_own_results(app, page, expected):
    images = [scene("depth", 3), scene("depth", 4, 64, 48)]
    other = page.context.new_page()
    open_page(other, app)
    choose(page, "Model", "several")
    choose(page, "Modality", "depth")
    for visitor, image in zip((page, other), images, strict=True):
        upload(visitor, "street.png", png(image))
        visitor.wait_for_selector("#viewer canvas")
    for visitor in (page, other):
        visitor.click("#run")
    for visitor, image in zip((page, other), images, strict=True):
        visitor.wait_for_selector("#viewer .legend")
        label, _ = run_pipeline(expected, "depth", image)
        assert np.array_equal(download(visitor, "Label PNG")[1], label)
    other.close()


def test_what_an_hour_leaves(page, app, starting_app):
    _, process, _, temporary = starting_app
    upload(page, "old.png", png(scene("depth", 0)))
    page.wait_for_selector("#viewer canvas")
    assert len(list(temporary.glob("madm-demo-*/*/old.png"))) == 1
    process.send_signal(signal.SIGUSR1)
    for _ in range(150):
        if not list(temporary.glob("madm-demo-*/*/old.png")):
            break
        time.sleep(0.1)
    page.click("#run")
    alert = page.locator("#viewer [role=alert]")
    alert.wait_for()
    assert alert.inner_text() == "old.png was deleted after an hour; choose it again."
    for kind, path in demo_app.EXAMPLES.items():  # their pictures stay
        address = urllib.parse.urljoin(app, page.locator(f"#{kind} img").get_attribute("src"))
        with urllib.request.urlopen(address) as reply:
            assert reply.read() == path.read_bytes()
    page.locator("#depth").click()
    page.wait_for_selector("#viewer canvas")
    assert page.problems == []


def test_only_uploads_and_examples_can_be_fetched(app):
    def status(path: str) -> int:
        try:
            with urllib.request.urlopen(f"{app}/gradio_api/file={path}") as reply:
                return reply.status
        except urllib.error.HTTPError as error:
            return error.code

    assert status(f"{REPOSITORY}/demo_app.py") == status("demo_app.py") == 403
    assert status("/etc/passwd") == status("../../etc/passwd") == status("space/examples/../../demo_app.py") == 403
    with urllib.request.urlopen(f"{app}/gradio_api/info") as reply:
        assert reply.read() == b'{"named_endpoints":{},"unnamed_endpoints":{}}'


# --- without the page ------------------------------------------------------------------------------------------------


def test_space_has_what_the_page_needs_and_no_more(hub):
    repo = hub.repos["spaces/me/page"]
    assert len(repo.commits) == 1  # every commit would build the Space again
    assert hub.variables["spaces/me/page"] == {"MADM_MODELS": "me/depth me/infrared"}
    assert {name.split("/")[0] for name in repo.files} == {
        "README.md", "demo_app.py", "madm_utils", "requirements.txt", "space"
    }  # fmt: skip
    assert not [name for name in repo.files if "__pycache__" in name]
    assert sum(map(len, repo.files.values())) < 2e6
    assert repo.files["requirements.txt"] == (REPOSITORY / "requirements-demo.txt").read_bytes()
    header = yaml.safe_load(repo.files["README.md"].decode().split("---")[1])
    assert header["sdk"] == "gradio" and header["app_file"] in repo.files
    assert header["models"] == ["me/depth", "me/infrared"]
    assert f"gradio=={header['sdk_version']}\n" in (REPOSITORY / "constraints-demo.txt").read_text()


def test_upload_script_without_a_model():
    done = subprocess.run(
        ["bash", REPOSITORY / "space" / "upload.sh", "me/page"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "usage: bash space/upload.sh USER/SPACE MODEL" in done.stderr


@pytest.mark.parametrize("index, modality", [(1, "depth"), (0, "infrared"), (0, "event")])
def test_examples_are_drawn_by_the_suite(index, modality):
    drawn, _ = render_scene(scene_seed(7, "test", modality, index), modality, 288, 384)
    assert np.array_equal(np.asarray(Image.open(demo_app.EXAMPLES[modality])), drawn[..., 0])


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("zero.png", b"", "zero.png is empty (0 bytes)"),
        ("note.png", b"Not an image", "note.png is no image that can be read; use PNG, JPEG"),
        (
            "vector.eps",
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
            "vector.eps is no image that can be read",
        ),
        ("nan.tiff", png(np.float32([[0.5, np.nan]]), "TIFF"), "nan.tiff: 1 values are not finite"),
        ("cut.jpg", png(scene("depth", 0), "JPEG")[:-200], "cut.jpg: cannot be read as an image"),
    ],
)
def test_uploads_that_cannot_be_used(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as raised:
        read_upload(str(path))
    assert str(raised.value).startswith(message) and str(tmp_path) not in str(raised.value)


def test_upload_that_has_been_deleted(tmp_path):
    with pytest.raises(UserError) as raised:
        read_upload(str(tmp_path / "street.png"))
    assert str(raised.value) == "street.png was deleted after an hour; choose it again."


@pytest.mark.parametrize("side", [7072, 20_000])  # 50.01 megapixels, and what Pillow itself refuses
def test_uploads_that_are_too_large(tmp_path, side):
    path = tmp_path / "large.bmp"
    size = side.to_bytes(4, "little")
    path.write_bytes(b"BM" + bytes(8) + b"\x36\0\0\0\x28\0\0\0" + size + size + b"\x01\0\x18\0" + bytes(24))
    with pytest.raises(UserError, match="large.bmp has more than 50 megapixels; make it smaller"):
        read_upload(str(path))


@pytest.mark.parametrize(
    "pixels, kind, rgb",
    [
        (np.uint8([[9]]), "PNG", [[[9, 9, 9]]]),
        (np.uint16([[0, 257, 65535]]), "PNG", [[[0, 0, 0], [1, 1, 1], [255, 255, 255]]]),
        (np.uint8([[[1, 2, 3, 4]]]), "PNG", [[[1, 2, 3]]]),
        (np.float32([[0.0, 1.0]]), "TIFF", [[[0, 0, 0], [255, 255, 255]]]),
    ],
)
def test_uploads_of_any_defined_scale(tmp_path, pixels, kind, rgb):
    path = tmp_path / "image"
    path.write_bytes(png(pixels, kind))
    assert np.asarray(read_upload(str(path))).tolist() == rgb


def result(label_map, class_names, palette, title="model · depth") -> Segmentation:
    label_map = np.array(label_map, np.uint8)
    return Segmentation(title, label_map, np.full(label_map.shape, 0.5, np.float32), class_names, palette, 0.25)


def test_results_that_nobody_waited_for_are_deleted(tmp_path):
    one = result([[0]], ("road",), [(1, 2, 3)])
    old, new = (Path(write_downloads("a.png", [one], str(tmp_path))[0]).parent for _ in "12")
    other = tmp_path / "upload"  # gradio's, which cleans up after itself
    other.mkdir()
    for folder, age in ((old, 3601), (new, 3500), (other, 3601)):
        os.utime(folder, (time.time() - age,) * 2)
    files = write_downloads("a.png", [one], str(tmp_path))
    assert not old.exists() and new.exists() and other.exists()
    assert [Path(file).name for file in files] == ["a_label.png", "a_color.png"]


def decoded(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.split(",")[1])))


def test_viewer_value():
    first = result([[0, 0], [1, 2]], ("road", "car", "sky"), [(1, 2, 3), (4, 5, 6), (7, 8, 9)])
    second = result([[1, 1], [1, 0]], ("sky", "road"), [(7, 8, 9), (1, 2, 3)])
    value = viewer_value("a.png", Image.new("RGB", (2, 2)), [first, second])
    assert value["agreement"] == 0.75  # road, road and sky; car has another name
    one = value["results"][0]
    assert (value["name"], value["width"], one["seconds"], one["confidence_mean"]) == ("a.png", 2, 0.25, 0.5)
    assert one["classes"][0] == {"name": "road", "color": [1, 2, 3], "share": 0.5}
    assert np.asarray(decoded(one["labels"])).tolist() == [[0, 0], [1, 2]]
    assert np.asarray(decoded(one["confidence"])).tolist() == [[128, 128]] * 2
    assert viewer_value("a.png", Image.new("RGB", (2, 2)), [first, first])["agreement"] == 1
    assert viewer_value("a.png", Image.new("RGB", (2, 2)), [first])["agreement"] is None
    assert message_value("no") == {"message": "no", "image": None, "results": []}


@pytest.mark.parametrize("width, height, shown_size", [(4000, 2, (1280, 1)), (1, 2560, (1, 1280)), (7, 5, (7, 5))])
def test_large_images_are_shown_smaller(width, height, shown_size):
    one = result(np.full((height, width), 1), ("a", "b"), [(0, 0, 0), (9, 9, 9)])
    value = viewer_value("a.png", Image.new("RGB", (width, height)), [one])
    assert max(shown_size) <= DISPLAY_SIDE and (value["width"], value["height"]) == (width, height)
    assert {decoded(url).size for url in (value["image"], value["results"][0]["labels"])} == {shown_size}
    assert np.unique(np.asarray(decoded(value["results"][0]["labels"]))).tolist() == [1]


def test_names_on_the_page_tell_the_models_apart(tmp_path):
    assert shown_names(["runs/a/depth"]) == ["depth"]
    assert shown_names(["runs/a/depth", "runs/b/depth"]) == ["a/depth", "b/depth"]
    assert shown_names(["me/depth", "me/event"]) == ["depth", "event"]
    with pytest.raises(UserError, match="names a model more than once"):
        shown_names([str(tmp_path), f"{tmp_path}/."])


def test_models_that_cannot_be_loaded(tmp_path, models, monkeypatch):
    monkeypatch.delenv("SPACE_ID", raising=False)
    with pytest.raises(UserError, match="no model to show; give --model_path or set .* MADM_MODELS"):
        demo_app.main([])
    missing = str(tmp_path / "missing")
    with pytest.raises(UserError, match=missing):
        load_models([missing])
    with pytest.raises(UserError, match="--device nonsense cannot be used: "):
        load_models([str(models["alone"])], "nonsense")
    kept = load_models([missing, str(models["alone"])], keep_going=True)
    assert list(kept.pipelines) == ["alone"] and len(kept.failures) == 1 and missing in kept.failures[0]


def test_models_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("MADM_MODELS", "me/a  me/b")
    assert demo_app.parse_args([]).model_path == ["me/a", "me/b"]
    assert demo_app.parse_args(["--model_path", "c"]).model_path == ["c"]


@pytest.mark.parametrize("port", ["99999", "0", "-1", "http"])
def test_ports_that_do_not_exist(port, capsys):
    with pytest.raises(SystemExit) as ended:
        demo_app.parse_args(["--server_port", port])
    assert ended.value.code == 2
    assert f"--server_port: expected a number from 1 to 65535, got {port}" in capsys.readouterr().err
    assert demo_app.parse_args(["--server_port", "65535"]).server_port == 65535
