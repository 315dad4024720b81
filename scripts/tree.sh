#!/bin/sh
# build/tree/fasttrain: the package as setup.py maps it, made of links, for tools that cannot follow an editable install.
set -eu
cd "$(dirname "$0")/.."
rm -rf build/tree
mkdir -p build/tree/fasttrain
for entry in "$PWD"/fasttrain/*; do
    ln -s "$entry" build/tree/fasttrain/
done
ln -s "$PWD/loaders" "$PWD/kernels" "$PWD/benchmarks" build/tree/fasttrain/
