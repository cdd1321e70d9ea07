"""Several processes as one: n processes with B images each follow one process with n * B images."""

import copy
import json

import numpy as np
import pytest
import scope_worker
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from test_train_madm import script, train_flags
from tiny_model import new_model, write_data

import train_madm
from madm_utils.augmentations import label_classes
from madm_utils.distributed import BatchScope, SyncBatchNorm2d, synchronize_statistics
from madm_utils.pseudo_labels import confident_fraction, palette_table
from madm_utils.tasks import TASKS
from madm_utils.train_args import parse_train_args, train_parser

LOSSES = ("source_loss", "lplr_source_loss", "target_loss", "lplr_target_loss")
LOGGED = (*LOSSES, "pseudo_label_weight", "gradient_norm")


@pytest.fixture(autouse=True)
def fresh_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


# --- modules and functions -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory):
    """The results of one process, where `nn.BatchNorm2d` and `nn.Dropout2d` do the work, and those of two."""
    folder = tmp_path_factory.mktemp("scope")
    torch.multiprocessing.spawn(scope_worker.work, (2, str(folder)), nprocs=2)
    return scope_worker.results(BatchScope()), [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def test_every_image_gets_what_it_gets_in_the_whole_batch(one_and_two):
    """Outputs, input gradients, dropout and augmentation; also when the activations are computed again."""
    one, two = one_and_two
    for name, expected in one["per_image"].items():
        tolerance = {"atol": 0.05, "rtol": 0.02} if "bfloat16" in name else {"atol": 1e-10, "rtol": 1e-10}
        together = torch.cat([rank["per_image"][name] for rank in two])
        torch.testing.assert_close(together, expected, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


def test_losses_and_gradients_average_to_those_of_the_whole_batch(one_and_two):
    one, two = one_and_two
    for name, expected in one["mean"].items():
        tolerance = 0.02 if "bfloat16" in name else 1e-10 if expected.dtype == torch.float64 else 1e-6
        average = (two[0]["mean"][name] + two[1]["mean"][name]) / 2
        torch.testing.assert_close(average, expected, atol=tolerance, rtol=tolerance)
    # Ranks with as many labelled pixels each would not show a wrong divisor.
    assert (two[0]["mean"]["cross entropy, valid"] / two[1]["mean"]["cross entropy, valid"] - 1).abs() > 0.1


def test_adaptation_pass_gives_the_gradient_of_the_whole_batch(one_and_two):
    """All of the method in float64: class mix, augmentation, teacher, dropout, weights, four losses; whole UNet."""
    one, two = one_and_two
    whole = one["adaptation"]["gradient"]
    average = (two[0]["adaptation"]["gradient"] + two[1]["adaptation"]["gradient"]) / 2
    assert len(whole) > 500_000 and (average - whole).norm() < 1e-7 * whole.norm()


def test_statistics_are_those_of_the_whole_batch(one_and_two):
    """Counted once, whether activations are computed again or not, and equal on the ranks bit by bit."""
    one, two = one_and_two
    assert one["same"]["plain 1.num_batches_tracked"] == 1
    for name, expected in one["same"].items():
        assert torch.equal(two[0]["same"][name], two[1]["same"][name])
        torch.testing.assert_close(two[0]["same"][name], expected, atol=1e-7, rtol=1e-10)


def test_synchronised_model_keeps_its_tensors():
    """Same names, same tensors, so that optimisers, checkpoints and the teacher's update see no difference."""
    segmenter = new_model(TASKS["synthetic_to_depth"]).segmenter.train()
    segmenter.head.fuse_layer.aspp_modules[1].eval()
    before = dict(segmenter.state_dict(keep_vars=True))
    modes = [module.training for module in segmenter.modules()]
    synchronize_statistics(segmenter, BatchScope())
    assert not any(isinstance(module, SyncBatchNorm2d) for module in segmenter.modules())
    synchronize_statistics(segmenter, BatchScope(2, 1))
    after = segmenter.state_dict(keep_vars=True)
    assert list(after) == list(before) and all(after[name] is tensor for name, tensor in before.items())
    assert [module.training for module in segmenter.modules()] == modes
    kinds = [type(m) for m in segmenter.modules()]
    assert torch.nn.BatchNorm2d not in kinds and torch.nn.Dropout2d not in kinds and SyncBatchNorm2d in kinds


def test_processes_that_decide_alone_draw_differently():
    class Second:
        num_processes, process_index = 2, 1

    alone, together = (BatchScope.of(Second, synchronized) for synchronized in (False, True))
    assert (alone.num_processes, alone.index, alone.number) == (1, 0, 1)
    assert (together.num_processes, together.index, together.number) == (2, 1, 0)
    assert together.local([1, 2, 3, 4]) == [3, 4] and alone.local([1, 2]) == [1, 2]


def test_confident_fraction_by_hand():
    label = torch.tensor([[[0, 0, 2], [0, 2, 2]]])
    probability = torch.tensor([[[0.9, 0.5, 0.8], [0.7, 0.1, 0.2]]])
    fraction = confident_fraction(label, probability, 0.7, 4)
    assert fraction[[0, 2]].tolist() == pytest.approx([2 / 3, 1 / 3])
    assert fraction.dtype == torch.float32 and fraction[[1, 3]].isnan().all()


# --- training --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def curves(out) -> dict[str, np.ndarray]:
    """Name -> value per step of the training log."""
    lines = [json.loads(line) for line in (out / "training_log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "validation" not in line]
    return {name: np.array([line[name] for line in steps]) for name in LOGGED}


def test_two_processes_follow_one_with_the_whole_batch(data, tmp_path):
    """12 steps with synchronised statistics. Also: nothing hangs where the ranks have different work (one saves and
    draws pictures, five images are scored by two), and the second rank writes nothing."""
    # 0.2 is a threshold that a part of an untrained teacher's pixels reaches. At this learning rate the training
    # changes every loss by 1e-3 to 1e-2 within these steps, so a wrong update would show.
    flags = ("--sync_batch_statistics", "--pseudo_label_threshold", 0.2, "--pseudo_label_weight", "batch",
             "--lplr_mask", "pseudo", "--learning_rate", 1e-5, "--head_lr_multiplier", 1, "--lora_lr_multiplier", 1,
             "--lr_scheduler", "constant", "--max_train_steps", 12, "--validation_steps", 6, "--validate_on",
             "test")  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    train_madm.main(train_flags(data, one, *flags, "--train_batch_size", 2))
    more = ("--train_batch_size", 1, "--checkpointing_steps", 6)
    script("tests/two_processes.py", tmp_path / "report.json", *train_flags(data, two, *flags, *more), processes=2)

    expected, found = curves(one), curves(two)
    difference = {name: np.abs(found[name] / expected[name] - 1) for name in expected}
    assert {name: len(values) for name, values in difference.items()} == dict.fromkeys(expected, 12)
    assert max(difference["source_loss"].max(), difference["lplr_source_loss"].max()) < 1e-5, difference
    assert difference["gradient_norm"].max() < 1e-3, difference
    for name in ("target_loss", "lplr_target_loss", "pseudo_label_weight"):
        # On another processor, rounding may put one pixel of one step on the other side of the teacher's decision.
        assert np.sort(difference[name])[-2] < 1e-5 and difference[name].max() < 1e-2, (name, difference)
    assert ((expected["pseudo_label_weight"] > 0.01) & (expected["pseudo_label_weight"] < 0.99)).all()

    report = json.loads((tmp_path / "report.json").read_text())
    assert report["parameters"] == report["teacher"] == report["statistics"] == 0.0
    assert report["in_order"]
    assert report["reduced"] == 12 * report["trainable"]
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two", "report.json"}
    assert (two / "checkpoint-12").is_dir() and (two / "validation/step-12.png").exists()


@pytest.fixture(scope="module")
def student():
    """In float64, where what is equal in the mathematics is equal in the numbers."""
    torch.manual_seed(0)
    return new_model(TASKS["synthetic_to_depth"], "lora").double().train()


METHOD = {"class_mix_scope": "image", "pseudo_label_weight": "image", "lplr_mask": "pseudo"}


@pytest.mark.parametrize(
    ("settings", "batch_norm", "equal"),
    [
        ({}, "eval", True),
        ({}, "train", False),
        ({"pseudo_label_weight": "batch"}, "eval", False),
        ({"loss_average": "valid"}, "eval", False),
    ],
)
def test_gradient_accumulation(settings, batch_norm, equal, student):
    """Two passes over one image make the gradient of one pass over two where nothing is decided for the batch as a
    whole; BatchNorm's statistics, the batch's pseudo-label weight and the average over labelled pixels are."""
    flags = ("--task", "synthetic_to_depth", "--data_dir", "-", "--output_dir", "-", "--pseudo_label_threshold", "0.2")
    ((args, task),) = parse_train_args(train_parser(""), [*flags, "--pretrained_model_name_or_path", "-"])
    vars(args).update(METHOD | settings)
    # The two pairs differ in brightness, confident pixels and labelled pixels.
    images = torch.randint(256, (2, 2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images[0, 0], images[1, 0] = images[0, 0] // 8, 255
    labels = (torch.arange(2 * 64 * 64) // 500).view(2, 64, 64) % task.num_classes
    labels[0, :48] = 255
    batch = {"source_image": images[0], "target_image": images[1], "source_label": labels}
    masks = train_madm.draw(labels, label_classes(labels), 0, "0", args).mix_masks

    def gradient(passes: int) -> torch.Tensor:
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=passes)
        model, teacher = copy.deepcopy(student), copy.deepcopy(student.segmenter)
        for segmenter in (model.segmenter, teacher):
            segmenter.head.dropout.p = 0.0
            segmenter.head.fuse_layer.train(batch_norm == "train")
        for index in range(passes):
            part = BatchScope(passes, index)
            mine = {name: part.local(value) for name, value in batch.items()}
            draws = train_madm.Draws(60, part.local(masks), lambda mixed: mixed)
            with accelerator.accumulate(model):
                train_madm.adaptation_pass(model, teacher, mine, draws, args, palette_table(task.palette), accelerator)
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    whole, accumulated = gradient(1), gradient(2)
    difference = ((accumulated - whole).norm() / whole.norm()).item()
    assert difference < 1e-7 if equal else difference > 1e-3
