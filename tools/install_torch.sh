#!/bin/sh
# Install torch into a virtual environment that has none; on Linux x86-64 the CPU build, because the default
# wheel brings several gigabytes of CUDA. uv knows PyTorch's own CPU index; where that cannot be reached, or
# does not answer in ten seconds, pip takes whatever build the configured index has.
#   usage: tools/install_torch.sh VENV [REQUIREMENT]
set -eu
venv=$1
requirement=${2:-torch==2.13.0}
if "$venv/bin/python" -c "import torch" 2>/dev/null; then
    exit 0
fi
echo "installing $requirement: the CPU build if PyTorch's own index answers, else what pip finds"
if [ "$(uname -s)-$(uname -m)" = "Linux-x86_64" ]; then
    if "$venv/bin/python" -m pip install --quiet "uv>=0.6" &&
        UV_HTTP_TIMEOUT=10 UV_HTTP_RETRIES=0 "$venv/bin/uv" pip install --quiet --python "$venv/bin/python" \
            --torch-backend=cpu "$requirement" 2>/dev/null; then
        exit 0
    fi
    echo "no CPU build from PyTorch's own index; asking pip"
fi
exec "$venv/bin/python" -m pip install --quiet "$requirement"
