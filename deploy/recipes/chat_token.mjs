// A token with which a page may chat for ten minutes, made by the site's own backend. Needs nothing but Node.
//
// Call `chatToken` where your site has already logged the user in, and return its text to the page. The secret is one
// of those in the broker's BROKER_JWT_SECRET.
//
//     CHAT_TOKEN_SECRET=… node chat_token.mjs USER [ORIGIN]    prints one, to try it

import { createHmac } from "node:crypto";
import { pathToFileURL } from "node:url";

const LIFETIME = 600; // seconds

const part = (value) => Buffer.from(JSON.stringify(value)).toString("base64url");

/**
 * Returns a token for a user of the site.
 * @param {string} user the id of the user; the broker counts and limits by it
 * @param {string} secret at least 32 random characters
 * @param {string} [origin] the origin of the site's pages, such as https://www.example.com; without one, any that the
 *   broker allows
 */
export function chatToken(user, secret, origin) {
  const now = Math.floor(Date.now() / 1000);
  const broker = {
    models: ["openai/gpt-*-mini", "rehearsal/*"],
    rate: "10/minute",
    streams: 2,
    max_output_tokens: 1000,
    daily_cost: "0.50", // USD
    ...(origin === undefined ? {} : { origins: [origin] }),
  };
  const signed = `${part({ alg: "HS256", typ: "JWT" })}.${part({ sub: user, iat: now, exp: now + LIFETIME, broker })}`;
  return `${signed}.${createHmac("sha256", secret).update(signed).digest("base64url")}`;
}

if (process.argv[1] && import.meta.url === pathToFileURL(process.argv[1]).href) {
  console.log(chatToken(process.argv[2], process.env.CHAT_TOKEN_SECRET, process.argv[3]));
}
