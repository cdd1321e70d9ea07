#!/usr/bin/env bash
# Any of the tasks on one GPU: LoRA instead of full fine-tuning, bf16, two pairs per step by accumulation.
# Not a published setting: LoRA and head learn ten times as fast as the published rate of the whole UNet. Not tuned on
# the real datasets yet.
#   bash recipes/lora_one_gpu.sh cityscapes_to_fmb_infrared
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
TASK=${1:?give a task, e.g. cityscapes_to_fmb_infrared}
RAW=${RAW:-raw} DATA=${DATA:-data} OUT=${OUT:-outputs/$TASK-lora}

python prepare_datasets.py --task "$TASK" --raw_dir "$RAW" --output_dir "$DATA" --verify

accelerate launch --config_file accelerate_configs/single_gpu.yaml train_madm.py \
    --task "$TASK" --data_dir "$DATA" --output_dir "$OUT" \
    --pretrained_model_name_or_path CompVis/stable-diffusion-v1-4 \
    --unet_tuning lora --rank 32 --learning_rate 5e-6 --lora_lr_multiplier 10 --head_lr_multiplier 10 \
    --mixed_precision bf16 --gradient_checkpointing \
    --train_batch_size 1 --gradient_accumulation_steps 2 --max_train_steps 10000 \
    --checkpointing_steps 1000 --checkpoints_total_limit 2 --validation_steps 500

python eval_madm.py --model_path "$OUT" --data_dir "$DATA" --output_dir "$OUT/evaluation" --mixed_precision bf16
