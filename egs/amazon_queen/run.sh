#!/usr/bin/env bash
# From the speech of "Flight of the Amazon Queen" to a word error rate and a page that shows it. See --help.
# shellcheck disable=SC2154,SC2317  # parse_options.sh and environment.sh set variables; stage calls functions by name
# shellcheck source-path=SCRIPTDIR/../..
set -euo pipefail

recipe="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$recipe/../.." && pwd)"
last_stage=10
layer=4
recipe_options=(layer)

usage() {
  cat <<'HELP'
egs/amazon_queen/run.sh: HuBERT on 4.6 hours of acted English, from the corpus to error rates and a report.

Modes: full (the default) takes under an hour on two cores; short, 7 minutes, shows that everything works.

Recipe options:
  --layer N   the block of pretrain1 whose output is clustered into units2 (default: 4, of the 6 of conf/model.yaml)

Stages:
  1  check      the environment (harken doctor)
  2  corpus     fetch, read, split, manifests (local/prepare.py)
  3  verify     index the manifests, decode every file, statistics, characters
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
  egs/amazon_queen/run.sh --conf egs/amazon_queen/conf/gpu.yaml --layer 8 --exp exp/gpu   # a larger model, on a GPU

HELP
}

. "$root/egs/shared/parse_options.sh"
parse_options "$@"
. "$root/egs/shared/environment.sh"
. "$root/egs/shared/stages.sh"
. "$root/egs/shared/training.sh"
. "$root/egs/shared/units.sh"
. "$recipe/local/hubert.sh"

# What the modes share is made once; everything that depends on the configuration goes to $exp.
data="$recipe/data"
conf_files=() corpus_option=()
if [ -n "$conf" ]; then conf_files=("$conf"); fi
if [ -n "$corpus" ]; then corpus_option=(--corpus "$corpus"); fi
if [ "$mode" = short ]; then
  labelled=train-30min clusters1=50 clusters2=50 max_frames=100000
else
  labelled=train clusters1=100 clusters2=200 max_frames=400000
fi

stage 1 check "the machine" "a list of versions and devices" harken doctor

stage 2 corpus "${corpus:-the Debian package}" "$data/train.jsonl $data/test.jsonl $data/flac/" \
  "$python" "$recipe/local/prepare.py" --out "$data" "${corpus_option[@]}" %force

verify_corpus() { # DATA: index every split, decode every file once, describe, list the characters
  local folder="$1" split
  anew "$folder"/*.verify.pieces
  harken data index "$folder"/{train,train-10min,train-30min,train-120min,dev,test,test-unseen}.jsonl
  for split in train dev test test-unseen; do
    harken_in_pieces data verify "$folder/$split.jsonl"
  done
  harken data stats "$folder/train.jsonl" "$folder/dev.jsonl" "$folder/test.jsonl" "$folder/test-unseen.jsonl"
  harken data tokens "$folder/train.jsonl" --out "$folder/tokens.txt"
}
stage_in_pieces 3 verify "$data/train.jsonl $data/test.jsonl" "$data/tokens.txt" verify_corpus "$data"

stage_in_pieces 4 units1 "$data/train.jsonl $data/dev.jsonl" "$exp/units1/labels/" \
  queen_units "$exp/units1" "$clusters1" "$max_frames" --features mfcc --subtract-mean --average 4

pretrain_stage 5 "$exp/pretrain1" "$exp/units1/labels" "$clusters1" "$recipe/conf/$mode/pretrain.yaml"

hidden_units_stage 6 "$exp/units2" "$clusters2" "$max_frames" "$exp/pretrain1"

pretrain_stage 7 "$exp/pretrain2" "$exp/units2/labels" "$clusters2" "$recipe/conf/$mode/pretrain.yaml"

train_stage 8 finetune "$data/$labelled.jsonl $exp/pretrain2/checkpoints/" "$exp/finetune" \
  "$recipe/conf/$mode/finetune.yaml" "${conf_files[@]}" "objective.tokenizer=$data/tokens.txt" \
  "data.train=$data/$labelled.jsonl" "data.valid=$data/dev.jsonl" "train.init_from=$exp/pretrain2"

# Best path, then prefix beam with a character n-gram of the training transcripts.
decode_and_score() { # MODEL OUT LABELLED
  local model="$1" out="$2" labelled="$3" search split
  anew "$out"/{greedy,beam}/*.pieces
  harken ngram "$data/$labelled.jsonl" --tokens "$data/tokens.txt" --order 6 --out "$out/characters.arpa"
  harken_in_pieces decode "$model" "$data/test.jsonl" "$data/test-unseen.jsonl" --out "$out/greedy"
  search_options "$out/characters.arpa"
  harken_in_pieces decode "$model" "$data/test.jsonl" "$data/test-unseen.jsonl" --out "$out/beam" "${search[@]}"
  for split in greedy/test greedy/test-unseen beam/test beam/test-unseen; do
    harken score "$out/$split.jsonl" --out "$out/$split-score"
  done
}
stage_in_pieces 9 decode "$data/test.jsonl $data/test-unseen.jsonl $exp/finetune/checkpoints/" "$exp/decode/greedy/test.jsonl" \
  decode_and_score "$exp/finetune" "$exp/decode" "$labelled"

stage 10 report "$exp/pretrain1/ $exp/pretrain2/ $exp/finetune/ $exp/decode/" "$exp/report.html" \
  harken report "$exp" --out "$exp/report.html" --cuts "$data/test.jsonl"

stages_summary
if [ -f "$exp/report.html" ]; then echo "report: $exp/report.html"; fi
