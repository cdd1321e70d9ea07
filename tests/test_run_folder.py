"""What a run writes at its end, what it says when stopped, and how it knows its base model."""

import pytest
import torch
from tiny_model import base_folder

import train_madm
from madm_utils.base_model import BaseModelReference, base_fingerprint, load_unet, load_vae
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

    with pytest.raises(UserError, match="could not be written to .*No space left.*make room, then finish with"):
        publish_model(tmp_path, save)
    assert [path.name for path in tmp_path.iterdir()] == ["madm_config.json"]


def test_no_room_at_the_start(tmp_path):
    with pytest.raises(UserError, match=f"cannot write in {tmp_path} .*No space left.*another --output_dir"):
        with writing(tmp_path):
            raise OSError(28, "No space left on device")


def test_what_a_stopped_training_says(tmp_path):
    """It names a checkpoint that exists; the one of the last step may have found no room."""
    assert train_madm.stopped(15, 7, tmp_path).endswith("no checkpoint could be written, start again")
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4/checkpoint.json").write_text("{}")
    assert "stopped by SIGTERM after step 7; go on from checkpoint-4" in train_madm.stopped(15, 7, tmp_path)


def test_fingerprint_of_a_base_model():
    """The same for the same base in any place; another one for other weights or another shape."""
    base = BaseModelReference(str(base_folder()))
    vae, unet = load_vae(base), load_unet(base)
    first = base_fingerprint(vae, unet)
    assert base_fingerprint(load_vae(base), load_unet(base)) == first
    unet.register_to_config(_name_or_path="elsewhere")
    assert base_fingerprint(vae, unet) == first
    with torch.no_grad():
        unet.conv_in.weight[0, 0, 0, 0] += 1e-3
    assert base_fingerprint(vae, unet) != first
    other = load_vae(base)
    other.register_to_config(scaling_factor=1.0)
    assert base_fingerprint(other, load_unet(base)) != first
