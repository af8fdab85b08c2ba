# shellcheck shell=bash disable=SC2154  # the script that sources it sets compared, data, exp, root, force, jobs
# Trainings of a comparison side by side, each on one thread, and its rows: fine-tunings on fixed amounts of labels with
# one budget, each decoded and scored. Source it after training.sh and hubert.sh. For rows the script defines, for the name of a start,
#   start_model START           prints the folder of the pretrained model, nothing for none
#   start_commands START        prints what made that model, a command a line
#   start_configuration START   prints what a row from it adds to the configuration, an argument a line

# What decides a row's result, one `name checksum` a line.
made_of() { # MINUTES MODEL CONFIGURATION...
  local minutes="$1" folder="$2" configuration model=none
  shift 2
  configuration="$(harken_config --yaml "$@")" || return
  if [ -n "$folder" ]; then model="$(cat "$folder"/checkpoints/*/checksums.json)" || return; fi
  printf 'configuration %s\n' "$(sha256sum <<< "$configuration")"
  printf 'labels %s\n' "$(cat "$data/train-${minutes}min.jsonl" "$data/dev.jsonl" "$data/tokens.txt" | sha256sum)"
  printf 'tests %s\n' "$(cat "$data/test.jsonl" "$data/test-unseen.jsonl" | sha256sum)"
  printf 'model %s\n' "$(sha256sum <<< "$model")"
}

# Prints a word for all that the recipe's configurations say: given to a stage that does not name them itself, it lets the
# stage run again when one has changed.
all_configurations() {
  find "$recipe/conf" -name '*.yaml' -print0 | sort -z | xargs -0 cat -- ${conf:+"$conf"} | sha256sum | cut -c1-16
}

# Prints why what an earlier call left of a training must not be kept, or nothing.
training_changed() { # FOLDER MADE_OF
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

says() { # TEXT: in the training's own log and in the stage's
  printf '%s\n' "$1"
  printf '%s\n' "$1" >&3
}

# Makes a training's folder ready to begin or to go on, and says which. 1: it is done already.
open_training() { # NAME FOLDER MADE_OF DONE
  local name="$1" out="$2" made="$3" why
  why="$(training_changed "$out" "$made")"
  if [ -n "$why" ]; then
    says "$name: begins anew ($why)"
    put_aside "$out"
  elif [ -f "$out/$4" ]; then
    says "$name: done before"
    return 1
  elif [ -d "$out" ]; then
    says "$name: continues"
  else
    says "$name: begins"
  fi
  if [ ! -d "$out" ]; then
    rm -rf "$out.new"
    mkdir "$out.new"
    printf '%s\n' "$made" > "$out.new/made-of"
    mv "$out.new" "$out"
  fi
}

# Trains, decodes and scores one row unless that is done. Its output is the row's log, where 3 is that of the stage.
row() { # MINUTES START SEED CONFIGURATION...
  local minutes="$1" start="$2" seed="$3" name="$1-$2-$3" out="$compared/rows/$1-$2-$3" model made
  local configuration own
  shift 3
  model="$(start_model "$start")"
  # masks begin after about 360 steps of 20 s in every row: an epoch of 10 minutes has 30
  configuration=("$@" "data.train=$data/train-${minutes}min.jsonl" "seed=$seed" engine.threads=1
    "objective.mask_from_epoch=$((120 / minutes))")
  if [ -n "$model" ]; then configuration+=("train.init_from=$model"); fi
  own="$(start_configuration "$start")"
  if [ -n "$own" ]; then mapfile -t -O "${#configuration[@]}" configuration <<< "$own"; fi
  made="$(made_of "$minutes" "$model" "${configuration[@]}")"
  open_training "$name" "$out" "$made" result.json || return 0
  stage_commands="$out/commands"
  : > "$stage_commands"
  start_commands "$start" > "$out/pretraining-commands"
  "$python" "$root/tools/results_table.py" begin "$out" --jobs "$jobs"
  train_model "$out" "${configuration[@]}"
  transcribe "$out" "$out"
  says "$name: done"
}

training_ended() { # NAME STATUS
  local logs
  logs="$exp/logs/$(basename "$compared")"
  if [ "$2" != 0 ] && [ "$2" != 143 ]; then
    echo "$1: FAILED with exit code $2; log: $logs/$1.log; its last 5 lines:" >&3
    tail -n 5 "$logs/$1.log" | sed 's/^/    /' >&3
    touch "$compared/failed/$1"
  fi
}

# On TERM a training lets harken save, and then ends.
alone() { # NAME COMMAND...
  local name="$1"
  shift
  export OMP_NUM_THREADS=1
  trap 'exit 143' TERM
  # shellcheck disable=SC2064  # the name is that of now
  trap "training_ended '$name' \$?" EXIT
  "$@"
}

# Starts a command when less than `jobs` others run. Its output is its log, where 3 is that of the stage.
beside_others() { # NAME COMMAND...
  while [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do wait -n || true; done
  alone "$@" 3>&1 >> "$exp/logs/$(basename "$compared")/$1.log" 2>&1 &
}

begin_side_by_side() {
  set +m # they stay in the stage's process group, to which signals go
  mkdir -p "$compared/failed" "$exp/logs/$(basename "$compared")"
  rm -f "$compared"/failed/*
  trap 'wait; exit 143' TERM
}

# Waits for all that were started; 1 when some have failed.
end_side_by_side() { # WHAT, as of several
  local failed
  wait
  failed="$(find "$compared/failed" -type f | wc -l)"
  if [ "$failed" != 0 ]; then
    echo "$failed $1 failed; the same command goes on with them"
    return 1
  fi
}

# Searches once more in what every finished row's model hears, with a character n-gram of all training texts.
search_rows() {
  local out
  harken ngram "$data/train.jsonl" --tokens "$data/tokens.txt" --order 6 --out "$compared/characters.arpa"
  begin_side_by_side
  for out in "$compared"/rows/*; do
    if [ -f "$out/result.json" ] && [[ "$out" =~ -[0-9]+$ ]]; then
      beside_others "$(basename "$out")-search" search_row "$out"
    fi
  done
  end_side_by_side searches
}

search_row() { # FOLDER
  local name out="$1/beam" search
  name="$(basename "$1")-search"
  search_options "$compared/characters.arpa"
  open_training "$name" "$out" "options ${search[*]}"$'\n'"ngram $(sha256sum < "$compared/characters.arpa")" done || return 0
  stage_commands="$1/search-commands"
  : > "$stage_commands"
  transcribe "$1" "$out" "${search[@]}"
  touch "$out/done"
  says "$name: done"
}

# Decodes the test sets with a row's model, scores them, and puts the rates into the row's result.
transcribe() { # FOLDER OUT OPTION...
  local split
  harken decode "$1" "$data/test.jsonl" "$data/test-unseen.jsonl" --out "$2" "${@:3}"
  for split in test test-unseen; do
    harken score "$2/$split.jsonl" --out "$2/$split-score"
  done
  "$python" "$root/tools/results_table.py" finish "$1"
}

# Every start of every row, `jobs` at a time, those of the first seed first so that a table can be made early.
rows() { # MINUTES MINUTES-OF-ALL-SEEDS SEEDS STARTS [all_configurations] -- CONFIGURATION...
  local amounts="$1" seeded=" $2 " all_seeds="$3" starts="$4" amount start seed model
  shift 4
  while [ "$1" != -- ]; do shift; done
  shift
  for start in $starts; do
    model="$(start_model "$start")"
    if [ -n "$model" ] && ! compgen -G "$model/checkpoints/*/checksums.json" > /dev/null; then
      die "$model holds no pretrained model: run this again from --stage 1"
    fi
  done
  mkdir -p "$compared/rows"
  begin_side_by_side
  for seed in $all_seeds; do
    for amount in $amounts; do
      if [[ "$seeded" != *" $amount "* ]] && [ "$seed" != "${all_seeds%% *}" ]; then continue; fi
      for start in $starts; do
        beside_others "$amount-$start-$seed" row "$amount" "$start" "$seed" "$@"
      done
    done
  done
  wait
  find "$compared/rows" -mindepth 2 -maxdepth 2 -path '*[0-9]/commands' -exec cat {} + >> "$stage_commands"
  end_side_by_side rows
}
