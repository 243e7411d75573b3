"""The lonelyps broadcaster: keeps subscriptions and fans each notify out to those that match."""
