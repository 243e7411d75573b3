"""The client: subscribe, receive and notify without keeping a connection open."""
