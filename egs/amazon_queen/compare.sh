#!/usr/bin/env bash
# What pretraining is worth: the same fine-tuning from scratch and after each iteration. See --help.
# shellcheck disable=SC2154,SC2317  # parse_options.sh and environment.sh set variables; stage calls functions by name
# shellcheck source-path=SCRIPTDIR/../..
set -euo pipefail

recipe="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$recipe/../.." && pwd)"
last_stage=5
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
  5  table      results/*.json beside this script, and the table in README.md

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

data="$recipe/data"
conf_files=()
if [ -n "$conf" ]; then conf_files=("$conf"); fi
units1="$exp/units1/labels" compared="$exp/compare"
if [ ! -f "$units1/card.json" ]; then die "$units1 holds no units: run run.sh --exp $exp --stop-stage 4 first"; fi
clusters1="$("$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))["clusters"])' "$units1/card.json")"

pretrain_stage 1 "$compared/pretrain1" "$units1" "$clusters1" "$recipe/conf/compare/pretrain.yaml"

hidden_units_stage 2 "$compared/units2" "$clusters" 400000 "$compared/pretrain1"

pretrain_stage 3 "$compared/pretrain2" "$compared/units2/labels" "$clusters" "$recipe/conf/compare/pretrain.yaml"

# What decides a row's result, one `name checksum` a line.
made_of() { # MINUTES START CONFIGURATION...
  local minutes="$1" start="$2" configuration model=none
  shift 2
  configuration="$(harken_config --yaml "$@")" || return
  if [ "$start" != scratch ]; then model="$(cat "$compared/$start"/checkpoints/*/checksums.json)" || return; fi
  printf 'configuration %s\n' "$(sha256sum <<< "$configuration")"
  printf 'labels %s\n' "$(cat "$data/train-${minutes}min.jsonl" "$data/dev.jsonl" "$data/tokens.txt" | sha256sum)"
  printf 'tests %s\n' "$(cat "$data/test.jsonl" "$data/test-unseen.jsonl" | sha256sum)"
  printf 'model %s\n' "$(sha256sum <<< "$model")"
}

# Prints why what an earlier call left of a row must not be kept, or nothing.
row_changed() { # FOLDER MADE_OF
  local changed
  if [ ! -e "$1" ]; then return; fi
  if [ "$force" = 1 ]; then
    echo "--force"
  elif [ ! -f "$1/made-of" ]; then
    echo "what it was made of is not known"
  else
    changed="$(comm -13 <(sort "$1/made-of") <(sort <<< "$2") | cut -d' ' -f1 | paste -sd' ')"
    if [ -n "$changed" ]; then echo "changed since: $changed"; fi
  fi
}

# What made the model that a row starts from.
pretraining_commands() { # START
  case "$1" in
    pretrain1) cat "$exp/stages/1-pretrain1.commands" ;;
    pretrain2) cat "$exp"/stages/{1-pretrain1,2-units2,3-pretrain2}.commands ;;
  esac
}

row_says() { # TEXT: in the row's log and in the stage's
  printf '%s\n' "$1"
  printf '%s\n' "$1" >&3
}

# Trains, decodes and scores one row unless that is done. Its output is the row's log, where 3 is that of the stage.
row() { # MINUTES START SEED CONFIGURATION...
  local minutes="$1" start="$2" seed="$3" name="$1-$2-$3" out="$compared/rows/$1-$2-$3" made why configuration split
  shift 3
  # masks begin after about 360 steps of 20 s in every row: an epoch of 10 minutes has 30
  configuration=("$@" "data.train=$data/train-${minutes}min.jsonl" "seed=$seed" engine.threads=1
    "objective.mask_from_epoch=$((120 / minutes))")
  # of a pretrained model the two top blocks start afresh
  if [ "$start" != scratch ]; then
    configuration+=("train.init_from=$compared/$start" train.init_fresh_blocks=2)
  fi
  made="$(made_of "$minutes" "$start" "${configuration[@]}")"
  why="$(row_changed "$out" "$made")"
  if [ -n "$why" ]; then
    row_says "$name: begins anew ($why)"
    put_aside "$out"
  elif [ -f "$out/result.json" ]; then
    row_says "$name: done before"
    return
  elif [ -d "$out" ]; then
    row_says "$name: continues"
  else
    row_says "$name: begins"
  fi
  if [ ! -d "$out" ]; then
    rm -rf "$out.new"
    mkdir "$out.new"
    printf '%s\n' "$made" > "$out.new/made-of"
    mv "$out.new" "$out"
  fi
  stage_commands="$out/commands"
  : > "$stage_commands"
  pretraining_commands "$start" > "$out/pretraining-commands"
  "$python" "$root/tools/results_table.py" begin "$out" --jobs "$jobs"
  train_model "$out" "${configuration[@]}"
  harken decode "$out" "$data/test.jsonl" "$data/test-unseen.jsonl" --out "$out"
  for split in test test-unseen; do
    harken score "$out/$split.jsonl" --out "$out/$split-score"
  done
  "$python" "$root/tools/results_table.py" finish "$out"
  row_says "$name: done"
}

row_ended() { # NAME STATUS
  if [ "$2" != 0 ] && [ "$2" != 143 ]; then
    echo "$1: FAILED with exit code $2; log: $exp/logs/compare/$1.log; its last 5 lines:" >&3
    tail -n 5 "$exp/logs/compare/$1.log" | sed 's/^/    /' >&3
    touch "$compared/rows/$1.failed"
  fi
}

# A row in the background. On TERM it lets harken save, and then ends.
run_row() { # MINUTES START SEED CONFIGURATION...
  export OMP_NUM_THREADS=1
  trap 'exit 143' TERM
  # shellcheck disable=SC2064  # the name is that of now
  trap "row_ended '$1-$2-$3' \$?" EXIT
  row "$@"
}

# Every start of every row, `jobs` at a time, those of the first seed first so that a table can be made early.
rows() { # MINUTES SEEDS CONFIGURATION...
  local amounts="$1" all_seeds="$2" amount start seed failed
  shift 2
  for start in pretrain1 pretrain2; do
    compgen -G "$compared/$start/checkpoints/*/checksums.json" > /dev/null ||
      die "$compared/$start holds no pretrained model: run this again from --stage 1"
  done
  set +m # rows stay in the stage's process group, to which signals go
  mkdir -p "$compared/rows" "$exp/logs/compare"
  rm -f "$compared"/rows/*.failed
  trap 'wait; exit 143' TERM
  for seed in $all_seeds; do
    for amount in $amounts; do
      if [ "$amount" != 30 ] && [ "$seed" != "${all_seeds%% *}" ]; then continue; fi
      for start in scratch pretrain1 pretrain2; do
        while [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do wait -n || true; done
        run_row "$amount" "$start" "$seed" "$@" 3>&1 >> "$exp/logs/compare/$amount-$start-$seed.log" 2>&1 &
      done
    done
  done
  wait
  find "$compared/rows" -mindepth 2 -maxdepth 2 -path '*[0-9]/commands' -exec cat {} + >> "$stage_commands"
  failed="$(find "$compared/rows" -maxdepth 1 -name '*.failed' | wc -l)"
  if [ "$failed" != 0 ]; then
    echo "$failed rows failed; the same command goes on with them"
    return 1
  fi
}
# data.train is the row's, and stands here because no configuration is whole without it.
stage 4 rows "$compared/pretrain1/ $compared/pretrain2/" "$compared/rows/" rows "$minutes" "$seeds" \
  "$recipe/conf/compare/finetune.yaml" "${conf_files[@]}" "objective.tokenizer=$data/tokens.txt" \
  "data.valid=$data/dev.jsonl" "data.train=$data/train.jsonl"

stage 5 table "$compared/rows/" "$recipe/results/" "$python" "$root/tools/results_table.py" table "$compared/rows" \
  --results "$recipe/results" --readme "$recipe/README.md" --readme "$root/README.md"

stages_summary
