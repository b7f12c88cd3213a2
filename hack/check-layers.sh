#!/usr/bin/env bash
# Checks the imports in src/ against the table of layers in src/lib.rs. Prints each import that the
# table does not allow as `file:line: module -> module`, and then exits with 1.
set -euo pipefail
cd "$(dirname "$0")/.."

mapfile -t files < <(find src -name '*.rs' ! -path src/lib.rs | sort)
awk '
function fail(text) { print FILENAME ":" FNR ": " text; failed = 1 }

# Checks an import of the top module `to`. Rank 1 is the top of the table.
function check(to) {
    if (to == "self" || to == module || module == "main") return
    if (!(to in rank)) fail(module " -> " to ", which is not in the table of layers")
    else if (rank[to] <= rank[module]) fail(module " -> " to)
}

# A row of the table: | layer | [`a`] (a comment) → [`b`], [`c`] |
FILENAME == "src/lib.rs" && /^\/\/! \|/ {
    for (ranks++; match($0, /\[`[a-z_]+`\]|→/); $0 = substr($0, RSTART + RLENGTH)) {
        name = substr($0, RSTART, RLENGTH)
        if (name == "→") ranks++
        else rank[substr(name, 3, length(name) - 4)] = ranks
    }
}
FILENAME == "src/lib.rs" && /^(pub )?mod [a-z_]+;/ {
    name = $NF; sub(";", "", name)
    if (!(name in rank)) fail(name " is not in the table of layers")
}
FILENAME == "src/lib.rs" { next }

FNR == 1 {
    path = FILENAME; sub(/^src\//, "", path); sub(/(\/mod)?\.rs$/, "", path)
    depth = split(path, parts, "/"); module = parts[1]
    state = group = 0; split("", indent)
}
{ text = $0; sub(/(^|[ \t])\/\/.*/, "", text) }
# Within `mod name { … }`, `super` has one more level to climb.
text ~ /^ *(pub(\([a-z]+\))? )?mod [a-z_]+ \{$/ { match(text, /^ */); indent[++depth] = RLENGTH }
text ~ /^ *\}$/ {
    match(text, /^ */)
    if (depth in indent && RLENGTH == indent[depth]) delete indent[depth--]
}
{
    # state: 1 after a path prefix, 2 after its `::`, 3 before an item of a group of imports.
    for (; match(text, /[A-Za-z_][A-Za-z0-9_]*|::|[{},]/); text = substr(text, RSTART + RLENGTH)) {
        token = substr(text, RSTART, RLENGTH)
        if (token == "super") { climbed = state == 2 ? climbed + 1 : 1; state = 1 }
        else if (token == "crate") { climbed = depth; state = 1 }
        else if (token == "::") state = state == 1 ? 2 : 0
        else if (state == 2 && climbed >= depth && token == "{") { group = 1; state = 3 }
        else if (token == "{") { if (group) group++; state = 0 }
        else if (token == "}") { if (group) group--; state = 0 }
        else if (token == ",") state = group == 1 ? 3 : 0
        else { if (state == 3 || state == 2 && climbed >= depth) check(token); state = 0 }
    }
}
END { exit failed }
' src/lib.rs "${files[@]}"
