"""An HTTP server for alerts: it accepts them, refuses them, or never answers."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class AlertServer:
    """A server on loopback. `taken`: bodies posted to /ok/..., in order; `num_refused`: requests for /refuse/..."""

    def __init__(self):
        self.taken, self.num_refused, self.release = [], 0, threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status = 200 if self.headers["Authorization"] == "Basic dXNlcjp3b3Jk" else 401
                if self.path.startswith("/hang"):
                    server.release.wait(60)
                elif self.path.startswith("/refuse"):
                    server.num_refused, status = server.num_refused + 1, 500
                else:
                    server.taken.append(body)
                self.send_response(status)
                self.end_headers()

            def log_message(self, *_):
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever)
        self._thread.start()
        self.address = f"127.0.0.1:{self._http.server_port}"

    def url(self, path):
        return f"http://user:word@{self.address}/{path}/very-secret"

    def close(self):
        self.release.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()
