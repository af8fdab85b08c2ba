"""Other toolkits' checkpoints: one file a toolkit, each with `import_checkpoint(path, folder)`."""

FORMATS = ("beats", "fairseq", "icefall", "wavlm")
