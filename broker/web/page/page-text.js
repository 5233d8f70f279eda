// Text for figures and failures. Plain functions: no document, no network.

const TRY_LATER = "Try again in a moment.";
const OTHER_MODEL = "Choose another model, or try again later.";

const ADVICE = {
  unreachable: "Check your connection, then try again.",
  unauthorized: "Enter a key below, then try again.",
  origin_not_allowed: "Open this page at the address the broker was set up for.",
  host_not_allowed: "Open this page at the address the broker was set up for.",
  model_not_allowed: "Choose another model.",
  session_not_found: TRY_LATER,
  session_expired: "What is above was saved; ask again for the rest.",
  replay_gap: "What is above was saved; ask again for the rest.",
  body_too_large: "Shorten the message, or start a new chat.",
  prompt_too_long: "Shorten the message, start a new chat, or choose a model with a larger context.",
  rate_limited: "You have asked a lot in a short time.",
  budget_exceeded: "The budget starts again at midnight UTC. A cheaper model may still fit.",
  too_many_streams: "Let another answer end first.",
  internal_error: TRY_LATER,
  upstream_unauthorized: "Whoever runs this broker has to look at its key.",
  upstream_payment_required: "Whoever runs this broker has to add credit. A free model may still answer.",
  upstream_rate_limited: OTHER_MODEL,
  upstream_moderated: "Put it in other words, or choose another model.",
  upstream_rejected: "Change the message, or choose another model.",
  upstream_unavailable: OTHER_MODEL,
  upstream_timeout: OTHER_MODEL,
  upstream_interrupted: "Ask again to get a whole answer.",
  upstream_error: OTHER_MODEL,
  upstream_invalid: "Choose another model.",
  response_too_large: "Ask for a shorter answer.",
  deadline_exceeded: "Ask for a shorter answer, or choose a faster model.",
  abandoned: "Ask again to get a whole answer.",
  worker_lost: "Ask again to get a whole answer.",
  server_shutdown: "Ask again to get a whole answer.",
  store_unavailable: TRY_LATER,
  draining: TRY_LATER,
  overloaded: TRY_LATER,
  stop_unconfirmed: "Left alone, the answer ends by itself after a short while.",
};

const FINISH = {
  cancelled: "Stopped",
  length: "Cut off at the output limit",
  content_filter: "Held back by a content filter",
  tool_calls: "The model asks for a tool, which this page does not run",
};

/** Return advice on a problem; empty where nothing helps. */
export function advice({ code, retryAfter }) {
  const wait = retryAfter > 0 ? `Wait about ${duration(retryAfter * 1000)} first.` : "";
  return [ADVICE[code], wait].filter(Boolean).join(" ");
}

/** Return US dollars as a short text that is never rounded to zero: $0.0012, $1.25. */
export function money(usd) {
  if (usd === 0) return "$0";
  if (usd < 0.0000005) return "under $0.000001";
  const digits = usd >= 0.1 ? 2 : Math.min(6, 1 - Math.floor(Math.log10(usd)));
  return `$${usd.toFixed(digits)}`;
}

/** Return a price per million tokens from the upstream's decimal strings (USD per token); a negative one means unknown. */
export function price({ prompt, completion } = {}) {
  const [input, output] = [prompt, completion].map((text) => Number.parseFloat(text) * 1e6);
  if (!(input >= 0 && output >= 0)) return "price varies";
  return input === 0 && output === 0 ? "free" : `${perMillion(input)} in, ${perMillion(output)} out`;
}

function perMillion(usd) {
  return `$${usd.toFixed(usd >= 0.1 || usd === 0 ? 2 : 3)}`;
}

/** Return a short number: 131072 → 131K, 1048576 → 1M. */
export function context(tokens) {
  if (!tokens) return "";
  return tokens >= 1e6 ? `${+(tokens / 1e6).toFixed(1)}M context` : `${Math.round(tokens / 1e3)}K context`;
}

export function duration(ms) {
  if (ms < 60_000) return `${+(ms / 1000).toFixed(ms < 10_000 ? 1 : 0)} s`;
  return `${Math.round(ms / 60_000)} min`;
}

const count = (tokens) => tokens.toLocaleString("en-US");

/** Return the facts of an answer: how it ended where that is not obvious, its cost, tokens, time and model. */
export function account({ result, dropped, model }) {
  const { finishReason, usage, cost, estimated, totalMs } = result;
  const about = estimated ? "about " : "";
  return [
    FINISH[finishReason],
    cost == null ? "cost unknown" : about + money(cost),
    usage && `${count(usage.prompt_tokens ?? 0)} tokens in, ${count(usage.completion_tokens ?? 0)} out`,
    totalMs != null && duration(totalMs),
    result.model ?? model,
    dropped > 0 && `${dropped} older ${dropped === 1 ? "message" : "messages"} left out`,
  ].filter(Boolean).join(" · ");
}

/** Return the total of a conversation; empty before the first answer. */
export function total(turns) {
  const results = turns.map((turn) => turn.result).filter(Boolean);
  if (!results.length) return "";
  const cost = results.reduce((sum, result) => sum + (result.cost ?? 0), 0);
  const tokens = results.reduce((sum, { usage }) => sum + (usage?.total_tokens ?? 0), 0);
  const unsure = results.some((result) => result.cost == null || result.estimated);
  return `${unsure ? "about " : ""}${money(cost)} · ${count(tokens)} tokens`;
}
