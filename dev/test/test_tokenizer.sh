#!/usr/bin/env bash
# The program tokenize: its commands, its errors, and, where Hugging Face tokenizers is installed, the same ids and merges, live.
set -u
cd "$(dirname "$0")/../.." || exit 1
tokenize=$PWD/${LLMC_TEST_BUILD:-build/test}/tokenize
golden=$PWD/dev/test/golden/tokenizer_hf
dir=$(mktemp -d "${TMPDIR:-/tmp}/llmc_tokenize_XXXXXX"); trap 'rm -rf "$dir"' EXIT
passed=0 failed=0 skipped=0
ok() { passed=$((passed + 1)); echo "ok $1"; }
bad() { failed=$((failed + 1)); echo "FAILED $1: $2"; }
# expect NAME STATUS PATTERN COMMAND...: exit status and a text in what it prints
expect() {
    local name=$1 status=$2 pattern=$3 got; shift 3
    "$@" >"$dir/said" 2>&1; got=$?
    if [ "$got" -ne "$status" ]; then bad "$name" "exit status $got, expected $status: $(head -3 "$dir/said")"
    elif ! grep -q -- "$pattern" "$dir/said"; then bad "$name" "expected \"$pattern\": $(head -3 "$dir/said")"
    else ok "$name"; fi
}
same() { if cmp "$2" "$3" >"$dir/said" 2>&1; then ok "$1"; else bad "$1" "$(cat "$dir/said")"; fi; }
text=$golden/text.txt

expect train_says_what_it_made 0 "900 tokens" "$tokenize" train --vocab-size 900 --out "$dir/t" "$text"
expect train_from_stdin 0 "900 tokens" "$tokenize" train --vocab-size 900 --out "$dir/u" - <"$text"
same both_vocabularies_are_equal "$dir/t/merges.txt" "$dir/u/merges.txt"
expect train_equals_hf 0 "1000 tokens" "$tokenize" train --vocab-size 1k --out "$dir/v" "$text"
same merges_equal_hf "$dir/v/merges.txt" "$golden/merges.txt"
expect more_than_the_text_has 0 "no pair of tokens occurs twice" "$tokenize" train --vocab-size 100k --out "$dir/w" "$text"

expect encode 0 "47316 bytes" "$tokenize" encode --tokenizer "$dir/t" --no-separator --out "$dir/a.bin" "$text"
"$tokenize" decode --tokenizer "$dir/t" "$dir/a.bin" >"$dir/back.txt"; same decode_gives_the_text_back "$dir/back.txt" "$text"
expect encode_stdin_one_thread 0 "tokens of" "$tokenize" encode --tokenizer "$dir/t" --no-separator --threads 1 --out "$dir/b.bin" - <"$text"
same stdin_and_threads_change_nothing "$dir/a.bin" "$dir/b.bin"
head -c 300000 /dev/urandom >"$dir/noise"
expect encode_noise 0 "300000 bytes" "$tokenize" encode --tokenizer "$dir/t" --no-separator --out "$dir/n.bin" "$dir/noise"
"$tokenize" decode --tokenizer "$dir/t" "$dir/n.bin" >"$dir/back"; same any_bytes_come_back "$dir/back" "$dir/noise"
cat "$text" | "$tokenize" encode --tokenizer "$dir/t" --quiet --val "$dir/v1.bin" --val-fraction 0.2 --out "$dir/t1.bin" - >"$dir/said" 2>&1
"$tokenize" encode --tokenizer "$dir/t" --quiet --val "$dir/v2.bin" --val-fraction 0.2 --out "$dir/t2.bin" "$text" >"$dir/said" 2>&1
same a_pipe_is_split_like_a_file "$dir/v1.bin" "$dir/v2.bin"
same a_pipe_trains_like_a_file "$dir/t1.bin" "$dir/t2.bin"
if ls "$dir"/*.tmp >/dev/null 2>&1; then bad nothing_is_left_over "$(ls "$dir"/*.tmp)"; else ok nothing_is_left_over; fi
printf 'one\n<|endoftext|>\ntwo\n' >"$dir/marked"
"$tokenize" encode --tokenizer "$dir/t" --quiet --out "$dir/m.bin" "$dir/marked" >"$dir/said" 2>&1
expect markers_become_separators 0 '^<|endoftext|>two$' "$tokenize" decode --tokenizer "$dir/t" "$dir/m.bin"
"$tokenize" encode --tokenizer "$dir/t" --quiet --no-separator --document-marker none --out "$dir/m.bin" "$dir/marked" >"$dir/said" 2>&1
"$tokenize" decode --tokenizer "$dir/t" "$dir/m.bin" >"$dir/back"; same without_a_marker_it_is_text "$dir/back" "$dir/marked"

expect help 0 "tokenize encode" "$tokenize" --help
expect help_of_a_command 0 "--val-fraction" "$tokenize" encode --help
expect version 0 "." "$tokenize" --version
expect no_command 2 "train, encode or decode" "$tokenize"
expect unknown_command 2 "unknown command" "$tokenize" encrypt
expect unknown_option 2 "--tokenizer" "$tokenize" encode --tokeniser "$dir/t" --out "$dir/x.bin" "$text"
expect vocabulary_out_of_range 2 "257" "$tokenize" train --vocab-size 100 --out "$dir/x" "$text"
expect no_vocabulary_size 2 "--vocab-size" "$tokenize" train --out "$dir/x" "$text"
expect no_tokenizer_given 2 "--tokenizer is missing" "$tokenize" encode --out "$dir/x.bin" "$text"
expect no_files 2 "no file" "$tokenize" encode --tokenizer "$dir/t" --out "$dir/x.bin"
expect missing_text 3 "nowhere.txt" "$tokenize" encode --tokenizer "$dir/t" --out "$dir/x.bin" "$dir/nowhere.txt"
expect missing_tokenizer 3 "vocab.json" "$tokenize" encode --tokenizer "$dir" --out "$dir/x.bin" "$text"
"$tokenize" encode --tokenizer "$dir/w" --quiet --out "$dir/large.bin" "$text" >"$dir/said" 2>&1
expect another_tokenizers_shard 3 "made with another one" "$tokenize" decode --tokenizer "$dir/t" "$dir/large.bin"
expect not_a_shard 3 "t/vocab.json" "$tokenize" decode --tokenizer "$dir/t" "$dir/t/vocab.json"
expect cannot_write 8 "/proc/nowhere" "$tokenize" encode --tokenizer "$dir/t" --out /proc/nowhere/x.bin "$text"
"$tokenize" decode --tokenizer "$dir/t" "$dir/n.bin" >/dev/full 2>"$dir/said"
if [ $? -eq 8 ] && grep -q "cannot write" "$dir/said"; then ok a_full_disk_is_said; else bad a_full_disk_is_said "$(cat "$dir/said")"; fi

python=
for p in "${PYTHON:-python3}" /usr/bin/python3; do "$p" -c 'import tokenizers' 2>/dev/null && { python=$p; break; }; done
if [ -n "$python" ]; then expect ids_and_merges_equal_hf_live 0 "^equal" "$python" dev/reference/record_tokenizer.py compare "$tokenize" 600
else skipped=1; echo "skipped ids_and_merges_equal_hf_live: python has no module tokenizers"; fi
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ]
