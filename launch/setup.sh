#!/usr/bin/env bash
# Sourced by the other scripts: makes the virtual environment once, installs
# the package with the given extras, and activates it.
#
#   source launch/setup.sh "test,parity"
#
# PYTHON names the interpreter (default python3); VENV the environment's
# directory (default .venv beside this checkout).

extras=$1
python=${PYTHON:-python3}
venv=${VENV:-.venv}

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "Python 3.11 or newer is needed; $("$python" --version) was found." \
    'Set PYTHON to a newer interpreter.' >&2
  exit 2
fi
if [ ! -x "$venv/bin/python" ]; then
  echo "Making a virtual environment in $venv"
  "$python" -m venv "$venv"
fi
# shellcheck disable=SC1091
source "$venv/bin/activate"
# Installing takes minutes the first time; skip it while nothing has changed.
stamp="$venv/.installed-$(echo "$extras" | tr ',' '-')"
if [ ! -e "$stamp" ] || [ setup.cfg -nt "$stamp" ]; then
  echo "Installing fedjax_safety${extras:+ with extras: $extras}"
  case ",$extras," in
    # First and by exact version: other requirements would take any build.
    *,parity,*) python -m pip install --quiet torch==2.13.0 ;;
  esac
  python -m pip install --quiet --editable ".${extras:+[$extras]}"
  touch "$stamp"
fi
