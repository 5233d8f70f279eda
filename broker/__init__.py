"""The session broker: between a web page and a language model."""
