"""Tests of skeyd.encoding."""
