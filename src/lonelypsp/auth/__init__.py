"""Kept for older imports; see `lonelypsp.signing`."""
