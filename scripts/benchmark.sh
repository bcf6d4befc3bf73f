#!/usr/bin/env bash
# Speed and memory against the peers, see docs/benchmarks.md. Arguments go to scripts/benchmark/run.py, for example: --quick
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec "$VENV/bin/python" scripts/benchmark/run.py "$@"
