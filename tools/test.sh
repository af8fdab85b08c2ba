#!/usr/bin/env bash
# Runs lint, types and tests; makes the environment first when it is missing. See --help.
# shellcheck disable=SC2317  # `check` calls the functions by name
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

usage() {
  cat <<'HELP'
tools/test.sh: make the environment if it is missing, then lint, types, style and tests.

  --fast         leave out the tests marked slow
  --venv DIR     the environment (default: .venv in the repository, made by tools/setup.sh)
  --python PATH  this Python as it is, with no environment made
  --nproc N      test processes (default: 2)
  --help         this text
Anything else goes to pytest. Every kind of check runs, and the exit code is that of the first kind that failed.

Examples:
  tools/test.sh
  tools/test.sh --fast tests/unit -k style
HELP
}

die() {
  printf 'test.sh: %s\n' "$*" >&2
  exit 2
}

venv="$root/.venv" python="" nproc=2 fast="" pytest_arguments=()
while [ $# -gt 0 ]; do
  case "$1" in
    --help | -h) usage; exit 0 ;;
    --fast) fast=1; shift ;;
    --venv | --python | --nproc)
      [ $# -ge 2 ] || die "$1 needs a value; see --help"
      case "$1" in
        --venv) venv="$(realpath -m "$2")" ;;
        --python) python="$(realpath -s "$(command -v "$2")")" || die "--python must be a program, found $2" ;;
        --nproc) nproc="$2" ;;
      esac
      shift 2 ;;
    *) pytest_arguments+=("$1"); shift ;;
  esac
done

names=() times=() results=() first_failure=0

check() { # name, command: runs it, keeps its time and result, goes on when it fails
  local name="$1" status=0 before=$SECONDS
  shift
  printf '\n== %s: %s\n' "$name" "$(printf '%s ' "$@" | sed "s|$root/||g" | cut -c1-140)"
  "$@" || status=$?
  names+=("$name")
  times+=("$((SECONDS - before))")
  if [ "$status" = 0 ]; then results+=(passed); else results+=("FAILED ($status)"); fi
  if [ "$status" != 0 ] && [ "$first_failure" = 0 ]; then first_failure="$status"; fi
}

check_types() { # the package, then each folder of scripts by itself: names such as prepare.py repeat
  local failed=0 folder
  "$python" -m mypy framework/harken || failed=1
  for folder in tools tools/*/ egs/*/local; do
    if compgen -G "$folder/*.py" > /dev/null; then
      MYPYPATH="$folder" "$python" -m mypy "$folder"/*.py || failed=1
    fi
  done
  return "$failed"
}

run_pytest() { # arguments; pytest's 5 says that the selection holds no test, which is no failure of a part
  local status=0
  "$python" -m pytest "$@" || status=$?
  if [ "$status" = 5 ] && [ "${allow_none:-}" = 1 ]; then status=0; fi
  return "$status"
}

check_tests() {
  local failed=0 not_slow="" none_in_one_part="" cluster="" cluster_status=0 log
  if [ -n "$fast" ]; then not_slow=" and not slow"; fi
  # Tests that start processes of their own run first and alone.
  if grep -rqE 'mark\.distributed' tests --include='*.py'; then
    allow_none=1 run_pytest -m "distributed$not_slow" "${pytest_arguments[@]}" || failed=$?
    none_in_one_part=1
  fi
  # Those with a Slurm of their own mostly wait, so they run beside the rest; what they print is shown behind it.
  if grep -rqE 'mark\.cluster' tests --include='*.py'; then
    log="$(mktemp)"
    # bash has its background ignore interrupts, by which pytest ends what its fixtures have started
    env --default-signal=INT "$python" -m pytest -m "cluster$not_slow" "${pytest_arguments[@]}" > "$log" 2>&1 &
    cluster=$!
    trap 'kill -INT '"$cluster"' 2> /dev/null || true' EXIT
    none_in_one_part=1
  fi
  allow_none="$none_in_one_part" run_pytest -n "$nproc" -m "not distributed and not cluster$not_slow" \
    "${pytest_arguments[@]}" || failed=$?
  if [ -n "$cluster" ]; then
    wait "$cluster" || cluster_status=$?
    trap - EXIT
    cat "$log"
    rm -f "$log"
    if [ "$cluster_status" != 0 ] && [ "$cluster_status" != 5 ]; then failed="$cluster_status"; fi
  fi
  return "$failed"
}

cd "$root"
if [ -z "$python" ]; then
  bash tools/setup.sh --venv "$venv"
  python="$venv/bin/python"
else
  export PYTHONPATH="$root/framework${PYTHONPATH:+:$PYTHONPATH}"
fi
# Two processes with two threads each are slower on two cores than two with one.
export OMP_NUM_THREADS=1

check lint "$python" -m ruff check .
check format "$python" -m ruff format --check .
check types check_types
check style "$python" tools/check_style.py
check tests check_tests

printf '\n%-8s %6s  %s\n' check seconds result
for i in "${!names[@]}"; do
  printf '%-8s %6s  %s\n' "${names[$i]}" "${times[$i]}" "${results[$i]}"
done
exit "$first_failure"
