#!/usr/bin/env bash
# Runs a command until it is done: keep_running.sh COMMAND [ARGUMENT...], for a run that saves itself and that the same command continues.
#   exit code 75 (saved, run again)            again, at once
#   a crash (1, 6, 7, 8, 9, a signal, ...)     again after a pause that doubles, at most KEEP_RUNNING_CRASHES (5) times in a row
#   0; 2, 3, 4, 5 (usage, data, no valid checkpoint, non-finite): never; another try would find the same
# A run of KEEP_RUNNING_GOOD (3600) seconds begins the count anew. A 75 before KEEP_RUNNING_PAUSE (10) seconds, the first pause, counts as a crash.
# SIGTERM, SIGINT (Ctrl-C), SIGHUP and SIGUSR1 are handed on, and the run is not begun again. The exit code is that of the last run.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=children.sh
source "$(dirname "${BASH_SOURCE[0]}")/children.sh"
[ $# -gt 0 ] || { sed -n '2,7s/^# //p' "${BASH_SOURCE[0]}" >&2; exit 2; }
crashes_most=${KEEP_RUNNING_CRASHES:-5} pause=${KEEP_RUNNING_PAUSE:-10} good=${KEEP_RUNNING_GOOD:-3600}
child='' crashes=0 code=0
say() { echo "keep_running: $*" >&2; }
tell() { [ -z "$child" ] || kill -"$1" -- "-$child" 2>/dev/null || true; }
hand_on tell

while :; do
    started=$SECONDS
    "$@" </dev/null &
    child=$!
    [ -z "$asked" ] || tell "$asked"
    wait_for "$child"
    child='' took=$((SECONDS - started))
    case $code in 0 | 2 | 3 | 4 | 5) exit "$code" ;; esac
    [ -z "$asked" ] || { say "stopped by SIG$asked; exit code $code"; exit "$code"; }
    [ "$took" -lt "$good" ] || crashes=0
    if [ "$code" -eq 75 ] && [ "$took" -ge "$pause" ]; then
        crashes=0
        say "saved after $took s (exit code 75): again"
        continue
    fi
    crashes=$((crashes + 1)) last=$code
    [ "$crashes" -le "$crashes_most" ] || { say "exit code $code after $took s, ${crashes} times in a row: no further try"; exit "$code"; }
    say "exit code $code after $took s: again in $((pause << (crashes - 1))) s (try $crashes of $crashes_most)"
    sleep $((pause << (crashes - 1))) &
    child=$!
    wait_for "$child"
    child=''
    [ -z "$asked" ] || { say "stopped by SIG$asked before the next try"; exit "$last"; }
done
