#!/usr/bin/env bash
# Every method of pretraining on the default corpus with one budget, side by side. See --help.
# shellcheck disable=SC2154,SC2317  # parse_options.sh and environment.sh set variables; stage calls functions by name
# shellcheck source-path=SCRIPTDIR/../..
set -euo pipefail

recipe="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$recipe/../.." && pwd)"
last_stage=5
methods="" seeds=1 steps=1000 budget=1500 aligner="" jobs="$(nproc)"
recipe_options=(methods seeds steps budget aligner jobs)
for file in "$recipe"/conf/methods/*.yaml; do methods+="${methods:+ }$(basename "$file" .yaml)"; done
every="$methods"

usage() {
  cat <<HELP
egs/amazon_queen/methods.sh: pretrains by each method of conf/methods with one budget of audio, looks at what the encoder
has learned before it has seen a label, fine-tunes on 30 minutes of labels, and writes the table of docs/methods.md. Run
run.sh to stage 4 first, whose units some methods predict, and further to stage 8, whose recogniser aligns the text.

Recipe options:
  --methods "A B"   of conf/methods (default: all: $every)
  --steps N         of pretraining, 40 s of audio each (default: 1000)
  --budget N        steps of fine-tuning, 20 s of audio each (default: 1500)
  --seeds "1"       seeds of fine-tuning
  --aligner DIR     recogniser that says which character is where (default: EXP/finetune, of run.sh)
  --jobs N          trainings that run side by side, each on one thread (default: the number of cores)

Stages:
  1  align     characters of dev, in time
  2  pretrain  each method; logs in EXP/logs/methods
  3  probe     of each: effective rank, and clusters of a hidden layer against the characters
  4  rows      30 minutes of labels: train, decode, score
  5  table     results/methods/*.json beside this script, and the table in docs/methods.md

Examples:
  egs/amazon_queen/methods.sh
  egs/amazon_queen/methods.sh --methods "hubert data2vec" --steps 4000

HELP
}

. "$root/egs/shared/parse_options.sh"
parse_options "$@"
for number in "$jobs" "$steps" "$budget"; do
  if ! is_whole_number "$number" || [ "$number" -lt 1 ]; then
    die "--jobs, --steps and --budget must be 1 or more, got '$number'"
  fi
done
for method in $methods; do
  if [ ! -f "$recipe/conf/methods/$method.yaml" ]; then die "--methods must be of: $every; got '$method'"; fi
done
. "$root/egs/shared/environment.sh"
. "$root/egs/shared/stages.sh"
. "$root/egs/shared/training.sh"
. "$root/egs/shared/units.sh"
. "$recipe/local/hubert.sh"
. "$recipe/local/rows.sh"

data="$recipe/data"
units1="$exp/units1/labels" compared="$exp/methods" aligner="${aligner:-$exp/finetune}"
if [ "$(clusters_of "$units1")" != 100 ]; then die "$units1 must hold 100 clusters, which conf/methods has: those of --mode full"; fi
if [ ! -d "$aligner/checkpoints" ]; then die "$aligner holds no recogniser: run run.sh --exp $exp to stage 8 first, or give --aligner"; fi

stage 1 align "$aligner/checkpoints/ $data/dev.jsonl" "$compared/align/" \
  harken align "$aligner" "$data/dev.jsonl" --out "$compared/align"

pretrain_method() { # METHOD
  local out="$compared/models/$1" labels configuration made
  configuration=("$recipe/conf/methods/$1.yaml" "data.train=$data/train.jsonl" "data.valid=$data/dev.jsonl"
    engine.threads=1 "train.steps=$steps" "schedule.warmup_steps=$((steps / 10))"
    "checkpoint.every_steps=$steps" "train.valid_every_steps=$steps" "health.after_steps=$((steps / 5))")
  if [ -n "$conf" ]; then configuration=("${configuration[0]}" "$conf" "${configuration[@]:1}"); fi
  # whoever has a list of classes predicts units, a store for each of them
  labels="$(harken_config "${configuration[@]}" | awk -v units="$units1" '
    $1 == "objective.classes" && $2 ~ /^\(/ { sub(/#.*/, ""); while (sub(/[0-9]+/, "")) list = list (list ? "," : "") units; print list }')"
  if [ -n "$labels" ]; then configuration+=("data.labels=[$labels]"); fi
  if [ "$1" = xeus ]; then
    if [ ! -f "$compared/rooms.jsonl" ]; then harken data rooms --out "$compared/rooms.jsonl" --count 300; fi
    configuration+=("data.reverberation=$compared/rooms.jsonl")
  fi
  made="configuration $(harken_config --yaml "${configuration[@]}" | sha256sum)"
  made+=$'\n'"data $(cat "$data/train.jsonl" "$units1/card.json" | sha256sum)"
  open_training "$1" "$out" "$made" model.yaml || return 0
  stage_commands="$out/commands"
  : > "$stage_commands"
  train_model "$out" "${configuration[@]}"
  "$python" "$root/tools/finetuning_of.py" "$out" --fresh-blocks 2 > "$out/model.yaml.new"
  mv "$out/model.yaml.new" "$out/model.yaml"
  says "$1: done"
}

pretrain_methods() {
  local method
  mkdir -p "$compared/models"
  begin_side_by_side
  for method in $methods; do beside_others "$method" pretrain_method "$method"; done
  wait
  for method in $methods; do
    if [ -f "$compared/models/$method/commands" ]; then cat "$compared/models/$method/commands" >> "$stage_commands"; fi
  done
  end_side_by_side methods
}
stage 2 pretrain "$units1/ $data/train.jsonl" "$compared/models/" pretrain_methods "$methods" "$steps" "$(all_configurations)"

probe_methods() {
  local method layer
  for method in $methods; do
    layer="$("$python" "$root/tools/methods_table.py" layer "$compared/models/$method")"
    harken probe "$compared/models/$method" "$compared/align/cuts.jsonl" --layer "$layer" --clusters 100 \
      --out "$compared/probes/$method.json"
  done
}
stage 3 probe "$compared/models/ $compared/align/" "$compared/probes/" probe_methods "$methods"

start_model() { # METHOD
  echo "$compared/models/$1"
}

start_commands() { # METHOD
  cat "$compared/models/$1/commands"
}

start_configuration() { # METHOD
  printf '%s\n' "$compared/models/$1/model.yaml" ${conf:+"$conf"} encoder.dropout=0.2
  # a Transformer stays blank at the rate of the Conformer (docs/LOG.md)
  case "$1" in beats | data2vec2 | eat | mrhubert | wavlm) echo schedule.peak=4e-4 ;; esac
}

stage 4 rows "$compared/models/" "$compared/rows/" rows 30 30 "$seeds" "$methods" \
  "$(all_configurations)" -- \
  "$recipe/conf/compare/finetune.yaml" "train.steps=$budget" "train.valid_every_steps=$budget" \
  "checkpoint.every_steps=$budget" \
  "objective.tokenizer=$data/tokens.txt" "data.valid=$data/dev.jsonl" "data.train=$data/train.jsonl"

stage 5 table "$compared/rows/ $compared/probes/" "$recipe/results/methods/" "$python" "$root/tools/methods_table.py" table "$compared" \
  --results "$recipe/results/methods" --page "$root/docs/methods.md"

stages_summary
