#!/bin/sh
# Says what a fresh machine lacks before anything is installed, and what to type to get it. Changes nothing.
#
#   deploy/setup/check-prerequisites.sh PYTHON      exit 0: all there · exit 1: the lines to type are on stderr
set -u

python=${1:-python3}
want=
problems=

lacks() { # lacks "what is wrong" PACKAGE...
  problems="$problems
  - $1"
  shift
  want="$want $*"
}

if ! command -v "$python" >/dev/null 2>&1; then
  lacks "there is no $python (Python 3.11 or newer is needed)" python3 python3-venv
elif ! version=$("$python" -c 'import sys; print(".".join(map(str, sys.version_info[:3]))); sys.exit(sys.version_info < (3, 11))' 2>/dev/null); then
  newer=
  for candidate in python3.14 python3.13 python3.12 python3.11; do
    command -v "$candidate" >/dev/null 2>&1 && newer=$candidate && break
  done
  if [ -n "$newer" ]; then
    lacks "$python is Python ${version:-of an unknown version}, 3.11 or newer is needed: add PYTHON=$newer to the make command"
  else
    lacks "$python is Python ${version:-of an unknown version}, 3.11 or newer is needed" python3.11 python3.11-venv
  fi
elif ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
  lacks "$python cannot make virtual environments (no ensurepip)" python3-venv
fi

compiler=${CXX:-c++}
if ! command -v "$compiler" >/dev/null 2>&1; then
  lacks "there is no C++ compiler ($compiler), and llama.cpp is built here" g++
else
  folder=$(mktemp -d "${TMPDIR:-/tmp}/fieldmesh-check.XXXXXX")
  printf '#include <filesystem>\n#include <thread>\nint main() { return std::filesystem::exists("/") ? 0 : 1; }\n' >"$folder/check.cpp"
  "$compiler" -std=c++17 -o "$folder/check" "$folder/check.cpp" >"$folder/log" 2>&1 ||
    lacks "the C++ compiler ($compiler) cannot build a C++17 program: $(head -n 1 "$folder/log")" g++
  rm -rf "$folder"
fi
command -v "${CC:-cc}" >/dev/null 2>&1 || lacks "there is no C compiler (${CC:-cc})" gcc

command -v make >/dev/null 2>&1 || lacks "there is no make" make

[ -n "$problems" ] || exit 0

echo "Fieldmesh needs a few things that this machine lacks:$problems" >&2
want=$(printf '%s\n' $want | sort -u | paste -sd' ' -)
if [ -n "$want" ]; then
  sudo=
  [ "$(id -u)" = 0 ] || sudo="sudo "
  if command -v apt-get >/dev/null 2>&1; then
    printf '\nType this, then try again:\n\n  %sapt-get update && %sapt-get install -y %s\n\n' "$sudo" "$sudo" "$want" >&2
  else
    printf '\nInstall (Debian calls them so): %s\n\n' "$want" >&2
  fi
fi
exit 1
