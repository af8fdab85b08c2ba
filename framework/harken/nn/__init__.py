"""Layers that encoders and frontends share."""
