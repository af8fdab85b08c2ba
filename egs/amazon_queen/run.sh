#!/usr/bin/env bash
# From the speech of "Flight of the Amazon Queen" to a word error rate and a page that shows it. See --help.
# shellcheck disable=SC2154,SC2317  # parse_options.sh and environment.sh set variables; stage calls functions by name
# shellcheck source-path=SCRIPTDIR/../..
set -euo pipefail

recipe="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$recipe/../.." && pwd)"
last_stage=10

usage() {
  cat <<'HELP'
egs/amazon_queen/run.sh: HuBERT on 4.6 hours of acted English, from the corpus to error rates and a report.

Stages:
  1  check      the environment (harken doctor)
  2  corpus     fetch, read, split, manifests (local/prepare.py)
  3  index      index the manifests, decode every file, statistics
  4  units1     k-means on MFCC, labels
  5  pretrain1  masked prediction of units1
  6  units2     k-means on a hidden layer of pretrain1, labels
  7  pretrain2  masked prediction of units2
  8  finetune   CTC on the labelled speech
  9  decode     transcripts and error rates of test and test-unseen
  10 report     one HTML page of the run

Examples:
  egs/amazon_queen/run.sh --mode short
  egs/amazon_queen/run.sh --corpus ~/Downloads --nproc 2 --stage 4 --stop-stage 5

HELP
}

. "$root/egs/shared/parse_options.sh"
parse_options "$@"
. "$root/egs/shared/environment.sh"
. "$root/egs/shared/stages.sh"

# What the modes share is made once; everything that depends on the configuration goes to $exp.
data="$recipe/data"
corpus_option=()
if [ -n "$corpus" ]; then corpus_option=(--corpus "$corpus"); fi

stage 1 check "$conf" "a list of versions and devices" "${harken[@]}" doctor

stage 2 corpus "${corpus:-the Debian package}" "$data/manifests" \
  "$python" "$recipe/local/prepare.py" --out "$data" "${corpus_option[@]}" %force

index_corpus() { # MANIFESTS INDEX: one index for each split, every file decoded once
  local manifests="$1" index="$2" split
  for split in train dev test test-unseen; do
    "${harken[@]}" data index "$manifests/$split.jsonl" --out "$index/$split"
    "${harken[@]}" data verify "$index/$split"
    "${harken[@]}" data stats "$index/$split"
  done
}
stage 3 index "$data/manifests" "$data/index" index_corpus "$data/manifests" "$data/index"

make_units() { # CONFIGURATION UNITS ARGUMENT...: fit the clusters, then label every split that training reads
  local configuration="$1" units="$2"
  shift 2
  "${parallel[@]}" units fit "$configuration" "exp=$units" "$@"
  "${parallel[@]}" units label "$configuration" "exp=$units" "$@"
  "${harken[@]}" units check "$units"
}
stage 4 units1 "$data/index" "$exp/units1" make_units "$recipe/conf/units1.yaml" "$exp/units1" %force

train_model() { # FOLDER [--force] ARGUMENT...: a run that is there is continued, with --force it is put aside
  local folder="$1"
  shift
  if [ "${1:-}" = --force ]; then
    shift
    if [ -d "$folder" ]; then
      rm -rf "$folder.old"
      mv "$folder" "$folder.old"
    fi
  fi
  "${parallel[@]}" train "$@" --exp "$folder"
}
stage 5 pretrain1 "$data/index $exp/units1" "$exp/pretrain1" train_model "$exp/pretrain1" %force \
  "$recipe/conf/pretrain.yaml" "$conf" "data.train=$data/index/train" "data.labels=$exp/units1"

stage 6 units2 "$data/index $exp/pretrain1" "$exp/units2" \
  make_units "$recipe/conf/units2.yaml" "$exp/units2" "model=$exp/pretrain1" %force

stage 7 pretrain2 "$data/index $exp/units2" "$exp/pretrain2" train_model "$exp/pretrain2" %force \
  "$recipe/conf/pretrain.yaml" "$conf" "data.train=$data/index/train" "data.labels=$exp/units2"

stage 8 finetune "$data/index $exp/pretrain2" "$exp/finetune" train_model "$exp/finetune" %force \
  "$recipe/conf/finetune.yaml" "$conf" "data.train=$data/index/train" "init=$exp/pretrain2"

decode_and_score() { # MODEL OUT
  local model="$1" out="$2" split
  for split in test test-unseen; do
    "${harken[@]}" decode "$model" --cuts "$data/index/$split" --out "$out/$split.jsonl"
    "${harken[@]}" score "$out/$split.jsonl" --out "$out/$split-score"
  done
}
stage 9 decode "$data/index $exp/finetune" "$exp/decode" decode_and_score "$exp/finetune" "$exp/decode"

stage 10 report "$exp/pretrain1 $exp/pretrain2 $exp/finetune $exp/decode" "$exp/report.html" \
  "${harken[@]}" report "$exp"

stages_summary
if [ -f "$exp/report.html" ]; then echo "report: $exp/report.html"; fi
