"""The daemon: puts the parts together, listens, and ends in order."""

from __future__ import annotations

import argparse
import ipaddress
import os
import resource
import signal
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc
import structlog

import skeyd
from skeyd import limits, logs, malloc
from skeyd.capabilities import CAP_SYS_PTRACE, give_up, hold_back
from skeyd.errors import Reason
from skeyd.linux import signals_by_socket
from skeyd.paths import default_runtime_dir
from skeyd.rpc.calls import CallInterceptor
from skeyd.rpc.health import SERVICE as HEALTH
from skeyd.rpc.health import Health
from skeyd.rpc.host_service import HostService
from skeyd.rpc.lanes import Lane
from skeyd.rpc.messages import PARSERS
from skeyd.rpc.reflection import VERSIONS, Reflection, service_name
from skeyd.rpc.slots import CallSlots
from skeyd.rpc.storage_key_service import StorageKeyService
from skeyd.rpc.vm_service import VmService
from skeyd.v1 import (
    host_service_pb2,
    host_service_pb2_grpc,
    storage_key_service_pb2,
    storage_key_service_pb2_grpc,
    vm_service_pb2,
    vm_service_pb2_grpc,
)
from skeyd.vms import launcher
from skeyd.vms.registry import Registry
from skeyd.vms.runtime import RuntimeDirectory, RuntimeDirectoryError
from skeyd.vms.starter import ChildStarter

EXIT_UNUSABLE: Final = 3
"""The runtime directory, a listener or the worker launcher can't be used; the message on standard error says why."""

_DESCRIPTORS: Final = 65_536
_UNIX_PATH_MAX: Final = 107
_MEMORY_DIR_MAX: Final = 700
"""With a file's name of 255 characters it fits into a field of the worker protocol."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What the command line asks for."""

    runtime_dir: Path
    insecure_tcp: str | None
    memory_dir: Path | None
    worker_launcher: str | None
    """An absolute path; "none"; or None, which is the default one where it is installed."""
    log_format: str
    allow_adoption: bool = False


class ListenError(Exception):
    """A listener can't be had. The message says why."""


class Daemon:
    """The front: one gRPC server a listener, all over one registry.

    `drain` stops it in order. No VM ends with it.
    """

    def __init__(
        self, settings: Settings, runtime: RuntimeDirectory, log: structlog.typing.FilteringBoundLogger
    ) -> None:
        self._log = log
        self._launcher = launcher.find_launcher(settings.worker_launcher)
        self._registry = Registry(runtime, ChildStarter(self._launcher))
        names = [
            pb.DESCRIPTOR.services_by_name[name].full_name
            for pb, name in (
                (host_service_pb2, "HostService"),
                (storage_key_service_pb2, "StorageKeyService"),
                (vm_service_pb2, "VmService"),
            )
        ]
        watches = CallSlots(limits.MAX_WATCHES, "health watches and reflection streams", Reason.TOO_MANY_STREAMS)
        streams = CallSlots(limits.MAX_KEY_STREAMS, "streams of keys", Reason.TOO_MANY_STREAMS)
        short_calls = CallSlots(limits.MAX_SHORT_CALLS, "short calls", Reason.TOO_MANY_CALLS)
        self.health = Health(names, watches)
        self._reflection = Reflection([*names, HEALTH, *map(service_name, VERSIONS)], watches)
        self._keys = StorageKeyService(self._registry, streams, short_calls)
        self._vms = VmService(self._registry, settings.memory_dir, short_calls, allow_adoption=settings.allow_adoption)
        self._host = HostService(self._registry, short_calls)
        refusals = ThreadPoolExecutor(limits.SPARE_THREADS, "refusal")

        def lane(name: str, threads: int, reason: Reason) -> Lane:
            return Lane(name, threads, limits.MAX_WAITING, reason, refusals)

        keys = lane("keys", limits.MAX_KEY_STREAMS + limits.SPARE_THREADS, Reason.TOO_MANY_STREAMS)
        watch = lane("watch", limits.MAX_WATCHES + limits.SPARE_THREADS, Reason.TOO_MANY_STREAMS)
        self._lanes = {
            **dict.fromkeys(
                [f"/{names[1]}/{name}" for name in ("GetSkeys", "SetSkeys", "DigestSkeys", "SummarizeSkeys")], keys
            ),
            f"/{HEALTH}/Check": lane("health", limits.CHECK_THREADS, Reason.TOO_MANY_CALLS),
            f"/{HEALTH}/Watch": watch,
            **{f"/{service_name(version)}/": watch for version in VERSIONS},
        }
        self._others = lane("call", limits.CALL_THREADS, Reason.TOO_MANY_CALLS)
        parsers = {f"/{names[1]}/{name}": parser for name, parser in PARSERS.items()}
        self._interceptor = CallInterceptor(log, self._lane_of, parsers)
        self._servers: list[grpc.Server] = []
        self.addresses: list[str] = []
        """Where it listens, as gRPC targets."""
        try:
            self._listen_unix(runtime.socket_path)
            if settings.insecure_tcp is not None:
                self._listen_tcp(settings.insecure_tcp)
        except BaseException:
            self._stop(0)
            raise

    def serve(self) -> None:
        """Take calls from now on, and say so."""
        for server in self._servers:
            server.start()
        self.health.serve()
        vms = self._registry.count()
        self._log.info(
            "serving",
            addresses=self.addresses,
            vms=vms,
            version=skeyd.__version__,
            pid=os.getpid(),
            # The default is found without a word on the command line; this says whether it was.
            worker_launcher=None if self._launcher is None else str(self._launcher),
        )
        # A VM that doesn't answer must keep nobody waiting, so they are looked at on the side.
        threading.Thread(target=self._report_vms, name="report-vms", daemon=True).start()

    def _report_vms(self) -> None:
        for name in self._registry.strangers():
            self._log.warning("stranger", name=name, detail="not a VM's directory; left alone")
        for vm in self._registry.list_all():
            if vm.state_reason:
                self._log.warning("vm", vm=f"vms/{vm.vm_id}", state=vm.state.value, detail=vm.state_reason)

    def drain(self) -> None:
        """Refuse new calls, let running ones end for DRAIN_SECONDS, cut the rest."""
        self.health.drain()
        self._log.info("draining", seconds=limits.DRAIN_SECONDS)
        self._stop(limits.DRAIN_SECONDS)
        self._log.info("stopped")

    def _stop(self, grace: float) -> None:
        for ended in [server.stop(grace) for server in self._servers]:
            ended.wait(grace + 2)
        self._registry.close()

    def _lane_of(self, method: str) -> Lane:
        return next((lane for prefix, lane in self._lanes.items() if method.startswith(prefix)), self._others)

    def _server(self) -> grpc.Server:
        server = grpc.server(
            self._others,
            interceptors=[self._interceptor],
            maximum_concurrent_rpcs=limits.MAX_CALLS,
            options=[
                # A second daemon must not be able to share the port silently.
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", limits.MAX_MESSAGE_BYTES),
                # Only none. Up to 1.51 grpcio looks at a message's size when it is unpacked, and then keeps the memory.
                ("grpc.compression_enabled_algorithms_bitset", 1),
                # By itself gRPC has windows grow with the speed of the peer, to as much as the largest message.
                ("grpc.http2.bdp_probe", 0),
                ("grpc.http2.lookahead_bytes", limits.RECEIVE_WINDOW_BYTES),
                # A peer that vanished without a word holds its VM's writer lock until this finds out.
                ("grpc.keepalive_time_ms", int(limits.KEEPALIVE_SECONDS * 1000)),
                ("grpc.keepalive_timeout_ms", int(limits.KEEPALIVE_TIMEOUT_SECONDS * 1000)),
                # Clients ask too; by itself gRPC takes more than one question in five minutes for an attack.
                ("grpc.http2.min_ping_interval_without_data_ms", int(limits.KEEPALIVE_SECONDS * 1000 / 2)),
            ],
        )
        host_service_pb2_grpc.add_HostServiceServicer_to_server(self._host, server)
        storage_key_service_pb2_grpc.add_StorageKeyServiceServicer_to_server(self._keys, server)
        vm_service_pb2_grpc.add_VmServiceServicer_to_server(self._vms, server)
        server.add_generic_rpc_handlers((self.health.handler(), *self._reflection.handlers()))
        self._servers.append(server)
        return server

    def _listen_unix(self, path: Path) -> None:
        if len(os.fsencode(path)) > _UNIX_PATH_MAX:
            raise ListenError(f"{path}: a socket's path has at most {_UNIX_PATH_MAX} bytes")
        if "%" in str(path):
            raise ListenError(f"{path}: gRPC takes a percent sign in a socket's path for something else")
        # grpcio unlinks whatever is there, a live socket too: the runtime directory's lock, which is held, says that
        # nobody lives there. The umask is the process's; no other thread makes files yet.
        before = os.umask(0o177)
        try:
            self._bind(f"unix:{path}")
        finally:
            os.umask(before)
        self.addresses.append(f"unix:{path}")

    def _listen_tcp(self, address: str) -> None:
        port = self._bind(address)
        host = address.rpartition(":")[0]
        self.addresses.append(f"{host}:{port}")

    def _bind(self, target: str) -> int:
        try:
            port = self._server().add_insecure_port(target)
        except RuntimeError as error:
            raise ListenError(f"{target}: can't listen there: {error}") from error
        if not port:
            raise ListenError(f"{target}: can't listen there")
        return int(port)


def parse(arguments: Sequence[str] | None = None) -> Settings:
    """Read the command line. SystemExit 2 with a message where it is wrong."""
    parser = argparse.ArgumentParser(
        prog="skeyd", description="The storage-key agent of a KVM host: guests' storage keys over gRPC."
    )
    parser.add_argument("--version", action="version", version=f"skeyd {skeyd.__version__}")
    parser.add_argument(
        "--runtime-dir",
        type=Path,
        default=default_runtime_dir(),
        help="where the socket, the lock and the VMs are; made with mode 0700 (default: %(default)s)",
    )
    parser.add_argument(
        "--insecure-tcp",
        metavar="ADDRESS:PORT",
        type=_loopback,
        help="listen there too, in plaintext, with no check of who calls: loopback addresses only; port 0 picks one",
    )
    parser.add_argument(
        "--memory-dir",
        type=Path,
        help="files in this directory may back the memory of owned VMs (default: none may)",
    )
    parser.add_argument(
        "--worker-launcher",
        metavar=f"PATH|{launcher.NONE}",
        help=f"start workers through this program, which gives them the PGSTE page tables that owned VMs need up to "
        f"Linux 6.19; {launcher.NONE}: directly (default: {launcher.DEFAULT} where it is installed)",
    )
    parser.add_argument(
        "--allow-adoption",
        action="store_true",
        help="let callers adopt VMs of other processes; workers need CAP_SYS_PTRACE for it (default: nobody may)",
    )
    parser.add_argument(
        "--log-format",
        choices=logs.FORMATS,
        default="auto",
        help="auto: colour on a terminal, JSON elsewhere (default: %(default)s)",
    )
    given = parser.parse_args(arguments)
    memory_dir = given.memory_dir
    if memory_dir is not None and not memory_dir.is_dir():
        parser.error(f"--memory-dir: {memory_dir} is no directory")
    path = "" if memory_dir is None else str(memory_dir.absolute())
    if len(path) > _MEMORY_DIR_MAX or not path.isprintable():
        parser.error(f"--memory-dir: a path is printable and has at most {_MEMORY_DIR_MAX} characters")
    return Settings(
        runtime_dir=given.runtime_dir,
        insecure_tcp=given.insecure_tcp,
        memory_dir=memory_dir and memory_dir.absolute(),
        worker_launcher=given.worker_launcher,
        log_format=given.log_format,
        allow_adoption=given.allow_adoption,
    )


def _loopback(text: str) -> str:
    host, _, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    try:
        address = ipaddress.ip_address(host[1:-1] if bracketed else host)
        number = int(port)
    except ValueError:
        address, number = None, 0
    if address is None or bracketed != (address.version == 6):
        raise argparse.ArgumentTypeError(f"{text!r} is no ADDRESS:PORT, as 127.0.0.1:50051 or [::1]:50051")
    if not address.is_loopback:
        raise argparse.ArgumentTypeError(f"{address} is not a loopback address, and plaintext goes no further")
    if not 0 <= number <= 65535:
        raise argparse.ArgumentTypeError(f"{number} is no port")
    # Written anew, so that grpc can't read into it another address than the one that was checked.
    return f"[{address}]:{number}" if bracketed else f"{address}:{number}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the daemon until SIGTERM or SIGINT. Exits 0 then, EXIT_UNUSABLE where it can't begin."""
    settings = parse(arguments)
    # Before the log has a thread.
    (hold_back if settings.allow_adoption else give_up)(CAP_SYS_PTRACE)
    malloc.tune()
    log = logs.configure(settings.log_format)
    # Each connection and each worker that is asked takes a descriptor; the usual soft limit of 1,024 is for select().
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, _DESCRIPTORS), most))
    with ExitStack() as resources:
        told, _ = resources.enter_context(signals_by_socket((signal.SIGTERM, signal.SIGINT)))
        try:
            runtime = resources.enter_context(RuntimeDirectory.open(settings.runtime_dir))
            daemon = Daemon(settings, runtime, log)
        except (RuntimeDirectoryError, ListenError, launcher.LauncherError) as error:
            log.error("cannot start", error=str(error))
            sys.exit(EXIT_UNUSABLE)
        daemon.serve()
        told.recv(1)
        daemon.drain()
    # Threads that wait for a stuck worker would hold the interpreter's own end up; nothing of theirs is left to lose.
    logs.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
