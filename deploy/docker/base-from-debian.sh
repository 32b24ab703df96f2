#!/bin/sh
# Makes a base image out of Debian's own packages, for a box where no container registry can be reached.
#
#   deploy/docker/base-from-debian.sh TAG PACKAGE...     (as root, or where sudo asks for no password)
#
# An image of that tag which holds the same packages is kept; otherwise debootstrap fills a folder (about 75 s)
# and `docker import` makes it an image. The host's bundle of certificate authorities goes in too, because a
# box like that is often behind a proxy with an authority of its own, and pip is told of it (PIP_CERT).
# Wherever a registry answers, use the Dockerfile's default base instead.
set -eu

[ $# -ge 2 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }
tag=$1
shift
suite=bookworm
packages=$(printf '%s\n' "$@" | sort -u | paste -sd, -)

if [ "$(docker image inspect --format '{{index .Config.Labels "fieldmesh.packages"}}' "$tag" 2>/dev/null)" = "$packages" ]; then
  echo "base image $tag is here already" >&2
  exit 0
fi

as_root=
[ "$(id -u)" = 0 ] || as_root="sudo -n"
command -v debootstrap >/dev/null || $as_root apt-get install -y -qq debootstrap >&2 || {
  echo "debootstrap is missing; type:  sudo apt-get install debootstrap" >&2
  exit 1
}

root=$(mktemp -d "${TMPDIR:-/tmp}/fieldmesh-base.XXXXXX")
trap '$as_root rm -rf "$root"' EXIT
trap 'exit 130' INT TERM

echo "base image $tag: Debian $suite with $packages (about a minute and a half)" >&2
$as_root debootstrap --variant=minbase --include="$packages" "$suite" "$root" >"$root.log" 2>&1 || {
  tail -n 20 "$root.log" >&2
  rm -f "$root.log"
  exit 1
}
rm -f "$root.log"
$as_root rm -rf "$root/var/cache/apt" "$root/var/lib/apt/lists"
# apt should not write its caches into every layer.
printf 'Dir::Cache::pkgcache "";\nDir::Cache::srcpkgcache "";\n' | $as_root tee "$root/etc/apt/apt.conf.d/no-caches" >/dev/null
$as_root mkdir -p "$root/var/cache/apt/archives/partial"

bundle=${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}
inside=/etc/ssl/certs/ca-certificates.crt
$as_root mkdir -p "$root/etc/ssl/certs"
$as_root cp "$bundle" "$root$inside"

$as_root tar -C "$root" -c . | docker import \
  --change "LABEL fieldmesh.packages=$packages" \
  --change "ENV PIP_CERT=$inside SSL_CERT_FILE=$inside LANG=C.UTF-8" \
  - "$tag" >&2
