#!/usr/bin/env bash
# Creates the virtual environment, after a check of what a fresh Debian machine may lack: one message for all of it.
set -euo pipefail

venv="$1"
python="${PYTHON3:-python3}"

fail() {
  printf 'attnfast set-up: %s\n' "$1" >&2
  exit 1
}

command -v "$python" >/dev/null || fail "python3 is missing. On Debian: sudo apt-get install python3 python3-venv python3-dev g++"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  fail "$("$python" --version) is too old, 3.10 or newer is needed (choose another with PYTHON3=/path/to/python3 make setup)."

missing=()
command -v "${CXX:-g++}" >/dev/null || missing+=(g++)
"$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' ||
  missing+=(python3-dev)
have_venv=true
"$python" -c 'import ensurepip, venv' 2>/dev/null || have_venv=false
if ! $have_venv && ! "$python" -c 'import virtualenv' 2>/dev/null; then missing+=(python3-venv); fi
[ ${#missing[@]} -eq 0 ] || fail "needed and not found: ${missing[*]}. On Debian: sudo apt-get install ${missing[*]}"

if $have_venv; then
  "$python" -m venv "$venv"
else
  "$python" -m virtualenv --quiet "$venv"
fi
