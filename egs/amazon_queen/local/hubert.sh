# shellcheck shell=bash disable=SC2154  # the recipe sets data, layer, conf_files
# The stages of HuBERT that run.sh and the comparisons share. Source it after training.sh and units.sh.

# Units of what pretraining reads and the report shows. Labelling uses every core, whatever trains on how many.
queen_units() { # OUT CLUSTERS FRAMES ARGUMENT...
  local out="$1" clusters="$2" frames="$3" jobs
  shift 3
  jobs="$(nproc)"
  make_units "$out" "$clusters" "$frames" "$data/train.jsonl" "$data"/{train,dev,test}.jsonl -- "$@"
}

# Units of the output of the model's block `layer`.
hidden_units_stage() { # NUMBER OUT CLUSTERS FRAMES MODEL
  stage_in_pieces "$1" "$(basename "$2")" "$data/train.jsonl $data/dev.jsonl $5/checkpoints/" "$2/labels/" \
    queen_units "$2" "$3" "$4" --features hidden --model "$5" --layer "$layer"
}

# Masked prediction of units.
pretrain_stage() { # NUMBER OUT LABELS CLUSTERS CONFIGURATION OVERRIDE...
  local number="$1" out="$2" labels="$3" clusters="$4" configuration="$5"
  shift 5
  train_stage "$number" "$(basename "$out")" "$data/train.jsonl $labels/" "$out" "$configuration" "${conf_files[@]}" \
    "objective.classes=[$clusters]" "data.train=$data/train.jsonl" "data.valid=$data/dev.jsonl" "data.labels=[$labels]" "$@"
}

# Prints the number of clusters of run.sh's units, which a comparison starts from.
clusters_of() { # LABELS
  if [ ! -f "$1/card.json" ]; then die "$1 holds no units: run run.sh --exp $exp --stop-stage 4 first"; fi
  "$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))["clusters"])' "$1/card.json"
}

# Sets `search`: how a recogniser is searched with a character n-gram. Weight and bonus were chosen on dev (docs/LOG.md).
search_options() { # NGRAM
  # shellcheck disable=SC2034  # the caller's
  search=(--method prefix_beam --ngram "$1" --ngram-weight 0.8 --insertion-bonus 1.5)
}
