#!/usr/bin/env bash
# Build Horovod against the torch of an environment, keep the wheel, install it there: scripts/horovod.sh [PYTHON]
#
# Horovod 0.28.1, its last release, asks for C++14, and torch's headers want C++17: two lines of its build files are
# changed. The wheel has the Gloo transport and fits one torch, one Python, one architecture and one set of HOROVOD_*
# variables, which name its place in the cache. On a GPU machine with NCCL: HOROVOD_GPU_OPERATIONS=NCCL scripts/horovod.sh
set -euo pipefail

VERSION=0.28.1
SHA256=92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0
PYTHON="${1:-.venv/bin/python}"
PYTHON="$(command -v "$PYTHON")" || { echo "no Python at ${1:-.venv/bin/python}; run make test or make sweep first" >&2; exit 2; }
command -v g++ >/dev/null || { echo "Horovod is built from source and needs g++; on Debian and Ubuntu: apt-get install g++" >&2; exit 2; }

torch="$("$PYTHON" -c 'import torch; print(torch.__version__)')"
packages="$("$PYTHON" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])')"
tag="$("$PYTHON" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')"
options="$(env | sed -n '/^HOROVOD_/p' | sort | sha256sum | cut -c1-8)"
cache="${XDG_CACHE_HOME:-$HOME/.cache}/saih/horovod-$VERSION-torch-$torch-$tag-$(uname -m)-$options"

if ! ls "$cache"/horovod-*.whl >/dev/null 2>&1; then
    echo "building Horovod $VERSION for torch $torch: five minutes or so on two cores"
    work="$(mktemp -d)"
    trap 'rm -rf "$work"' EXIT
    "$PYTHON" -m venv "$work/venv"
    # Its setup.py wants setuptools from before 81, its bundled Gloo a cmake from before 4.
    "$work/venv/bin/pip" install --quiet --disable-pip-version-check 'setuptools<81' wheel packaging 'cmake<4'
    export PATH="$work/venv/bin:$PATH"
    # torch comes after what was just installed: on PYTHONPATH, the packages beside it would come before.
    python -c 'import pathlib, sys, sysconfig; pathlib.Path(sysconfig.get_path("purelib"), "torch.pth").write_text(sys.argv[1])' "$packages"
    cd "$work"
    echo "horovod==$VERSION --hash=sha256:$SHA256" >requirements.txt
    pip download --quiet --disable-pip-version-check --no-deps --no-binary :all: --no-build-isolation --require-hashes -r requirements.txt
    tar xzf "horovod-$VERSION.tar.gz"
    sed -i 's/set(CMAKE_CXX_STANDARD 14)/set(CMAKE_CXX_STANDARD 17)/' "horovod-$VERSION/CMakeLists.txt" "horovod-$VERSION/horovod/torch/CMakeLists.txt"
    export HOROVOD_WITH_PYTORCH=1 HOROVOD_WITH_GLOO=1 HOROVOD_WITHOUT_MPI=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1
    export MAKEFLAGS="${MAKEFLAGS:--j2}" # one compilation takes 1.4 GB
    pip wheel --quiet --disable-pip-version-check --no-cache-dir --no-build-isolation --no-deps --wheel-dir wheels "./horovod-$VERSION" ||
        { echo "Horovod $VERSION does not build here; the lines above say why. Everything but backend=horovod works without it." >&2; exit 1; }
    mkdir -p "$cache"
    mv wheels/horovod-*.whl "$cache/"
    cd - >/dev/null
fi
"$PYTHON" -m pip install --quiet --disable-pip-version-check "$cache"/horovod-*.whl
"$PYTHON" -c 'import horovod.torch as hvd; print("Horovod", hvd.__version__ if hasattr(hvd, "__version__") else "", "with Gloo" if hvd.gloo_built() else "", "is ready")'
