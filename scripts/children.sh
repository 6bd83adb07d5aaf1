#!/usr/bin/env bash
# For the scripts that start others, which source it: each command gets a process group of its own, so that a terminal's Ctrl-C reaches it once, by
# the script, which hands signals on.
# shellcheck disable=SC2034 # what is set here is for the scripts that source it
set -euo pipefail
set -m
interrupted=0 asked=''

hand_on() { # FUNCTION: it gets the name of each signal that says stop
    local name
    # shellcheck disable=SC2064 # the name is of now
    for name in TERM INT HUP USR1; do trap "interrupted=1 asked=$name; $1 $name" "$name"; done
}

wait_for() { # PROCESS: its exit code in $code. A wait that a signal ends begins again, and finds the code or, where it was known already, 127.
    local found
    code=127
    while :; do
        interrupted=0 found=0
        wait "$1" 2>/dev/null || found=$?
        [ "$found" -eq 127 ] || code=$found
        [ "$interrupted" -eq 1 ] || return 0
    done
}
