#!/usr/bin/env bash
# Builds what `make test-cluster` needs, once, into a cache outside git: a Kubernetes from Debian's source package
# (there is no package of it) and a Debian base for the images. Needs root, Debian 12 and its package mirror.
#
#   HCODEC_CLUSTER_CACHE  where (default ~/.cache/hcodec/cluster-1.20)
#   DEBIAN_MIRROR         which mirror (default http://deb.debian.org/debian)
#   --install             also install the Debian packages it needs
set -euo pipefail

CACHE=${HCODEC_CLUSTER_CACHE:-$HOME/.cache/hcodec/cluster-1.20}
MIRROR=${DEBIAN_MIRROR:-http://deb.debian.org/debian}
VERSION=1.20.5+really1.20.2
REVISION=1.1+deb12u1
COMPONENTS=(kube-apiserver kube-controller-manager kube-scheduler kubelet)
PACKAGES=(golang-go golang-github-modern-go-reflect2-dev rsync make gcc libc6-dev dpkg-dev
          etcd-server containerd runc containernetworking-plugins buildah podman debootstrap
          iptables iproute2 conntrack openssl)

say() { echo "cluster build: $*"; }

install_packages() {
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${PACKAGES[@]}"
}

check_packages() {
  local missing
  missing=$(for package in "${PACKAGES[@]}"; do
    dpkg-query -W -f '${db:Status-Abbrev}' "$package" 2>/dev/null | grep -q '^ii' || echo "$package"
  done | xargs)
  if [[ -n $missing ]]; then
    say "these Debian packages are missing: $missing. Run $0 --install as root." >&2
    exit 1
  fi
}

# apt with its own source list and state: the machine's own lists stay as they are.
fetch_source() {
  local apt=$CACHE/apt
  mkdir -p "$apt/lists/partial" "$apt/source" "$apt/cache/archives/partial"
  echo "deb-src [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $MIRROR bookworm main" \
    > "$apt/sources.list"
  local options=(-o "Dir::Etc::SourceList=$apt/sources.list" -o Dir::Etc::SourceParts=/dev/null
                 -o "Dir::State::Lists=$apt/lists" -o "Dir::Cache=$apt/cache")
  apt-get "${options[@]}" update -qq
  # As root, apt would fetch as user _apt, who may not enter a home folder.
  (cd "$apt/source" && apt-get "${options[@]}" -o APT::Sandbox::User=root source --download-only \
    "kubernetes=$VERSION-$REVISION")
}

unpack_source() {
  rm -rf "$CACHE/src" && mkdir -p "$CACHE/src"
  tar xf "$CACHE"/apt/source/kubernetes_*.orig.tar.* -C "$CACHE/src" --strip-components=1
  # The vendored reflect2 reads runtime internals that Go 1.19 changed: the API server crashes at start.
  local vendored=$CACHE/src/vendor/github.com/modern-go/reflect2
  rm -f "$vendored"/*.go "$vendored"/*.s
  cp /usr/share/gocode/src/github.com/modern-go/reflect2/*.{go,s} "$vendored/"
  cat > "$CACHE/version" <<END
KUBE_GIT_COMMIT='unknown'
KUBE_GIT_TREE_STATE='archive'
KUBE_GIT_VERSION='v1.20.2'
KUBE_GIT_MAJOR='1'
KUBE_GIT_MINOR='20'
END
}

build_kubernetes() {
  local target what=()
  for target in "${COMPONENTS[@]}"; do what+=("cmd/$target"); done
  export GOFLAGS=-mod=vendor GOPROXY=off GOTOOLCHAIN=local
  (cd "$CACHE/src" && KUBE_GIT_VERSION_FILE=$CACHE/version make WHAT="${what[*]}")
  for target in "${COMPONENTS[@]}"; do
    install -s -m 0755 "$CACHE/src/_output/local/go/bin/$target" "$CACHE/bin/$target"
  done
  chmod -R u+w "$CACHE/src"
  rm -rf "$CACHE/src" "$CACHE/apt"
}

# What holds a pod's namespaces: it does nothing, and takes a signal.
build_pause() {
  printf '#include <signal.h>\n#include <unistd.h>\nstatic void end(int n){_exit(n?0:1);}\n%s\n' \
    'int main(void){signal(SIGTERM,end);signal(SIGINT,end);for(;;)pause();}' > "$CACHE/pause.c"
  gcc -Os -static -s -o "$CACHE/bin/pause" "$CACHE/pause.c"
  rm "$CACHE/pause.c"
}

bootstrap_base() {
  local root=$CACHE/base.partial
  rm -rf "$root"
  debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv,python3-pip \
    bookworm "$root" "$MIRROR"
  rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
  tar -C "$root" -cf "$CACHE/base.tar.partial" .
  rm -rf "$root"
  mv "$CACHE/base.tar.partial" "$CACHE/base.tar"
}

main() {
  if [[ ${1:-} == --install ]]; then install_packages; fi
  check_packages
  mkdir -p "$CACHE/bin"
  if [[ -s $CACHE/base.tar ]]; then
    say "base image: there already"
  else
    say "base image: about 2 minutes" && bootstrap_base
  fi
  if [[ -x $CACHE/bin/kubelet ]]; then
    say "kubernetes: there already"
  else
    say "kubernetes $VERSION: 6 to 18 minutes" && fetch_source && unpack_source && build_kubernetes
  fi
  if [[ ! -x $CACHE/bin/pause ]]; then build_pause; fi
  say "ready: $(du -sh "$CACHE" | cut -f1) in $CACHE"
}

main "$@"
