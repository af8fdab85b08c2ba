"""Other toolkits' checkpoints: one file a toolkit, each with `import_checkpoint(path, folder)`."""

FORMATS = ("fairseq", "icefall", "wavlm")
