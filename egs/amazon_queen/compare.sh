#!/usr/bin/env bash
# What pretraining is worth: the same fine-tuning from scratch and after each iteration. See --help.
# shellcheck disable=SC2154,SC2317  # parse_options.sh and environment.sh set variables; stage calls functions by name
# shellcheck source-path=SCRIPTDIR/../..
set -euo pipefail

recipe="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$recipe/../.." && pwd)"
last_stage=6
minutes="10 30 120" seeds="1 2 3" layer=4 clusters=200 jobs="$(nproc)"
recipe_options=(minutes seeds layer clusters jobs)

usage() {
  cat <<'HELP'
egs/amazon_queen/compare.sh: pretrains longer than run.sh does, fine-tunes on 10, 30 and 120 minutes of labels from
scratch, after HuBERT iteration 1 and after iteration 2, with one budget, and writes the results table of README.md. Run
run.sh to stage 4 first: iteration 1 learns its units. 30 minutes are run with every seed, the others with the first.

Recipe options:
  --minutes "10 30 120"   label amounts
  --seeds "1 2 3"         seeds for the 30 minute rows
  --layer N               the block of iteration 1 whose output is clustered for iteration 2 (default: 4)
  --clusters N            the number of its clusters (default: 200)
  --jobs N                rows that run side by side, each on one thread (default: the number of cores)

Stages:
  1  pretrain1  masked prediction of run.sh's units1
  2  units2     k-means on a hidden layer of it, labels
  3  pretrain2  masked prediction of these
  4  rows       every row: train, decode, score; logs in EXP/logs/compare
  5  search     every row's transcripts once more, with a character 6-gram of all training texts
  6  table      results/*.json beside this script, and the table in README.md

A row is redone when its configuration, its labelled speech, the test sets or its pretrained model have changed, and with
--force. One that failed stops no other; one that was interrupted continues.

Examples:
  egs/amazon_queen/compare.sh
  egs/amazon_queen/compare.sh --exp exp/amazon_queen --minutes "30" --jobs 1

HELP
}

. "$root/egs/shared/parse_options.sh"
parse_options "$@"
if ! is_whole_number "$jobs" || [ "$jobs" -lt 1 ]; then die "--jobs must be 1 or more, got '$jobs'"; fi
. "$root/egs/shared/environment.sh"
. "$root/egs/shared/stages.sh"
. "$root/egs/shared/training.sh"
. "$root/egs/shared/units.sh"
. "$recipe/local/hubert.sh"
. "$recipe/local/rows.sh"

data="$recipe/data"
conf_files=()
if [ -n "$conf" ]; then conf_files=("$conf"); fi
units1="$exp/units1/labels" compared="$exp/compare"
clusters1="$(clusters_of "$units1")"

pretrain_stage 1 "$compared/pretrain1" "$units1" "$clusters1" "$recipe/conf/compare/pretrain.yaml"

hidden_units_stage 2 "$compared/units2" "$clusters" 400000 "$compared/pretrain1"

pretrain_stage 3 "$compared/pretrain2" "$compared/units2/labels" "$clusters" "$recipe/conf/compare/pretrain.yaml"

start_model() { # START
  if [ "$1" != scratch ]; then echo "$compared/$1"; fi
}

start_commands() { # START
  case "$1" in
    pretrain1) cat "$exp/stages/1-pretrain1.commands" ;;
    pretrain2) cat "$exp"/stages/{1-pretrain1,2-units2,3-pretrain2}.commands ;;
  esac
}

start_configuration() { # START: of a pretrained model the two top blocks start afresh
  if [ "$1" != scratch ]; then echo train.init_fresh_blocks=2; fi
}

# data.train is the row's, and stands here because no configuration is whole without it.
stage 4 rows "$compared/pretrain1/ $compared/pretrain2/" "$compared/rows/" rows "$minutes" 30 "$seeds" \
  "scratch pretrain1 pretrain2" -- \
  "$recipe/conf/compare/finetune.yaml" "${conf_files[@]}" "objective.tokenizer=$data/tokens.txt" \
  "data.valid=$data/dev.jsonl" "data.train=$data/train.jsonl"

stage 5 search "$compared/rows/" "$compared/characters.arpa" search_rows

stage 6 table "$compared/rows/ $compared/characters.arpa" "$recipe/results/" "$python" "$root/tools/results_table.py" table "$compared/rows" \
  --results "$recipe/results" --readme "$recipe/README.md" --readme "$root/README.md"

stages_summary
