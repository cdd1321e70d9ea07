"""The reference of the speed: plain equals the published code, and every arrangement equals the suite.

With `MADM_SLOW_TESTS=1`, plain's training pass too is compared with the published code (minutes).
"""

import copy
import dataclasses
import os

import numpy as np
import pytest
import test_reference_parity as parity
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tiny_model import RESOLUTION, new_model

import train_madm
from benchmarks.common import training_settings
from benchmarks.plain_step import ARRANGEMENTS, Arrangement, PlainTraining, cross_entropy, latent_l1, paint, predict
from madm_utils.augmentations import label_classes
from madm_utils.draws import draw
from madm_utils.optimization import build_adamw, parameter_groups
from madm_utils.pseudo_labels import palette_table
from madm_utils.tasks import TASKS

TASK = TASKS["cityscapes_to_deliver_depth"]
converted, inputs, golden = parity.converted, parity.inputs, parity.golden


@pytest.fixture(autouse=True)
def fresh():
    yield
    AcceleratorState._reset_state(True)


# --- against the suite -----------------------------------------------------------------------------------------------
# In float64, where two ways to the same number agree to more digits than a ReLU or a confident pixel can turn on.


class Start:
    """A student, a teacher of other weights and a batch; the same for every arrangement."""

    def __init__(self):
        torch.manual_seed(0)
        self.model, other = (new_model(TASK).double().train() for _ in "12")
        self.model.segmenter.head.dropout = other.segmenter.head.dropout = torch.nn.Identity()
        self.teacher = other.segmenter.requires_grad_(False)
        self.state = copy.deepcopy(self.model.state_dict())
        self.teacher_state = copy.deepcopy(self.teacher.state_dict())
        shape = (1, 3, RESOLUTION, RESOLUTION)
        self.batch = {name: torch.randint(256, shape, dtype=torch.uint8) for name in ("source_image", "target_image")}
        label = torch.randint(TASK.num_classes, (1, RESOLUTION // 8, RESOLUTION // 8))
        self.batch["source_label"] = label.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)
        self.batch["source_label"][:, :5] = 255

    def step(self, arrangement: Arrangement | None, *flags: str) -> dict[str, torch.Tensor]:
        """Losses, gradients, new weights and buffers of one step of an arrangement, or of the suite."""
        model, teacher, accelerator = self.model, self.teacher, Accelerator(cpu=True)
        model.load_state_dict(self.state)
        model.zero_grad()
        teacher.load_state_dict(self.teacher_state)
        # Some of the teacher's pixels are confident at this threshold.
        args = training_settings(model, "--learning_rate", "1e-3", "--pseudo_label_threshold", "0.2", *flags)
        label = self.batch["source_label"]
        draws = draw(label, label_classes(label), 1, "stream", args)
        if arrangement is None:
            groups = parameter_groups(model, args.learning_rate, args.weight_decay)
            optimizer = build_adamw(groups, (args.adam_beta1, args.adam_beta2), args.adam_epsilon, use_8bit=False)
            scalars, _ = train_madm.adaptation_pass(
                model, teacher, self.batch, draws, args, palette_table(TASK.palette), accelerator
            )
            scalars.pop("confident_fraction")
        else:
            training = PlainTraining(model, args, accelerator, arrangement)
            training.teacher, optimizer = teacher, training.optimizer
            scalars = training.adapt(self.batch, draws)
        trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
        gradients = {f"gradient of {key}": p.grad.clone() for key, p in trained.items()}
        accelerator.clip_grad_norm_(trained.values(), args.max_grad_norm)
        optimizer.step()
        parts = {"new": model, "new teacher's": teacher}
        after = {f"{part} {key}": t.clone() for part, m in parts.items() for key, t in m.state_dict().items()}
        return scalars | gradients | after


@pytest.fixture(scope="module")
def start() -> Start:
    return Start()


@pytest.fixture(scope="module")
def suite_step(start) -> dict[str, torch.Tensor]:
    return start.step(None)


def check_equal(ours: dict[str, torch.Tensor], suite: dict[str, torch.Tensor]) -> None:
    """Every tensor within 1e-5 of its norm; what vanishes up to rounding, within 1e-9 of the largest gradient."""
    assert ours.keys() == suite.keys()
    scale = max(t.norm() for key, t in suite.items() if key.startswith("gradient"))
    for key, value in suite.items():
        assert (ours[key].double() - value).norm() <= 1e-5 * value.double().norm() + 1e-9 * scale, key


# Parts that have no line of code in common are taken together; the teacher's update has tests of its own.
@pytest.mark.parametrize("parts", ["", "head", "vae", "backward", "palette confidence optimizer"])
def test_arrangement_equals_the_suite(start, suite_step, parts):
    assert 0.05 < suite_step["pseudo_label_weight"] < 0.95
    check_equal(start.step(Arrangement(**dict.fromkeys(parts.split(), True))), suite_step)


def test_one_arrangement_per_part():
    """The rows of the table: plain, and each part alone."""
    parts = [field.name for field in dataclasses.fields(Arrangement)]
    assert list(ARRANGEMENTS) == ["plain", *parts]
    assert ARRANGEMENTS["plain"] == Arrangement()
    for part in parts:
        assert dataclasses.asdict(ARRANGEMENTS[part]) == {name: name == part for name in parts}


def test_regression_on_the_source_only(start, suite_step):
    """The event task's setting: no palette image of the mixed label, and 20 times the source's regression."""
    ours = start.step(Arrangement(), "--lplr_loss", "source", "--lplr_weight", "20")
    assert "lplr_target_loss" not in ours
    assert ours["lplr_source_loss"] == pytest.approx(20 * suite_step["lplr_source_loss"].item())
    for name in ("source_loss", "target_loss", "pseudo_label_weight"):
        assert ours[name] == pytest.approx(suite_step[name].item()), name


def test_teacher_update_by_hand(start):
    """0.75 of the teacher, 0.25 of the student; buffers stay."""
    start.model.load_state_dict(start.state)
    for arrangement in (ARRANGEMENTS["plain"], ARRANGEMENTS["ema"]):
        training = PlainTraining(start.model, training_settings(start.model), Accelerator(cpu=True), arrangement)
        training.teacher = copy.deepcopy(start.teacher)
        training.teacher.load_state_dict(start.teacher_state)
        training.update_teacher(0.75)
        for name, parameter in training.teacher.named_parameters():
            student = start.state[f"segmenter.{name}"]
            torch.testing.assert_close(parameter, 0.75 * start.teacher_state[name] + 0.25 * student)
        for name, buffer in training.teacher.named_buffers():
            assert torch.equal(buffer, start.teacher_state[name]), name


def test_steps_of_a_training(start):
    """The teacher follows from the second step on, each step moves the weights, and gradients do not add up."""
    start.model.load_state_dict(start.state)
    args = training_settings(start.model, "--learning_rate", "1e-3")
    training = PlainTraining(start.model, args, Accelerator(cpu=True))
    before = copy.deepcopy(training.teacher.state_dict())
    label = start.batch["source_label"]
    for number, decay in enumerate((1.0, 0.5)):
        student = copy.deepcopy(training.model.segmenter.state_dict())
        training.step(start.batch, draw(label, label_classes(label), number, str(number), args))
        name = "conditioning.prompt_embed"
        expected = decay * before[name] + (1 - decay) * student[name]
        torch.testing.assert_close(training.teacher.state_dict()[name], expected)
        assert not torch.equal(training.model.segmenter.state_dict()[name], student[name])
        assert all(p.grad is None for p in training.parameters)


def test_prediction_equals_the_suite(start):
    """In evaluation mode, with BatchNorm statistics that are not those of a fresh layer; several images."""
    model = copy.deepcopy(start.model).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    images = torch.rand(2, 3, RESOLUTION, RESOLUTION, dtype=torch.float64)
    with torch.no_grad():
        suite = model(images).logits
    for arrangement in (Arrangement(), Arrangement(head=True, vae=True)):
        ours = predict(model, images, arrangement)
        assert (ours - suite).norm() <= 1e-6 * suite.norm()


# --- numbers by hand -------------------------------------------------------------------------------------------------


def test_palette_image_by_hand():
    label = torch.tensor([[[0, 1], [255, 2]], [[1, 1], [1, 1]]])
    images = paint(label, [(255, 0, 0), (0, 255, 51)])
    assert images.shape == (2, 3, 2, 2)
    expected = torch.tensor([[[1, -1], [-1, -1]], [[-1, 1], [-1, -1]], [[-1, -0.6], [-1, -1]]])
    torch.testing.assert_close(images[0], expected)
    torch.testing.assert_close(images[1], torch.tensor([-1, 1, -0.6])[:, None, None].expand(3, 2, 2))


def test_losses_by_hand():
    """Ignored pixels count in the denominator; the mask takes the pixel at the corner of each latent."""
    logits = torch.zeros(1, 4, 1, 2)
    label = torch.tensor([[[3, 255]]])
    assert cross_entropy(logits, label, torch.tensor([[[3.0, 9.0]]])) == pytest.approx(1.5 * np.log(4))
    label = torch.tensor([[[255, 0, 1, 1], [0, 0, 1, 1]]])
    latent, target = torch.zeros(1, 2, 1, 2), torch.tensor([1.0, -3.0])[None, :, None, None].expand(1, 2, 1, 2)
    weight = torch.tensor([[[9.0, 9.0, 0.5, 9.0], [9.0, 9.0, 9.0, 9.0]]])
    assert latent_l1(latent, target, label, weight) == pytest.approx(0.5 * (1 + 3) / 4)


# --- against the published code --------------------------------------------------------------------------------------


@pytest.mark.parity
def test_published_logits(converted, inputs, golden):
    logits = predict(converted.model, inputs["target"][:1].float() / 255)[0]
    parity.assert_close(logits[:, ::4, ::4], golden["logits_s4_0"], 2e-3)
    assert (logits.argmax(0).numpy() == golden["argmax_0"]).mean() >= 0.999


@pytest.mark.parity
@pytest.mark.skipif(not os.environ.get("MADM_SLOW_TESTS"), reason="a training pass of minutes; set MADM_SLOW_TESTS")
@pytest.mark.parametrize("name", parity.variants("train_main", "train_dropout", several_steps=False))
def test_published_training_pass(converted, inputs, name):
    """As `parity.test_training_pass`, with the tolerances of the suite: losses, gradients, BatchNorm buffers."""
    variant = parity.load_variant(name)
    trainer = parity.Trainer(converted, inputs, variant)
    training = PlainTraining(trainer.model, trainer.args, trainer.accelerator)
    training.teacher = trainer.teacher
    trainer.set_dropout(0)
    scalars = training.adapt(trainer.batch, trainer.draws(0))
    expected, arrays = variant.iterations[0], variant.arrays
    parity.check_scalars(scalars, expected, rtol=1e-4)
    parity.check_gradients(trainer.model, expected, arrays)
    parity.check_buffers(trainer.model.segmenter, trainer.teacher, arrays)


@pytest.mark.parity
def test_published_teacher_update(converted):
    """Updates 1, 2 and 5000 of the teacher, with the student fixed."""
    training = PlainTraining(copy.deepcopy(converted.model), training_settings(converted.model), Accelerator(cpu=True))

    def update(teacher, student, decay):
        training.teacher = teacher
        training.update_teacher(decay)

    parity.check_ema(converted, update)
