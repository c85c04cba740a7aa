"""The VMs of this host as the front knows them: by the evidence in the runtime directory, never by memory.

A front that was killed and started again finds the same VMs. What it can't explain it quarantines: it reports it and
leaves it alone.
"""
