# shellcheck shell=bash disable=SC2154  # parse_options.sh and the recipe set recipe, exp, given; stages.sh stage_job, resumes
# Stages as jobs of a Slurm cluster. stages.sh sources it.
#
# A stage's job runs the recipe with the same options for that stage alone, so the same code decides there what is
# finished and what continues. It waits for the job of the stage before; when that does not succeed, Slurm cancels it.
# A stage in pieces has three jobs: one that begins it, an array of pieces, and one that ends it.

submit_stage() { # NAME MARKER; sets stage_job
  local name="$1" marker="$2" after="$stage_job" arguments=(--exp "$exp" --name "$1") command word status
  command=("$(command -v bash)" "$recipe/$(basename "$0")")
  for word in "${given[@]}"; do
    # a stage in pieces is forced by its markers being gone, once for all its jobs
    if [ -z "${in_pieces:-}" ] || [ "$word" != --force ]; then command+=("$word"); fi
  done
  command+=(--launcher job --stage "${name%%-*}" --stop-stage "${name%%-*}" --only "$name")
  if [ -n "${in_pieces:-}" ] && [ "$pieces" != 1 ]; then arguments+=(--begin --pieces "${pieces:-cluster}"); fi
  if [ -n "$partition" ]; then arguments+=(--partition "$partition"); fi
  if [ -n "$cluster" ]; then arguments+=(--cluster "$cluster"); fi
  if [ -n "$after" ]; then arguments+=(--after "$after"); fi
  if [ -n "${resumes:-}" ]; then
    arguments+=(--resumes "$resumes" --nodes "$nodes" --gpus "$gpus" --processes "$nproc")
    if [ -n "$time" ]; then arguments+=(--time "$time"); fi
  fi
  if [ -n "$dry_run" ]; then
    "$python" -m harken.apps.main launch "${arguments[@]}" --dry-run -- "${command[@]}"
    stage_job="JOB_OF_$name"
    stage_table+=("$(printf '%-14s printed, not submitted' "$name")")
    return
  fi
  # Forced, it must run even when its first start ends before it has begun the stage. Refused, as a job of it still
  # runs, that one keeps its markers: without them it would begin anew.
  if [ "$force" = 1 ]; then move_markers "$marker" "" .forced; fi
  stage_job="$("$python" -m harken.apps.main launch "${arguments[@]}" --parsable -- "${command[@]}")" || {
    status=$?
    if [ "$force" = 1 ]; then move_markers "$marker" .forced ""; fi
    exit "$status"
  }
  rm -f "$marker.forced" "${marker%.done}.begun.forced"
  echo "job $stage_job${after:+, after job $after}: $exp/jobs/$name.sbatch"
  stage_table+=("$(printf '%-14s job %s' "$name" "$stage_job")")
}

move_markers() { # MARKER FROM TO, endings
  local file
  for file in "$1" "${1%.done}.begun"; do
    if [ -e "$file$2" ]; then mv "$file$2" "$file$3"; fi
  done
}

# What was submitted; the last line of a recipe.
submitted_summary() {
  printf '\n== jobs of stages %s to %s\n' "$stage" "$stop_stage"
  printf '%s\n' "${stage_table[@]}"
  echo "how they go: harken status $exp"
}
