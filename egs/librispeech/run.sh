#!/usr/bin/env bash
# From LibriSpeech to HuBERT or Zipformer Base, fine-tuned on 10 minutes to 960 hours. See --help.
# shellcheck disable=SC2154,SC2317  # parse_options.sh and environment.sh set variables; stage calls functions by name
# shellcheck source-path=SCRIPTDIR/../..
set -euo pipefail

recipe="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$recipe/../.." && pwd)"
last_stage=10
method=hubert labels="10min 1h 10h 100h 960h" objectives="ctc transducer" data="" finetuning="" pretrained=""
clusters1=100 clusters2=500 layer=6 max_frames=2000000 bpe=500 jobs="$(nproc)"
recipe_options=(method labels objectives data finetuning pretrained clusters1 clusters2 layer max_frames bpe jobs)

usage() {
  cat <<'HELP'
egs/librispeech/run.sh: pretrains HuBERT Base in two iterations, or k2SSL's Zipformer Base on the units of the first, on
the 960 hours of LibriSpeech; fine-tunes by CTC and by the transducer on each of five amounts of labels; error rates of
dev and test, clean and other. Pretraining needs several GPUs for days: README.md has the figures of the papers.

Recipe options:
  --method METHOD     hubert or zipformer, the model of stages 7 to 10 (default: hubert); hubert_large fine-tunes what
                      egs/librilight/run.sh pretrains, with --pretrained
  --labels "10min 1h 10h 100h 960h"   amounts that are fine-tuned on
  --objectives "ctc transducer"       losses that are fine-tuned with
  --finetuning DIR    librispeech_finetuning of Libri-light, the 10 min, 1 h and 10 h (default: beside the corpus, or
                      fetched when the corpus is)
  --pretrained DIR    fine-tune this model instead of pretraining one: stages 4 to 7 are left out
  --data DIR          where manifests and tokenizers go (default: data beside run.sh)
  --clusters1 N, --clusters2 N   units of the first iteration and of the second (default: 100 and 500)
  --layer N           the block of the first iteration whose output is clustered for the second (default: 6)
  --max-frames N      frames that k-means keeps in memory (default: 2000000, which are 6 GB of layer 6)
  --bpe N             classes of the transducer's tokenizer (default: 500); CTC has characters
  --jobs N            processes that cluster and label, whatever --nproc trains on (default: the number of cores)

Stages:
  1  check      the environment (harken doctor)
  2  corpus     fetch it or find it, manifests (local/prepare.py)
  3  verify     index the manifests, decode every file, statistics, characters and BPE
  4  units1     k-means on MFCC, labels
  5  pretrain1  HuBERT Base, first iteration, whatever the method
  6  units2     k-means on a hidden layer of it, labels
  7  pretrain2  the model of --method: masked prediction of units2
  8  finetune   every amount of labels with every objective
  9  decode     greedy and beam, error rates of dev and test, clean and other
  10 report     one HTML page of the run

Both methods may share --exp: the second begins at --stage 7. --conf is merged over all training stages that run.

Examples:
  egs/librispeech/run.sh --corpus /corpora --nproc 8
  egs/librispeech/run.sh --corpus /corpora --nproc 8 --method zipformer --stage 7
  egs/librispeech/run.sh --corpus /corpora --stage 8 --labels "1h 100h" --objectives ctc --nproc 8
  egs/librispeech/run.sh --method hubert_large --pretrained egs/librilight/exp/full/hubert_large --stage 8 --nproc 8

HELP
}

. "$root/egs/shared/parse_options.sh"
parse_options "$@"
if [ "$mode" != full ]; then die "--mode has only full here: --conf FILE makes every training smaller, got '$mode'"; fi
case "$method" in
  hubert | zipformer) ;;
  hubert_large) [ -n "$pretrained" ] || die "--method hubert_large fine-tunes a model that --pretrained DIR names" ;;
  *) die "--method must be hubert, zipformer or hubert_large, got '$method'" ;;
esac
for word in $objectives; do
  case "$word" in ctc | transducer) ;; *) die "--objectives are ctc and transducer, got '$word'" ;; esac
done
for word in $labels; do
  [ -f "$recipe/conf/$method/$word.yaml" ] || die "--labels are 10min, 1h, 10h, 100h and 960h, got '$word'"
done
for word in clusters1 clusters2 layer max_frames bpe jobs; do
  is_whole_number "${!word}" || die "--${word//_/-} must be a whole number, got '${!word}'"
done
if [ -n "$pretrained" ]; then
  [ -d "$pretrained" ] || die "--pretrained must be a folder of a model, found none at $pretrained"
  pretrained="$(realpath "$pretrained")"
fi
. "$root/egs/shared/environment.sh"
. "$root/egs/shared/stages.sh"
. "$root/egs/shared/training.sh"
. "$root/egs/shared/units.sh"

data="$(realpath -m "${data:-$recipe/data}")"
conf_files=() corpus_options=()
if [ -n "$conf" ]; then conf_files=("$conf"); fi
if [ -n "$corpus" ]; then corpus_options+=(--corpus "$corpus"); fi
if [ -n "$finetuning" ]; then corpus_options+=(--finetuning "$(realpath -m "$finetuning")"); fi
train="$data/train-960h.jsonl" valid="$data/dev-other.jsonl" # fairseq validates on dev_other (valid_subset)
tests=("$data/dev-clean.jsonl" "$data/dev-other.jsonl" "$data/test-clean.jsonl" "$data/test-other.jsonl")

stage 1 check "the machine" "a list of versions and devices" harken doctor

stage 2 corpus "${corpus:-OpenSLR 12 and Libri-light, fetched}" "$train ${tests[*]}" \
  "$python" "$recipe/local/prepare.py" --out "$data" --jobs "$jobs" \
  "${corpus_options[@]}"

if [ "$stop_stage" -ge 8 ]; then # now, and not after weeks of pretraining
  for word in $labels; do
    [ -f "$data/train-$word.jsonl" ] || die "--labels asks for $data/train-$word.jsonl, which is not there: run stage" \
      "2 with --finetuning DIR, the folder librispeech_finetuning of Libri-light, or name fewer --labels"
  done
fi

verify_corpus() { # FOLDER BPE: index every list, decode every file once, describe, make the tokenizers
  local folder="$1" bpe="$2" path
  anew "$folder"/*.verify.pieces
  harken data index "$folder"/train-*.jsonl "$folder"/{dev,test}-{clean,other}.jsonl
  for path in "$folder"/train-960h.jsonl "$folder"/{dev,test}-{clean,other}.jsonl; do
    harken_in_pieces data verify "$path" --max-clipped 1 # a damaged file stops here; one that is clipped is so for everybody
  done
  harken data stats "$folder"/train-960h.jsonl "$folder"/{dev,test}-{clean,other}.jsonl
  harken data tokens "$folder/train-960h.jsonl" --out "$folder/characters.txt"
  harken data tokens "$folder/train-960h.jsonl" --out "$folder/bpe-$bpe.model" --size "$bpe"
}
stage_in_pieces 3 verify "$train ${tests[*]}" "$data/characters.txt $data/bpe-$bpe.model" verify_corpus "$data" "$bpe"

if [ -z "$pretrained" ]; then
  stage_in_pieces 4 units1 "$train $valid" "$exp/units1/labels/" \
    make_units "$exp/units1" "$clusters1" "$max_frames" "$train" "$train" "$valid" -- --features mfcc

  train_stage 5 pretrain1 "$train $exp/units1/labels/" "$exp/pretrain1" \
    "$recipe/conf/hubert/iteration1.yaml" "${conf_files[@]}" "objective.classes=[$clusters1]" \
    "data.train=$train" "data.valid=$valid" "data.labels=[$exp/units1/labels]"

  stage_in_pieces 6 units2 "$train $valid $exp/pretrain1/checkpoints/" "$exp/units2/labels/" make_units "$exp/units2" \
    "$clusters2" "$max_frames" "$train" "$train" "$valid" -- --features hidden --model "$exp/pretrain1" --layer "$layer"

  train_stage 7 "pretrain2-$method" "$train $exp/units2/labels/" "$exp/$method" \
    "$recipe/conf/$method/pretrain.yaml" "${conf_files[@]}" "objective.classes=[$clusters2]" \
    "data.train=$train" "data.valid=$valid" "data.labels=[$exp/units2/labels]"
  pretrained="$exp/$method"
fi

tokenizer_of() { # OBJECTIVE
  if [ "$1" = ctc ]; then echo "$data/characters.txt"; else echo "$data/bpe-$bpe.model"; fi
}
for word in $labels; do
  for objective in $objectives; do
    train_stage 8 "$method-$objective-$word" \
      "$data/train-$word.jsonl $(tokenizer_of "$objective") $pretrained/checkpoints/" "$exp/$method-$objective-$word" \
      "$recipe/conf/$method/finetune.yaml" "$recipe/conf/$objective.yaml" "$recipe/conf/$method/$word.yaml" \
      "${conf_files[@]}" "objective.tokenizer=$(tokenizer_of "$objective")" "data.train=$data/train-$word.jsonl" \
      "data.valid=$valid" "train.init_from=$pretrained"
  done
done

decode_and_score() { # MODEL OUT OPTION... -- MANIFEST...
  local model="$1" out="$2" path options=()
  shift 2
  while [ "$1" != -- ]; do options+=("$1"); shift; done
  shift
  anew "$out"/*.pieces
  harken_in_pieces decode "$model" "$@" --out "$out" "${options[@]}"
  for path in "$@"; do
    path="$out/$(basename "$path")"
    harken score "$path" --out "${path%.jsonl}-score"
  done
}
# The n-gram is over characters, of the 960 hours' transcripts: the papers' is over words, of 800 million of them.
characters="$exp/characters.arpa.gz"
if [[ " $objectives " = *" ctc "* ]]; then
  stage 9 ngram "$train" "$characters" \
    harken ngram "$train" --tokens "$data/characters.txt" --order 6 --out "$characters"
fi
for word in $labels; do
  for objective in $objectives; do
    name="$method-$objective-$word"
    beam=(--method modified_beam --beam 4) # beam of icefall's modified_beam_search
    if [ "$objective" = ctc ]; then
      beam=(--method prefix_beam --ngram "$characters" --ngram-weight 0.5 --insertion-bonus 0.5)
    fi
    stage_in_pieces 9 "$name-greedy" "${tests[*]} $exp/$name/checkpoints/" "$exp/decode/$name-greedy/" \
      decode_and_score "$exp/$name" "$exp/decode/$name-greedy" --method greedy -- "${tests[@]}"
    stage_in_pieces 9 "$name-beam" "${tests[*]} $exp/$name/checkpoints/ $characters" "$exp/decode/$name-beam/" \
      decode_and_score "$exp/$name" "$exp/decode/$name-beam" "${beam[@]}" -- "${tests[@]}"
  done
done

stage 10 report "$pretrained/ $exp/decode/" "$exp/report.html" \
  harken report "$exp" --out "$exp/report.html" --cuts "$data/test-clean.jsonl"

stages_summary
if [ -f "$exp/report.html" ]; then echo "report: $exp/report.html"; fi
