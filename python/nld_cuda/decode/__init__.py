"""Decode modes over a paged cache and a static device state."""
