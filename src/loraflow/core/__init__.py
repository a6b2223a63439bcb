"""The fused pass: all adapters in one low-rank product around each base linear, weighed token by token."""
