"""A judge on this machine that can be away."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler
from typing import Any


class Judge(BaseHTTPRequestHandler):
    """Grades by the length of what it is told; while ``down`` it is restarting."""

    down = False

    def log_message(self, *args: Any) -> None:
        return

    def do_POST(self) -> None:
        said = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        grade = str(len(said["messages"][1]["content"]) % 11)
        body = b"restarting" if self.down else json.dumps({"choices": [{"message": {"content": grade}}]}).encode()
        self.send_response(503 if self.down else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
