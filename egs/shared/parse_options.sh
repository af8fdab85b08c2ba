# shellcheck shell=bash disable=SC2034,SC2154  # the recipe reads these variables and sets recipe and last_stage
# Command-line options of a recipe's run.sh. Source it, then call: parse_options "$@"
#
# The recipe defines `recipe` (its folder) and `last_stage` before, and a function `usage` that says what it does and
# gives examples. Variables set here: stage stop_stage mode nproc conf exp corpus force python launcher nodes gpus
# partition time pieces cluster dry_run, all documented below; given, the words of the command line but --dry-run; and processes, how
# many train together on all nodes. The launcher `job` is for the jobs that slurm submits: one stage, spread over the job's nodes.
# They are told that stage by `--only NUMBER-NAME`, and what of it they are to do by `--piece`: begin, or I/N (stages.sh).
# A recipe with options of its own lists them in the array `recipe_options`, as names of variables it has set already.

stage=1 stop_stage="" mode=full nproc=1 conf="" exp="" corpus="" force="" python=""
launcher=local nodes=1 gpus=0 partition="" time="" pieces="" cluster="" dry_run="" only="" piece=""
given=() processes=1
recipe_options=("${recipe_options[@]}")

die() {
  printf '%s: %s\n' "$(basename "$0")" "$*" >&2
  exit 2
}

shared_options_help() {
  cat <<HELP
Options:
  --stage N        first stage to run (default: 1)
  --stop-stage N   last stage to run (default: $last_stage)
  --mode MODE      short or full (default: full)
  --nproc N        processes that train together, on each node (default: 1)
  --conf FILE      configuration merged over those of the training stages (another model, a GPU's sizes)
  --exp DIR        where everything of this run goes (default: exp/MODE beside run.sh)
  --corpus PATH    the corpus where it is already; nothing is fetched then
  --force          run the selected stages again even when they are finished
  --python PATH    this Python as it is, instead of the environment that tools/setup.sh makes
  --help           this text
On a Slurm cluster (docs/cluster.md):
  --launcher KIND  local runs the stages here (the default); slurm submits each as a job that waits for the one before
  --nodes N        nodes that train together (default: 1)
  --gpus G         GPUs of each node, one process each (default: 0, then --nproc)
  --partition P    of all jobs (default: those of the cluster's file)
  --time T         limit of a start of a job that trains; it saves, is requeued and goes on
  --pieces N       tasks of the array that does a stage of data, labels or decoding; 1 makes none (default: that of
                   the cluster's file)
  --cluster FILE   your cluster's file (default: slurm/cluster.yaml)
  --dry-run        print the jobs and submit none
A finished stage is skipped with a reason. The output of stage N is kept in DIR/logs, its marker in DIR/stages.
HELP
}

is_whole_number() { [[ "$1" =~ ^[0-9]+$ ]]; }

is_recipe_option() { # NAME
  local known
  for known in "${recipe_options[@]}"; do
    if [ "$known" = "$1" ]; then return 0; fi
  done
  return 1
}

set_option() { # NAME VALUE, the name as it stands on the command line
  local variable="${1//-/_}"
  case "$1" in
    stage | stop-stage | mode | nproc | conf | exp | corpus | python | launcher | nodes | gpus | partition | time | pieces)
      printf -v "$variable" '%s' "$2"
      ;;
    cluster | only | piece) printf -v "$variable" '%s' "$2" ;;
    *)
      is_recipe_option "$variable" || die "unknown option --$1; --help lists the known ones"
      printf -v "$variable" '%s' "$2"
      ;;
  esac
}

check_launcher() {
  case "$launcher" in
    local | slurm | job) ;;
    *) die "--launcher must be local or slurm, got '$launcher'" ;;
  esac
  if ! is_whole_number "$nodes" || [ "$nodes" -lt 1 ]; then die "--nodes must be 1 or more, got '$nodes'"; fi
  is_whole_number "$gpus" || die "--gpus must be a whole number, got '$gpus'"
  if [ -n "$pieces" ] && { ! is_whole_number "$pieces" || [ "$pieces" -lt 1 ]; }; then
    die "--pieces must be 1 or more, got '$pieces'"
  fi
  if [ "$launcher" = local ] && [ "$nodes$gpus$partition$time$pieces$dry_run" != 10 ]; then
    die "--nodes, --gpus, --partition, --time, --pieces and --dry-run are for --launcher slurm"
  fi
  if [ "$launcher" != job ] && [ -n "$only$piece" ]; then die "--only and --piece are for the jobs of --launcher slurm"; fi
  if [ -n "$cluster" ]; then
    [ -f "$cluster" ] || die "--cluster must be a file, found none at $cluster"
    cluster="$(realpath "$cluster")"
  fi
  processes=$((nodes * (gpus > 0 ? gpus : nproc)))
  # A job that Slurm starts again goes on with what it has; it was forced once.
  if [ "$launcher" = job ] && [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then force=""; fi
}

check_options() {
  stop_stage="${stop_stage:-$last_stage}"
  is_whole_number "$stage" || die "--stage must be a whole number, got '$stage'"
  is_whole_number "$stop_stage" || die "--stop-stage must be a whole number, got '$stop_stage'"
  if [ "$stage" -lt 1 ] || [ "$stage" -gt "$last_stage" ]; then
    die "--stage must be between 1 and $last_stage, got $stage"
  fi
  if [ "$stop_stage" -lt "$stage" ]; then die "--stop-stage must not be before --stage $stage, got $stop_stage"; fi
  if ! is_whole_number "$nproc" || [ "$nproc" -lt 1 ]; then die "--nproc must be 1 or more, got '$nproc'"; fi
  check_launcher
  case "$mode" in
    short | full) ;;
    *) die "--mode must be short or full, got '$mode'" ;;
  esac
  if [ -n "$conf" ]; then
    [ -f "$conf" ] || die "--conf must be a file, found none at $conf"
    conf="$(realpath "$conf")"
  fi
  exp="$(realpath -m "${exp:-$recipe/exp/$mode}")"
  if [ -n "$corpus" ]; then
    [ -e "$corpus" ] || die "--corpus must be a folder or a file, found none at $corpus"
    corpus="$(realpath "$corpus")"
  fi
}

parse_options() {
  local word
  for word in "$@"; do
    if [ "$word" != --dry-run ]; then given+=("$word"); fi
  done
  while [ $# -gt 0 ]; do
    case "$1" in
      --help | -h) usage; shared_options_help; exit 0 ;;
      --force) force=1; shift ;;
      --dry-run) dry_run=1; shift ;;
      --*=*) set_option "$(cut -d= -f1 <<< "${1#--}")" "${1#*=}"; shift ;;
      --*)
        if [ $# -lt 2 ]; then
          set_option "${1#--}" ""
          die "$1 needs a value; see --help"
        fi
        set_option "${1#--}" "$2"
        shift 2
        ;;
      *) die "options start with --, got '$1'; see --help" ;;
    esac
  done
  check_options
}
