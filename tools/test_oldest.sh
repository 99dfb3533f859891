#!/bin/sh
# Run the suites of the stores and of many ranks with the oldest versions that pyproject.toml admits, in .venv-oldest.
set -eu
venv=.venv-oldest
python=${PYTHON:-python3}
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
tools/install_torch.sh "$venv" "torch==2.6.0"
"$venv/bin/python" -m pip install --quiet -e ".[test]" "s3fs==2025.3.0" "gcsfs==2025.3.0" "fsspec==2025.3.0" \
    "aiobotocore==2.19.0"
"$venv/bin/python" -m pip list 2>/dev/null | grep -i -E "^(torch|fsspec|s3fs|gcsfs|aiobotocore|botocore) "
exec "$venv/bin/python" -m pytest tests/storage tests/stories/test_bad_input_s3.py tests/stories/test_bad_input_gcs.py \
    tests/crash tests/coordination tests/distributed -m "not slow" -n 2 --dist loadfile "$@"
