// A site with a login of its own, whose pages chat with a token for ten minutes. Needs nothing but Node.
//
//     CHAT_TOKEN_SECRET=… BROKER=https://broker.example PORT=8000 node server.mjs
//
// The broker has the same secret in BROKER_JWT_SECRET and this site's origin in BROKER_CORS_ORIGINS.

import { randomUUID } from "node:crypto";
import { readFileSync } from "node:fs";
import { createServer } from "node:http";
import { chatToken } from "../chat_token.mjs";

const { BROKER, CHAT_TOKEN_SECRET, PORT } = process.env;
const page = readFileSync(new URL("index.html", import.meta.url), "utf8").replace("https://broker.example", BROKER);

// Stands for the login that your site has already.
const users = new Map();

function userOf(request) {
  return users.get(/\bsession=([\w-]+)/.exec(request.headers.cookie ?? "")?.[1]);
}

const server = createServer((request, response) => {
  const user = userOf(request);
  if (request.method === "POST" && request.url === "/login") {
    const session = randomUUID();
    users.set(session, "ann");
    response.writeHead(204, { "Set-Cookie": `session=${session}; HttpOnly; SameSite=Lax; Path=/` }).end();
  } else if (request.method === "POST" && request.url === "/chat-token") {
    if (!user) return response.writeHead(401).end();
    const token = chatToken(user, CHAT_TOKEN_SECRET);
    response.writeHead(200, { "Content-Type": "text/plain", "Cache-Control": "no-store" }).end(token);
  } else if (request.url === "/") {
    response.writeHead(200, { "Content-Type": "text/html; charset=utf-8" }).end(page);
  } else response.writeHead(404).end();
});

server.listen(PORT, "127.0.0.1", () => console.log(`http://127.0.0.1:${server.address().port}`));
