#!/bin/sh
# sh examples/torchrun.sh 2: a recipe by two processes of this machine, a GPU each or all on the CPU; again, it goes on.
set -eu
run=runs/fashion-mnist-processes
resume=""
[ -e "$run/recipe.yaml" ] && resume=--resume
torchrun --standalone --nproc-per-node="${1:-2}" -m -- rarefy train recipes/fashion-mnist.yaml --run "$run" $resume
