# shellcheck shell=bash disable=SC2154  # parse_options.sh and the recipe set stage, stop_stage, last_stage, exp, force
# Runs the stages of a recipe. Source it after parse_options.sh has set stage, stop_stage, exp and force.
#
#   stage NUMBER NAME "READS" "WRITES" COMMAND [ARGUMENT...]
#
# COMMAND is a program or a function of the recipe, which stops at its first failing command.
# READS and WRITES are for the reader; their words with a slash are taken as paths: a stage runs again when a path it
# wrote is gone, or when a stage that wrote what it reads has run since. An argument `%force` is passed on as --force
# when the user gave --force and is left out otherwise, for commands that would continue from what they find.
#
# A finished stage leaves EXP/stages/NUMBER-NAME.done: a stage that failed or was stopped leaves none and runs again.

stages_begun=$SECONDS
stage_table=()
stage_child="" stage_signal="" stage_status=0 stage_now=""

# The arguments, the text of a function, and the contents of the arguments that are configurations or scripts: an
# edited file is a changed command.
stage_hash() {
  local argument
  {
    printf '%s\0' "$@"
    declare -f "$1" || true
    for argument in "$@"; do
      case "$argument" in
        *.yaml | *.py | *.sh) if [ -f "$argument" ]; then cat "$argument"; fi ;;
      esac
    done
  } | sha256sum | cut -d' ' -f1
}

marker_value() { # MARKER KEY
  sed -n "s/^$2=//p" "$1"
}

paths_in() { # TEXT: its words with a slash, one a line
  tr -s ', ' '\n' <<< "$1" | grep / || true
}

# Prints why a finished stage must run again, or nothing.
stale_reason() { # MARKER HASH READS
  local marker="$1" hash="$2" reads="$3" path other written
  if [ "$force" = 1 ]; then
    echo "--force"
    return
  fi
  if [ "$(marker_value "$marker" hash)" != "$hash" ]; then
    echo "its command or a file it names has changed"
    return
  fi
  while read -r path; do
    if [ -n "$path" ] && [ ! -e "$path" ]; then
      echo "$path is gone"
      return
    fi
  done < <(paths_in "$(marker_value "$marker" writes)")
  for other in "$exp"/stages/*.done; do
    if [ "$other" -nt "$marker" ]; then
      while read -r written; do
        while read -r path; do
          if [ -n "$path" ] && [[ "$path/" == "$written/"* || "$written/" == "$path/"* ]]; then
            echo "$(basename "$other" .done), which writes $written, has run since"
            return
          fi
        done < <(paths_in "$reads")
      done < <(paths_in "$(marker_value "$other" writes)")
    fi
  done
}

write_marker() { # MARKER HASH SECONDS WRITES COMMAND...
  local marker="$1" hash="$2" seconds="$3" writes="$4"
  shift 4
  {
    printf 'hash=%s\nfinished=%s\nseconds=%s\nwrites=%s\n' "$hash" "$(date '+%F %T')" "$seconds" "$writes"
    printf 'command=%s\n' "$(printf '%q ' "$@")"
  } > "$marker.tmp"
  mv "$marker.tmp" "$marker"
}

# The command has a process group of its own: a signal to the recipe is passed on to all of it as TERM, on which
# training saves and exits.
forward_signal() { # SIGNAL
  if [ -n "$stage_signal" ]; then
    echo "stopped twice: killing stage $stage_now at once" >&2
    kill -KILL -- "-$stage_child" 2> /dev/null || true
  else
    echo "stopping stage $stage_now (once more kills it)" >&2
    kill -TERM -- "-$stage_child" 2> /dev/null || true
  fi
  stage_signal="$1"
}

# Runs a command with its output on the terminal and in LOG; its exit status goes to stage_status. To be called
# plainly: behind `||` or in `if`, bash would not stop a function at its first failing command.
run_logged() { # LOG COMMAND...
  local log="$1" pipe tee
  shift
  pipe="$(mktemp -u)"
  mkfifo "$pipe"
  tee -i "$log" < "$pipe" &
  tee=$!
  stage_signal="" stage_status=0
  set -m
  "$@" > "$pipe" 2>&1 < /dev/null &
  stage_child=$!
  set +m
  trap 'forward_signal INT' INT
  trap 'forward_signal TERM' TERM
  trap 'forward_signal HUP' HUP
  wait "$stage_child" || stage_status=$?
  # A signal ends `wait`, not the child.
  while kill -0 "$stage_child" 2> /dev/null; do
    stage_status=0
    wait "$stage_child" || stage_status=$?
  done
  wait "$tee" || true
  trap - INT TERM HUP
  rm -f "$pipe"
}

stage_failed() { # STATUS SECONDS LOG
  if [ -n "$stage_signal" ]; then
    echo "stage $stage_now stopped by $stage_signal after $2 s; run the same command to go on; log: $3" >&2
    exit 130
  fi
  echo "stage $stage_now FAILED after $2 s with exit code $1; log: $3; its last 15 lines:" >&2
  tail -n 15 "$3" | sed 's/^/    /' >&2
  exit "$1"
}

cost_of() { # SECONDS WRITES: what a stage cost, for the reader
  local path sizes=""
  while read -r path; do
    if [ -e "$path" ]; then sizes+=", $(du -sh "$path" | cut -f1) in ${path#"$PWD"/}"; fi
  done < <(paths_in "$2")
  echo "$1 s$sizes"
}

stage() {
  local number="$1" name="$2" reads="$3" writes="$4" marker log hash why="" begun cost
  shift 4
  stage_now="$number $name"
  if [ "$number" -lt "$stage" ] || [ "$number" -gt "$stop_stage" ]; then return; fi
  marker="$exp/stages/$number-$name.done" log="$exp/logs/$number-$name.log"
  mkdir -p "$exp/stages" "$exp/logs"
  hash="$(stage_hash "$@")"
  printf '\n== stage %s of %s: %s\n' "$number" "$last_stage" "$name"
  if [ -f "$marker" ]; then
    why="$(stale_reason "$marker" "$hash" "$reads")"
    if [ -z "$why" ]; then
      echo "skipped: finished on $(marker_value "$marker" finished) in $(marker_value "$marker" seconds) s with the" \
        "same command (--force redoes it)"
      stage_table+=("$(printf '%-3s %-14s skipped' "$number" "$name")")
      return
    fi
    echo "finished before, runs again: $why"
  fi
  rm -f "$marker"
  local command=() word
  for word in "$@"; do
    if [ "$word" != %force ]; then command+=("$word"); elif [ "$force" = 1 ]; then command+=(--force); fi
  done
  printf 'reads:   %s\nwrites:  %s\ncommand: %s\nlog:     %s\n' "$reads" "$writes" "$(printf '%q ' "${command[@]}")" "$log"
  if [ -f "$log" ]; then mv "$log" "$log.old"; fi
  begun=$SECONDS
  run_logged "$log" "${command[@]}"
  if [ "$stage_status" != 0 ] || [ -n "$stage_signal" ]; then
    stage_failed "$stage_status" "$((SECONDS - begun))" "$log"
  fi
  write_marker "$marker" "$hash" "$((SECONDS - begun))" "$writes" "$@"
  cost="$(cost_of "$((SECONDS - begun))" "$writes")"
  echo "cost:    $cost"
  stage_table+=("$(printf '%-3s %-14s %s' "$number" "$name" "$cost")")
}

# What each stage of this run cost; the last line of a recipe.
stages_summary() {
  printf '\n== stages %s to %s finished in %s s\n' "$stage" "$stop_stage" "$((SECONDS - stages_begun))"
  printf '%s\n' "${stage_table[@]}"
}
