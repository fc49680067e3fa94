#!/bin/sh
# Installs requirements.lock and torch into a virtual environment: install_product.sh FOLDER
# TORCH=cpu takes PyTorch's build for CPUs, TORCH=pypi PyPI's, which has CUDA on Linux. By default it is the one for CPUs
# where pip is configured to find it.
set -eu
supply=$(dirname "$0")
folder=$1

case ${TORCH:-} in
    cpu) "$supply/install.sh" "$folder" "$supply/torch-cpu.lock" ;;
    pypi) "$supply/install.sh" "$folder" "$supply/torch.lock" ;;
    "")
        if ! errors=$("$supply/install.sh" "$folder" "$supply/torch-cpu.lock" 2>&1); then
            case $errors in
                *"No matching distribution"*) "$supply/install.sh" "$folder" "$supply/torch.lock" ;;
                *)
                    echo "$errors" >&2
                    exit 1
                    ;;
            esac
        fi
        ;;
    *)
        echo "TORCH is '$TORCH'; it may be cpu or pypi." >&2
        exit 2
        ;;
esac
# PyPI has one package as source only. It is built by the setuptools of a lock, not by the newest that there is.
"$supply/install.sh" "$folder" "$supply/build.lock"
"$supply/install.sh" "$folder" "$supply/../../requirements.lock" \
    --no-binary antlr4-python3-runtime --no-build-isolation
