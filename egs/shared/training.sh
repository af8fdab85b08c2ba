# shellcheck shell=bash disable=SC2154  # parse_options.sh sets processes, environment.sh defines the commands
# Stages that train. Source it after environment.sh and stages.sh.

# A stage whose run in FOLDER is continued when it was interrupted, and put aside when what it is made of has changed.
train_stage() { # NUMBER NAME "READS" FOLDER CONFIGURATION...
  local number="$1" name="$2" reads="$3" resumes="$4"
  shift 4
  stage "$number" "$name" "$reads" "$resumes/checkpoints/" train_model "$resumes" "$@"
}

train_model() { # FOLDER CONFIGURATION...
  local folder="$1" divided
  shift
  divided="$(divided_batch "$@")"
  # a training that was stopped is no finished stage, even when only its own process got the signal
  harken_parallel train "$@" ${divided:+"$divided"} --fail-when-stopped --exp "$folder"
}

# Prints the override that makes the micro-batches of a step divide among all processes: the largest size that is not
# above the configured one, for memory's sake. Prints nothing where they divide already, and where they would become too
# small for the longest cut: the loader then says what is wrong with the sizes that the user gave.
divided_batch() { # CONFIGURATION...
  if [ "$processes" = 1 ]; then return; fi
  harken_config "$@" | awk -v ranks="$processes" '
    { value[$1] = $2 }
    END {
      step = value["batch.seconds_per_step"]; most = value["batch.max_seconds"]
      if (most + 0 == 0) exit  # auto: harken divides them itself
      longest = value["data.crop_seconds"] == "None" ? value["data.max_seconds"] : value["data.crop_seconds"]
      if (int(step / most + 0.5) % ranks == 0) exit
      pieces = int(step / most / ranks)
      if (pieces * most * ranks < step) pieces++
      size = sprintf("%.6g", step / (pieces * ranks))
      if (size + 0 >= longest + 0) print "batch.max_seconds=" size
    }'
}
