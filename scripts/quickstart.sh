#!/usr/bin/env bash
# Trains a base model, SFT, a reward model and PPO-ptx on a small made-up world and compares them.
# usage: scripts/quickstart.sh [--seed N] [--out DIR]
here="$PWD"
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
command="$PWD/$VENV/bin/lit-instruct"
case "$VENV" in /*) command="$VENV/bin/lit-instruct" ;; esac
cd "$here"
exec "$command" quickstart "$@"
