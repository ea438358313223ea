"""The command `opd serve MODEL`: load a model, open a port, serve requests until stopped."""

import socket

from opd.config.commands import Serve
from opd.config.precision import dtype_of
from opd.core.errors import Refusal
from opd.models import load as models
from opd.models.source import locate
from opd.models.verify import verify_head
from opd.rollouts.engines.verify_cache import verify_cache
from opd.teachers.serve.model import Served


def serve(config: Serve) -> None:
    """Serve requests until SIGINT or SIGTERM.  Raises Refusal for mistakes that the user can fix."""
    token = config.check()
    try:
        from opd.teachers.serve.app import build
        from opd.teachers.serve.draining import run
    except ImportError as error:
        raise Refusal(f"opd serve: {error.name} is not installed; pip install 'opd[serve]'") from error
    with _listen(config.host, config.port) as listening:
        served = _open(config)
        listening.listen()  # from here on clients wait in the queue instead of being rejected
        host, port = listening.getsockname()[:2]
        address = f"[{host}]" if ":" in host else host
        print(f"serving {served.name} at http://{address}:{port}" + (" with a token" if token else ""), flush=True)
        run(build(served, config, token=token), config, listening)


def _open(config: Serve) -> Served:
    source = locate(config.model, field="model", trust_remote_code=config.trust_remote_code)
    text = models.tokenizer(source, field="model")
    stop = models.stop_ids(source, text)
    on = models.device(config.device, field="device")
    model = models.load(source, field="model", dtype=dtype_of(config.precision), device=on)
    verify_head(model, field="model")
    verify_cache(model, field="model")
    models.small_threads(model)
    return Served(model, text, stop, config)


def _listen(host: str, port: int) -> socket.socket:
    """Return a bound socket.  It is bound before the model loads, so that a port in use fails at once."""
    try:
        (family, _, _, _, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(address)
        except OSError:
            listening.close()
            raise
    except OSError as error:
        raise Refusal(
            f"--host {host} --port {port}: {error.strerror}; choose another (--port 0 finds a free one)"
        ) from error
    return listening
