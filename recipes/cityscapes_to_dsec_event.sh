#!/usr/bin/env bash
# Cityscapes (RGB, labelled) -> DSEC (event edges, no labels): the published recipe, from the downloads to mIoU.
# Published: 2 GPUs with one image pair each, full fine-tuning of Stable Diffusion 1.4 under fp16, 10,000 steps. The
# task brings the rest (teacher noise t = 50|51 until step 8000, latent regression on source images, weight 20).
#   bash recipes/cityscapes_to_dsec_event.sh            RAW=/where/the/downloads/are to say where they are
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
TASK=cityscapes_to_dsec_event
RAW=${RAW:-raw} DATA=${DATA:-data} OUT=${OUT:-outputs/$TASK}

# Downloads that need an account: docs/data.md. Prepared data that is complete is checked and kept.
python prepare_datasets.py --task $TASK --raw_dir "$RAW" --output_dir "$DATA" --verify

accelerate launch --config_file accelerate_configs/multi_gpu.yaml --num_processes 2 train_madm.py \
    --task $TASK --data_dir "$DATA" --output_dir "$OUT" \
    --pretrained_model_name_or_path CompVis/stable-diffusion-v1-4 \
    --unet_tuning full --mixed_precision fp16 --noise_in_latent_dtype \
    --train_batch_size 1 --max_train_steps 10000 --learning_rate 5e-6 \
    --checkpointing_steps 1000 --checkpoints_total_limit 1 --validation_steps 500

# The published protocol: 512x512, one pass, fp16.
python eval_madm.py --model_path "$OUT" --data_dir "$DATA" --output_dir "$OUT/evaluation" --mixed_precision fp16
