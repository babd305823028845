"""C-GSPN: vision encoders that stay fast at high resolution."""

__version__ = "0.1.0"
