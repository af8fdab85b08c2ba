# shellcheck shell=bash disable=SC2154  # the recipe sets jobs, how many processes; environment.sh defines harken
# Units of a recipe. Source it after environment.sh.

# Fits the clusters on one manifest, labels others (it among them, or not) into one store, and checks the labels.
make_units() { # OUT CLUSTERS FRAMES FITTED MANIFEST... -- ARGUMENT...
  local out="$1" clusters="$2" frames="$3" fitted="$4" manifests=()
  shift 4
  while [ "$1" != -- ]; do manifests+=("$1"); shift; done
  shift
  anew "$out"
  harken units fit "$fitted" --out "$out/km" --clusters "$clusters" --max-frames "$frames" --jobs "$jobs" "$@"
  harken_in_pieces units label "${manifests[@]}" --clusterer "$out/km" --out "$out/labels" --jobs "$jobs" "$@"
  harken units check "$out/labels"
}
