"""One SetSkeys call over raw gRPC, message by message, and what its client was told."""

from __future__ import annotations

import json
import queue
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, Self

import grpc

from skeyd import standard
from skeyd.v1 import storage_key_service_pb2 as pb
from skeyd.v1 import storage_key_service_pb2_grpc, vm_pb2

DEADLINE: Final = 60.0
CHUNK_KEYS: Final = 200


@dataclass(frozen=True)
class Plan:
    """What a client means to do."""

    vm: str
    ranges: tuple[tuple[int, int], ...]
    """(first gfn, frames)."""
    keys: bytes
    """Of all ranges, in order."""
    keep: bool = False
    allow_enable: bool = False
    request_id: str = ""
    end: str = "commit"
    """After `chunks` chunks: "commit", "close" (no Commit), "cancel", or "deadline" (it stands still until then)."""
    chunks: int = 1 << 30
    """So many, or all."""
    seconds: float = DEADLINE
    validate_only: bool = False
    spoil: str = ""
    """What is wrong with the second chunk: "checksum", "reserved", "order" or "size"."""
    digest: str = ""
    """ "expected" or "resulting": the keys before or after are to have a digest that none have."""

    def frames(self) -> list[int]:
        """Return the frames of all keys, in order."""
        return [gfn for start, count in self.ranges for gfn in range(start, start + count)]

    @property
    def first_chunk(self) -> tuple[int, int]:
        """The first frame, and the one after the last."""
        start, count = self.ranges[0]
        return start, start + min(count, CHUNK_KEYS)

    def header(self, *, resume: bool = False) -> pb.SetSkeysRequest:
        """Make the first message."""
        digest = pb.KeysDigest(sha256=b"?" * 32) if self.digest else None
        return pb.SetSkeysRequest(
            header=pb.SetSkeysRequest.Header(
                expected_digest=digest if self.digest == "expected" else None,
                resulting_digest=digest if self.digest == "resulting" else None,
                vm=self.vm,
                ranges=[vm_pb2.GfnRange(start_gfn=start, count=count) for start, count in self.ranges],
                allow_enable=self.allow_enable,
                on_interrupt=pb.ON_INTERRUPT_KEEP if self.keep else pb.ON_INTERRUPT_ROLL_BACK,
                validate_only=self.validate_only,
                request_id=self.request_id,
                resume=resume,
            )
        )

    def messages(self, done: int = 0) -> Iterator[pb.SetSkeysRequest]:
        """Make the chunks that follow so many keys."""
        at, number = 0, 0
        for start, count in self.ranges:
            for first in range(0, count, CHUNK_KEYS):
                here = min(CHUNK_KEYS, count - first)
                skip = min(max(done - at, 0), here)
                if skip < here:
                    number += 1
                    keys = self.keys[at + skip : at + here]
                    spoil = self.spoil if number == 2 else ""
                    crc = zlib.crc32(keys) ^ (spoil == "checksum")
                    if spoil == "reserved":
                        keys = keys[:-1] + bytes([keys[-1] | 1])
                        crc = zlib.crc32(keys)
                    yield pb.SetSkeysRequest(
                        chunk=pb.Chunk(
                            start_gfn=start + first + skip + (spoil == "order"),
                            count=len(keys) + (spoil == "size"),
                            encoding=pb.ENCODING_RAW,
                            data=keys,
                            crc32=crc,
                        )
                    )
                at += here


@dataclass(frozen=True)
class Told:
    """What the client knows in the end."""

    outcome: str
    """As the status' metadata has it; APPLIED or VALIDATED for a result; "" where nobody told."""
    code: str = ""
    reason: str = ""
    message: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    answers: tuple[str, ...] = ()
    enabled: bool = False
    keys_set: int = 0
    crc32: int = 0
    begun: dict[str, Any] = field(default_factory=dict)

    @property
    def is_of_nobody(self) -> bool:
        """Whether there was no daemon to tell anything."""
        return self.code == "UNAVAILABLE" and not self.outcome

    def written(self) -> bytes:
        """Write it down."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def read(cls, data: bytes) -> Self:
        """Read it."""
        return cls(**json.loads(data))


class Connection:
    """A channel of its own, which shares nothing with another one."""

    def __init__(self, target: str) -> None:
        self.channel = grpc.insecure_channel(
            target, [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
        )
        self.keys = storage_key_service_pb2_grpc.StorageKeyServiceStub(self.channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()


def nowhere(_: str) -> None:
    """Be no point at all."""


def set_skeys(
    connection: Connection, plan: Plan, at: Callable[[str], object] = nowhere, *, resume: bool = False
) -> Told:
    """Make the call; `at` is called at each of the client's points."""
    requests: queue.SimpleQueue[pb.SetSkeysRequest | None] = queue.SimpleQueue()

    def sent() -> Iterator[pb.SetSkeysRequest]:
        while (request := requests.get()) is not None:
            yield request

    answers: list[str] = []
    begun: dict[str, Any] = {}
    at("call.before")
    call = connection.keys.SetSkeys(sent(), timeout=plan.seconds)

    def ask(request: pb.SetSkeysRequest) -> pb.SetSkeysResponse | None:
        name = request.WhichOneof("part")
        at(f"{name}.before")
        requests.put(request)
        at(f"{name}.sent")
        answer = next(call, None)
        if answer is not None:
            answers.append(str(answer.WhichOneof("part")))
        at(f"{name}.answered")
        return answer

    def told() -> Told:
        answer = ask(plan.header(resume=resume))
        if answer is not None and answer.HasField("begun"):
            first = answer.begun
            begun.update(next_gfn=first.next_gfn, keys_set=first.keys_set, crc32=first.crc32)
            for number, chunk in enumerate(plan.messages(first.keys_set)):
                if number == plan.chunks:
                    break
                ask(chunk)
            match plan.end:
                case "commit":
                    answer = ask(pb.SetSkeysRequest(commit=pb.SetSkeysRequest.Commit()))
                case "cancel":
                    call.cancel()
                case "close":
                    requests.put(None)
            if plan.end != "commit":
                answer = next(call, None)
        assert answer is not None, f"the call ended without a status after {answers}"
        assert next(call, None) is None, "something came after the result"
        done = answer.result
        outcome = pb.SetSkeysResponse.Outcome.Name(done.outcome).removeprefix("OUTCOME_")
        return Told(
            outcome,
            "OK",
            answers=tuple(answers),
            enabled=done.enabled,
            keys_set=done.keys_set,
            crc32=done.crc32,
            begun=begun,
        )

    try:
        return told()
    except grpc.RpcError as error:
        return replace(_refused(error), answers=tuple(answers), begun=begun)
    finally:
        call.cancel()
        requests.put(None)


def _refused(error: grpc.RpcError) -> Told:
    trailers: dict[str, Any] = dict(error.trailing_metadata() or ())  # type: ignore[arg-type]  # pairs
    details = trailers.get("grpc-status-details-bin")
    if details is None:
        return Told("", error.code().name, message=str(error.details()))
    status = standard.message("google.rpc.Status").FromString(details)
    info = standard.message("google.rpc.ErrorInfo")()
    assert status.details[0].Unpack(info)
    metadata = dict(info.metadata)
    return Told(
        metadata.get("outcome", ""),
        error.code().name,
        info.reason,
        str(error.details()),
        metadata,
        enabled=metadata.get("enabled") == "true",
        keys_set=int(metadata.get("keys_set", "0")),
        crc32=int(metadata.get("crc32", "0"), 16),
    )
