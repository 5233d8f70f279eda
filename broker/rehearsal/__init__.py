"""The scripted upstream: a whole OpenRouter-compatible service with its faults, chosen by model name."""
