"""Mirrors skeyd/kvm."""
