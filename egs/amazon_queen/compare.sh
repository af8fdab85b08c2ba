#!/usr/bin/env bash
# What pretraining is worth: the same fine-tuning from scratch and after each iteration. See --help.
# shellcheck disable=SC2154  # parse_options.sh and environment.sh set variables
# shellcheck source-path=SCRIPTDIR/../..
set -euo pipefail

recipe="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$recipe/../.." && pwd)"
last_stage=2
minutes="10 30 120" seeds="1 2 3"
recipe_options=(minutes seeds)

usage() {
  cat <<'HELP'
egs/amazon_queen/compare.sh: fine-tunes on 10, 30 and 120 minutes of labels from scratch, after HuBERT iteration 1 and
after iteration 2, with one budget, and writes the results table of README.md. Run run.sh first: its exp folder holds
the pretrained models. 30 minutes are run with every seed, the others with the first.

Recipe options:
  --minutes "10 30 120"   label amounts
  --seeds "1 2 3"         seeds for the 30 minute rows

Stages:
  1  finetune   every row: train, decode, score
  2  table      results/*.json beside this script, and the table in README.md

Examples:
  egs/amazon_queen/compare.sh
  egs/amazon_queen/compare.sh --exp exp/amazon_queen --minutes "30"

HELP
}

. "$root/egs/shared/parse_options.sh"
parse_options "$@"
. "$root/egs/shared/environment.sh"
. "$root/egs/shared/stages.sh"

data="$recipe/data"
conf_files=()
if [ -n "$conf" ]; then conf_files=("$conf"); fi
for model in pretrain1 pretrain2; do
  [ -d "$exp/$model/checkpoints" ] || die "$exp/$model holds no pretrained model: run run.sh --exp $exp first"
done

row() { # MINUTES START SEED: train, decode and score one row unless it is there; nothing is kept but model and scores
  local minutes="$1" start="$2" seed="$3"
  local out="$exp/compare/$minutes-$start-$seed" init=()
  if [ -f "$out/test-score/wer.json" ] && [ -f "$out/test-unseen-score/wer.json" ]; then
    echo "$out: scored already"
    return 0
  fi
  if [ "$start" != scratch ]; then init=("train.init_from=$exp/$start"); fi
  "${parallel[@]}" train "$recipe/conf/compare.yaml" "${conf_files[@]}" "objective.tokenizer=$data/tokens.txt" \
    "data.train=$data/train-${minutes}min.jsonl" "data.valid=$data/dev.jsonl" "seed=$seed" "${init[@]}" --exp "$out"
  "${harken[@]}" decode "$out" "$data/test.jsonl" "$data/test-unseen.jsonl" --out "$out"
  "${harken[@]}" score "$out/test.jsonl" --out "$out/test-score"
  "${harken[@]}" score "$out/test-unseen.jsonl" --out "$out/test-unseen-score"
}

rows() { # MINUTES SEEDS: every start of every row, the cheapest first so that a table can be made early
  local amounts="$1" all_seeds="$2" amount start seed
  for seed in $all_seeds; do
    for amount in $amounts; do
      if [ "$amount" != 30 ] && [ "$seed" != "${all_seeds%% *}" ]; then continue; fi
      for start in scratch pretrain1 pretrain2; do
        row "$amount" "$start" "$seed"
      done
    done
  done
}
stage 1 finetune "$exp/pretrain1/ $exp/pretrain2/" "$exp/compare/" rows "$minutes" "$seeds"

stage 2 table "$exp/compare/" "$recipe/results/" \
  "$python" "$root/tools/results_table.py" "$exp/compare" --results "$recipe/results" --readme "$recipe/README.md"

stages_summary
