"""One rank of `test_train_madm.test_two_processes`: trains with the real code and reports what the ranks share.

torchrun --nproc_per_node 2 tests/two_processes.py REPORT.json FLAGS...
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import train_madm

report_path, flags = sys.argv[1], sys.argv[2:]
original_train = train_madm.train
reduced = 0


def count(state, bucket):
    """DDP calls this for every bucket it reduces; then it averages as usual."""
    global reduced
    reduced += bucket.buffer().numel()
    buffer = bucket.buffer() / torch.distributed.get_world_size()
    return torch.distributed.all_reduce(buffer, async_op=True).get_future().then(lambda f: f.value()[0])


def train(runs, *rest):
    (run,), accelerator = runs, rest[-1]
    run.model.register_comm_hook(None, count)
    original_train(runs, *rest)
    student = accelerator.unwrap_model(run.model)

    def spread(tensors) -> float:
        sums = torch.stack([t.detach().double().sum() for t in tensors])
        everyone = accelerator.gather(sums[None])
        return (everyone[0] - everyone[-1]).abs().max().item()

    report = {
        "parameters": spread(run.parameters),
        "teacher": spread(run.teacher.parameters()),
        "statistics": spread([b for n, b in student.segmenter.named_buffers() if "running" in n]),
        "reduced": reduced,
        "trainable": sum(p.numel() for p in run.parameters),
    }
    if accelerator.is_main_process:
        Path(report_path).write_text(json.dumps(report))
    return 0


train_madm.train = train
train_madm.main(flags)
