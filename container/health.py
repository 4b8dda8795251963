"""Health of a container: a server must answer /health; a container that runs something else is healthy."""

import sys
import urllib.request
from pathlib import Path

if b"dvpo serve" in Path("/proc/1/cmdline").read_bytes().replace(b"\0", b" "):
    try:
        urllib.request.urlopen("http://127.0.0.1:8000/health", timeout=4).close()
    except OSError as error:
        sys.exit(f"the server does not answer: {error}")
