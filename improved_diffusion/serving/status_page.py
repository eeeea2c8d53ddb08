"""The status page, and the same numbers for Prometheus at /metrics. No user is named on either."""

from __future__ import annotations

import html
import socketserver
import threading
from collections.abc import Callable, Iterable
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, ProcessCollector, make_wsgi_app
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from improved_diffusion.errors import UserError
from improved_diffusion.serving.queue import JobQueue
from improved_diffusion.serving.summary import summarize

PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="refresh" content="5">
<title>improved_diffusion: status</title><style>body {{ font: 15px monospace; margin: 2em; }}</style></head>
<body><h1>Status</h1><pre>{summary}</pre><p><a href="/metrics">metrics</a> for Prometheus</p></body></html>"""


class _QueueCollector(Collector):
    """Asks the database at every scrape."""

    def __init__(self, queue: JobQueue):
        self.queue = queue

    def collect(self) -> Iterable[Metric]:
        summary = summarize(self.queue)
        states = GaugeMetricFamily("serving_jobs", "Jobs that have not expired, by state", labels=["state"])
        for state, count in summary.states.items():
            states.add_metric([state], count)
        yield states
        for name, meaning, value in (
            ("users", "Users with jobs under way", summary.users),
            ("oldest_queued_seconds", "How long the oldest queued job has waited", summary.oldest),
            ("wait_median_seconds", "Until drawing began, in the last hour", summary.wait_median),
            ("wait_longest_seconds", "Until drawing began, in the last hour", summary.wait_longest),
            ("images_per_minute", "In the last hour", summary.images_per_minute),
            ("disk_bytes", "Results and uploads", summary.bytes_on_disk),
            ("deliveries_unsure", "Results of which nobody knows whether they arrived", summary.unsure),
            ("workers", "Workers alive", len(summary.workers)),
        ):
            yield GaugeMetricFamily(f"serving_{name}", meaning, value=value)


class StatusServer:
    """Serves / and /metrics from a thread of its own until `close`.

    Raises:
        UserError: the address cannot be had.
    """

    def __init__(self, queue: JobQueue, host: str, port: int):
        registry = CollectorRegistry()
        registry.register(_QueueCollector(queue))
        ProcessCollector(registry=registry)  # memory and time of this process
        metrics = make_wsgi_app(registry)

        def application(environment: dict, start_response: Callable) -> Iterable[bytes]:
            if environment["PATH_INFO"] == "/metrics":
                return metrics(environment, start_response)
            if environment["PATH_INFO"] != "/":
                start_response("404 Not Found", [("Content-Type", "text/plain")])
                return [b"the status is at /"]
            start_response("200 OK", [("Content-Type", "text/html; charset=utf-8")])
            return [PAGE.format(summary=html.escape(str(summarize(queue)))).encode()]

        try:
            self._server = make_server(host, port, application, _ThreadingServer, _SilentHandler)
        except (OSError, OverflowError) as error:
            raise UserError(f"cannot serve the status at {host}, port {port}: {error}") from error
        self.address = f"http://{host}:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, name="status", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _ThreadingServer(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _SilentHandler(WSGIRequestHandler):
    timeout = 30  # seconds without a byte until a connection is dropped

    def log_message(self, *_: object) -> None:
        pass
