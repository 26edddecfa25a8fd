"""What a router did: metrics of a Routing."""
