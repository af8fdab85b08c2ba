# shellcheck shell=bash disable=SC2034,SC2154  # root, python and nproc are set before; the commands are used after
# Sets `python` and the command `harken` of a recipe. Source it after parse_options.
if [ -z "$python" ]; then
  bash "$root/tools/setup.sh"
  python="$root/.venv/bin/python"
else
  python="$(command -v "$python")" || die "--python must be a program, found none by that name"
  "$python" -c 'import torch' || die "--python must have harken's dependencies, $python could not import torch"
  export PYTHONPATH="$root/framework${PYTHONPATH:+:$PYTHONPATH}"
fi

harken=("$python" -m harken.apps.main)
# One process needs no launcher; several are started by torchrun, which restarts none: a stage resumes when run again.
parallel=("${harken[@]}")
if [ "$nproc" -gt 1 ]; then
  parallel=("$python" -m torch.distributed.run --standalone --nproc-per-node "$nproc" -m harken.apps.main)
fi
