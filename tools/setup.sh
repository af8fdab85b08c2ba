#!/usr/bin/env bash
# Makes the Python environment of this repository. See --help.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

usage() {
  cat <<'HELP'
tools/setup.sh: make the environment: a venv, torch, the pinned dependencies, harken itself (editable).

  --venv DIR        where to make it (default: .venv in the repository)
  --python PATH     the Python to make it with, 3.11 or later (default: the first that fits on PATH)
  --torch VERSION   this torch instead of the pinned one; `none` keeps the one that is already there,
                    in the venv or in the system's Python (containers)
  --extras LIST     extras of setup.py, comma-separated (default: dev)
  --torch-args ARGS more arguments for `pip install torch` alone, such as an index of CPU or CUDA builds
  --pip-args ARGS   more arguments for every `pip install`
  --force           install again even when nothing changed
  --help            this text

An environment that is up to date is left alone, and --torch and --extras are remembered for later calls.
It can be interrupted at any time: run it again.

Examples:
  tools/setup.sh
  tools/setup.sh --torch 2.13.0 --torch-args "--index-url URL_OF_THE_BUILDS_FOR_YOUR_CUDA"
  tools/setup.sh --torch none --extras dev,export --venv /opt/harken
HELP
}

die() {
  printf 'setup.sh: %s\n' "$*" >&2
  exit 1
}

venv="$root/.venv" python="" torch="" extras="" torch_args="" pip_args="" force=""
while [ $# -gt 0 ]; do
  case "$1" in
    --help | -h) usage; exit 0 ;;
    --force) force=1; shift; continue ;;
    --venv | --python | --torch | --extras | --torch-args | --pip-args)
      [ $# -ge 2 ] || die "$1 needs a value; see --help"
      case "$1" in
        --venv) venv="$(realpath -m "$2")" ;;
        --python) python="$2" ;;
        --torch) torch="$2" ;;
        --extras) extras="$2" ;;
        --torch-args) torch_args="$2" ;;
        --pip-args) pip_args="$2" ;;
      esac
      shift 2 ;;
    *) die "unknown option $1; see --help" ;;
  esac
done

stamp="$venv/harken-setup.stamp"
started=$SECONDS

remembered() { # KEY: what an earlier call wrote in the stamp
  if [ -f "$stamp" ]; then sed -n "s/^$1=//p" "$stamp"; fi
}

write_stamp() { # HASH
  printf 'hash=%s\ntorch=%s\nextras=%s\n' "$1" "$torch" "$extras" > "$stamp.tmp"
  mv "$stamp.tmp" "$stamp"
}

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; }

find_python() {
  local candidate
  if [ -n "$python" ]; then
    is_new_enough "$python" || die "Python must be 3.11 or later, $python is: $("$python" --version 2>&1 || true)"
    return
  fi
  for candidate in python3 python3.13 python3.12 python3.11 python3.14; do
    if is_new_enough "$candidate"; then
      python="$candidate"
      return
    fi
  done
  die "Python must be 3.11 or later, found $(python3 --version 2>&1 || true); on Debian 12 or Ubuntu 24.04 and" \
    "later: apt-get install python3 python3-venv; elsewhere name one with --python PATH"
}

make_venv() {
  local options=()
  if [ -x "$venv/bin/python" ] && "$venv/bin/python" -m pip --version > /dev/null 2>&1; then
    return
  fi
  find_python
  if [ -d "$venv" ] && [ ! -f "$venv/pyvenv.cfg" ] && [ -n "$(ls -A "$venv")" ]; then
    die "$venv must be a venv or absent, found a folder with other files: name another with --venv DIR"
  fi
  "$python" -c 'import ensurepip, venv' 2> /dev/null ||
    die "$python has no venv module: apt-get install python3-venv (as root), then run this again"
  if [ "$torch" = none ]; then options+=(--system-site-packages); fi
  echo "making $venv with $("$python" --version)"
  "$python" -m venv --clear "${options[@]}" "$venv"
}

# pip writes RECORD last: a package without it was cut off, and pip would take it for installed.
drop_unfinished_packages() {
  local folder
  for folder in "$venv"/lib/python3*/site-packages/*.dist-info; do
    if [ -d "$folder" ] && [ ! -f "$folder/RECORD" ]; then
      echo "an earlier run was cut off while it installed $(basename "$folder" .dist-info): installing it again"
      rm -rf "$folder"
    fi
  done
  rm -rf "$venv"/lib/python3*/site-packages/~*
}

pip_install() { # what it is for, arguments
  local what="$1" before=$SECONDS quiet=()
  shift
  if [ ! -t 1 ]; then quiet=(--quiet); fi
  echo "installing $what"
  # shellcheck disable=SC2086  # --pip-args is a list of words
  "$venv/bin/python" -m pip --disable-pip-version-check install "${quiet[@]}" "$@" $pip_args ||
    die "could not install $what: the lines above say why; then run this again, what is installed stays"
  echo "installed $what in $((SECONDS - before)) s"
}

installed_torch() {
  "$venv/bin/python" -c 'import importlib.metadata as m; print(m.version("torch"))' 2> /dev/null || true
}

install_torch() {
  local wanted
  if [ "$torch" = none ]; then
    [ -n "$(installed_torch)" ] ||
      die "--torch none needs a torch in $venv or in the system's Python, found none: install one there, or name" \
        "a version with --torch VERSION"
    return
  fi
  wanted="torch==$torch"
  if [ "$torch" = pinned ]; then wanted="$(grep '^torch==' "$root/constraints.txt")"; fi
  if [ ! -e /proc/driver/nvidia/version ] && [ -z "$torch_args$pip_args" ] && [ -z "$(installed_torch)" ]; then
    echo "no NVIDIA driver here: if pip now fetches gigabytes of CUDA packages, interrupt it and name the index of" \
      "CPU builds (torch's own installation page has it) with --torch-args \"--index-url URL\""
  fi
  # shellcheck disable=SC2086  # --torch-args is a list of words
  pip_install "$wanted" "$wanted" $torch_args
}

install_all() {
  local pins="$venv/harken-constraints.txt" found
  install_torch
  found="$(installed_torch)"
  # The torch that is there stays: nothing below may replace a CUDA build by another.
  sed "s/^torch==.*/torch==$found/" "$root/constraints.txt" > "$pins"
  pip_install "harken[$extras] with torch $found" --constraint "$pins" --editable "${root}[$extras]"
}

if command -v flock > /dev/null; then
  exec 9> "$root/.harken-setup.lock"
  flock --nonblock 9 || { echo "another setup.sh is at work here: waiting for it"; flock 9; }
fi
torch="${torch:-$(remembered torch)}" torch="${torch:-pinned}"
extras="${extras:-$(remembered extras)}" extras="${extras:-dev}"
hash="$(cat "$root/setup.py" "$root/constraints.txt" <(echo "$torch $extras $root") | sha256sum | cut -d' ' -f1)"
if [ -z "$force" ] && [ "$(remembered hash)" = "$hash" ] && [ -x "$venv/bin/python" ]; then
  echo "environment $venv is up to date (setup.py and constraints.txt are unchanged)"
  exit 0
fi
make_venv
drop_unfinished_packages
write_stamp unfinished
install_all
write_stamp "$hash"
echo "environment $venv is ready: $((SECONDS - started)) s, $(du -sh "$venv" | cut -f1) on disk"
echo "next: . ${venv#"$PWD"/}/bin/activate && harken --help"
