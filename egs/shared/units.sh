# shellcheck shell=bash disable=SC2154  # the recipe sets jobs; environment.sh defines harken
# Units of a recipe. Source it after environment.sh.

# Fits the clusters on the first manifest, labels all of them into one store, and checks the labels.
make_units() { # OUT CLUSTERS FRAMES MANIFEST... -- ARGUMENT...
  local out="$1" clusters="$2" frames="$3" manifests=()
  shift 3
  while [ "$1" != -- ]; do manifests+=("$1"); shift; done
  shift
  rm -rf "$out"
  harken units fit "${manifests[0]}" --out "$out/km" --clusters "$clusters" --max-frames "$frames" \
    --jobs "$jobs" "$@"
  harken units label "${manifests[@]}" --clusterer "$out/km" --out "$out/labels" --jobs "$jobs" "$@"
  harken units check "$out/labels"
}
