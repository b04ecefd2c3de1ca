#!/bin/sh
# The table of README.md on a CPU, then what each lever is worth: three rounds beside TRL, one round of
# every ablation, three of most. An hour and a quarter on two cores that nothing else uses; the
# order is that of importance, and each line writes its own file, so that it may be stopped.
#
#     sh bench/table.sh SmolLM2-135M-Instruct FOLDER_OF_PAIRS OUT
set -e
model=$1
pairs=$2
out=$3
bench=$(dirname "$0")
mkdir -p "$out"

compare() { # name, data, pairs, batch, rounds, the rest
    name=$1 data=$2 count=$3 batch=$4 rounds=$5
    shift 5
    echo "== $name"
    ${PYTHON:-python} "$bench/compare.py" --model "$model" --data "$data" --pairs "$count" \
        --batch "$batch" --rounds "$rounds" --json "$out/$name.json" "$@" | tee "$out/$name.txt"
}

hh=$pairs/hh_harmless_base_test.jsonl.gz
ultra=$pairs/ultrafeedback-train_clean.jsonl.gz
every="sharing packing forwards_1024 forwards_2048 chunked_head wide_chunks kept_logits
    lean_reference precomputed_reference c_layers short_spin checkpointing compile"

compare hh-bf16 "$hh" 32 8 3 --bf16
compare ultrafeedback-bf16 "$ultra" 8 4 3 --bf16
compare hh-lora-bf16 "$hh" 32 8 3 --bf16 --adapter lora
compare hh-float32 "$hh" 16 8 3
compare ultrafeedback-float32 "$ultra" 4 4 3
compare ultrafeedback-lora-bf16 "$ultra" 4 4 3 --bf16 --adapter lora
# shellcheck disable=SC2086
compare hh-ablations "$hh" 32 8 1 --bf16 --ablate $every
# shellcheck disable=SC2086
compare ultrafeedback-ablations "$ultra" 4 4 1 --bf16 --ablate $every
compare hh-lora-ablations "$hh" 32 8 1 --bf16 --adapter lora \
    --ablate sharing kept_logits lora_product lean_reference checkpointing
compare hh-levers "$hh" 32 8 3 --bf16 --ablate c_layers kept_logits lean_reference chunked_head \
    wide_chunks sharing forwards_1024 short_spin precomputed_reference
