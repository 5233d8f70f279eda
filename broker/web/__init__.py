"""HTTP: parse requests, call the other layers, and answer."""
