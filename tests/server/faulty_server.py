"""A server over a model, on a free port, whose backend does what the file MODE says: fine, sometimes, raise, hang.

python faulty_server.py GVM MODE
"""

import json
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import uvicorn

from dvpo.data.templates import Encoded
from dvpo.models import load_tokenizer
from server import logs
from server.app import create_app
from server.backends import Scored
from server.backends.transformers import TransformersBackend
from server.connection import Connection
from server.engine import Engine
from server.metrics import Metrics
from server.settings import Settings
from server.text import Codec

folder, mode = Path(sys.argv[1]), Path(sys.argv[2])


class Faulty(TransformersBackend):
    """Reads the file before every batch; `sometimes` raises at every second one."""

    calls = 0

    def score(self, items: Sequence[Encoded], *, alone: bool = True) -> list[Scored]:
        """The values, or the fault."""
        now, self.calls = mode.read_text(), self.calls + 1
        if now == "raise" or (now == "sometimes" and self.calls % 2):
            raise RuntimeError("told to")
        if now == "hang":
            time.sleep(3600)
        return super().score(items)


logs.configure()
metrics = Metrics()
engine = Engine(Faulty(folder), batch_tokens=512, batch_seconds=5, on_batch=metrics.batch)
app = create_app(engine, Codec(load_tokenizer(folder)), Settings(), metrics)
listener = socket.create_server(("127.0.0.1", 0))
print(json.dumps({"url": f"http://127.0.0.1:{listener.getsockname()[1]}"}), file=sys.stderr, flush=True)
uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, http=Connection)).run(sockets=[listener])
