#!/usr/bin/env bash
# A short run of the fuzzers (make fuzz SECONDS=... for a long one).
exec bash "$(dirname "$0")/../fuzz/run.sh" 3
