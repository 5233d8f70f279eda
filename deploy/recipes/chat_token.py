#!/usr/bin/env python3
"""A token with which a page may chat for ten minutes, made by the site's own backend. Needs PyJWT.

Call `chat_token` where your site has already logged the user in, and return its text to the page. `SECRET` is one of
those in the broker's `BROKER_JWT_SECRET`.

    CHAT_TOKEN_SECRET=… python chat_token.py USER [ORIGIN]    prints one, to try it
"""

import os
import sys
import time

import jwt

LIFETIME = 600  # seconds


def chat_token(user: str, secret: str, origin: str | None = None) -> str:
    """Return a token for a user of the site.

    Args:
        user: the id of the user; the broker counts and limits by it.
        secret: at least 32 random characters.
        origin: the origin of the site's pages, such as ``https://www.example.com``; None for any that the broker
            allows.
    """
    now = int(time.time())
    limits: dict[str, object] = {
        "models": ["openai/gpt-*-mini", "rehearsal/*"],
        "rate": "10/minute",
        "streams": 2,
        "max_output_tokens": 1000,
        "daily_cost": "0.50",  # USD
    }
    if origin is not None:
        limits["origins"] = [origin]
    claims = {"sub": user, "iat": now, "exp": now + LIFETIME, "broker": limits}
    return jwt.encode(claims, secret, algorithm="HS256")


if __name__ == "__main__":
    print(chat_token(sys.argv[1], os.environ["CHAT_TOKEN_SECRET"], *sys.argv[2:3]))
