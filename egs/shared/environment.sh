# shellcheck shell=bash disable=SC2034,SC2154  # root, python and nproc are set before; the functions are called after
# Sets `python` and defines the command `harken` of a recipe. Source it after parse_options.
if [ -z "$python" ]; then
  bash "$root/tools/setup.sh"
  python="$root/.venv/bin/python"
else
  python="$(command -v "$python")" || die "--python must be a program, found none by that name"
  "$python" -c 'import torch' || die "--python must have harken's dependencies, $python could not import torch"
  export PYTHONPATH="$root/framework${PYTHONPATH:+:$PYTHONPATH}"
fi

# What a stage runs is noted as a user would type it (note_command of stages.sh); the report shows it.
# A piece of a stage (stage_in_pieces of stages.sh) leaves it to the others; the end only notes what the begin has done.
harken() {
  case "${stage_part:-}" in
    "" | begin) ;;
    end) note_command harken "$@"; return ;;
    *) return ;;
  esac
  note_command harken "$@"
  "$python" -m harken.apps.main "$@"
}

# A command that knows --piece, in a stage that is done in pieces. The first of them is where the begin ends.
harken_in_pieces() {
  case "${stage_part:-}" in
    "") harken "$@" ;;
    begin) exit 0 ;;
    end) stage_part=""; harken "$@" ;;
    *) "$python" -m harken.apps.main "$@" --piece "$stage_part" ;;
  esac
}

# Removes what an earlier run of a stage has left, where the stage begins.
anew() { # PATH...
  case "${stage_part:-}" in "" | begin) rm -rf "$@" ;; esac
}

# One process needs no launcher; several are started by torchrun, which restarts none: a stage resumes when run again.
# In a job they are spread over its nodes, which are checked before.
harken_parallel() {
  if [ "$launcher" = job ]; then
    note_command harken parallel --processes "$nproc" -- "$@"
    "$python" -m harken.apps.main parallel --processes "$nproc" --preflight "$exp" ${cluster:+--cluster "$cluster"} -- "$@"
  elif [ "$nproc" = 1 ]; then
    harken "$@"
  else
    note_command torchrun --standalone --nproc-per-node "$nproc" -m harken.apps.main "$@"
    "$python" -m torch.distributed.run --standalone --nproc-per-node "$nproc" -m harken.apps.main "$@"
  fi
}

# What a configuration amounts to: asked by the scripts, no part of what a stage does.
harken_config() { # [--yaml] FILE... KEY=VALUE...
  "$python" -m harken.apps.main config "$@"
}
