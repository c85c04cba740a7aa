"""Mirrors skeyd/vms."""
