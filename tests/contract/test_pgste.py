"""PGSTE page tables, without which no VM can be created up to Linux 6.19: real kernels only."""

from __future__ import annotations

import errno

from skeyd.kvm import abi
from tests.contract.kernels import every_real_kernel, real_since_7_0, real_up_to_6_19
from tests.contract.operations import DONE, Answer, Capability, Create
from tests.contract.real import RealKernel
from tests.contract.subject import slots

CREATE = Create(slots((0, 1)))


@real_up_to_6_19
def test_up_to_6_19_a_process_without_pgste_can_create_no_vm(real: RealKernel) -> None:
    with real.process(pgste=False) as process:
        assert process.play(CREATE) == [Answer.refused(errno.EINVAL)]


@real_up_to_6_19
def test_up_to_6_19_setting_the_sysctl_later_helps_no_process_that_runs(real: RealKernel) -> None:
    with real.process(pgste=False) as process, real.allocate_pgste(True):
        assert process.play(CREATE) == [Answer.refused(errno.EINVAL)]


@real_up_to_6_19
def test_up_to_6_19_setting_the_sysctl_later_helps_what_such_a_process_execs(real: RealKernel) -> None:
    # As the daemon its workers: it need not be started anew.
    with real.process(pgste=False) as process, real.allocate_pgste(True):
        assert process.play(CREATE) == [Answer.refused(errno.EINVAL)]
        assert process.play(where="exec") == []
        assert process.play(CREATE) == [DONE]


@real_up_to_6_19
def test_up_to_6_19_exec_alone_helps_nobody(real: RealKernel) -> None:
    with real.process(pgste=False) as process, real.allocate_pgste(False):
        assert process.play(where="exec") == []
        assert process.play(CREATE) == [Answer.refused(errno.EINVAL)]


@every_real_kernel
def test_what_a_launcher_execs_needs_no_sysctl_and_neither_do_its_forks_and_what_they_exec(real: RealKernel) -> None:
    # The server was exec'ed by the launcher; the process is a fork of it, and then becomes a plain python3.
    with real.allocate_pgste(False), real.process(pgste=False, launcher=True) as process:
        assert process.play(CREATE) == [DONE]
        assert process.play(Capability(abi.KVM_CAP_S390_SKEYS), where="exec") == [Answer.refused(errno.EIO)]
        assert process.play(CREATE) == [DONE]


@real_up_to_6_19
def test_up_to_6_19_a_process_started_with_the_sysctl_keeps_what_it_has_over_fork_and_exec(real: RealKernel) -> None:
    # The server was started with the sysctl set; the process is a fork of it.
    with real.allocate_pgste(False), real.process() as process:
        assert process.play(CREATE) == [DONE]
        assert process.play(Capability(abi.KVM_CAP_S390_SKEYS), where="exec") == [Answer.refused(errno.EIO)]
        assert process.play(CREATE) == [DONE]


@real_since_7_0
def test_since_7_0_there_is_no_sysctl_and_no_process_needs_it(real: RealKernel) -> None:
    assert not real.has_pgste_sysctl()
    with real.process() as process:
        assert process.play(CREATE) == [DONE]
