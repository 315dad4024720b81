#!/bin/sh
# Sets up .venv: scripts/venv.sh demo|test. Called by the Makefile; safe to call again.
#   PYTHON=...  the interpreter to use (3.11 or newer; otherwise the first that is found)
set -eu
cd "$(dirname "$0")/.."
what=${1:?demo or test}
venv=.venv

say() { printf 'fasttrain: %s\n' "$*"; }
fail() { say "$*" >&2; exit 1; }
recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# as_root COMMAND ..: as root, or through sudo where that asks nothing
as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; elif sudo -n true 2>/dev/null; then sudo -n "$@"; else return 1; fi
}

# apt PACKAGE ..: installs Debian packages where that is allowed
apt() {
    command -v apt-get >/dev/null 2>&1 || return 1
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$@" >build/apt.log 2>&1 && return 0
    as_root apt-get update -qq >build/apt.log 2>&1 || return 1
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$@" >>build/apt.log 2>&1
}

mkdir -p build
[ "$(uname -s)" = Linux ] || fail "this project runs on Linux; this is $(uname -s)"

if ! [ -x $venv/bin/python ]; then
    python=
    for candidate in ${PYTHON:-} python3 python3.14 python3.13 python3.12 python3.11; do
        if command -v "$candidate" >/dev/null 2>&1 && recent "$candidate"; then python=$candidate; break; fi
    done
    [ -n "$python" ] || fail "Python 3.11 or newer is needed and none was found; install one, or name it: PYTHON=/path/to/python3 make $what"
    say "setting up $venv with $("$python" --version)"
    if ! "$python" -m venv $venv >build/venv.log 2>&1; then
        rm -rf $venv
        version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        apt "python$version-venv" || fail "$python cannot make virtual environments, and this user may not install packages; ask for: apt-get install python$version-venv"
        "$python" -m venv $venv >build/venv.log 2>&1 || { rm -rf $venv; fail "$python -m venv failed; see build/venv.log"; }
    fi
fi

# uv installs the 6 GB that PyTorch and CUDA take several times faster than pip; pip stands in where uv cannot be had
install() {
    if $venv/bin/python -m uv --version >/dev/null 2>&1 || $venv/bin/python -m pip install -q uv >build/uv.log 2>&1; then
        index=$($venv/bin/python -m pip config get global.index-url 2>/dev/null || true)
        SSL_CERT_FILE=${SSL_CERT_FILE:-${PIP_CERT:-}}
        [ -n "$SSL_CERT_FILE" ] && export SSL_CERT_FILE || unset SSL_CERT_FILE
        UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-${PIP_INDEX_URL:-$index}}
        [ -n "$UV_DEFAULT_INDEX" ] && export UV_DEFAULT_INDEX || unset UV_DEFAULT_INDEX
        UV_HTTP_TIMEOUT=300 $venv/bin/python -m uv pip install -q --python $venv/bin/python "$@" >build/uv.log 2>&1 && return 0
        say "uv could not install $* (see build/uv.log); trying pip"
    fi
    $venv/bin/python -m pip install -q "$@" >build/pip.log 2>&1 || { tail -n 15 build/pip.log >&2; return 1; }
}

# uv leaves bytecode to the first import; where PYTHONDONTWRITEBYTECODE is set, every import would compile PyTorch anew
compile() { $venv/bin/python -m compileall -q -j 0 $venv/lib >build/compile.log 2>&1 || true; }

if [ "$what" = demo ]; then
    say "installing PyTorch and what the demo needs (about 6 GB, once)"
    install -e '.[demo]' || fail "the installation failed; see build/pip.log"
    compile
    exit 0
fi

say "installing PyTorch and what the tests need (about 7 GB, once)"
install -e '.[demo,test]' || fail "the installation failed; see build/pip.log"

# FFCV compiles against OpenCV and libjpeg-turbo
ready() { command -v c++ >/dev/null 2>&1 && command -v pkg-config >/dev/null 2>&1 && pkg-config --exists opencv4 libturbojpeg; }
if ! $venv/bin/python -c 'import ffcv' 2>/dev/null; then
    if ! ready; then
        say "installing the libraries that FFCV compiles against (apt)"
        apt build-essential pkg-config libopencv-dev libturbojpeg0-dev || true
    fi
    if ! ready; then
        say "FFCV is left out: it needs apt-get install build-essential pkg-config libopencv-dev libturbojpeg0-dev, which this user may not do; everything else works without it"
    else
        install -e '.[ffcv]' || say "FFCV is left out: it did not compile; see build/uv.log and build/pip.log"
    fi
fi

# torchcodec loads FFmpeg's libraries, and only when it is used
if ! (cd build && ../$venv/bin/python -c 'from fasttrain.loaders.parts import import_part; import_part("torchcodec.decoders")') >/dev/null 2>&1; then
    say "installing FFmpeg, whose libraries torchcodec loads (apt)"
    apt ffmpeg || say "torchcodec is left out: it needs apt-get install ffmpeg, which this user may not do; other decoders work without it"
fi
compile
