"""Tests of skeyd.rpc: the real daemon, and raw gRPC stubs."""
