"""One self-contained HTML page about an experiment: what it reads, what it draws, how it is laid out."""
