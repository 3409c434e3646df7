#!/usr/bin/env bash
# The step of action.yml that calls the command. Inputs come as variables: COMMAND RECIPE SETS SUBJECT BASELINE GATES REPORT.
set -uo pipefail

arguments=()
lines() { # OPTION TEXT: the option before every line of the text
  while IFS= read -r line; do
    [ -n "${line//[[:space:]]/}" ] && arguments+=("$1" "$line")
  done <<< "$2"
}

case "$COMMAND" in
  run)
    arguments+=(run "$RECIPE")
    lines --set "$SETS"
    ;;
  check)
    read -r -a recipes <<< "$RECIPE"
    arguments+=(check "${recipes[@]}")
    lines --set "$SETS"
    ;;
  gate)
    mkdir -p "$REPORT"
    arguments+=(gate "$SUBJECT" --junit "$REPORT/gates.xml")
    [ -n "$BASELINE" ] && arguments+=(--baseline "$BASELINE")
    [ -n "$RECIPE" ] && arguments+=(--recipe "$RECIPE")
    lines --gate "$GATES"
    echo "junit=$REPORT/gates.xml" >> "$GITHUB_OUTPUT"
    ;;
  *)
    echo "::error::there is no command \`$COMMAND\`; use run, gate or check"
    exit 2
    ;;
esac

compress "${arguments[@]}"
status=$?
echo "status=$status" >> "$GITHUB_OUTPUT"
exit "$status"
