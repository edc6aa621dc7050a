#!/bin/sh
# Programs cannot derive from Gloo's TCP transport: its pairs' headers are installed, and one that they include is not.
#
# gloo/transport/tcp/pair.h and context.h include gloo/common/memory.h, which is not among the headers to install in
# Gloo's gloo/common/CMakeLists.txt; the other TCP headers compile. Looked at here: Debian 12's package. Nobody has to
# be root.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
apt-get download -qq libgloo-dev=0.0~git20220518.5b14351-3 2> /dev/null
dpkg -x ./*.deb .
dpkg-deb -f ./*.deb Package Version
compiles() {
  printf '#include <gloo/transport/tcp/%s>\n' "$1" > program.cc
  if g++ -std=c++17 -fsyntax-only -isystem usr/include program.cc 2> errors; then
    echo "$1: compiles"
  else
    grep -o '[a-z/]*\.h: No such file or directory' errors | sed "s|^|$1: |"
  fi
}
found=$(for header in device.h address.h loop.h pair.h context.h; do compiles "$header"; done)
echo "$found"
[ "$found" = "device.h: compiles
address.h: compiles
loop.h: compiles
pair.h: gloo/common/memory.h: No such file or directory
context.h: gloo/common/memory.h: No such file or directory" ] || { echo "the behaviour has changed"; exit 1; }
