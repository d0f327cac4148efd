#!/bin/sh
# Resolves pyproject.toml's dependencies for all platforms into tools/lock, with hashes and without any index's address.
set -eu
.venv/bin/python -m pip --disable-pip-version-check --quiet install uv
for name in run dev; do
    options=""
    [ "$name" = run ] || options="--group dev --extra speed --extra otel"
    .venv/bin/uv pip compile pyproject.toml $options --universal --python-version 3.11 --generate-hashes --upgrade \
        --no-header --no-annotate --no-emit-index-url --quiet --output-file "tools/lock/$name.txt"
done
# What builds the wheel, for installations that bring nothing else along (tools/deploy/docker).
.venv/bin/uv pip compile --group pyproject.toml:build --universal --python-version 3.11 --generate-hashes --upgrade \
    --no-header --no-annotate --no-emit-index-url --quiet --output-file tools/lock/build.txt
