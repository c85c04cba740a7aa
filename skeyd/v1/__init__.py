"""Generated from proto/skeyd/v1 by `make proto`; never edited."""
