"""One rank of the tests that train with two processes: trains with the real code and reports what the ranks share.

torchrun --nproc_per_node 2 tests/two_processes.py REPORT.json FLAGS...

Only the main process gets the --output_dir of the flags; what another writes would appear in a folder of its own,
`OUTPUT_DIR-rank1`.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from accelerate import skip_first_batches

import train_madm

report_path, flags = sys.argv[1], sys.argv[2:]
if os.environ["RANK"] != "0":
    flags[flags.index("--output_dir") + 1] += f"-rank{os.environ['RANK']}"
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

    def in_order(first: int) -> bool:
        """Whether the ranks together read samples `first` passes later, one global batch after the other."""
        size = run.args.train_batch_size * accelerator.num_processes
        for index, batch in zip(range(first, first + 2), skip_first_batches(run.batches, first), strict=False):
            wanted = [run.batches.dataset[k]["source_image"] for k in range(index * size, (index + 1) * size)]
            if not torch.equal(accelerator.gather(batch["source_image"]).cpu(), torch.stack(wanted)):
                return False
        return True

    report = {
        "parameters": spread(run.parameters),
        "teacher": spread(run.teacher.parameters()),
        "statistics": spread([b for n, b in student.segmenter.named_buffers() if "running" in n]),
        "in_order": in_order(0) and in_order(1),
        "reduced": reduced,
        "trainable": sum(p.numel() for p in run.parameters),
    }
    if accelerator.is_main_process:
        Path(report_path).write_text(json.dumps(report))
    return 0


train_madm.train = train
train_madm.main(flags)
