// Figures as short texts. Plain functions: no document, no network.

import { FIGURES, LANGUAGE } from "./sentences.js";

/** Return US dollars as a short text that is never rounded to zero: $0.0012, $1.25. */
export function money(usd) {
  if (usd === 0) return "$0";
  if (usd < 0.0000005) return FIGURES.under("$0.000001");
  const digits = usd >= 0.1 ? 2 : Math.min(6, 1 - Math.floor(Math.log10(usd)));
  return `$${usd.toFixed(digits)}`;
}

export const count = (number) => number.toLocaleString(LANGUAGE);

export function duration(ms) {
  if (ms < 60_000) return FIGURES.seconds(+(ms / 1000).toFixed(ms < 10_000 ? 1 : 0));
  return FIGURES.minutes(Math.round(ms / 60_000));
}

/** Return a short number: 131072 → 131K, 1048576 → 1M. */
export function short(tokens) {
  return tokens >= 1e6 ? `${+(tokens / 1e6).toFixed(1)}M` : tokens >= 1e4 ? `${Math.round(tokens / 1e3)}K` : count(tokens);
}

/** Return USD per token of the prompt and of the answer; null where it is unknown. The list has decimal strings. */
export function prices({ pricing } = {}) {
  const [input, output] = [pricing?.prompt, pricing?.completion].map(Number.parseFloat);
  return input >= 0 && output >= 0 ? { input, output } : null; // a negative price means unknown
}

export const isFree = (model) => {
  const known = prices(model);
  return known !== null && known.input === 0 && known.output === 0;
};

export function price(model) {
  const known = prices(model);
  if (!known) return FIGURES.priceVaries;
  return isFree(model) ? FIGURES.free : FIGURES.price(perMillion(known.input), perMillion(known.output));
}

function perMillion(usd) {
  const million = usd * 1e6;
  return `$${million.toFixed(million >= 0.1 || million === 0 ? 2 : 3)}`;
}

/** Return what an answer used: `{cost, input, output, first, speed, unsure}`, from its end or, without one, from its text. */
export function used(answer, model) {
  const { result } = answer;
  const reported = result?.usage;
  const input = reported?.prompt_tokens ?? null;
  const output = reported?.completion_tokens ?? null;
  const writingMs = result?.totalMs != null && result.ttftMs != null ? result.totalMs - result.ttftMs : answer.endedAt - answer.firstAt;
  const figures = { cost: result?.cost ?? null, input, output, first: result?.ttftMs ?? (answer.firstAt ? answer.firstAt - answer.at : null), unsure: Boolean(result?.estimated) };
  if (output === null) {
    const { cost, ...tokens } = guess(answer, model);
    Object.assign(figures, tokens, { cost: figures.cost ?? cost ?? null });
  }
  const speed = (figures.output ?? 0) / (writingMs / 1000);
  return { ...figures, speed: writingMs > 200 && speed > 0 ? Math.round(speed) : null };
}

/** A stop that only this page knows of and an error say nothing of cost: an estimate, at four bytes a token. */
function guess(answer, model) {
  const written = answer.text.length - (answer.from ?? 0) + answer.reasoning.length;
  if (!written) return {};
  const input = Math.ceil((answer.sent ?? 0) / 4);
  const output = Math.ceil(written / 4);
  const known = prices(model);
  return { input, output, cost: known && input * known.input + output * known.output, unsure: true };
}

export function account(answer, model) {
  const { cost, input, output, first, speed, unsure } = used(answer, model);
  if (cost === null && output === null && !answer.result) return "";
  const paid = cost === null ? FIGURES.costUnknown : money(cost);
  return [
    unsure && cost !== null ? FIGURES.about(paid) : paid,
    output !== null && FIGURES.tokens(count(input ?? 0), count(output)),
    first !== null && FIGURES.firstWord(duration(first)),
    speed !== null && FIGURES.speed(count(speed)),
  ].filter(Boolean).join(" · ");
}

/** Return the total of a conversation, as cost and tokens; nothing before the first end. */
export function total(answers, modelOf) {
  const all = answers.filter((answer) => answer.result || answer.problem).map((answer) => used(answer, modelOf(answer.model)));
  const known = all.filter(({ cost, output }) => cost !== null || output !== null);
  if (!known.length) return null;
  const cost = known.reduce((sum, each) => sum + (each.cost ?? 0), 0);
  const tokens = known.reduce((sum, each) => sum + (each.input ?? 0) + (each.output ?? 0), 0);
  const unsure = known.some((each) => each.unsure || each.cost === null);
  return { cost: unsure ? FIGURES.about(money(cost)) : money(cost), tokens: FIGURES.totalTokens(count(tokens)) };
}
