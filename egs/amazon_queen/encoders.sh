#!/usr/bin/env bash
# Encoders and objectives of recognition side by side: Transformer, Zipformer, CTC, transducer. See --help.
# shellcheck disable=SC2154,SC2317  # parse_options.sh and environment.sh set variables; stage calls functions by name
# shellcheck source-path=SCRIPTDIR/../..
set -euo pipefail

recipe="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$recipe/../.." && pwd)"
last_stage=4
minutes="30 120" seeds="1 2 3" steps=2000 budget=2000 jobs="$(nproc)"
starts="transformer_ctc zipformer_ctc transformer_transducer zipformer_transducer"
recipe_options=(minutes seeds starts steps budget jobs)

usage() {
  cat <<'HELP'
egs/amazon_queen/encoders.sh: pretrains a Transformer and a Zipformer of equal size on run.sh's first units, fine-tunes each
by CTC and by the transducer with one budget, and writes the table of encoders in README.md. Run run.sh to stage 4 first.

Recipe options:
  --minutes "30 120"   label amounts, each with every seed
  --seeds "1 2 3"      seeds of fine-tuning
  --starts "..."       rows to train (default: "transformer_ctc zipformer_ctc transformer_transducer zipformer_transducer")
  --steps N            of pretraining, 40 s of audio each (default: 2000)
  --budget N           steps of fine-tuning, 20 s of audio each (default: 2000)
  --jobs N             rows that run side by side, each on one thread (default: the number of cores)

Stages:
  1  transformer  masked prediction of run.sh's units1
  2  zipformer    the same with the other encoder
  3  rows         every row: train, decode, score; logs in EXP/logs/encoders
  4  table        results/encoders/*.json beside this script, and the table in README.md

Examples:
  egs/amazon_queen/encoders.sh
  egs/amazon_queen/encoders.sh --minutes 30 --seeds 1 --starts "transformer_ctc zipformer_ctc"

HELP
}

. "$root/egs/shared/parse_options.sh"
parse_options "$@"
for number in "$jobs" "$steps" "$budget"; do
  if ! is_whole_number "$number" || [ "$number" -lt 1 ]; then
    die "--jobs, --steps and --budget must be 1 or more, got '$number'"
  fi
done
for start in $starts; do
  case "$start" in
    transformer_ctc | zipformer_ctc | transformer_transducer | zipformer_transducer) ;;
    *) die "--starts must name rows that --help lists, got '$start'" ;;
  esac
done
. "$root/egs/shared/environment.sh"
. "$root/egs/shared/stages.sh"
. "$root/egs/shared/training.sh"
. "$root/egs/shared/units.sh"
. "$recipe/local/hubert.sh"
. "$recipe/local/rows.sh"

data="$recipe/data"
units1="$exp/units1/labels" compared="$exp/encoders"
clusters1="$(clusters_of "$units1")"

# neither has dropout in pretraining, as the default model has none
encoder_stage() { # NUMBER NAME OVERRIDE...
  local number="$1" name="$2"
  shift 2
  conf_files=("$recipe/conf/$name.yaml")
  if [ -n "$conf" ]; then conf_files+=("$conf"); fi
  pretrain_stage "$number" "$compared/$name" "$units1" "$clusters1" "$recipe/conf/compare/pretrain.yaml" \
    "train.steps=$steps" "$@"
}
encoder_stage 1 transformer encoder.dropout=0
encoder_stage 2 zipformer encoder.dropout=0 encoder.start_dropout=0 encoder.position_dropout=0

start_model() { # START
  echo "$compared/${1%%_*}"
}

start_commands() { # START
  cat "$exp"/stages/[12]-"${1%%_*}".commands
}

start_configuration() { # START
  echo "$recipe/conf/${1%%_*}.yaml"
  if [[ "$1" == *_transducer ]]; then echo "$recipe/conf/transducer.yaml"; fi
  if [ -n "$conf" ]; then echo "$conf"; fi
  printf '%s\n' encoder.dropout=0.2 objective.mask_probability=0.3
  # rates that 700 steps of CTC from the pretrained models chose; schedules that have run do not begin again
  case "$1" in
    transformer_*) echo schedule.peak=4e-4 ;;
    zipformer_*) printf '%s\n' schedule.peak=0.03 encoder.schedule_start=100000 ;;
  esac
}

stage 3 rows "$compared/" "$compared/rows/" rows "$minutes" "$minutes" "$seeds" "$starts" \
  "$(all_configurations)" -- "$recipe/conf/compare/finetune.yaml" "train.steps=$budget" \
  "objective.tokenizer=$data/tokens.txt" "data.valid=$data/dev.jsonl" "data.train=$data/train.jsonl"

stage 4 table "$compared/rows/" "$recipe/results/encoders/" "$python" "$root/tools/results_table.py" table \
  "$compared/rows" --results "$recipe/results/encoders" --readme "$recipe/README.md" --name encoders --costs \
  --start "transformer_ctc=Transformer, CTC" --start "zipformer_ctc=Zipformer, CTC" \
  --start "transformer_transducer=Transformer, transducer" --start "zipformer_transducer=Zipformer, transducer"

stages_summary
