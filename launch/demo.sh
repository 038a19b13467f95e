#!/usr/bin/env bash
# Sets up the environment and runs the main job on the embedded world.
#
#   bash launch/demo.sh [WORKDIR] [further flags of `fedjax-safety run`]
#
# WORKDIR is runs/demo by default; run again after an interruption to resume.
set -euo pipefail
cd "$(dirname "$0")/.."

workdir=runs/demo
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
  workdir=$1
  shift
fi
# shellcheck disable=SC1091
source launch/setup.sh ""

# Compiled programs are kept, so that a second start compiles nothing.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$VIRTUAL_ENV/jax-cache}
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.5

start=$SECONDS
fedjax-safety run --config=configs/demo.py --workdir="$workdir" "$@"
echo "The run took $((SECONDS - start)) seconds."
