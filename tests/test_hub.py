"""Model cards, and uploads to a local server that speaks the Hub's protocol (`hub_server`).

The client reads `HF_ENDPOINT` when it is imported, so uploads run in subprocesses; they import no torch, which keeps
them quick.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from hub_server import READ_TOKEN, WRITE_TOKEN, HubServer, Repo
from huggingface_hub import ModelCard
from PIL import Image
from tiny_model import base_folder, new_model, write_data, write_model

from madm_utils.cli import UserError
from madm_utils.hub import _link, versions
from madm_utils.model_card import update_model_card, write_model_card
from madm_utils.modeling_madm import MADMModel
from madm_utils.tasks import TASKS
from madm_utils.train_args import parse_train_args, train_parser

ROOT = Path(__file__).parent.parent
SYNTHETIC = "synthetic_to_depth"


def record(task: str = SYNTHETIC, *flags: str, base: str | None = None) -> dict:
    """What `run.json` of a real command line holds."""
    base = base or str(base_folder())
    flags = ["--task", task, "--data_dir", "d", "--output_dir", "o", "--pretrained_model_name_or_path", base, *flags]
    [(args, parsed)] = parse_train_args(train_parser(""), flags)
    settings = {name: value for name, value in vars(args).items() if name != "hub_token"}
    machine = {"mixed_precision": "bf16", "num_processes": 2, "device": "Some GPU", "versions": versions()}
    return {"settings": settings, "task": parsed.to_dict(), **machine}


def scores(task: str = SYNTHETIC, miou: float | None = 12.345) -> dict:
    """What `metrics.json` holds; the first class has no labelled pixels."""
    names = TASKS[task].class_names
    rows = {name: {"iou": 10.0 + k, "acc": 20.0 + k} for k, name in enumerate(names)}
    rows[names[0]] = {"iou": None, "acc": None}
    return {"task": task, "split": "test", "protocol": "paper", "num_images": 7, "miou": miou, "macc": 30.0,
            "pacc": 40.0, "fwiou": None, "per_class": rows}  # fmt: skip


def write_run(folder: Path, *flags: str, task: str = SYNTHETIC) -> Path:
    """A finished run of a tiny LoRA model, with the things that are not to be uploaded."""
    write_model(folder, task, "lora")
    content = record(task, *flags)
    (folder / "run.json").write_text(json.dumps(content))
    (folder / "validation").mkdir()
    for step, color in ((90, "red"), (100, "blue")):
        Image.new("RGB", (8, 8), color).save(folder / f"validation/step-{step}.png")
    (folder / "logs").mkdir()
    (folder / "logs/events").write_text("events")
    write_model_card(folder, {"": content})
    return folder


def files(folder: Path, *left_out: str) -> dict[str, bytes]:
    paths = [p.relative_to(folder) for p in folder.rglob("*") if p.is_file()]
    return {p.as_posix(): (folder / p).read_bytes() for p in paths if p.parts[0] not in left_out}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of the finished run, with two checkpoints."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    for step in (1, 2):
        (folder / f"checkpoint-{step}/segmenter").mkdir(parents=True)
        (folder / f"checkpoint-{step}/segmenter/weights.safetensors").write_bytes(bytes([step]) * 300_000)
        (folder / f"checkpoint-{step}/training_state.json").write_text(f'{{"step": {step}}}')
    return folder


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


# --- model card ------------------------------------------------------------------------------------------------------


def snippet(folder: Path) -> str:
    """The first one: the use of this package."""
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[0]


def execute(folder: Path, place: Path, monkeypatch, capsys) -> tuple[np.ndarray, str]:
    """Run the card's snippet where a reader would: beside the folder and an image."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)).save(place / "image.png")
    monkeypatch.chdir(place)
    names: dict = {}
    exec(snippet(folder), names)
    return names["label_map"], capsys.readouterr().out


def test_usage_snippet_of_the_card_runs(finished, monkeypatch, capsys):
    label_map, printed = execute(finished, finished.parent, monkeypatch, capsys)
    assert label_map.shape == (70, 90) and label_map.dtype == np.uint8
    assert printed.strip() == str([TASKS[SYNTHETIC].class_names[i] for i in np.unique(label_map)])


def test_card_before_and_after_the_evaluation(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    before = ModelCard.load(folder / "README.md")
    assert before.data.eval_results is None and "Not evaluated yet" in before.text
    assert before.data.base_model is None and "model was a local folder" in before.text  # of this machine

    update_model_card(folder, scores())
    card = ModelCard.load(folder / "README.md")
    results = {result.metric_type: result for result in card.data.eval_results}
    assert {kind: result.metric_value for kind, result in results.items()} == {
        "mean_iou": 12.35, "mean_accuracy": 30.0, "overall_accuracy": 40.0}  # fmt: skip
    assert results["mean_iou"].dataset_name == "synthetic_depth (depth)"
    assert results["mean_iou"].dataset_split == "test"
    assert results["mean_iou"].dataset_args == {"protocol": "paper", "weights": "student", "num_images": 7}
    names = TASKS[SYNTHETIC].class_names
    assert f"| {names[0]} | - | - |" in card.text and f"| {names[1]} | 11.00 | 21.00 |" in card.text
    assert "mIoU **12.35**" in card.text and "fwIoU **-**" in card.text
    for shown in ("| steps | 800 |", "| 0.0001, x30 for the head, x10 for the LoRA, multistep |",
                  "2 x Some GPU", "timestep 60 to 61", "| precision | bf16 |", "@inproceedings{",
                  "Source data `synthetic_rgb`: drawn by"):  # fmt: skip
        assert shown in card.text, shown
    assert not list(folder.glob(".*"))


def test_card_shows_the_newest_validation_picture(finished):
    assert "](sample.png)" in (finished / "README.md").read_text()
    assert (finished / "sample.png").read_bytes() == (finished / "validation/step-100.png").read_bytes()


def test_pictures_of_data_that_may_not_be_passed_on(finished, tmp_path):
    """Cityscapes forbids it: no copy, no link, the terms; a private repository passes nothing on."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    name, base = "cityscapes_to_fmb_infrared", "CompVis/stable-diffusion-v1-4"
    write_model_card(folder, {"": record(name, base=base)})
    card = ModelCard.load(folder / "README.md")
    assert not (folder / "sample.png").exists() and "sample.png" not in card.text
    assert "do not allow showing" in card.text
    assert "Source data `cityscapes`: research use only" in card.text and "`fmb`: no licence" in card.text
    assert card.data.license == "other" and f"Base model `{base}`: creativeml-openrail-m" in card.text
    assert card.data.base_model == base and card.data.base_model_relation == "adapter"
    write_model_card(folder, {"": record(name, "--hub_private_repo", "--unet_tuning", "full", base=base)})
    card = ModelCard.load(folder / "README.md")
    assert "](sample.png)" in card.text and "the tuned UNet" in card.text
    assert card.data.base_model_relation == "finetune" and "lora" not in card.data.tags


def test_card_of_a_class_name_with_a_bar(tmp_path):
    """Names are the user's; a `|` must not end a table cell."""
    names = TASKS[SYNTHETIC].class_names
    content, metrics = record(), scores()
    content["task"]["class_names"] = ["sky|air", *names[1:]]
    metrics["per_class"] = {"sky|air": {"iou": 1.0, "acc": 2.0}}
    write_model_card(tmp_path, {"": content}, {"": metrics})
    assert "| sky\\|air | 1.00 | 2.00 |" in (tmp_path / "README.md").read_text()


def test_cards_of_several_adapters(tmp_path, monkeypatch, capsys):
    """One card above, one per modality; scores of an adapter reach both, and the snippet chooses it."""
    folder = tmp_path / "several"
    records = {"depth": record(), "infrared": record("synthetic_to_infrared", "--source_only")}
    for name, content in records.items():
        new_model(TASKS[content["task"]["name"]], "lora").save_pretrained(folder / name)
        (folder / name / "run.json").write_text(json.dumps(content))
        (folder / "validation" / name).mkdir(parents=True)
        (folder / "validation" / name / "step-5.png").write_text(name)
    write_model_card(folder, records)
    assert all((folder / name / "sample.png").read_text() == name for name in records)
    measured = scores("synthetic_to_infrared", 33.0) | {"settings": {"weights": "teacher"}}
    update_model_card(folder / "infrared", measured)
    above, own = (ModelCard.load(folder / name / "README.md") for name in (".", "infrared"))
    assert "| [infrared](infrared/README.md) | synthetic_rgb | synthetic_infrared | 9 | 33.00 |" in above.text
    assert "| [depth](depth/README.md) | synthetic_rgb | synthetic_depth | 11 | - |" in above.text
    assert above.data.eval_results == own.data.eval_results and above.data.eval_results[0].metric_value == 33.0
    assert "protocol `paper`, teacher, in percent" in own.text
    assert "none (source only)" in own.text and "33.00" in own.text
    assert 'set_adapters("depth")' in snippet(folder) and 'set_adapters("infrared")' in snippet(folder / "infrared")
    label_map, printed = execute(folder / "infrared", tmp_path, monkeypatch, capsys)
    assert printed.strip() == str([TASKS["synthetic_to_infrared"].class_names[i] for i in np.unique(label_map)])


def test_card_leaves_the_readme_of_others_alone(finished, tmp_path):
    """A folder of runs may have a README of its own."""
    (tmp_path / "README.md").write_text("# My experiments")
    shutil.copytree(finished, tmp_path / "run")
    update_model_card(tmp_path / "run", scores())
    assert (tmp_path / "README.md").read_text() == "# My experiments"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "run.json cannot be read .*give the --output_dir of a finished training run"),
        ("{", "run.json cannot be read"),
        ("[]", "run.json cannot be read"),
        ("{}", "run.json lacks mixed_precision, num_processes, settings, task, versions"),
    ],
)
def test_card_of_a_folder_without_a_run(content, message, tmp_path):
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(UserError, match=message):
        update_model_card(tmp_path, scores())
    assert not (tmp_path / "README.md").exists()


def test_card_with_scores_of_another_task(finished):
    before = (finished / "README.md").read_text()
    with pytest.raises(UserError, match="trained for 'synthetic_to_depth', the scores are of 'synthetic_to_event'"):
        update_model_card(finished, scores("synthetic_to_event"))
    assert (finished / "README.md").read_text() == before


# --- upload ----------------------------------------------------------------------------------------------------------

_PRELUDE = f"""
import logging, shutil, sys, time
from pathlib import Path
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
from madm_utils.cli import UserError
from madm_utils.hub import HubUpload
def begin(folder, strategy="end", repo="me/x", private=False, token="{WRITE_TOKEN}", **options):
    upload = HubUpload(repo, private, token, folder, strategy, **{{"pauses": (0.05, 0.05), "timeout": 30, **options}})
    print("repository", upload.start())
    return upload
def finish(upload):
    try:
        print("done", upload.finish())
    except UserError as error:
        print("error:", error)
"""


def client(hub: HubServer, code: str, folder: Path, check: int = 0, **environment: str) -> str:
    """Run `code` against the server in a process of its own; `run` is `folder` there. Returns what it printed."""
    own = {"PYTHONPATH": str(ROOT), "HF_HOME": str(folder.parent / "hf"), **environment}
    env = os.environ | hub.environment() | own
    script = _PRELUDE + f"run = Path({str(folder)!r})\n" + code
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == check, done.stdout + done.stderr
    printed = done.stdout + done.stderr
    assert "hf_Secret" not in printed
    return printed


UPLOADED = {"madm_config.json", "model_index.json", "pipeline.py", "run.json", "README.md", "sample.png",
            "pytorch_lora_weights.safetensors", "segmenter/config.json", "segmenter/segmenter.py",
            "segmenter/diffusion_pytorch_model.safetensors", "teacher/config.json",
            "teacher/diffusion_pytorch_model.safetensors"}  # fmt: skip


def test_upload_arrives_whole_and_loads_back(hub, run, tmp_path):
    """A dropped connection is tried again; what arrives is byte-equal, private, and the model that was trained."""
    hub.fail("PUT /storage", "drop")
    printed = client(
        hub,
        """
import os
from huggingface_hub import snapshot_download
upload = begin(run, "every_checkpoint", repo=None, private=True)
for step in (1, 2):
    upload.checkpoint(run / f"checkpoint-{step}")
print("done", upload.finish())
snapshot_download("me/run", local_dir=run.parent / "downloaded", token=os.environ["READ"])
""",
        run,
        READ=READ_TOKEN,
    )
    repo = hub.repos["me/run"]
    assert f"done {hub.url}/me/run" in printed and "repository me/run" in printed
    assert repo.private and sum("PUT /storage" in line for line in hub.requests) > len(repo.large)
    sent = files(run, "logs", "validation")
    assert repo.files == sent and {name for name in sent if "checkpoint" not in name} == UPLOADED
    assert repo.commits == ["Add checkpoint-1", "Add checkpoint-2", "End of training"]
    assert not any(b"hf_Secret" in content for content in files(run).values())
    assert not list(run.glob(".upload*"))

    downloaded = tmp_path / "downloaded"
    assert files(downloaded, ".cache") == sent
    images = torch.rand(1, 3, 64, 64, generator=torch.manual_seed(0))
    with torch.no_grad():
        expected, actual = (MADMModel.from_pretrained(folder)(images) for folder in (run, downloaded))
    assert torch.equal(actual.logits, expected.logits)


def test_adapters_of_several_modalities(hub, tmp_path):
    """Sub-folders and the card above arrive, an earlier model at the top goes, and each LoRA loads in diffusers."""
    folder = tmp_path / "several"
    records = {"depth": record(), "infrared": record("synthetic_to_infrared")}
    torch.manual_seed(0)
    for name, content in records.items():
        model = new_model(TASKS[content["task"]["name"]], "lora", rank=4, lora_alpha=16)
        for key, parameter in model.unet.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(folder / name)
        (folder / name / "run.json").write_text(json.dumps(content))
    write_model_card(folder, records)
    stale = ("madm_config.json", "unet/config.json", "depth/teacher/config.json", "notes.txt")
    hub.repos["me/x"] = Repo(files=dict.fromkeys(stale, b"{}"))
    client(
        hub,
        """
from huggingface_hub import snapshot_download
finish(begin(run, names=("depth", "infrared")))
snapshot_download("me/x", local_dir=run.parent / "downloaded")
""",
        folder,
    )
    assert hub.repos["me/x"].files == {**files(folder), "notes.txt": b"{}"}
    sample, prompt = torch.ones(1, 4, 16, 16), torch.ones(1, 77, 32)
    pipe = StableDiffusionPipeline.from_pretrained(base_folder())
    pipe.load_lora_weights(tmp_path / "downloaded", subfolder="infrared")
    with torch.no_grad():
        expected = MADMModel.from_pretrained(folder / "infrared").unet(sample, 3, prompt).sample
        torch.testing.assert_close(pipe.unet(sample, 3, prompt).sample, expected)


def test_rejected_upload_says_how_to_finish_and_the_command_does(hub, run):
    """403 is not tried again; the folder stays as it was; the printed commands upload the rest."""
    before = files(run)
    hub.repos["me/x"] = Repo(files={"teacher/old.json": b"of another run"})
    hub.fail("POST .*/commit/", 403, times=9)
    printed = client(
        hub,
        """
upload = begin(run, "every_checkpoint", private=False)
upload.checkpoint(run / "checkpoint-2")
finish(upload)
""",
        run,
    )
    assert "uploading checkpoint-2 to me/x failed" in printed and "tried again with the next checkpoint" in printed
    assert f"error: the model is complete in {run}, but uploading to me/x failed" in printed and "403" in printed
    assert sum("/commit/" in line for line in hub.requests) == 2  # the checkpoint, the final model
    assert files(run) == before
    hub.faults.clear()
    commands = re.search(r"finish with: (.*)", printed)[1].split(" && ")
    assert [shlex.split(command)[:3] for command in commands] == [["hf", "upload", "me/x"]] * 2
    for command in commands:
        tool = str(Path(sys.executable).with_name("hf"))
        env = {**os.environ, **hub.environment(), "HF_TOKEN": WRITE_TOKEN, "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0"}
        subprocess.run([tool, *shlex.split(command)[1:]], check=True, env=env, capture_output=True)
    assert hub.repos["me/x"].files == files(run, "logs", "validation", "checkpoint-1")


def test_server_error_is_tried_again_then_reported(hub, run):
    hub.fail("POST .*/commit/", 500, times=9)
    printed = client(hub, "finish(begin(run))", run)
    assert printed.count("trying again in 0.05 s") == 2 and sum("/commit/" in line for line in hub.requests) == 3
    assert "failed (Server error '500" in printed and "hf upload me/x" in printed
    hub.faults.clear()
    hub.fail("POST .*/commit/", 500, times=2)
    assert f"done {hub.url}/me/x" in client(hub, "finish(begin(run))", run)
    assert hub.repos["me/x"].files == files(run, "logs", "validation", "checkpoint-1", "checkpoint-2")


def test_silent_server_does_not_hold_up_the_end(hub, run):
    """A request without an answer counts as failed after the time limit."""
    hub.fail("POST .*/commit/", "hold", times=9)
    assert "failed (timed out)" in client(hub, "finish(begin(run, timeout=2, pauses=()))", run)


def test_failed_checkpoint_goes_with_the_next_one(hub, run):
    hub.fail("POST .*/commit/", 500)
    printed = client(
        hub,
        """
upload = begin(run, "every_checkpoint")
upload.checkpoint(run / "checkpoint-1")
while not upload._failed:
    time.sleep(0.01)
upload.checkpoint(run / "checkpoint-2")
while upload._thread:
    time.sleep(0.01)
print("in the background")
finish(upload)
""",
        run,
    )
    assert printed.index("uploading checkpoint-1 to me/x failed") < printed.index("in the background")
    assert hub.repos["me/x"].commits == ["Add checkpoint-1", "Add checkpoint-2", "End of training"]


def test_rotation_while_uploading(hub, run):
    """Training goes on: the server keeps silent until both checkpoints are handed over and deleted. The one under way
    arrives whole, the one that waits is skipped, and the disk space of both is free at the end."""
    sent = {f"checkpoint-1/{name}": content for name, content in files(run / "checkpoint-1").items()}
    hub.fail("PUT /storage", "hold")
    code = """
upload = begin(run, "every_checkpoint")
upload.checkpoint(run / "checkpoint-1")
upload.checkpoint(run / "checkpoint-2")
while not Path(run.parent / "held").exists():
    time.sleep(0.01)
shutil.rmtree(run / "checkpoint-1")
shutil.rmtree(run / "checkpoint-2")
Path(run.parent / "deleted").touch()
finish(upload)
"""

    def release():
        hub.held.wait(30)
        (run.parent / "held").touch()
        while not (run.parent / "deleted").exists():
            threading.Event().wait(0.01)
        hub.released.set()

    threading.Thread(target=release, daemon=True).start()
    printed = client(hub, code, run)
    assert "checkpoint-2 is not uploaded: it was deleted before its turn came" in printed
    stored = {name: content for name, content in hub.repos["me/x"].files.items() if name.startswith("checkpoint")}
    assert stored == sent and not list(run.glob(".upload*"))


def test_stopped_training_does_not_wait_for_the_upload(hub, run):
    """Told to stop in the middle of an upload: the process ends at once with its own exit code."""
    hub.fail("PUT /storage", "hold")
    code = """
upload = begin(run, "every_checkpoint", timeout=300)
upload.checkpoint(run / "checkpoint-1")
while not (run.parent / "held").exists():
    time.sleep(0.01)
upload.close()
sys.exit(143)
"""
    threading.Thread(target=lambda: (hub.held.wait(30), (run.parent / "held").touch()), daemon=True).start()
    printed = client(hub, code, run, check=143)
    assert f"by hand: hf upload me/x {run}/checkpoint-1 checkpoint-1" in printed
    assert not list(run.glob(".upload*")) and (run / "checkpoint-1/training_state.json").exists()


def test_mistakes_are_found_before_training(hub, run):
    """Wrong token, no right to write, bad name, public instead of private, no connection: nothing is sent."""
    hub.repos["me/public"] = Repo()
    hub.repos["you/theirs"] = Repo()
    cases = {
        "wrong token": 'token="hf_unknown"', "read only": f'token="{READ_TOKEN}"', "bad name": 'repo="a/b/c"',
        "no right": 'repo="you/new"', "read token, existing": f'repo="me/public", token="{READ_TOKEN}"',
        "public": 'repo="me/public", private=True', "token with a newline": 'token="hf_Secret\\n"',
    }  # fmt: skip
    code = "".join(
        f"try:\n    begin(run, {arguments})\nexcept UserError as error:\n    print({name!r}, error)\n"
        for name, arguments in cases.items()
    )
    printed = client(hub, code, run)
    lines = {name: next(line for line in printed.splitlines() if line.startswith(name + " ")) for name in cases}
    for name in set(cases) - {"public"}:
        assert "cannot be written to (" in lines[name] and "--hub_model_id" in lines[name], lines[name]
        assert "or train without --push_to_hub and upload afterwards: hf upload" in lines[name]
    assert "Invalid credentials" in lines["wrong token"] and "403" in lines["read only"]
    assert "403" in lines["read token, existing"]
    assert "me/public exists and is public; make it private on the Hub" in lines["public"]
    assert not any(repo.files or repo.commits for repo in hub.repos.values()) and set(hub.repos) >= {"me/public"}

    offline = client(hub, code.split("try:")[1].join(("try:", "")), run, HF_HUB_OFFLINE="1")
    assert "offline mode is enabled" in offline and "trying again" not in offline


def test_copy_where_there_are_no_hard_links(tmp_path):
    """Another file system refuses the link; the copy has the same content."""
    other = Path("/dev/shm") / f"madm-test-{os.getpid()}"
    if not other.parent.is_dir() or other.parent.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second file system")
    other.write_text("content")
    try:
        _link(str(other), str(tmp_path / "copy"))
    finally:
        other.unlink()
    assert (tmp_path / "copy").read_text() == "content"
    _link(str(tmp_path / "copy"), str(tmp_path / "link"))
    assert (tmp_path / "link").samefile(tmp_path / "copy")


def test_training_with_upload(hub, tmp_path):
    """train_madm.py end to end: checkpoints and the final model are on the Hub, the token is nowhere."""
    data, out = write_data(tmp_path / "data", num_test=1), tmp_path / "run"
    sizes = ("--resolution 64 --projection_channels 32 --bottleneck_channels 32 --head_channels 16 --rank 4 "
             "--dataloader_num_workers 0 --rare_class_min_pixels 10 --max_train_steps 2 --checkpointing_steps 1 "
             "--checkpoints_total_limit 1 --validation_steps 1 --push_to_hub --hub_strategy every_checkpoint "
             "--hub_private_repo --hub_model_id me/trained")  # fmt: skip
    command = [sys.executable, str(ROOT / "train_madm.py"), "--task", SYNTHETIC, "--data_dir", str(data)]
    command += ["--output_dir", str(out), "--pretrained_model_name_or_path", str(base_folder()), *sizes.split()]
    env = {**os.environ, **hub.environment(), "HF_TOKEN": WRITE_TOKEN, "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0",
           "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"uploaded to {hub.url}/me/trained" in done.stdout
    repo = hub.repos["me/trained"]
    assert repo.private and repo.commits[-1] == "End of training" and "Add checkpoint-2" in repo.commits
    final = {name: content for name, content in repo.files.items() if not name.startswith("checkpoint-")}
    assert set(final) == UPLOADED and all((out / name).read_bytes() == content for name, content in final.items())
    newest = files(out / "checkpoint-2")
    assert {f"checkpoint-2/{name}": content for name, content in newest.items()}.items() <= repo.files.items()
    assert "hf_Secret" not in done.stdout + done.stderr
    assert not any(b"hf_Secret" in content for content in files(out).values())
