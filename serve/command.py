"""What `gtl serve` does: a config checked, started here, and kept up until it is stopped."""

from __future__ import annotations

import ipaddress
import re
import signal
import socket
import threading
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gtl.config.explain import explain
from gtl.config.keys import put
from gtl.config.load import read_override, read_sections
from gtl.session import begins_one, session
from gtl.types import Progress, UserError, quiet
from serve.settings import Base, Settings, most_pixels, resolved

if TYPE_CHECKING:
    from serve.catalog import Catalog
    from serve.schema import Limits

LOCAL = Path(__file__).with_name("local.yaml")
BUILDER = "serve.app:build"


class Config(NamedTuple):
    """A Ray Serve config with one application of ours."""

    name: str
    route_prefix: str
    proxy_location: str
    http: dict[str, Any]
    """`http_options`."""
    settings: Settings
    deployments: tuple[str, ...] = ()
    """Names of those whose options it says; Ray Serve puts them in place of the ones that `settings` lead to."""

    @property
    def url(self) -> str:
        """Of the endpoint, as this machine reaches it."""
        host = self.http["host"]
        return f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{self.http['port']}{self.route_prefix}"  # noqa: S104


def read_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a Ray Serve config, the one for this machine if none is given; `key=value` go into the application's args.

    Raises:
        UserError: the file is no config of Ray Serve's, it has no application of ours, or a key or value is wrong.
    """
    from pydantic import ValidationError
    from ray.serve.schema import ServeDeploySchema

    where = str(path or LOCAL)
    values = read_sections(where, "serve config")
    applications = values.get("applications")
    ours = [
        one
        for one in (applications if isinstance(applications, list) else [])
        if isinstance(one, dict) and one.get("import_path") == BUILDER
    ]
    if len(ours) != 1:
        raise UserError(f"{where}: applications: {len(ours)} with import_path {BUILDER}; expected one")
    args = ours[0].get("args") or {}
    for override in overrides:
        key, value = read_override(override)
        put(args, key, value, f"--set {override}")
    ours[0]["args"] = args
    try:  # Ray Serve itself passes over a key that it does not know
        checked = ServeDeploySchema.model_validate(values, extra="forbid")
    except ValidationError as error:
        raise UserError(f"{where}: {explain(error, values, ServeDeploySchema)}") from None
    application = next(one for one in checked.applications if one.import_path == BUILDER)
    settings = resolved(args)
    http = checked.http_options.model_dump(exclude_unset=True)
    http = {"host": "127.0.0.1", "port": 8000, **http}
    if settings.keys is None and not is_loopback(http["host"]):
        raise UserError(f"{where}: http_options.host: {http['host']}: others reach it; set args.keys to a file of keys")
    if not 0 < http["port"] < 2**16:
        raise UserError(f"{where}: http_options.port: {http['port']}: expected 1 to {2**16 - 1}")
    route = application.route_prefix or "/"
    if route != f"/{route.strip('/')}" or set(route) & set("{}"):
        raise UserError(f"{where}: route_prefix: {route!r}: expected / or a path that begins with / and ends without")
    allowed = http.get("request_timeout_s")
    if allowed is not None and allowed <= settings.timeout_s:
        raise UserError(
            f"{where}: http_options.request_timeout_s: {allowed:g}: should be above timeout_s, {settings.timeout_s:g}: "
            "Ray Serve ends a request in words of its own"
        )
    names = tuple(one.name for one in application.deployments)
    return Config(application.name, route, str(checked.proxy_location.value), http, settings, names)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check(config: Config) -> Catalog:
    """Find everything that can be found wrong before anything is started; what would be served.

    Raises:
        UserError: what is wrong.
    """
    import serve.app
    from serve.catalog import Catalog
    from serve.keys import KeyFile

    if Path(serve.app.__file__).parent != LOCAL.parent:
        raise UserError(f"{serve.app.__file__}: another module than gtl's is found as serve.app; start elsewhere")
    if config.settings.keys is not None:
        KeyFile(config.settings.keys)
    check_safety(config.settings)
    check_output(config.settings)
    catalog = Catalog(config.settings)
    known = {"Ingress", *(f"Generator:{base.name}" for base in catalog.bases)}
    if unknown := next((name for name in config.deployments if name not in known), None):
        raise UserError(f"deployments: {unknown!r}: there is none; expected {', '.join(sorted(known))}")
    for base in catalog.bases:
        check_base(base, config.settings.limits)
        catalog.check_merged(base)
    return catalog


def describe(catalog: Catalog) -> str:
    """What is served, a line each."""
    from gtl.families import open_family

    lines = []
    for base in catalog.bases:
        family = open_family(base.source, revision=base.revision, variant=base.variant)
        replicas, most = f"{base.replicas.min} to {base.replicas.max} replicas", catalog.model(base.name).gtl.max_pixels
        lines.append(f"{base.name}: {base.source} ({family.name}), {replicas}, pictures of up to {most} pixels")
    lines += [model.id for model in catalog.models() if model.gtl.kind == "adapter"]
    return "\n".join(lines)


def check_base(base: Base, limits: Limits) -> None:
    """Find a base's model, and that it draws what is asked of it where a request says nothing.

    Raises:
        UserError: there is no such model or it is damaged, its steps are more than it has, or so small a limit that
            `size: auto` would be beyond it.
    """
    from gtl.families import denoising, open_family
    from gtl.families.files import weight_files
    from gtl.families.loading import check_whole
    from gtl.generate.request import Request
    from gtl.generate.request import check as check_request

    family = denoising(open_family(base.source, revision=base.revision, variant=base.variant))
    for part in filter(None, (*family.encoders, family.main, family.codec)):
        for file in weight_files(family.folder / part, family.variant):
            check_whole(file)
    height, width = family.default_size
    most = most_pixels(base, limits, (height, width))
    if most is not None and most < height * width:
        key = "limits.max_pixels" if most == limits.max_pixels else f"bases: {base.name}: max_picture_pixels"
        raise UserError(f"{key}: {most}: should be at least {height * width}, of the model's own {width}x{height}")
    try:
        check_request(Request("", height, width, steps=base.steps, guidance=base.guidance), family)
    except UserError as error:
        raise UserError(f"bases: {base.name}: {error}") from None


def check_output(settings: Settings) -> None:
    """See that pictures can be written to where they shall be, and away again.

    Raises:
        UserError: they cannot.
    """
    if settings.output is None:
        return
    from gtl.storage import Store

    try:
        store, key = Store(settings.output), f"{uuid.uuid4().hex}.check"
        store.write(key, b"")
        store.delete(key)
    except FileNotFoundError:  # of a bucket, or of what is no place for files
        raise UserError(f"output: {settings.output}: nothing can be written there") from None
    except UserError as error:
        raise UserError(f"output: {error}") from None


def check_safety(settings: Settings) -> None:
    """Load the safety checker, if there is to be one, and let it go.

    Raises:
        UserError: it is none, or its files are damaged.
    """
    from serve.safety import load_checker

    if settings.safety is not None:
        load_checker(settings.safety)


def run(config: Config, progress: Progress = quiet, stop: threading.Event | None = None) -> None:
    """Start the endpoint and keep it up until `stop`, Ctrl-C or SIGTERM; what is being drawn is finished.

    Raises:
        UserError: the config is wrong, the port is taken, or a generator does not start.
    """
    from ray import serve

    from serve.app import build

    progress("check", 0, 0)
    settings = config.settings.model_copy(update={"bases": list(check(config).bases)})
    stop = stop or threading.Event()
    if begins_one():
        check_port(config.http)
    progress("start", 0, 0, "Ray")
    with session():
        try:
            serve.start(proxy_location=config.proxy_location, http_options=config.http)
            progress("start", 0, 0, "models")
            application = build(settings.model_dump(mode="json"))
            try:
                serve.run(application, name=config.name, route_prefix=config.route_prefix)
            except RuntimeError as error:  # it names the deployment, and not what is the matter with it
                raise UserError(f"the endpoint does not start: {reason_of(config.name) or error}") from error
            catch(stop)
            progress("ready", 0, 0, config.url)
            while not stop.wait(0.2):
                pass
            serve.delete(config.name)  # shutting down at once would take the proxy from under what is being drawn
        finally:
            serve.shutdown()


def reason_of(application: str) -> str | None:
    """Why a deployment of an application does not start, as its replicas say; None: nothing is known of it."""
    from ray import serve

    told = serve.status().applications.get(application)
    failed = [one.message for one in told.deployments.values() if one.status == "DEPLOY_FAILED"] if told else []
    return last_error(failed[0]) if failed else None


def last_error(message: str) -> str:
    """What a traceback ends with, in one line and without the name of the exception's class."""
    last = message.strip().rpartition("\n")[2]
    return re.sub(r"^[A-Za-z_][\w.]*: ", "", last)


def check_port(http: Mapping[str, Any]) -> None:
    """See that the endpoint can be listened for, which Ray Serve's proxy finds out when all else has been started.

    Raises:
        UserError: it cannot, mostly since another process listens there.
    """
    host, port = http["host"], http["port"]
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise UserError(f"http_options: {host}:{port}: cannot be listened at: {error.strerror or error}") from None


def catch(stop: threading.Event) -> None:
    """Let Ctrl-C and SIGTERM ask for the end. After Ray's own start, which takes SIGTERM for itself."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
