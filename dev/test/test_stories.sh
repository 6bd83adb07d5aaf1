#!/usr/bin/env bash
# The program `stories`: writes the same text from the same seed, reads it back to the same number, judges a loss against it.
set -u
cd "$(dirname "$0")/../.." || exit 1
stories=$(realpath "${LLMC_TEST_BUILD:-build/test}")/stories
[ -x "$stories" ] || { echo "FAILED $stories is not built"; echo "0 passed, 1 failed"; exit 1; }
dir=$(mktemp -d) || exit 1
trap 'rm -rf "$dir"' EXIT
passed=0 failed=0 skipped=0
check() { # name, condition as a command
    local name=$1; shift
    if "$@"; then passed=$((passed + 1)); echo "ok $name"; else failed=$((failed + 1)); echo "FAILED $name: $*"; fi
}
exits() { # status, text that the message must hold, command
    local want=$1 text=$2 status=0; shift 2
    "$@" >"$dir/stdout" 2>"$dir/stderr" || status=$?
    [ "$status" -eq "$want" ] && grep -qF -- "$text" "$dir/stdout" "$dir/stderr" && return
    echo "exit status $status (expected $want), expected to read: $text"; cat "$dir/stdout" "$dir/stderr"; return 1
}
field() { sed -n "s/.*\"$1\": {.*\"$2\": \([-0-9.e+]*\).*/\1/p" "$dir/report.json"; }
about() { awk -v a="$1" -v b="$2" -v t="$3" 'BEGIN { d = a - b; if (d < 0) d = -d; exit !(a != "" && b != "" && d <= t) }'; }

"$stories" --bytes 1M --seed 5 --out "$dir/a.txt" --val-out "$dir/val.txt" --val-bytes 100k --report "$dir/report.json" 2>"$dir/log"
check writes_what_was_asked test "$(stat -c %s "$dir/a.txt")" -ge 1000000 -a "$(stat -c %s "$dir/a.txt")" -lt 1002000 -a "$(stat -c %s "$dir/val.txt")" -ge 100000
check report_counts_bytes test "$(field train bytes)" = "$(stat -c %s "$dir/a.txt")" -a "$(field val bytes)" = "$(stat -c %s "$dir/val.txt")"
check report_counts_stories test "$(field train stories)" = "$(grep -cxF '<|endoftext|>' "$dir/a.txt")" -a "$(field train stories)" = "$(grep -cvxF '<|endoftext|>' "$dir/a.txt")"
"$stories" --bytes 1M --seed 5 >"$dir/b.txt" 2>>"$dir/log"
check same_seed_same_text_on_stdout cmp "$dir/a.txt" "$dir/b.txt"
"$stories" --stories 100 --seed 5 --out "$dir/c.txt" 2>>"$dir/log"
check shorter_text_is_the_beginning_of_the_longer cmp "$dir/c.txt" <(head -200 "$dir/a.txt")
"$stories" --stories 100 --seed 6 --out "$dir/d.txt" 2>>"$dir/log"
check other_seed_other_text test -z "$(grep -vxF '<|endoftext|>' "$dir/d.txt" | grep -Fxf - "$dir/c.txt")"
check no_validation_story_in_training test -z "$(grep -vxF '<|endoftext|>' "$dir/val.txt" | grep -Fxf - "$dir/a.txt")"
check report_says_so grep -q '"train_stories_also_in_val": 0' "$dir/report.json"

nats=$("$stories" --score "$dir/val.txt" | sed -n 's/.*, \([0-9.]*\) nats,.*/\1/p')
check score_equals_report about "$nats" "$(field val nats)" 1e-4
check score_reads_stdin exits 0 "100 stories" "$stories" --score - <"$dir/c.txt"
entropy=$("$stories" --facts | sed -n 's/entropy of a story: \([0-9.]*\) nats.*/\1/p')
error=$(awk -v e="$(field train nats_standard_error)" -v n="$(field train stories)" 'BEGIN { print 5 * e / n }')
check sample_mean_near_entropy about "$(field train nats_per_story)" "$entropy" "$error"

sed '101s/ the / teh /' "$dir/c.txt" >"$dir/bad.txt"
check changed_story_is_named exits 3 "bad.txt:101: not a story: at byte" "$stories" --score "$dir/bad.txt"
sed '102d' "$dir/c.txt" >"$dir/bad.txt"
check missing_marker_is_named exits 3 "bad.txt:102: expected a line <|endoftext|>" "$stories" --score "$dir/bad.txt"
: >"$dir/empty.txt"
check empty_text exits 3 "no story in it" "$stories" --score "$dir/empty.txt"
check missing_file exits 3 "nowhere.txt: could not open" "$stories" --score "$dir/nowhere.txt"
check no_size exits 2 "how much text" "$stories" --out "$dir/x"
check unknown_option exits 2 "--stories" "$stories" --storys 3
check bad_directory exits 8 "no/such" "$stories" --stories 3 --out "$dir/no/such/file"
if [ -c /dev/full ]; then
    "$stories" --stories 3000 >/dev/full 2>"$dir/log"; status=$?
    check full_disk test "$status" -eq 8 -a -n "$(grep -F "standard output: No space left" "$dir/log")"
else skipped=$((skipped + 1)); echo "skipped full_disk: no /dev/full here"; fi

floor=$(awk -v n="$nats" 'BEGIN { print n / 20000 }')
above=$(awk -v f="$floor" 'BEGIN { print f + 0.1 }') below=$(awk -v f="$floor" 'BEGIN { print 0.9 * f }')
check loss_above_the_floor_is_fine exits 0 "0.1000 above the floor" "$stories" --score "$dir/val.txt" --tokens 20000 --val-loss "$above"
check loss_at_the_floor_is_fine exits 0 "above the floor" "$stories" --score "$dir/val.txt" --tokens 20000 --val-loss "$floor"
check loss_below_the_floor_is_a_leak exits 3 "LEAK" "$stories" --score "$dir/val.txt" --tokens 20000 --val-loss "$below"
check loss_of_zero_is_a_leak exits 3 "LEAK" "$stories" --score "$dir/val.txt" --tokens 20000 --val-loss 0
check loss_without_text exits 2 "--score" "$stories" --val-loss 1

echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ]
