"""One rank of `test_engines`: trains with the real code, then reports what it held and what the ranks share.

accelerate launch --config_file CONFIG tests/engine_worker.py REPORT.json FLAGS...
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch.distributed.tensor import DTensor

import train_madm

report_path, flags = sys.argv[1], sys.argv[2:]
original_train = train_madm.train


def own_share(tensors) -> float:
    """Part of the elements that this rank holds."""
    tensors = list(tensors)
    own = sum((t.to_local() if isinstance(t, DTensor) else t).numel() for t in tensors)
    return own / sum(t.numel() for t in tensors)


def train(runs, state, log, stop, upload, accelerator):
    code = original_train(runs, state, log, stop, upload, accelerator)
    student, moments = accelerator.unwrap_model(runs[0].model), runs[0].optimizer_state.optimizer.state
    held = sum(
        v.to_local().numel() if isinstance(v, DTensor) else v.numel() for s in moments.values() for v in s.values()
    )
    sums = torch.stack([p.sum().double() for p in runs[0].teacher.parameters()])
    everyone = accelerator.gather(sums[None])
    report = {
        "distributed_type": accelerator.distributed_type.value,
        "unet": own_share(student.unet.parameters()),
        "vae": own_share(student.extractor.vae.parameters()),
        "moments": held / (2 * sum(p.numel() for p in runs[0].parameters)),
        "teacher_spread": (everyone[0] - everyone[-1]).abs().max().item(),
    }
    if accelerator.is_main_process:
        Path(report_path).write_text(json.dumps(report))
    return code


train_madm.train = train
sys.exit(train_madm.main(flags))
