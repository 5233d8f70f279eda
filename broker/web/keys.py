"""What the handlers are given: typed keys of the application, filled by the composition root."""

from __future__ import annotations

import asyncio

from aiohttp import web

from broker.admission import Admission
from broker.catalog import Catalog
from broker.core.accounts import Allowances
from broker.core.origins import Origins
from broker.relay.registry import Registry
from broker.settings import Settings
from broker.store.accounts import AccountStore
from broker.store.connection import Store
from broker.store.rates import Rates
from broker.upstream.client import UpstreamClient
from broker.web.identity import Identifier
from broker.web.refused_origins import RefusedOrigins

SETTINGS = web.AppKey("settings", Settings)
ORIGINS = web.AppKey("origins", Origins)
REFUSED_ORIGINS = web.AppKey("refused_origins", RefusedOrigins)
STORE = web.AppKey("store", Store)
CATALOG = web.AppKey("catalog", Catalog)
ACCOUNTS = web.AppKey("accounts", AccountStore)
ALLOWANCES = web.AppKey("allowances", Allowances)
RATES = web.AppKey("rates", Rates)
ADMISSION = web.AppKey("admission", Admission)
IDENTIFIER = web.AppKey("identifier", Identifier)
STORE_SEEN = web.AppKey("store_seen", asyncio.Event)
"""Redis has answered at least once."""
REGISTRY = web.AppKey("registry", Registry)
UPSTREAM = web.AppKey("upstream", UpstreamClient)

REQUEST_ID = web.RequestKey("request_id", str)
