"""What may go wrong, at every step of front, worker and client, and what must be true afterwards (README.md)."""
