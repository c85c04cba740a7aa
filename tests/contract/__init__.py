"""What skeyd relies on, a sentence a test, held against every kernel there is: simulated ones and real ones.

`subject.py` says what a test needs of a kernel, `operations.py` what it can have done; `simulated.py` and `real.py` do
it, the latter through tests/emulated/contract_server.py in an emulated host. `kernels.py` says which kernels there are.
Where a real kernel disagrees with a sentence, the sentence is wrong, docs/kernel.md with it, and so is the simulation.
"""
