"""The typed configuration: schema, loader with provenance, and the one registry of named parts."""
