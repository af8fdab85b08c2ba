#!/usr/bin/env bash
# From Libri-light to HuBERT Large, pretrained on 60,000 hours. See --help.
# shellcheck disable=SC2154,SC2317  # parse_options.sh and environment.sh set variables; stage calls functions by name
# shellcheck source-path=SCRIPTDIR/../..
set -euo pipefail

recipe="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$recipe/../.." && pwd)"
last_stage=7
method=hubert_large parts="small medium large" seconds=15.6 data="" librispeech="" teacher=""
layer=9 clusters=500 max_frames=2000000 to=shar shard_cuts=1000 jobs="$(nproc)"
recipe_options=(method parts seconds data librispeech teacher layer clusters max_frames to shard_cuts jobs)

usage() {
  cat <<'HELP'
egs/librilight/run.sh: pretrains HuBERT Large on the 60,000 hours of Libri-light, read in order from shards, on units
of HuBERT Base. egs/librispeech/run.sh comes first, to its stage 7, and fine-tunes the result. Pretraining needs many
GPUs for weeks: README.md has the figures of the paper.

Recipe options:
  --method METHOD     hubert_large, or zipformer with the sizes of icefall's script (default: hubert_large)
  --parts "small medium large"   what of Libri-light is read: 577, 5,193 and 51,934 hours
  --seconds S         longest stretch of speech that a cut holds (default: 15.6, a crop of HuBERT)
  --teacher DIR       HuBERT Base, second iteration (default: that of egs/librispeech, exp/full/hubert)
  --layer N           its block whose output is clustered (default: 9)
  --clusters N        units (default: 500)
  --max-frames N      frames that k-means keeps in memory (default: 2000000, which are 6 GB of layer 9)
  --librispeech DIR   the data folder of egs/librispeech, on whose 960 hours k-means is fitted and whose dev-other
                      validates (default: egs/librispeech/data)
  --data DIR          where the manifest and the shards go (default: data beside run.sh)
  --to KIND           shar or webdataset (default: shar)
  --shard-cuts N      cuts of a shard (default: 1000)
  --jobs N            processes that read, label and write shards (default: the number of cores)

Stages:
  1  check     the environment (harken doctor)
  2  corpus    a manifest of stretches of speech (local/prepare.py); --corpus names the folder of small/ to large/
  3  index     index the manifest, statistics
  4  units     k-means on the teacher's layer, of LibriSpeech; labels
  5  shards    the audio in shards, cuts shuffled among them
  6  pretrain  masked prediction, reading the shards
  7  report    one HTML page of the run

Examples:
  egs/librilight/run.sh --corpus /corpora/librilight --nproc 8
  egs/librilight/run.sh --corpus /corpora/librilight --parts small --data data/small --exp exp/small --stop-stage 5

HELP
}

. "$root/egs/shared/parse_options.sh"
parse_options "$@"
if [ "$mode" != full ]; then die "--mode has only full here: --parts and --conf FILE make it smaller, got '$mode'"; fi
[ -f "$recipe/conf/$method.yaml" ] || die "--method must be hubert_large or zipformer, got '$method'"
for word in layer clusters max_frames shard_cuts jobs; do
  is_whole_number "${!word}" || die "--${word//_/-} must be a whole number, got '${!word}'"
done
data="$(realpath -m "${data:-$recipe/data}")"
librispeech="$(realpath -m "${librispeech:-$root/egs/librispeech/data}")"
teacher="$(realpath -m "${teacher:-$root/egs/librispeech/exp/full/hubert}")"
train="$data/train.jsonl" shards="$data/$to"
valid="$librispeech/dev-other.jsonl" fitted="$librispeech/train-960h.jsonl"
if [ "$stage" -le 2 ] && [ "$stop_stage" -ge 2 ]; then
  [ -n "$corpus" ] || die "--corpus must name the folder that holds small/, medium/ and large/ of Libri-light, which" \
    "nothing fetches: they are 3 TB, https://github.com/facebookresearch/libri-light says where"
fi
if [ "$stage" -le 6 ] && [ "$stop_stage" -ge 4 ]; then # now, and not after days of labelling
  for word in "$valid" "$fitted"; do
    [ -f "$word" ] || die "$word is not there: run stages 2 and 3 of egs/librispeech/run.sh, or name --librispeech DIR"
  done
fi
if [ "$stage" -le 4 ] && [ "$stop_stage" -ge 4 ]; then
  [ -d "$teacher" ] || die "no teacher at $teacher: run egs/librispeech/run.sh to its stage 7, or name --teacher DIR"
fi
. "$root/egs/shared/environment.sh"
. "$root/egs/shared/stages.sh"
. "$root/egs/shared/training.sh"
. "$root/egs/shared/units.sh"
conf_files=() part_names=()
if [ -n "$conf" ]; then conf_files=("$conf"); fi
read -ra part_names <<< "$parts"

stage 1 check "the machine" "a list of versions and devices" harken doctor

stage 2 corpus "$corpus" "$train $data/dropped.tsv" "$python" "$recipe/local/prepare.py" --out "$data" \
  --corpus "$corpus" --seconds "$seconds" --jobs "$jobs" --parts "${part_names[@]}"

describe_corpus() { # MANIFEST
  harken data index "$1" --jobs "$jobs"
  harken data stats "$1"
}
stage 3 index "$train" "$train.idx/" describe_corpus "$train"

# Fitted on LibriSpeech: fitting reads a corpus once, and 60,000 hours would cost as much again as labelling them.
stage_in_pieces 4 units "$fitted $train $valid $teacher/" "$exp/units/labels/" \
  make_units "$exp/units" "$clusters" "$max_frames" "$fitted" "$train" "$valid" -- \
  --features hidden --model "$teacher" --layer "$layer"

make_shards() { # MANIFEST OUT KIND CUTS: an interrupted conversion goes on, a finished one is replaced
  rm -rf "$2"
  harken data shards "$1" --out "$2" --to "$3" --shard-cuts "$4" --shuffle 1 --jobs "$jobs"
}
stage 5 shards "$train" "$shards/" make_shards "$train" "$shards" "$to" "$shard_cuts"

train_stage 6 "pretrain-$method" "$shards/ $valid $exp/units/labels/" "$exp/$method" \
  "$recipe/conf/$method.yaml" "${conf_files[@]}" "objective.classes=[$clusters]" \
  "data.train=$shards" "data.valid=$valid" "data.labels=[$exp/units/labels]"

stage 7 report "$exp/$method/ $exp/units/labels/" "$exp/report.html" \
  harken report "$exp" --out "$exp/report.html" --utterances 0

stages_summary
if [ -f "$exp/report.html" ]; then echo "report: $exp/report.html"; fi
