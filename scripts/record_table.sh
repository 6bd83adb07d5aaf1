#!/usr/bin/env bash
# The table of whole steps for the README, from the newest record in dev/bench/records, which it names.
#   record_table.sh                   prints it; "no GPU record yet" when there is none
#   record_table.sh --update          writes it into README.md, between the lines <!-- gpu record --> and <!-- end of gpu record -->
#   record_table.sh --record FILE     of this record.json, without naming it
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
field() { sed -n "s/.*\"$2\": \"\{0,1\}\([^,\"}]*\).*/\1/p" <<<"$1"; } # line, name
table() { # record.json: a line of it a step
    grep -q '"tokens_per_s"' "$1" || { echo "no whole step was measured"; return; }
    printf '| model | dtype, attention | micro-batches x B x T | ms a step, median (p10 to p90) | tokens/s | MFU |\n|---|---|---|---|---|---|\n'
    grep '"tokens_per_s"' "$1" | while IFS= read -r line; do
        ms() { awk -v s="$(field "$line" "$1")" 'BEGIN {printf "%.1f", 1e3 * s}'; }
        mfu=$(field "$line" mfu)
        [ "$mfu" = null ] && mfu=n/a || mfu=$(awk -v m="$mfu" 'BEGIN {printf "%.1f %%", 100 * m}')
        more='' # what is not the default
        case $(field "$line" own_products) in 1) more=', own products on' ;; 2) more=', own products only' ;; esac
        [ "$(field "$line" early_launch)" != 1 ] || more+=', early launch'
        printf '| %s | %s, %s%s | %s x %s x %s | %s (%s to %s) | %.0f | %s |\n' "$(field "$line" model)" "$(field "$line" dtype)" "$(field "$line" attention)" "$more" \
            "$(field "$line" micro_batches)" "$(field "$line" B)" "$(field "$line" T)" "$(ms median_s)" "$(ms p10_s)" "$(ms p90_s)" "$(field "$line" tokens_per_s)" "$mfu"
    done
}
newest() { # by date; records that came to an end, of all parts, of a GPU
    local f
    for f in dev/bench/records/*/record.json; do
        [ ! -f "$f" ] || grep -qE '"backend": "emu"|"only": "' "$f" || printf '%s %s\n' "$(field "$(head -n 1 "$f")" date)" "$f"
    done | sort | tail -n 1 | cut -d' ' -f2-
}
page() {
    local record
    record=$(newest)
    if [ -z "$record" ]; then echo "no GPU record yet: \`make gpu-record\` on a machine with a GPU writes one"; return; fi
    printf '%s, %s, commit %s ([the record](%s)); MFU counts 6N + 6LCT FLOPs a token.\n\n' "$(field "$(head -n 1 "$record")" device)" "$(field "$(head -n 1 "$record")" date)" \
        "$(field "$(head -n 1 "$record")" commit)" "$(dirname "$record")/README.md"
    table "$record"
}
case ${1:-} in
    '') page ;;
    --record) table "$2" ;;
    --update)
        grep -q '^<!-- gpu record -->$' README.md && grep -q '^<!-- end of gpu record -->$' README.md || { echo "record_table: README.md has no place for the table" >&2; exit 1; }
        page=$(page)
        awk -v page="$page" '/^<!-- gpu record -->$/ {print; print page; skip = 1} /^<!-- end of gpu record -->$/ {skip = 0} !skip' README.md >README.md.new
        mv README.md.new README.md ;;
    *) echo "record_table: unknown option '$1'" >&2; exit 2 ;;
esac
