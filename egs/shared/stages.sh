# shellcheck shell=bash disable=SC2154  # parse_options.sh and the recipe set stage, stop_stage, last_stage, exp, force
# Runs the stages of a recipe. Source it after parse_options.sh has set stage, stop_stage, exp and force.
#
#   stage NUMBER NAME "READS" "WRITES" COMMAND [ARGUMENT...]
#
# COMMAND is a program or a function of the recipe, which stops at its first failing command. Arguments that end in
# .yaml are configurations of harken, those of the form KEY=VALUE what overrides them.
# READS and WRITES are for the reader; their words with a slash are taken as paths: a stage runs again when a path it
# wrote is gone, or when a stage that wrote what it reads has run since. An argument `%force` is passed on as --force
# when the user gave --force and is left out otherwise, for commands that would continue from what they find.
# A folder in the variable `resumes` holds work that the command continues (see train_stage in training.sh): it is
# continued only when the stage was interrupted and nothing has changed since it began, else put aside as FOLDER.old.
#
# A finished stage leaves EXP/stages/NUMBER-NAME.done. One that failed or was stopped leaves .begun and runs again.
# What a stage ran stands in NUMBER-NAME.commands beside them.
# With --launcher slurm a stage is not run but submitted (see slurm.sh): its job runs the recipe for that stage alone.
#
#   stage_in_pieces ...as stage...
#
# is for a stage most of whose work knows --piece. Run here it is a stage like any other. As jobs its COMMAND runs several
# times: to its first `harken_in_pieces` (the begin); these alone (each piece); from the first of them on (the end). So COMMAND
# is a function that works by `harken`, `harken_in_pieces` and `anew` of environment.sh alone, and what pieces need comes first.

# shellcheck source=egs/shared/slurm.sh
. "$(dirname "${BASH_SOURCE[0]}")/slurm.sh"

stages_begun=$SECONDS
stage_table=()
stage_child="" stage_signal="" stage_status=0 stage_now="" stage_commands="" stage_anew="" stage_job=""
stage_part="" # what is to be done of a stage in pieces: begin, I/N, end; all of it where this is empty

# What a stage's command is: its arguments, the text of the function that it calls (not of those that this one calls),
# the scripts among its arguments, and every resolved value of its configuration: a file that a configuration reaches
# through `base:` counts, a comment in it does not.
stage_hash() {
  local argument configuration=() files=0 resolved=""
  for argument in "$@"; do
    case "$argument" in
      -*) ;;
      *=*) configuration+=("$argument") ;;
      *.yaml) configuration+=("$argument"); files=1 ;;
    esac
  done
  # A substitution does not inherit errexit: a configuration with a mistake must end the recipe here.
  if [ "$files" = 1 ]; then resolved="$(harken_config --yaml "${configuration[@]}")" || return; fi
  {
    printf '%s\0' "$@" "$resolved"
    declare -f "$1" || true
    for argument in "$@"; do
      case "$argument" in
        *.py | *.sh) if [ -f "$argument" ]; then cat "$argument"; fi ;;
      esac
    done
  } | sha256sum | cut -d' ' -f1
}

# Adds a command that the stage is about to run to those that the report shows: one line that a shell reads back.
note_command() { # COMMAND ARGUMENT...
  local word line=""
  if [ -z "$stage_commands" ]; then return; fi
  for word in "$@"; do
    if [[ "$word" =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then line+=" $word"; else line+=" ${word@Q}"; fi
  done
  printf '%s\n' "${line# }" >> "$stage_commands"
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
          if [ -n "$path" ] && [[ "${path%/}/" == "${written%/}/"* || "${written%/}/" == "${path%/}/"* ]]; then
            echo "$(basename "$other" .done), which writes $written, has run since"
            return
          fi
        done < <(paths_in "$reads")
      done < <(paths_in "$(marker_value "$other" writes)")
    fi
  done
}

# Decides whether a stage runs, and says why. Status 1: it is finished and nothing has changed. Sets stage_anew when
# work that an earlier run left must not be continued.
stage_due() { # MARKER HASH READS
  local marker="$1" begun="${1%.done}.begun" why since
  stage_anew=1
  if [ -f "$marker" ]; then
    why="$(stale_reason "$marker" "$2" "$3")"
    if [ -z "$why" ]; then
      echo "skipped: finished on $(marker_value "$marker" finished) in $(marker_value "$marker" seconds) s with the" \
        "same command (--force redoes it)"
      return 1
    fi
    echo "finished before, runs again: $why"
  elif [ -f "$begun" ]; then
    why="$(stale_reason "$begun" "$2" "$3")" since="$(marker_value "$begun" begun)"
    if [ -n "$why" ]; then
      echo "begun on $since and not finished, begins anew: $why"
    elif [ -n "${resumes:-}" ]; then
      echo "begun on $since and not finished, continues"
      stage_anew=""
    elif [ -n "$(marker_value "$begun" ready)" ]; then
      stage_anew=""
      if [ "$stage_part" = begin ]; then
        echo "begun on $since, its pieces are next"
        return 1
      fi
      echo "begun on $since and not finished, continues"
      stage_part="${stage_part:-end}"
    else
      echo "begun on $since and not finished, runs again"
    fi
  fi
}

put_aside() { # PATH: as PATH.old, in place of an older one
  if [ -e "$1" ]; then
    rm -rf "$1.old"
    mv "$1" "$1.old"
    echo "put aside: $1.old"
  fi
}

# In this order a kill at any moment leaves either the old state or one that begins anew.
begin_stage() { # MARKER HASH
  local begun="${1%.done}.begun"
  if [ -n "$stage_anew" ]; then
    rm -f "$begun"
    rm -f "$1"
    if [ -n "${resumes:-}" ]; then put_aside "$resumes"; fi
    printf 'hash=%s\nbegun=%s\n' "$2" "$(date '+%F %T')" > "$begun.tmp"
    mv "$begun.tmp" "$begun"
  fi
}

# What the pieces of a stage need is there.
mark_ready() { # MARKER HASH SECONDS
  local begun="${1%.done}.begun" since
  since="$(marker_value "$begun" begun)"
  printf 'hash=%s\nbegun=%s\nready=%s\nseconds=%s\n' "$2" "$since" "$(date '+%F %T')" "$3" > "$begun.tmp"
  mv "$begun.tmp" "$begun"
}

write_marker() { # MARKER HASH SECONDS WRITES
  printf 'hash=%s\nfinished=%s\nseconds=%s\nwrites=%s\n' "$2" "$(date '+%F %T')" "$3" "$4" > "$1.tmp"
  mv "$1.tmp" "$1"
  rm -f "${1%.done}.begun"
}

# The command has a process group of its own: a signal to the recipe is passed on to all of it as TERM, on which
# training saves and exits. USR1, which a job repeats, is passed on as it is: torchrun would end at TERM within 30 s.
forward_signal() { # SIGNAL
  if [ "$1" = USR1 ]; then
    stage_signal="$1"
    kill -USR1 -- "-$stage_child" 2> /dev/null || true
    return
  fi
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
  tee -i -a "$log" < "$pipe" &
  tee=$!
  stage_signal="" stage_status=0
  set -m
  "$@" > "$pipe" 2>&1 < /dev/null &
  stage_child=$!
  set +m
  trap 'forward_signal INT' INT
  trap 'forward_signal TERM' TERM
  trap 'forward_signal HUP' HUP
  trap 'forward_signal USR1' USR1
  wait "$stage_child" || stage_status=$?
  # A signal ends `wait`, not the child.
  while kill -0 "$stage_child" 2> /dev/null; do
    stage_status=0
    wait "$stage_child" || stage_status=$?
  done
  # What the command started may save for a while yet.
  while kill -0 "$tee" 2> /dev/null; do wait "$tee" || true; done
  trap - INT TERM HUP USR1
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

# Where a stage, or a part of it, keeps what it prints. The end adds to what the begin has.
open_log() { # NAME; sets log
  case "$stage_part" in
    */*) log="$exp/logs/pieces/$1-${stage_part%/*}.log" ;;
    *) log="$exp/logs/$1.log" ;;
  esac
  mkdir -p "$(dirname "$log")"
  if [ -f "$log" ] && [ "$stage_part" != end ]; then mv "$log" "$log.old"; fi
}

# What a stage ran, for the report; all pieces run the same.
open_commands() { # MARKER COMMAND...
  stage_commands="${1%.done}.commands"
  # the end notes what the begin has run once more, so that one that is repeated notes nothing twice
  case "$stage_part" in */*) stage_commands="" ;; *) : > "$stage_commands" ;; esac
  shift
  if ! declare -F "$1" > /dev/null; then note_command "$@"; fi
}

run_stage() { # MARKER HASH READS WRITES COMMAND...
  local marker="$1" hash="$2" reads="$3" writes="$4" log begun earlier seconds cost
  shift 4
  begin_stage "$marker" "$hash"
  open_log "$(basename "$marker" .done)"
  printf 'reads:   %s\nwrites:  %s\nlog:     %s\n' "$reads" "$writes" "$log"
  printf 'command: %s\n' "$(printf '%q ' "$@")"
  open_commands "$marker" "$@"
  begun=$SECONDS
  run_logged "$log" "$@"
  seconds=$((SECONDS - begun))
  if [ "$stage_status" != 0 ] || [ -n "$stage_signal" ]; then stage_failed "$stage_status" "$seconds" "$log"; fi
  case "$stage_part" in
    begin) mark_ready "$marker" "$hash" "$seconds" ;;
    "" | end)
      earlier="$(marker_value "${marker%.done}.begun" seconds)"
      seconds=$((seconds + ${earlier:-0}))
      write_marker "$marker" "$hash" "$seconds" "$writes"
      ;;
  esac
  cost="$(cost_of "$seconds" "$writes")"
  echo "cost:    $cost"
  stage_table+=("$(printf '%-3s %-14s %s' "${stage_now% *}" "${stage_now#* }" "$cost")")
}

stage() {
  local number="$1" name="$2" reads="$3" writes="$4" marker hash command=() word
  shift 4
  stage_now="$number $name" stage_part="$piece"
  if [ "$number" -lt "$stage" ] || [ "$number" -gt "$stop_stage" ]; then return; fi
  if [ -n "$only" ] && [ "$only" != "$number-$name" ]; then return; fi
  marker="$exp/stages/$number-$name.done"
  mkdir -p "$exp/stages" "$exp/logs"
  printf '\n== stage %s of %s: %s\n' "$number" "$last_stage" "$name"
  hash="$(stage_hash "$@")"
  # behind a stage that has a job, what is there now says nothing about what will be
  if [ -n "$stage_job" ]; then
    echo "waits for job $stage_job"
  elif ! stage_due "$marker" "$hash" "$reads"; then
    stage_table+=("$(printf '%-3s %-14s skipped' "$number" "$name")")
    return
  fi
  if [ "$launcher" = slurm ]; then
    submit_stage "$number-$name" "$marker"
    return
  fi
  if [[ "$stage_part" == */* ]] && [ -n "$stage_anew" ]; then
    echo "a piece of stage $stage_now needs what the job $number-$name-begin makes, which has not succeeded" >&2
    exit 1
  fi
  for word in "$@"; do
    if [ "$word" != %force ]; then command+=("$word"); elif [ "$force" = 1 ]; then command+=(--force); fi
  done
  run_stage "$marker" "$hash" "$reads" "$writes" "${command[@]}"
}

stage_in_pieces() { # as stage
  local in_pieces=1
  stage "$@"
}

# What each stage of this run cost; the last line of a recipe.
stages_summary() {
  if [ "$launcher" = slurm ]; then
    submitted_summary
    return
  fi
  printf '\n== stages %s to %s finished in %s s\n' "$stage" "$stop_stage" "$((SECONDS - stages_begun))"
  printf '%s\n' "${stage_table[@]}"
}
