"""Real s390x kernels with KVM, booted under emulation on any Debian machine: README.md tells how."""
