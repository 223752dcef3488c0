"""Routed experts: router, dispatch, experts, and the layer that joins them."""
