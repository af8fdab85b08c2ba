#!/usr/bin/env bash
# Two iterations of BEATs: codes of a random projection, then those of a tokenizer that the first model taught. See --help.
# shellcheck disable=SC2154,SC2317  # parse_options.sh and environment.sh set variables; stage calls functions by name
# shellcheck source-path=SCRIPTDIR/../..
set -euo pipefail

recipe="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$recipe/../.." && pwd)"
last_stage=5
codes=256
recipe_options=(codes)

usage() {
  cat <<'HELP'
egs/amazon_queen/beats.sh: pretrains a small BEATs twice on the speech that run.sh has prepared. Run run.sh to stage 3
first: its manifests are read here. Everything that is made goes to EXP/beats.

Recipe options:
  --codes N   codes of the tokenizer, which are the labels of the second iteration (default: 256)

Stages:
  1  beats1        masked prediction of a random projection's codes
  2  tokenizer     a tokenizer that learns to predict what beats1 makes of the audio
  3  beats_labels  its codes of every patch, in one store
  4  beats2        masked prediction of these
  5  beats_report  one HTML page of the three runs

Examples:
  egs/amazon_queen/run.sh --mode short --stop-stage 3 && egs/amazon_queen/beats.sh --mode short
  egs/amazon_queen/beats.sh --nproc 2 --codes 512 --exp exp/more-codes

HELP
}

. "$root/egs/shared/parse_options.sh"
parse_options "$@"
. "$root/egs/shared/environment.sh"
. "$root/egs/shared/stages.sh"
. "$root/egs/shared/training.sh"

data="$recipe/data" made="$exp/beats"
conf_files=("$recipe/conf/$mode/beats.yaml")
if [ -n "$conf" ]; then conf_files+=("$conf"); fi
if [ ! -f "$data/dev.jsonl" ]; then die "$data holds no manifests: run run.sh --stop-stage 3 first"; fi
manifests=("data.train=$data/train.jsonl" "data.valid=$data/dev.jsonl")

train_stage 1 beats1 "$data/train.jsonl" "$made/beats1" "$recipe/conf/beats.yaml" "${conf_files[@]}" "${manifests[@]}"

train_stage 2 tokenizer "$data/train.jsonl $made/beats1/checkpoints/" "$made/tokenizer" \
  "$recipe/conf/beats_tokenizer.yaml" "${conf_files[@]}" "${manifests[@]}" \
  "objective.codes=$codes" "objective.teacher=$made/beats1"

# The codes of what the second iteration reads. Labelling uses every core, whatever trains on how many.
label_patches() { # OUT TOKENIZER
  rm -rf "$1"
  harken units label "$data/train.jsonl" "$data/dev.jsonl" --tokenizer "$2" --out "$1" --jobs "$(nproc)"
  harken units check "$1"
}
stage 3 beats_labels "$data/train.jsonl $data/dev.jsonl $made/tokenizer/checkpoints/" "$made/units2/labels/" \
  label_patches "$made/units2/labels" "$made/tokenizer"

train_stage 4 beats2 "$data/train.jsonl $made/units2/labels/" "$made/beats2" "$recipe/conf/beats.yaml" \
  "${conf_files[@]}" "${manifests[@]}" \
  objective.targets=labels "objective.classes=$codes" "data.labels=[$made/units2/labels]"

stage 5 beats_report "$made/beats1/ $made/tokenizer/ $made/beats2/" "$made/report.html" \
  harken report "$made" --out "$made/report.html"

stages_summary
if [ -f "$made/report.html" ]; then echo "report: $made/report.html"; fi
