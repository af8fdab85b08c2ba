# shellcheck shell=bash disable=SC2154  # the recipe sets data and jobs; environment.sh defines harken
# Units of the recipe. Source it after environment.sh.

# Fits the clusters, labels what pretraining reads and the report shows, and checks the labels.
make_units() { # OUT CLUSTERS FRAMES ARGUMENT...
  local out="$1" clusters="$2" frames="$3"
  shift 3
  rm -rf "$out"
  harken units fit "$data/train.jsonl" --out "$out/km" --clusters "$clusters" --max-frames "$frames" \
    --jobs "$jobs" "$@"
  harken units label "$data/train.jsonl" "$data/dev.jsonl" "$data/test.jsonl" --clusterer "$out/km" \
    --out "$out/labels" --jobs "$jobs" "$@"
  harken units check "$out/labels"
}
