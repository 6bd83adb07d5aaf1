#!/usr/bin/env bash
# Draws the losses of a run as SVG: training loss, validation loss, and a floor where one is known.
# Usage: plot_loss.sh RUN_DIRECTORY [FLOOR] > loss.svg        (awk alone; reads RUN_DIRECTORY/metrics.jsonl)
set -euo pipefail
if [ $# -lt 1 ] || [ ! -f "$1/metrics.jsonl" ]; then
    echo "usage: plot_loss.sh RUN_DIRECTORY [FLOOR] > loss.svg; found no ${1:-RUN_DIRECTORY}/metrics.jsonl" >&2
    exit 2
fi
awk -v floor="${2:--1}" '
function field(name,    at, text) {
    at = index($0, "\"" name "\":"); if (!at) return "null"
    text = substr($0, at + length(name) + 3); sub(/[,}].*/, "", text); return text
}
function px(step) { return left + width * step / last }
function py(loss) { return top + height * (high - loss) / (high - low) }
function label(x, y, anchor, text, colour) { printf "<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"%s\" fill=\"%s\">%s</text>\n", x, y, anchor, colour, text }
/"kind":"step"/ && field("loss") != "null" { t[field("step")] = field("loss"); if (field("step") + 0 > last) last = field("step") + 0 }
/"kind":"validation"/ && field("loss") != "null" { v[field("step")] = field("loss") }
END {
    left = 50; top = 20; width = 620; height = 300; high = 0
    for (s in t) if (t[s] > high) high = t[s]
    for (s in v) if (v[s] > high) high = v[s]
    high = int(high) + 1; low = 0
    if (!last) { print "plot_loss: no steps in the log" > "/dev/stderr"; exit 3 }
    printf "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 700 370\" font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"700\" height=\"370\" fill=\"#ffffff\"/>\n"
    for (y = 0; y <= high; y++) {
        printf "<path d=\"M%.1f %.1fH%.1f\" stroke=\"#dddddd\"/>\n", left, py(y), left + width
        label(left - 8, py(y) + 4, "end", y, "#555555")
    }
    for (i = 0; i <= 4; i++) label(px(last * i / 4), top + height + 18, "middle", int(last * i / 4), "#555555")
    label(left + width / 2, top + height + 38, "middle", "step (loss in nats per token)", "#555555")
    printf "<path fill=\"none\" stroke=\"#9ec5e8\" d=\""
    stride = last > 700 ? int(last / 700) : 1; first = 1
    for (s = 1; s <= last; s += stride) if (s in t) { printf "%s%.1f %.1f", first ? "M" : "L", px(s), py(t[s]); first = 0 }
    printf "\"/>\n<path fill=\"none\" stroke=\"#1f4e79\" stroke-width=\"2\" d=\""
    first = 1
    for (s = 0; s <= last; s++) if (s in v) { printf "%s%.1f %.1f", first ? "M" : "L", px(s), py(v[s]); first = 0; end = v[s] }
    print "\"/>"
    if (floor >= 0) {
        printf "<path d=\"M%.1f %.1fH%.1f\" stroke=\"#b03030\" stroke-width=\"1.5\" stroke-dasharray=\"6 4\"/>\n", left, py(floor), left + width
        label(left + width - 4, py(floor) + 15, "end", sprintf("true entropy %.3f", floor), "#b03030")
    }
    label(left + width - 4, top + 16, "end", sprintf("validation loss, %.3f at the end", end), "#1f4e79")
    label(left + width - 4, top + 34, "end", "training loss", "#6f9fc8")
    print "</svg>"
}' "$1/metrics.jsonl"
