#!/usr/bin/env bash
# One round of human feedback: from a policy to a better one by the labels of a team. The same command goes on where it stopped.
# usage: scripts/feedback_round.sh --policy CKPT --prompts FILE --heldout_prompts FILE [--text FILE] --labelers ann,bob --out DIR
here="$PWD"
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
command="$PWD/$VENV/bin/lit-instruct"
case "$VENV" in /*) command="$VENV/bin/lit-instruct" ;; esac
cd "$here"
exec "$command" round "$@"
