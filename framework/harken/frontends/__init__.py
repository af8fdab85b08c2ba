"""Raw input to frames: waveform convolutions and log-mel filterbanks."""
