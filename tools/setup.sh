#!/bin/sh
# Makes .venv and installs the locked requirements and this project into it. Needs Python 3.11 or later, nothing else.
set -eu
PYTHON="${PYTHON:-python3}"

if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "Sheratan Hub needs Python 3.11 or later; '$PYTHON' is not. Name another: make PYTHON=python3.12 ..." >&2
    exit 1
fi

# Debian and Ubuntu keep the part of venv that brings pip in a package of its own.
if ! "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null; then
    package="python$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv"
    sudo=""
    [ "$(id -u)" = 0 ] || sudo="sudo -n"
    echo "installing $package, which this Python lacks"
    if ! { $sudo apt-get -qq update && $sudo env DEBIAN_FRONTEND=noninteractive apt-get -qq -y install "$package"; } >/dev/null; then
        echo "could not install it; as root run: apt-get install $package" >&2
        exit 1
    fi
fi

echo "setting up .venv"
[ -x .venv/bin/python ] && .venv/bin/python -m pip --version >/dev/null 2>&1 || "$PYTHON" -m venv --clear .venv
PIP=".venv/bin/python -m pip --disable-pip-version-check --quiet"
$PIP install --require-hashes -r tools/lock/dev.txt
$PIP install --no-deps --no-build-isolation -e .
