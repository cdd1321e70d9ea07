"""What a run writes at its end, what it says when stopped, and how it knows its base model."""

import pytest
import torch
from tiny_model import base_folder

import train_madm
from madm_utils.base_model import BaseModelReference, base_fingerprint, load_scheduler, load_unet, load_vae
from madm_utils.cli import UserError
from madm_utils.files import writing
from madm_utils.run_folder import publish_model


def test_a_model_replaces_the_earlier_one_part_by_part(tmp_path):
    def save(text):
        def write(folder):
            (folder / "segmenter").mkdir(parents=True)
            (folder / "segmenter/weights").write_text(text)
            (folder / "madm_config.json").write_text(text)

        return write

    (tmp_path / "logs").mkdir()
    for text in ("first", "second"):
        publish_model(tmp_path, save(text))
        assert (tmp_path / "segmenter/weights").read_text() == (tmp_path / "madm_config.json").read_text() == text
    assert {path.name for path in tmp_path.iterdir()} == {"logs", "segmenter", "madm_config.json"}


def test_no_room_for_the_model(tmp_path):
    """The earlier model stays, nothing half-written does."""
    (tmp_path / "madm_config.json").write_text("earlier")

    def save(folder):
        folder.mkdir()
        (folder / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="could not be written to .*No space left.*make room, then start again"):
        publish_model(tmp_path, save)
    assert [path.name for path in tmp_path.iterdir()] == ["madm_config.json"]


def test_no_room_at_the_start(tmp_path):
    with pytest.raises(UserError, match=f"cannot write in {tmp_path} .*No space left.*another --output_dir"):
        with writing(tmp_path):
            raise OSError(28, "No space left on device")


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(ConnectionError):
        with writing(tmp_path):
            raise ConnectionError("a tracker without network")


def test_what_a_stopped_training_says(tmp_path):
    """It names a checkpoint that exists; the one of the last step may have found no room."""
    assert train_madm.stopped(15, 7, tmp_path).endswith("no checkpoint could be written, start again")
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4/checkpoint.json").write_text("{}")
    assert "stopped by SIGTERM after step 7; go on from checkpoint-4" in train_madm.stopped(15, 7, tmp_path)


def test_fingerprint_of_a_base_model():
    """The same for the same base in any place and of any diffusers; another one for other weights or noise levels."""
    base = BaseModelReference(str(base_folder()))

    def parts():
        return load_vae(base), load_unet(base), load_scheduler(base)

    first = base_fingerprint(*parts())
    vae, unet, scheduler = parts()
    unet.register_to_config(_name_or_path="elsewhere", argument_of_a_later_version=1)
    assert base_fingerprint(vae, unet, scheduler) == first
    for module in (vae.encoder.conv_in, vae.decoder.conv_out, unet.conv_in, unet.conv_out):
        with torch.no_grad():
            module.weight[0, 0, 0, 0] += 1e-3
            assert base_fingerprint(vae, unet, scheduler) != first
            module.weight[0, 0, 0, 0] -= 1e-3
    vae.register_to_config(scaling_factor=1.0)
    assert base_fingerprint(vae, unet, scheduler) != first
    scheduler.alphas_cumprod[5] = 0.5
    assert base_fingerprint(parts()[0], parts()[1], scheduler) != first
