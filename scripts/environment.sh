# Sourced by scripts/quickstart, scripts/test and scripts/gpu_check: find or make the Python environment and install
# the package.

# All measurements were made with this version. A torch that is already installed is kept.
TORCH_VERSION=2.13.0

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        return
    fi
    if [ -n "${VIRTUAL_ENV:-}" ]; then
        PYTHON="$VIRTUAL_ENV/bin/python"
        return
    fi
    if [ ! -x .venv/bin/python ]; then
        say "making the environment .venv"
        python3 -m venv .venv || fail "python3 -m venv failed; on Debian: apt install python3-venv"
    fi
    PYTHON="$PWD/.venv/bin/python"
}

# ensure_installed [dev]: install the package in editable form, with the development extra on request.
ensure_installed() {
    find_python
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "Python 3.11 or newer is needed"
    local extra="${1:-}" stamp
    stamp="$("$PYTHON" -c 'import sys; print(sys.prefix)')/.subspec-installed-${extra:-plain}"
    if [ -f "$stamp" ] && [ ! pyproject.toml -nt "$stamp" ] && [ "$(cat "$stamp")" = "$PWD" ]; then
        return
    fi
    say "installing (a few minutes the first time)"
    if ! "$PYTHON" -c 'import torch' 2>/dev/null; then
        "$PYTHON" -m pip install --quiet --disable-pip-version-check "torch==$TORCH_VERSION"
    fi
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --editable ".${extra:+[$extra]}"
    printf '%s' "$PWD" > "$stamp"
}

say() {
    if [ -t 2 ] && [ -z "${NO_COLOR:-}" ]; then
        printf '\033[2m%s\033[0m\n' "$*" >&2
    else
        printf '%s\n' "$*" >&2
    fi
}

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}
