"""Connections that nobody uses now: how many are kept, and which."""

from __future__ import annotations

from skeyd.vms.idle import IdleSessions
from tests.vms.fake_session import FakeSession


def test_only_so_many_connections_are_kept_and_those_used_last() -> None:
    class Quiet(FakeSession):
        quiet, closed = True, False

        def is_quiet(self) -> bool:
            return self.quiet

        def close(self) -> None:
            self.closed = True

    idle = IdleSessions(3, 2)
    a = [Quiet((0, 1)) for _ in range(3)]
    for one in a:
        idle.put("a", 1, one)
    assert [one.closed for one in a] == [True, False, False]
    b, c = Quiet((0, 1)), Quiet((0, 1))
    idle.put("b", 1, b)
    idle.put("c", 1, c)
    assert [one.closed for one in (*a, b, c)] == [True, True, False, False, False]
    assert idle.take("b", 2) is None
    assert b.closed, "it is of other evidence"
    c.quiet = False
    assert idle.take("c", 1) is None
    assert c.closed
    taken = idle.take("a", 1)
    assert taken is not None
    assert taken[0] is a[2]
    assert 0 <= taken[1] < 60
    assert idle.take("a", 1) is None
    idle.put("a", 1, a[2])
    idle.drop("a")
    assert a[2].closed
    loud = Quiet((0, 1))
    loud.quiet = False
    idle.put("d", 1, loud)
    assert loud.closed
    last = [Quiet((0, 1)), Quiet((0, 1))]
    idle.put("e", 1, last[0])
    idle.close()
    idle.put("e", 1, last[1])
    assert [one.closed for one in last] == [True, True]
