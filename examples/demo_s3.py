"""``make demo-s3``: starts a real S3 server on loopback, runs the demonstration on it, and stops it again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from cloudckpt.testing.servers import SeaweedFS

DEMO = Path(__file__).with_name("demo.py")
BUCKET = "demo"


def main() -> None:
    with SeaweedFS() as server:
        server.create_bucket(BUCKET)
        print(f"SeaweedFS {server.version} at {server.url}, bucket {BUCKET!r}", flush=True)
        environment = {**os.environ, **server.environment()}
        root = f"s3://{BUCKET}/runs/demo"
        subprocess.run([sys.executable, str(DEMO), "--root", root], env=environment, check=True)
        subprocess.run([sys.executable, "-m", "cloudckpt", "doctor", root], env=environment, check=True)


if __name__ == "__main__":
    main()
