#!/usr/bin/env bash
# Lint, types and the default test suite, on a fresh machine too. Arguments go to pytest, for example: -m slow
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # models of a few thousand parameters: more threads wait for one another
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .
"$VENV/bin/mypy"
exec "$VENV/bin/python" -m pytest --numprocesses "${TEST_PROCESSES:-2}" --dist loadfile "$@"
