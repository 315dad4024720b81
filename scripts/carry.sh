#!/bin/sh
# What a GPU machine with PyTorch but without internet lacks, in parts that can be carried there.
#
#   sh scripts/carry.sh pack FOLDER [SET ..]           here, after `make venv`: downloads, builds, and cuts into FOLDER/part-*
#   eval "$(sh scripts/carry.sh unpack FOLDER SITE)"   there: joins FOLDER/part-*, installs into SITE, sets PYTHONPATH and LD_LIBRARY_PATH
#
# Sets: base (command line, FFCV with its libraries, PyAV, Liger), dali, video (decord, torchcodec, PyNvVideoCodec). All if none is named.
#   PYTHON_THERE=3.12   the version of Python there         PART_MB=58   the size of a part
#   PYTHON=python3      unpack: the Python there that has PyTorch
carry_pack() (
    set -eu
    out=$1; shift
    root=$(cd "$(dirname "$0")/.." && pwd)
    python=$root/.venv/bin/python
    mkdir -p "$out"
    out=$(cd "$out" && pwd)
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    mkdir "$work/wheels"
    platforms="--platform any --platform manylinux1_x86_64 --platform manylinux2014_x86_64"
    for n in 5 12 17 24 27 28 31 34 35 39; do platforms="$platforms --platform manylinux_2_${n}_x86_64"; done
    for set in ${*:-base dali video}; do
        case $set in
            base) names="jsonargparse docstring-parser typeshed-client importlib-resources av liger-kernel pytorch-pfn-extras terminaltables"
                  ffcv=1 ;;
            dali) names="nvidia-dali-cuda130 nvidia-libnvcomp-cu13 nvidia-nvimgcodec-cu13 nvidia-nvjpeg2k-cu13 nvidia-nvtiff-cu13 nvidia-nvjpeg nvtx optree makefun astunparse gast libcst" ;;
            video) names="decord2 torchcodec pynvvideocodec" ;;
            *) echo "carry.sh: there is no set $set; there are base, dali, video" >&2; exit 2 ;;
        esac
        for name in $names; do # the version that is tried here, where there is one
            version=$("$python" -m pip show "$name" 2>/dev/null | sed -n 's/^Version: /==/p')
            # shellcheck disable=SC2086
            "$python" -m pip download -q --no-deps --only-binary=:all: --implementation cp --python-version "${PYTHON_THERE:-3.12}" \
                $platforms -d "$work/wheels" "$name$version"
        done
    done
    if [ "${ffcv:-}" ]; then # its module asks nothing of a version of Python, only the file's name does
        "$python" -m pip wheel -q --no-deps -w "$work/wheels" assertpy fastargs
        site=$("$python" -c 'import ffcv, pathlib; print(pathlib.Path(ffcv.__file__).parent.parent)')
        mkdir "$work/site" "$work/libraries"
        cp -r "$site/ffcv" "$site"/ffcv-*.dist-info "$work/site/"
        find "$work/site" -name __pycache__ -prune -exec rm -rf {} +
        mv "$work/site/ffcv/"_libffcv*.so "$work/site/ffcv/_libffcv.so"
        ldd "$work/site/ffcv/_libffcv.so" | awk '$3 ~ "^/" {print $3}' | grep -Ev '/(libc|libm|libstdc\+\+|libgcc_s|libz|ld-linux)[.-]' \
            | xargs -I{} cp -L {} "$work/libraries/"
    fi
    rm -f "$out"/part-*
    tar -C "$work" -cf - . | gzip -1 | split -b "${PART_MB:-58}M" - "$out/part-"
    ls -l "$out"
)

carry_unpack() (
    set -eu
    mkdir -p "$2"
    cat "$1"/part-* | tar -C "$2" -xzf -
    "${PYTHON:-python3}" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$2/site" "$2"/wheels/*.whl >&2
    rm -rf "$2/wheels"
    mkdir -p "$2/libraries"
    for file in "$2"/site/av.libs/libav*.so.* "$2"/site/av.libs/libsw*.so.*; do # torchcodec loads PyAV's FFmpeg by its plain names
        if [ -e "$file" ]; then
            ln -sf "$file" "$2/libraries/$(basename "$file" | sed -E 's/-[0-9a-f]{8}//; s/(\.so\.[0-9]+).*/\1/')"
        fi
    done
    libraries=$2/libraries:$2/site/av.libs
    echo "export PYTHONPATH='$2/site${PYTHONPATH:+:$PYTHONPATH}' LD_LIBRARY_PATH='$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}'"
)

case ${1:-} in
    pack) shift; carry_pack "$@" ;;
    unpack) carry_unpack "$2" "$3" ;;
    *) sed -n 's/^# \{0,1\}//p' "$0" | sed 1d ;;
esac
