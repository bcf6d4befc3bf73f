# Sourced by the other scripts: a virtual environment in .venv (or $VENV) with the project in it. A second call finds
# everything in place and takes a second.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV="${VENV:-.venv}"
TORCH=2.13.0

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.13 python3.12 python3.11 python3 python; do
        if [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 &&
            "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "Python 3.11 or newer is needed and was not found; install it, or set PYTHON to its path." >&2
    return 1
}

# What the environment was made from: if it changes, the installation is brought up to date.
wanted="$(cat pyproject.toml scripts/setup.sh | cksum)"
if [ "$(cat "$VENV/.lit_instruct" 2>/dev/null)" != "$wanted" ]; then
    [ -x "$VENV/bin/python" ] || "$(find_python)" -m venv "$VENV"
    echo "Installing into $VENV (a few minutes the first time) ..."
    pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@"; }
    if ! "$VENV/bin/python" -c 'import torch' 2>/dev/null; then
        if [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null 2>&1; then
            # The default build on Linux brings several GB of CUDA libraries that have no use here.
            pip install -qq --retries 0 --no-deps --extra-index-url https://download.pytorch.org/whl/cpu "torch==$TORCH+cpu" ||
                pip install -q "torch==$TORCH"
        else
            pip install -q "torch==$TORCH"
        fi
    fi
    pip install -q -e ".[dev]"
    echo "$wanted" >"$VENV/.lit_instruct"
fi
