"""Typed keys of the application, under which handlers find what the composition root has built."""

from __future__ import annotations

from aiohttp import web

from broker.catalog import Catalog
from broker.core.client_limits import ServiceLimits
from broker.core.origins import Origins
from broker.identity.known_clients import KnownClients
from broker.metrics import Metrics
from broker.naming import Naming
from broker.prepare import Admission
from broker.relay.hub import Hub
from broker.relay.results import Results
from broker.relay.worker import Worker
from broker.settings import Settings
from broker.store.accounts import AccountStore
from broker.store.connection import Store
from broker.system_message import SystemMessage
from broker.telemetry.interface import Telemetry
from broker.upstream.client import UpstreamClient
from broker.web.identity import ClientResolver
from broker.web.metrics_token import MetricsToken
from broker.web.occupancy import Occupancy
from broker.web.refused_origins import RefusedOrigins
from broker.web.turns import Turns
from broker.web.waiting import WaitingPages

SETTINGS = web.AppKey("settings", Settings)
ORIGINS = web.AppKey("origins", Origins)
REFUSED_ORIGINS = web.AppKey("refused_origins", RefusedOrigins)
OCCUPANCY = web.AppKey("occupancy", Occupancy)
TURNS = web.AppKey("turns", Turns)
STORE = web.AppKey("store", Store)
CATALOG = web.AppKey("catalog", Catalog)
ACCOUNTS = web.AppKey("accounts", AccountStore)
LIMITS = web.AppKey("limits", ServiceLimits)
ADMISSION = web.AppKey("admission", Admission)
SYSTEM = web.AppKey("system", SystemMessage)
RESOLVER = web.AppKey("resolver", ClientResolver)
KNOWN_CLIENTS = web.AppKey("known_clients", KnownClients)
HUB = web.AppKey("hub", Hub)
WORKER = web.AppKey("worker", Worker)
RESULTS = web.AppKey("results", Results)
"""Only present where an application wants the results."""
WAITING = web.AppKey("waiting", WaitingPages)
TELEMETRY = web.AppKey("telemetry", Telemetry)
METRICS = web.AppKey("metrics", Metrics)
METRICS_TOKEN = web.AppKey("metrics_token", MetricsToken)
NAMING = web.AppKey("naming", Naming)
UPSTREAM = web.AppKey("upstream", UpstreamClient)

REQUEST_ID = web.RequestKey("request_id", str)
LOGGED = web.RequestKey("logged", dict[str, str])
"""Further fields of the log line of a request."""
