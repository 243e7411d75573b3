"""Tests with the older implementation of the protocol as the other peer."""
