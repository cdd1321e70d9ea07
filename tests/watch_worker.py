"""One rank of `test_tracking.test_two_processes`: logs and evaluates with the real code, reports what it saw.

torchrun --nproc_per_node 2 tests/watch_worker.py MODEL DATA OUT
"""

import json
import logging
import resource
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from madm_utils.cli import UserError
from madm_utils.datasets import EvaluationDataset
from madm_utils.evaluation import each_batch, evaluate
from madm_utils.modeling_madm import MADMModel
from madm_utils.tracking import TrainingLog

model_dir, data_dir, out = map(Path, sys.argv[1:])
logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stdout)
torch.set_num_threads(1)
accelerator = Accelerator(cpu=True, log_with="tensorboard", project_config=ProjectConfiguration(out, out / "logs"))
rank, nan = accelerator.process_index, float("nan")
names = ["road", "sky", "car"]
report = {}


class DamagedDataset(EvaluationDataset):
    """The last but one image cannot be read; it is one of rank 1."""

    def __getitem__(self, index):
        if index == 3:
            raise UserError("image 3 is damaged")
        return super().__getitem__(index)


def failure(dataset: EvaluationDataset) -> str:
    try:
        evaluate(model, dataset, accelerator, disable=True)
    except UserError as error:
        return str(error)


log = TrainingLog(out, accelerator, {"seed": 1}, 9, 0, 2, "tensorboard", "logs")
per_class = torch.tensor([[0.25, nan, nan], [0.5, 0.75, nan]][rank])
values = {"source_loss": torch.tensor(1.0 + rank), "target_loss": torch.tensor([2.0, nan][rank]), "learning_rate": 0.1}
log.scalars(1, {**values, "confident_fraction": per_class}, "", names)
log.advance()
report["bar_off"] = log.progress.disable

model = MADMModel.from_pretrained(model_dir).train()
dataset = EvaluationDataset(data_dir, model.task, "test", model.resolution)
# Each process has statistics of its own, as training leaves them; those of the main one count.
variances = [buffer for name, buffer in model.segmenter.named_buffers() if "var" in name]
own = [buffer.uniform_(1, 2).clone() if rank else buffer.clone() for buffer in variances]
indices = []
for batch_size in (2, 8):  # 3 and 1 batches: never as many for both
    counted = []
    each_batch(
        lambda batch, counts, to=counted: to.extend(batch["index"] if counts else ()),
        dataset, accelerator, batch_size, disable=True,
    )  # fmt: skip
    indices.append(counted)
    confusion = evaluate(model, dataset, accelerator, batch_size, disable=True)
    report[f"confusion {batch_size}"] = confusion.tolist()
report["indices"] = indices
report["statistics"] = all(map(torch.equal, own, variances))
report["stopped"] = evaluate(model, dataset, accelerator, stop=lambda: rank == 1, disable=True) is None
report["damaged"] = failure(DamagedDataset(data_dir, model.task, "test", model.resolution))
if rank == 1:
    model.segmenter.head.conv_seg.bias.data.fill_(nan)
report["not finite"] = failure(dataset)
(out / f"report-{rank}.json").write_text(json.dumps(report))
accelerator.wait_for_everyone()

# A full disk, on the process that writes.
picture = {"source": torch.zeros(1, 3, 8, 8)}
if rank == 0:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
log.scalars(2, {"source_loss": 1.0})
log.pictures(2, picture, model.task)
if rank == 0:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log.scalars(3, {"source_loss": 1.0})
log.pictures(3, picture, model.task)
log.close()
accelerator.end_training()
