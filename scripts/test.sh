#!/usr/bin/env bash
# Installs what is missing, builds, runs the whole test suite. Last line: N passed, N failed; exits non-zero when a test failed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
./scripts/install_deps.sh --tests
exec bash dev/test/run.sh   # what `make test` runs; make would add a line of its own after a failure
