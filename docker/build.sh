#!/usr/bin/env bash
# Builds one image: docker/build.sh worker|airflow. `make images` builds both.
#
#   ENGINE         docker, podman or "buildah ..." (default: the first that is there)
#   TAG            default: the product's version
#   BASE_IMAGE     other than the Dockerfile's
#   TORCH, TORCH_INDEX  see docker/worker.Dockerfile
#   WEIGHTS        a folder of codecs to bake into the worker, each in a folder named by its digest
#   PIP_CONFIG     a pip.conf for a mirror, handed in as a secret that no layer keeps
#   BUILD_OPTIONS  more options for the engine
set -euo pipefail
cd "$(dirname "$0")/.."

name=${1:?which image: worker or airflow}
version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)

find_engine() {
  for engine in docker podman buildah; do
    if command -v "$engine" >/dev/null; then echo "$engine"; return; fi
  done
  echo "Neither docker, podman nor buildah was found: install one, or set ENGINE." >&2
  exit 1
}

engine=${ENGINE:-$(find_engine)}
options=(--file "docker/$name.Dockerfile" --tag "hcodec-$name:${TAG:-$version}"
         --build-arg "VERSION=$version" --build-arg "REVISION=$revision")
arguments=(BASE_IMAGE)
if [[ $name == worker ]]; then arguments+=(TORCH TORCH_INDEX); fi
for argument in "${arguments[@]}"; do
  if [[ -n ${!argument:-} ]]; then options+=(--build-arg "$argument=${!argument}"); fi
done
if [[ -n ${WEIGHTS:-} ]]; then options+=(--build-context "weights=$WEIGHTS"); fi
if [[ -n ${PIP_CONFIG:-} ]]; then options+=(--secret "id=pip_config,src=$PIP_CONFIG"); fi
# Unquoted on purpose: both may be several words.
# shellcheck disable=SC2086
exec $engine build "${options[@]}" ${BUILD_OPTIONS:-} .
