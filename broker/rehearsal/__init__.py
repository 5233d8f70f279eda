"""The scripted upstream: an OpenRouter-compatible service whose models fail in chosen ways."""
