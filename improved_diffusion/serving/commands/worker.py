"""Draw what is queued, until it is stopped; what is under way then stays queued."""

from __future__ import annotations

from improved_diffusion.personalize.quiet import quieten_libraries
from improved_diffusion.serving.commands.options import command_parser, stop_signal
from improved_diffusion.serving.config import load_serving_config


def run(arguments: list[str]) -> None:
    parser = command_parser("worker", __doc__)
    name = "of its own, among several workers of one database (default: worker)"
    parser.add_argument("--name", default="worker", help=name)
    parser.add_argument("--port", type=int, help="of its status page (default: as the settings say)")
    options = parser.parse_args(arguments)
    config = load_serving_config(options.home)

    quieten_libraries()
    # Imported only now: torch takes seconds, and typos are answered at once.
    from improved_diffusion.serving.drawers import open_drawers
    from improved_diffusion.serving.status_page import StatusServer
    from improved_diffusion.serving.worker import Worker, only_worker

    with only_worker(config, options.name):
        worker = Worker(config, *open_drawers(config), options.name)
        stop = stop_signal()
        status = StatusServer(worker.queue, config.host, config.port if options.port is None else options.port)
        worker.start()
        print(f"drawing {', '.join(worker.offer['kinds'])} jobs; status: {status.address}", flush=True)
        stop.wait()
        print("stopping", flush=True)
        status.close()
        worker.stop()
