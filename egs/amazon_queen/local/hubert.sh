# shellcheck shell=bash disable=SC2154  # the recipe sets data, layer, conf_files; environment.sh defines harken
# The stages of HuBERT that run.sh and compare.sh have both. Source it after training.sh.

# Fits the clusters, labels what pretraining reads and the report shows, and checks the labels.
make_units() { # OUT CLUSTERS FRAMES ARGUMENT...
  local out="$1" clusters="$2" frames="$3" jobs
  shift 3
  jobs="$(nproc)" # labelling uses every core, whatever trains on how many
  rm -rf "$out"
  harken units fit "$data/train.jsonl" --out "$out/km" --clusters "$clusters" --max-frames "$frames" \
    --jobs "$jobs" "$@"
  harken units label "$data/train.jsonl" "$data/dev.jsonl" "$data/test.jsonl" --clusterer "$out/km" \
    --out "$out/labels" --jobs "$jobs" "$@"
  harken units check "$out/labels"
}

# Units of the output of the model's block `layer`.
hidden_units_stage() { # NUMBER OUT CLUSTERS FRAMES MODEL
  stage "$1" "$(basename "$2")" "$data/train.jsonl $data/dev.jsonl $5/checkpoints/" "$2/labels/" \
    make_units "$2" "$3" "$4" --features hidden --model "$5" --layer "$layer"
}

# Masked prediction of units.
pretrain_stage() { # NUMBER OUT LABELS CLUSTERS CONFIGURATION
  train_stage "$1" "$(basename "$2")" "$data/train.jsonl $3/" "$2" "$5" "${conf_files[@]}" "objective.classes=[$4]" \
    "data.train=$data/train.jsonl" "data.valid=$data/dev.jsonl" "data.labels=[$3]"
}
