"""gRPC: requests become valid values at this edge, once; services call vms/ and convert the answers."""
