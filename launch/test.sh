#!/usr/bin/env bash
# Sets up the environment and runs the linter and every test.
#
#   bash launch/test.sh [--extra parity] [pytest arguments]
#
# `--extra parity` (or several, as `parity,privacy`) installs PyTorch and PEFT
# and runs the tests that compare with them; without it those are skipped.
set -euo pipefail
cd "$(dirname "$0")/.."

extras='test'
if [ "${1:-}" = --extra ]; then
  extras="test,$2"
  shift 2
fi
# shellcheck disable=SC1091
source launch/setup.sh "$extras"

export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
# Compiled programs are kept between runs and shared by the test processes.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$VIRTUAL_ENV/jax-cache}
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.5

ruff check .
ruff format --check .
# A file's tests run in one process, so that what they share is made once; the
# files with few tests are the slow ones and must not come last.
exec python -m pytest --numprocesses "$(nproc)" --dist loadfile \
  --no-loadscope-reorder "$@"
